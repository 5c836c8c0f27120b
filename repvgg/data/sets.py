"""The data sets: the images that a run trains, validates and tests on, and their description.

Small sets live in memory as uint8 and are augmented by the batch. Large ones are read from files by
worker processes.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict, Unpack

import torch
from safetensors.torch import load_file
from torchvision.transforms import v2

from repvgg.checks import ArgumentError, check_boolean, check_integer, check_number, wrong_value
from repvgg.contract import DataContract, to_float
from repvgg.data.augment import by_batch, by_image, random_affine
from repvgg.data.batches import AnyAugmentation, Source, Stored
from repvgg.data.files import Files, Reading, Shards, has_shards, read_contents, store
from repvgg.data.images import MOST_PIXELS, fit
from repvgg.data.module import ImageData
from repvgg.data.scan import check_name, has_part, hold_out, read_parts

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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


class Found(NamedTuple):
    """The contents of a folder.

    Attributes:
        sources: by part: train, val and, if there is one, test.
        origins, notes: as in `ImageData`.
    """

    sources: Mapping[str, Source]
    classes: list[str]
    origins: Mapping[str, str]
    notes: Sequence[str] = ()


def open_data(config: Mapping[str, object], **options: object) -> ImageData:
    """Open the data that a configuration names under `_target_`, with the arguments beside it.

    Args:
        options: further arguments, such as those of `ImageData`.

    Raises:
        ValueError: the function returns something else, or raises its own error.
    """
    from hydra.utils import instantiate

    data = instantiate(config, **options, _convert_="all")
    if not isinstance(data, ImageData):
        raise ValueError(
            f"{config['_target_']}: returns a {type(data).__name__}, not a "
            "repvgg.data.module.ImageData, which describes the images. Any other "
            "LightningDataModule trains with training.classifier.Classifier in your own Trainer"
        )
    return data


def digits(*, batch_size: int = 64, augment: float = 1.0, **options: Unpack[Options]) -> ImageData:
    """The 1,797 handwritten digits of the UCI set, 8x8 pixels, one channel; inside the package.

    E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, 1998, CC BY 4.0,
    https://doi.org/10.24432/C50P49. Of every seven images in the file's order the first validates,
    the second tests and five train: 257, 257 and 1,283, the same for every seed. Each digit is 7 to
    13 % of each part.

    Args:
        batch_size: images in a batch.
        augment: strength of `random_affine` on the training images; 0 is off.
        options: mixup, cutmix and seed, of `ImageData`.

    Raises:
        ValueError: a value is outside its range.
    """
    check_number("augment", augment, example=1.0)
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
        augment=functools.partial(random_affine, strength=augment) if augment > 0 else None,
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
            processes that decode a folder of images; batch_size, mixup, cutmix and seed, of
            `ImageData`.

    Raises:
        ValueError: a value is outside its range, or the data cannot be read.
        OSError: it cannot be downloaded.
    """
    return _cifar("CIFAR100", root, **options)


