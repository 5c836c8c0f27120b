"""Label images with a deployed file: python scripts/predict.py model=model.onnx images=FOLDER

Everything else is in the file's metadata: channels, size, interpolation, normalization, classes.
An image of another size is resized by its shorter side and cropped at the centre. Prints a line for
every image: its name, the label and how sure the network is.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from repvgg import cli
from repvgg.checks import check_integer
from repvgg.contract import DataContract, to_float
from repvgg.data.images import fit, open_image, to_tensor
from repvgg.export.formats import open_artifact

DEFAULTS: dict[str, Any] = {"model": None, "images": None, "batch_size": 32}


def main(settings: dict[str, Any]) -> None:
    for key in ("model", "images"):
        if settings[key] is None:
            raise ValueError(f"{key} is missing: type {key}=PATH")
    size = check_integer("batch_size", settings["batch_size"], minimum=1, example=32)
    paths = list(find(Path(settings["images"])))
    predict = open_artifact(Path(settings["model"]))
    contract = predict.description.data
    for start in range(0, len(paths), size):
        batch = paths[start : start + size]
        scores = predict(torch.stack([read(path, contract) for path in batch]))
        if predict.description.output == "logits":
            scores = scores.softmax(1)
        for path, (share, label) in zip(batch, zip(*scores.max(1), strict=True), strict=True):
            print(f"{path}\t{contract.classes[label]}\t{share:.4f}")


def find(place: Path) -> Iterator[Path]:
    """Images below a folder, in order, or the one image.

    Raises:
        ValueError: there is none.
    """
    known = Image.registered_extensions()
    found = [place] if place.is_file() else sorted(place.rglob("*"))
    images = [path for path in found if path.is_file() and path.suffix.lower() in known]
    if not images:
        raise ValueError(f"images={place}: there is no image; known are .png, .jpg and others")
    return iter(images)


def read(path: Path, contract: DataContract) -> Tensor:
    """Read an image as the network was trained to see it: (C, H, W), float32 in [0, 1].

    Raises:
        ValueError: the file cannot be read, or nothing says how bright its pixels are.
    """
    image = fit(
        open_image(path, contract.in_channels),
        tuple(contract.image_size),
        interpolation=contract.interpolation,
        resize=contract.resize_size,
    )
    return to_float(to_tensor(image))


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
