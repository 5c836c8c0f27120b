"""Rebuild the embedded digits, repvgg/data/digits.safetensors, from scikit-learn.

    pip install scikit-learn && python scripts/make_digits.py [PATH]

The images keep their original values, 0 to 16, and their order. The file's metadata holds source
and licence. The file is identical to the byte for every release of scikit-learn with these images.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

ABOUT = {
    "title": "Optical Recognition of Handwritten Digits: the 1,797 images of the test set",
    "authors": "E. Alpaydin and C. Kaynak, 1998",
    "source": "UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, "
    "as carried by scikit-learn (sklearn.datasets.load_digits)",
    "licence": "CC BY 4.0, https://creativecommons.org/licenses/by/4.0/",
    "changes": "stored as uint8 tensors, values and order unchanged",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[1] / "repvgg" / "data" / "digits.safetensors"
    parser.add_argument("path", nargs="?", type=Path, default=default)
    path = parser.parse_args().path
    digits = load_digits()
    tensors = {
        "images": torch.from_numpy(digits.images).to(torch.uint8),  # (1797, 8, 8)
        "labels": torch.from_numpy(digits.target).to(torch.uint8),  # (1797,)
    }
    # One entry, because safetensors writes several in random order.
    save_file(tensors, path, metadata={"about": json.dumps(ABOUT)})
    print(f"{path}: {len(tensors['images'])} images, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