def imagefolder(
    *,
    root: str | None,
    image_size: int = 224,
    eval_size: int | None = None,
    resize_size: int | None = 256,
    interpolation: str = "bilinear",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    augment: Sequence[v2.Transform] | None = (),
    num_workers: int | None = None,
    skip_unreadable: bool = False,
    max_pixels: int | None = None,
    in_memory: bool = False,
    holdout: float = 0.05,
    cache_size: str = "100GB",
    **options: Unpack[BatchOptions],
) -> ImageData:
    """Any folder of images, ImageNet too: train/, val/ and test/, each with one folder a class.

    Without val/ (or valid/, validation/), some training images validate. Without test/, the
    validation images test. A folder of classes without train/ is training images. A file counts as
    an image by its extension; see `repvgg.data.scan`.

    Args:
        root: the folder; or its shards by `scripts/write_shards.py`, also as s3://... or gs://...
        image_size: height and width in pixels in training.
        eval_size: those in evaluation; None takes `image_size`.
        resize_size: length of the shorter side before the centre crop, in evaluation; None scales
            as little as covers the size.
        interpolation: "bilinear" or "bicubic".
        mean, std: by channel, of images in [0, 1].
        augment: transforms of the training images: see `repvgg.data.augment.by_image`.
        num_workers: processes that decode; None takes one for each CPU, at most 8.
        skip_unreadable: replace an image that cannot be read by another one, and leave out files
            of formats that cannot be read here.
        max_pixels: a larger image is an error; None takes 178,956,970, Pillow's limit.
        in_memory: decode all images once, scaled to `image_size`: for small ones. They are
            augmented by the batch: see `repvgg.data.augment.by_batch`.
        holdout: share of the training images, by class, that validates if val/ is missing.
        cache_size: disk space for fetched shards.
        options: batch_size, mixup, cutmix and seed, of `ImageData`.

    Raises:
        ValueError: a value is outside its range, or the folders are not as described.
    """
    check_integer("image_size", image_size, minimum=8, example=224)
    size = check_integer("eval_size", eval_size or image_size, minimum=8, example=224)
    if resize_size is not None:
        check_integer("resize_size", resize_size, minimum=size, example=256)
    if interpolation not in ("bilinear", "bicubic"):
        allowed = "must be bilinear or bicubic"
        raise wrong_value("interpolation", interpolation, allowed, "bilinear")
    check_boolean("skip_unreadable", skip_unreadable)
    check_boolean("in_memory", in_memory)
    if root is None:
        raise ArgumentError("root is missing: pass root=FOLDER, with train/ and val/", "root")
    root = root if "://" in root else str(Path(root).expanduser())
    check_name(root)
    if max_pixels is None:
        max_pixels = MOST_PIXELS
    check_integer("max_pixels", max_pixels, minimum=1, example=MOST_PIXELS)
    check_number("holdout", holdout, below=1, example=0.05)
    reading = Reading(
        evaluate=functools.partial(
            fit, size=(size, size), interpolation=interpolation, resize=resize_size
        ),
        num_workers=_count_workers(num_workers),
        skip_unreadable=skip_unreadable,
        max_pixels=max_pixels,
    )
    whole = (image_size, image_size)
    transform: AnyAugmentation | None
    if in_memory:
        if has_shards(root) or size != image_size:
            raise wrong_value("in_memory", True, "is for folders and one size of images", "false")
        found = _read_into_memory(
            root, holdout, whole, reading["num_workers"], max_pixels, skip_unreadable
        )
        transform = by_batch(augment, padding=image_size // 8, size=image_size)
    else:
        found = (
            _read_shards(root, cache_size, reading)
            if has_shards(root)
            else _read_folder(root, holdout, reading)
        )
        transform = by_image(augment, size=whole, interpolation=interpolation)
    contract = DataContract(
        classes=found.classes,
        in_channels=3,
        image_size=(size, size),
        mean=tuple(mean),
        std=tuple(std),
        interpolation=interpolation,
        resize_size=None if in_memory else resize_size,
    )
    return _image_data(found, contract, transform, options)


def _read_folder(root: str, holdout: float, reading: Reading) -> Found:
    parts = read_parts(Path(root), holdout, skip_unreadable=reading["skip_unreadable"])
    sources = {part: Files(*files, **reading) for part, files in parts.files.items()}
    return Found(sources, parts.classes, parts.origins, parts.notes)


def _read_into_memory(
    root: str | Path,
    holdout: float,
    size: tuple[int, int],
    num_workers: int,
    max_pixels: int = MOST_PIXELS,
    skip_unreadable: bool = False,
) -> Found:
    parts = read_parts(Path(root), holdout, skip_unreadable=skip_unreadable)
    sources = {
        part: store(*files, size, num_workers=num_workers, max_pixels=max_pixels)
        for part, files in parts.files.items()
    }
    return Found(sources, parts.classes, parts.origins, parts.notes)


def _read_shards(root: str, cache_size: str, reading: Reading) -> Found:
    contents = read_contents(root)
    shards = {
        part: Shards(
            f"{root}/{part}",
            torch.tensor(labels),
            shard_size=contents["shard_size"],
            cache_size=cache_size,
            **reading,
        )
        for part, labels in contents["labels"].items()
    }
    return Found(shards, contents["classes"], {part: f"shards in {part}/" for part in shards})


def _image_data(
    found: Found,
    contract: DataContract,
    augment: AnyAugmentation | None,
    options: BatchOptions,
) -> ImageData:
    return ImageData(
        found.sources["train"],
        found.sources["val"],
        found.sources.get("test"),
        contract,
        augment=augment,
        origins=found.origins,
        notes=found.notes,
        **options,
    )


def _cifar(
    name: str,
    root: str,
    *,
    augment: Sequence[v2.Transform] | None = (),
    padding: int = 4,
    holdout: float = 0.02,
    num_workers: int | None = None,
    **options: Unpack[BatchOptions],
) -> ImageData:
    """CIFAR from the original files or from a folder of images; see `cifar100`."""
    check_integer("padding", padding, minimum=0, maximum=16, example=4)
    transform = by_batch(augment, padding=padding, size=32)
    folder = Path(root).expanduser()
    check_name(folder)
    if has_part(folder, "train"):
        found = _read_into_memory(folder, holdout, (32, 32), _count_workers(num_workers))
    else:
        found = _read_cifar(name, folder, holdout)
    train = found.sources["train"]
    assert isinstance(train, Stored)
    pixels = to_float(train.images)
    contract = DataContract(
        classes=found.classes,
        in_channels=3,
        image_size=(32, 32),
        mean=tuple(pixels.mean((0, 2, 3)).tolist()),
        std=tuple(pixels.std((0, 2, 3)).tolist()),
        interpolation="bilinear",
    )
    return _image_data(found, contract, transform, options)


def _read_cifar(name: str, folder: Path, holdout: float) -> Found:
    """The original files, downloaded by torchvision if they are missing, and checked."""
    from filelock import FileLock
    from torchvision import datasets

    kind = {"CIFAR10": datasets.CIFAR10, "CIFAR100": datasets.CIFAR100}[name]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock"):  # one process of several downloads
            parts = [kind(str(folder), train=train, download=True) for train in (True, False)]
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


def _count_workers(given: int | None) -> int:
    if given is not None:
        return check_integer("num_workers", given, minimum=0, example=4)
    try:
        count = len(os.sched_getaffinity(0))  # Linux: the CPUs of this process
    except AttributeError:
        count = os.cpu_count() or 1
    return min(8, count)
