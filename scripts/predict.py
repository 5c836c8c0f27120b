"""Label images with a deployed file: python scripts/predict.py model=model.onnx images=FOLDER

Everything else is in the file's metadata: channels, size, interpolation, normalization, classes.
An image of another size is resized by its shorter side and cropped at the centre. Prints a line for
every image: its name, the label and how sure the network is.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from repvgg import cli
from repvgg.arguments import check_integer
from repvgg.export import open_artifact
from repvgg.model import DataContract

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
    height, width = contract.image_size
    mode = {1: "L", 3: "RGB"}.get(contract.in_channels)
    if mode is None:
        raise ValueError(f"the network takes {contract.in_channels} channels, files have 1 or 3")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"{path}: pixels of mode {image.mode} have no known scale; save 8 bits")
    if image.has_transparency_data:
        raise ValueError(f"{path}: it is transparent, on an unknown background; save it without")
    image = image.convert(mode)
    if image.size != (width, height):
        scale = max(width / image.width, height / image.height)
        size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = image.resize(size, Image.Resampling[contract.interpolation.upper()])
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(image)).reshape(height, width, contract.in_channels)
    return pixels.permute(2, 0, 1).float() / 255


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
