"""The data sets by name whose images live in memory: digits, CIFAR-10, CIFAR-100.

They are uint8 and are augmented by the batch.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict, Unpack

import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms import v2

from repvgg.checks import ArgumentError, check_boolean, check_integer, check_number
from repvgg.contract import DataContract, to_float
from repvgg.data.augment import by_batch, random_affine
from repvgg.data.batches import AnyAugmentation, Source, Stored
from repvgg.data.cache import cached, fingerprint
from repvgg.data.memory import keep, statistics
from repvgg.data.module import ImageData
from repvgg.data.scan import check_name, has_part, read_parts
from repvgg.data.split import hold_out

BATCH_SIZE = 64  # by default


class Options(TypedDict, total=False):
    """Arguments of `ImageData` with a default, which every data set takes."""

    mixup: float
    cutmix: float
    seed: int


class BatchOptions(Options):
    """The same, and the size of a batch."""

    batch_size: int


class CifarOptions(BatchOptions, total=False):
    """Arguments of CIFAR beside its folder."""

    augment: Sequence[v2.Transform] | None
    padding: int
    holdout: float
    num_workers: int | None
    cache: bool


class Found(NamedTuple):
    """The images of a data set.

    Attributes:
        sources: by part: train, val and, if there is one, test.
        origins, notes: as in `ImageData`.
    """

    sources: Mapping[str, Source]
    classes: list[str]
    origins: Mapping[str, str]
    notes: Sequence[str] = ()


def digits(
    *, batch_size: int = 64, augment: float | None = 1.0, **options: Unpack[Options]
) -> ImageData:
    """The 1,797 handwritten digits of the UCI set, 8x8 pixels, one channel; inside the package.

    E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, 1998, CC BY 4.0,
    https://doi.org/10.24432/C50P49. Of every seven images in the file's order the first validates,
    the second tests and five train: 257, 257 and 1,283, the same for every seed. Each digit is 7 to
    13 % of each part.

    Args:
        batch_size: images in a batch.
        augment: strength of `random_affine` on the training images; 0 and None are off.
        options: mixup, cutmix and seed, of `ImageData`.

    Raises:
        ValueError: a value is outside its range.
    """
    strength = check_number("augment", 0 if augment is None else augment, example=1.0)
    content = load_file(Path(__file__).with_name("digits.safetensors"))
    images = content["images"].float().mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = content["labels"].long()
    part = torch.arange(len(images)) % 7  # 7 and the period of the labels, 10, are coprime
    train, val, test = (
        Stored(images[rows], labels[rows]) for rows in (part > 1, part == 0, part == 1)
    )
    pixels = to_float(train.images)
    contract = DataContract(
        classes=[str(digit) for digit in range(10)],
        in_channels=1,
        image_size=(8, 8),
        mean=(pixels.mean().item(),),
        std=(pixels.std().item(),),
        interpolation="bilinear",
    )
    return ImageData(
        train,
        val,
        test,
        contract,
        batch_size=batch_size,
        augment=functools.partial(random_affine, strength=strength) if strength > 0 else None,
        **options,
    )


def cifar10(*, root: str, **options: Unpack[CifarOptions]) -> ImageData:
    """CIFAR-10: 60,000 photographs of 32x32 pixels in ten classes (A. Krizhevsky, 2009).

    See `cifar100` for the arguments.
    """
    return _cifar("CIFAR10", root, **options)


def cifar100(*, root: str, **options: Unpack[CifarOptions]) -> ImageData:
    """CIFAR-100: 60,000 photographs of 32x32 pixels in a hundred classes (A. Krizhevsky, 2009).

    Args:
        root: a folder with train/ and test/, one folder of images for each class in both, and val/
            if there is one. Or a folder for the original files, which are downloaded if they are
            missing, and checked.
        options: augment, the transforms, and padding, of `data.augment.by_batch`; holdout, the
            share of the training images, by class, that validates if val/ is missing; num_workers,
            processes that decode a folder of images; cache, which keeps the decoded images for the
            next start; batch_size, mixup, cutmix and seed, of `ImageData`.

    Raises:
        ValueError: a value is outside its range, or the data cannot be read.
        OSError: it cannot be downloaded.
    """
    return _cifar("CIFAR100", root, **options)


def image_data(
    found: Found,
    contract: DataContract,
    augment: AnyAugmentation | None,
    options: BatchOptions,
) -> ImageData:
    complete: BatchOptions = {"batch_size": BATCH_SIZE, **options}
    return ImageData(
        found.sources["train"],
        found.sources["val"],
        found.sources.get("test"),
        contract,
        augment=augment,
        origins=found.origins,
        notes=found.notes,
        **complete,
    )


def _cifar(
    name: str,
    root: str,
    *,
    augment: Sequence[v2.Transform] | None = (),
    padding: int = 4,
    holdout: float = 0.02,
    num_workers: int | None = None,
    cache: bool = True,
    **options: Unpack[BatchOptions],
) -> ImageData:
    """CIFAR from the original files or from a folder of images; see `cifar100`."""
    check_integer("padding", padding, minimum=0, maximum=16, example=4)
    check_boolean("cache", cache)
    transform = by_batch(augment, padding=padding, size=32)
    folder = Path(root).expanduser()
    check_name(folder)
    if has_part(folder, "train"):
        parts = read_parts(folder, holdout)
        kept = keep(folder, parts, (32, 32), cache=cache, num_workers=count_workers(num_workers))
        found = Found(kept.sources, parts.classes, parts.origins, [*parts.notes, *kept.notes])
        mean, std = kept.mean, kept.std
    else:
        found = _read_cifar(name, folder, holdout)
        mean, std = _statistics(name, found, folder, cache)
    contract = DataContract(
        classes=found.classes,
        in_channels=3,
        image_size=(32, 32),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        interpolation="bilinear",
    )
    return image_data(found, contract, transform, options)


def _statistics(name: str, found: Found, folder: Path, cache: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the original files, which take longer than reading them."""
    train = found.sources["train"]
    assert isinstance(train, Stored)
    if not cache:
        made = statistics(train.images)
    else:
        files = sorted(path for path in folder.glob("cifar-*/*") if path.is_file())
        key = fingerprint(folder, {name: (files, train.labels)})
        made, _ = cached(folder, f"{name}-statistics", key, lambda: statistics(train.images))
    return made["mean"], made["std"]


