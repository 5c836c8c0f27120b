"""Images in files as tensors in memory: decoded once, then read from a cache on disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from repvgg.contract import to_float
from repvgg.data.batches import Request, Source, Stored
from repvgg.data.cache import LEAST, Tensors, cached, fingerprint
from repvgg.data.files import CHUNK, Decoding, store
from repvgg.data.split import Parts


class Kept(NamedTuple):
    """The images of all parts in memory.

    Attributes:
        sources: by part.
        mean, std: (C,), of the training images in [0, 1].
        notes: lines for the reader.
    """

    sources: Mapping[str, Stored]
    mean: Tensor
    std: Tensor
    notes: list[str]


def keep(
    root: Path,
    parts: Parts,
    size: tuple[int, int],
    *,
    interpolation: str = "bilinear",
    cache: bool,
    **options: Unpack[Decoding],
) -> Kept:
    """Decode all images into memory, scaled and cropped to one size.

    Args:
        root: the folder of the data.
        cache: keeps them on disk, for the next start.
        options: num_workers, max_pixels and channels, of `data.files.Files`.

    Raises:
        ValueError: images cannot be read; the message counts them and names the first.
    """

    def decode() -> Tensors:
        images = {
            part: store(*files, size, interpolation=interpolation, **options).images
            for part, files in parts.files.items()
        }
        return images | statistics(images["train"])

    channels = options.get("channels", 3)
    count = sum(len(paths) for paths, _ in parts.files.values())
    if cache and count >= LEAST:
        name = f"{size[0]}x{size[1]}x{channels}"
        key = fingerprint(
            root,
            parts.files,
            size=size,
            channels=channels,
            interpolation=interpolation,
            max_pixels=options.get("max_pixels"),
        )
        found, note = cached(root, name, key, decode)
    else:
        found, note = decode(), ""
    sources = {part: Stored(found[part], labels) for part, (_, labels) in parts.files.items()}
    return Kept(sources, found["mean"], found["std"], [note] if note else [])


class Measured(NamedTuple):
    """Mean and standard deviation by channel, of images in [0, 1], and how they were measured."""

    mean: list[float]
    std: list[float]
    note: str


def measure(train: Source) -> Measured:
    """Measure the training images: all in memory, at most 2,048 in files, evenly spread."""
    count = len(train.labels)
    if isinstance(train, Stored):
        images = train.images
    else:
        rows = torch.arange(min(count, 2048)) * count // min(count, 2048)
        requests = [Request(part) for part in torch.split(rows, CHUNK)]
        images = torch.cat([images for images, _ in train.read(requests, None)])
    found = statistics(images)
    of = "the training images" if len(images) == count else f"{len(images):,} training images"
    mean, std = found["mean"].tolist(), found["std"].tolist()
    numbers = "; ".join(" ".join(f"{value:.4f}" for value in values) for values in (mean, std))
    if not all(std):
        raise ValueError(f"std: {of} are of one colour in a channel ({numbers}); pass mean and std")
    return Measured(mean, std, f"mean and standard deviation of {of}: {numbers}")


def statistics(images: Tensor) -> Tensors:
    """Mean and standard deviation by channel of images (N, C, H, W), uint8, scaled to [0, 1]."""
    if images.numel() > MOST_AS_FLOATS:
        return _from_counts(images)
    pixels = to_float(images)
    return {"mean": pixels.mean((0, 2, 3)), "std": pixels.std((0, 2, 3))}


MOST_AS_FLOATS = 2**28  # pixels, 1 GiB in float32; CIFAR has fewer


def _from_counts(images: Tensor) -> Tensors:
    """The same, to rounding, without a copy of the images."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = torch.zeros(256, dtype=torch.float64)
        for part in torch.split(images[:, channel], 4096):
            counts += part.reshape(-1).int().bincount(minlength=256)
        mean = (counts * values).sum() / counts.sum()
        square = (counts * (values - mean) ** 2).sum() / (counts.sum() - 1)
        means.append(mean)
        deviations.append(square.sqrt())
    return {"mean": torch.stack(means).float(), "std": torch.stack(deviations).float()}
