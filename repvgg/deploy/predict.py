"""Labels for images, by a deployed file."""

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from repvgg.contract import DataContract, to_float
from repvgg.data.images import fit, open_image, to_tensor
from repvgg.export.formats import open_artifact


def label(images: Path, model: Path, *, batch_size: int) -> Iterator[tuple[Path, str, float]]:
    """Label images: path, class and its probability.

    Args:
        images: an image, or a folder that is searched.
        model: a deployed file.

    Raises:
        ValueError: there is no image, the file is not a deployed one, or an image is unreadable.
    """
    paths = find(images)
    predict = open_artifact(model)
    contract = predict.description.data
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        scores = predict(torch.stack([read(path, contract) for path in batch]))
        if predict.description.output == "logits":
            scores = scores.softmax(1)
        best = scores.max(1)
        for path, value, index in zip(batch, best.values, best.indices, strict=True):
            yield path, contract.classes[int(index)], float(value)


def find(place: Path) -> list[Path]:
    """Images below a folder, in order, or the one image.

    Raises:
        ValueError: there is none.
    """
    known = Image.registered_extensions()
    found = [place] if place.is_file() else sorted(place.rglob("*"))
    images = [path for path in found if path.is_file() and path.suffix.lower() in known]
    if not images:
        raise ValueError(f"images={place}: there is no image; known are .png, .jpg and others")
    return images


def read(path: Path, contract: DataContract) -> Tensor:
    """Read an image with the preprocessing of the network: (C, H, W), float32 in [0, 1].

    Raises:
        ValueError: the file cannot be read, or the range of its pixels is unknown.
    """
    height, width = contract.image_size
    image = fit(
        open_image(path, contract.in_channels),
        (height, width),
        interpolation=contract.interpolation,
        resize=contract.resize_size,
    )
    return to_float(to_tensor(image))