def _read_cifar(name: str, folder: Path, holdout: float) -> Found:
    """The original files, downloaded by torchvision if they are missing, and checked."""
    from filelock import FileLock
    from torchvision import datasets

    kind = {"CIFAR10": datasets.CIFAR10, "CIFAR100": datasets.CIFAR100}[name]

    def opened(download: bool) -> list[datasets.CIFAR10]:
        return [kind(str(folder), train=train, download=download) for train in (True, False)]

    try:
        try:
            parts = opened(False)
        except RuntimeError:  # not there
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):  # one process of several downloads
                parts = opened(True)
    except (OSError, RuntimeError) as error:
        raise ArgumentError(
            f"root={folder}: holds neither train/ and test/ nor the files of {name}, and they "
            f"cannot be downloaded ({error}); pass a folder that has them",
            "root",
        ) from error
    whole, test = (
        Stored(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)
        )
        for part in parts
    )
    kept, held = hold_out(whole.labels, holdout)
    train, val = (Stored(whole.images[rows], whole.labels[rows]) for rows in (kept, held))
    return Found(
        {"train": train, "val": val, "test": test},
        list(parts[0].classes),
        {"val": "held out of the training images"},
    )


def count_workers(given: int | None) -> int:
    if given is not None:
        return check_integer("num_workers", given, minimum=0, example=4)
    try:
        count = len(os.sched_getaffinity(0))  # Linux: the CPUs of this process
    except AttributeError:
        count = os.cpu_count() or 1
    return min(8, count)
