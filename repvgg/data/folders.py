"""Data sets of image files: folders of classes, their shards, or tables of paths and labels."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Unpack

import torch
from torchvision.transforms import v2

from repvgg.checks import ArgumentError, check_boolean, check_integer, check_number, wrong_value
from repvgg.contract import DataContract
from repvgg.data.augment import by_batch, by_image
from repvgg.data.batches import AnyAugmentation, Source
from repvgg.data.files import Files, Reading
from repvgg.data.images import MODES, MOST_PIXELS, fit
from repvgg.data.memory import keep, measure
from repvgg.data.module import ImageData
from repvgg.data.scan import check_name, read_parts
from repvgg.data.sets import BatchOptions, Found, count_workers, image_data
from repvgg.data.shards import Shards, has_shards, read_contents
from repvgg.data.split import Parts
from repvgg.data.table import read_tables

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FileOptions(BatchOptions, total=False):
    """Arguments of every data set of image files; see `imagefolder`."""

    image_size: int
    eval_size: int | None
    resize_size: int | None
    interpolation: str
    in_channels: int
    mean: Sequence[float] | None
    std: Sequence[float] | None
    augment: Sequence[v2.Transform] | None
    flip: bool
    num_workers: int | None
    skip_unreadable: bool
    max_pixels: int | None
    in_memory: bool
    cache: bool
    holdout: float


def imagefolder(
    *, root: str | None, cache_size: str = "100GB", **options: Unpack[FileOptions]
) -> ImageData:
    """Any folder of images, ImageNet too: train/, val/ and test/, each with one folder a class.

    Without val/ (or valid/, validation/), some training images validate. Without test/, the
    validation images test. A folder of classes without train/ is training images. A file counts as
    an image by its extension; see `repvgg.data.scan`.

    Args:
        root: the folder; or its shards by `scripts/write_shards.py`, also as s3://... or gs://...
        cache_size: disk space for shards that were fetched, as in "100GB".
        options: those below, and batch_size, mixup, cutmix and seed, of `ImageData`.

    Keyword Args:
        image_size: height and width in pixels in training.
        eval_size: those in evaluation; None takes `image_size`.
        resize_size: length of the shorter side before the centre crop, in evaluation; None scales
            as little as covers the size.
        interpolation: "bilinear" or "bicubic".
        in_channels: 3, or 1 for greyscale.
        mean, std: by channel, of images in [0, 1]; None takes ImageNet's for 3 channels, and
            measures them on training images for 1.
        augment: transforms of the training images: see `repvgg.data.augment.by_image`.
        flip: False does not flip training images, as for digits and letters.
        num_workers: processes that decode; None is one for each CPU, at most 8.
        skip_unreadable: another image replaces a damaged one.
        max_pixels: a larger image is an error; None is Pillow's limit.
        in_memory: decodes all images once and keeps them; for small images.
        cache: keeps the decoded images on disk too, for the next start.
        holdout: share of the training images, by class, that validates if val/ is missing.

    Raises:
        ValueError: a value is outside its range, or the folders are not as described.
    """
    if root is None:
        raise ArgumentError(
            "root is missing: pass root=FOLDER, with a folder for each class", "root"
        )
    shards = None
    if has_shards(root):
        root = root if "://" in root else str(Path(root).expanduser())
        shards = functools.partial(_read_shards, root, cache_size)
    return _image_files(root, read_parts, shards=shards, **options)


def csv(
    *,
    root: str | None,
    train: str | None,
    val: str | None = None,
    test: str | None = None,
    path_column: str = "path",
    label_column: str = "label",
    **options: Unpack[FileOptions],
) -> ImageData:
    """Images that CSV files list, with a label each.

    Args:
        root: the folder where the paths start.
        train: a CSV file in UTF-8 with a header, in `root` unless absolute.
        val: another; without it some training images validate.
        test: another; without it the validation images test.
        path_column: name of the column of paths, relative to `root`.
        label_column: name of the column of labels, which are names of classes.
        options: of `imagefolder`.

    Raises:
        ValueError: a value is outside its range, a table is not as described, or a file is missing.
    """
    if root is None or train is None:
        key, example = ("root", "FOLDER") if root is None else ("train", "train.csv")
        raise ArgumentError(f"{key} is missing: pass {key}={example}", key)
    tables = {"train": train, "val": val, "test": test}
    given = {part: table for part, table in tables.items() if table is not None}
    read = functools.partial(
        read_tables, tables=given, path_column=path_column, label_column=label_column
    )
    return _image_files(root, read, **options)


def _image_files(
    root: str,
    read: Callable[..., Parts],
    *,
    shards: Callable[[Reading], Found] | None = None,
    image_size: int = 224,
    eval_size: int | None = None,
    resize_size: int | None = 256,
    interpolation: str = "bilinear",
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Sequence[v2.Transform] | None = (),
    flip: bool = True,
    num_workers: int | None = None,
    skip_unreadable: bool = False,
    max_pixels: int | None = None,
    in_memory: bool = False,
    cache: bool = True,
    holdout: float = 0.05,
    **options: Unpack[BatchOptions],
) -> ImageData:
    """The data set of the images that `read` lists, or of shards; see `imagefolder`."""
    check_integer("image_size", image_size, minimum=8, example=224)
    size = check_integer("eval_size", eval_size or image_size, minimum=8, example=224)
    if resize_size is not None:
        check_integer("resize_size", resize_size, minimum=size, example=256)
    check_interpolation(interpolation)
    for name, value in (
        *(("flip", flip), ("skip_unreadable", skip_unreadable)),
        *(("in_memory", in_memory), ("cache", cache)),
    ):
        check_boolean(name, value)
    check_channels(in_channels)
    if max_pixels is None:
        max_pixels = MOST_PIXELS
    check_integer("max_pixels", max_pixels, minimum=1, example=MOST_PIXELS)
    check_number("holdout", holdout, below=1, example=0.05)
    check_name(root)
    folder = Path(root).expanduser()
    workers = count_workers(num_workers)
    evaluate = functools.partial(
        fit, size=(size, size), interpolation=interpolation, resize=resize_size
    )
    reading = Reading(
        evaluate=evaluate,
        num_workers=workers,
        skip_unreadable=skip_unreadable,
        max_pixels=max_pixels,
        channels=in_channels,
    )
    whole = (image_size, image_size)
    transform: AnyAugmentation | None
    if in_memory:
        if shards or size != image_size:
            raise wrong_value("in_memory", True, "is for folders and one size of images", "false")
        parts = read(folder, holdout, skip_unreadable=skip_unreadable)
        kept = keep(
            folder,
            parts,
            whole,
            interpolation=interpolation,
            cache=cache,
            num_workers=workers,
            max_pixels=max_pixels,
            channels=in_channels,
        )
        found = Found(kept.sources, parts.classes, parts.origins, [*parts.notes, *kept.notes])
        transform = by_batch(
            augment, padding=image_size // 8, size=image_size, channels=in_channels, flip=flip
        )
    else:
        found = shards(reading) if shards else _read_files(read, folder, holdout, reading)
        transform = by_image(
            augment, size=whole, interpolation=interpolation, channels=in_channels, flip=flip
        )
    if in_channels == 3:
        mean, std = mean or IMAGENET_MEAN, std or IMAGENET_STD
    if mean is None or std is None:
        measured = measure(found.sources["train"])
        mean, std = mean or measured.mean, std or measured.std
        found = found._replace(notes=[*found.notes, measured.note])
    contract = DataContract(
        classes=found.classes,
        in_channels=in_channels,
        image_size=(size, size),
        mean=tuple(mean),
        std=tuple(std),
        interpolation=interpolation,
        resize_size=None if in_memory else resize_size,
    )
    return image_data(found, contract, transform, options)


def check_interpolation(given: str) -> None:
    """Raise ArgumentError for a filter other than these two."""
    if given not in ("bilinear", "bicubic"):
        raise wrong_value("interpolation", given, "must be bilinear or bicubic", "bilinear")


def check_channels(given: int) -> None:
    """Raise ArgumentError for images that are neither RGB nor greyscale."""
    if isinstance(given, bool) or given not in MODES:
        raise wrong_value("in_channels", given, "must be 3, or 1 for greyscale", 3)


def _read_files(
    read: Callable[..., Parts], folder: Path, holdout: float, reading: Reading
) -> Found:
    parts = read(folder, holdout, skip_unreadable=reading["skip_unreadable"])
    sources: Mapping[str, Source] = {
        part: Files(*files, **reading) for part, files in parts.files.items()
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
