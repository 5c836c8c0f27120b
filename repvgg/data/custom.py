"""The user's own data: a factory by its dotted name, whose data sets become an `ImageData`.

A factory returns an `ImageData`, one map-style data set, or two or three of them.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Unpack

import torch
from torchvision.transforms import v2

from repvgg.checks import (
    ArgumentError,
    check_boolean,
    check_integer,
    check_number,
    wrong_value,
)
from repvgg.contract import DataContract
from repvgg.data.augment import by_batch, by_image
from repvgg.data.batches import AnyAugmentation, Source, Stored
from repvgg.data.files import Reading
from repvgg.data.folders import check_channels, check_interpolation
from repvgg.data.images import fit
from repvgg.data.items import ItemError, Items, Kind, count_channels, load, place, read_item
from repvgg.data.map_style import KEY, MapStyle, as_parts, stated_classes, stated_labels
from repvgg.data.memory import measure
from repvgg.data.module import ImageData
from repvgg.data.sets import BatchOptions, Found, Options, count_workers, image_data
from repvgg.data.split import first_names, hold_out, note_single

MOST_IN_MEMORY = 2**30  # bytes of decoded images
READ_TWICE = 8  # items of a part that must be the same when they are read again


class ItemOptions(BatchOptions, total=False):
    """Arguments of `from_dataset`."""

    classes: Sequence[str] | None
    image_size: int | None
    in_channels: int | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    interpolation: str
    augment: Sequence[v2.Transform] | None
    flip: bool
    num_workers: int | None
    in_memory: bool | None
    holdout: float


def from_dataset(
    dataset: object,
    *,
    origin: str = "dataset",
    batch_size: int = 64,
    classes: Sequence[str] | None = None,
    image_size: int | None = None,
    in_channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str = "bilinear",
    augment: Sequence[v2.Transform] | None = (),
    flip: bool = True,
    num_workers: int | None = None,
    in_memory: bool | None = None,
    holdout: float = 0.05,
    **options: Unpack[Options],
) -> ImageData:
    """Describe map-style data sets of (image, label); see `repvgg.data.items` for the images.

    Args:
        dataset: one, whose images train and validate; or (train, val), (train, val, test), or a
            dictionary with these keys.
        origin: what gave it, for the errors.
        batch_size: images in a batch.
        classes: names, in the order of the labels; None takes the data set's own, else numbers.
        image_size: height and width in pixels; None takes those of the images, which must agree.
        in_channels: 1 or 3; None takes those of the images, which must agree.
        mean: by channel, of images in [0, 1]; None measures it on training images.
        std: the same.
        interpolation: "bilinear" or "bicubic".
        augment: transforms of the training images, see `repvgg.data.augment`.
        flip: False does not flip training images, as for digits and letters.
        num_workers: processes that read; None is one for each CPU, at most 8.
        in_memory: reads all images once, and augments them by the batch; False reads them each
            epoch, in worker processes; None chooses by their size, up to 1 GiB.
        holdout: share of the training images, by class, that validates if there are no others.
        options: mixup, cutmix and seed, of `ImageData`.

    Raises:
        ArgumentError: a value is outside its range, or this is no such data set.
        ItemError: an item is not an image with a label; its row is named.
    """
    if image_size is not None:
        check_integer("image_size", image_size, minimum=8, example=32)
    if in_channels is not None:
        check_channels(in_channels)
    if in_memory is not None:
        check_boolean("in_memory", in_memory)
    check_boolean("flip", flip)
    check_interpolation(interpolation)
    check_number("holdout", holdout, below=1, example=0.05)
    parts = as_parts(dataset, origin)
    first = _first_images(parts, in_channels)
    kind = Kind(
        None if image_size else first.size,
        in_channels or first.channels,
        converts=in_channels is not None,
    )
    size = (image_size, image_size) if image_size else first.size
    if min(size) < 8:
        raise ArgumentError(
            f"image_size: the images have {size[0]}x{size[1]} pixels, fewer than 8; pass "
            "image_size=8 or more to scale them",
            "image_size",
        )
    count = sum(len(part) for part in parts.values())
    if in_memory is None:
        in_memory = count * kind.channels * size[0] * size[1] <= MOST_IN_MEMORY
    reading = Reading(
        evaluate=functools.partial(fit, size=size, interpolation=interpolation),
        num_workers=count_workers(num_workers),
        skip_unreadable=False,
        channels=kind.channels,
    )
    sources = {
        part: _read(given, part, kind, reading, in_memory=in_memory)
        for part, given in parts.items()
    }
    names = _name_classes(parts, sources, classes, origin)
    found = _complete(sources, parts, names, holdout)
    transform: AnyAugmentation | None
    if in_memory:
        padding = min(size) // 8
        transform = by_batch(augment, padding=padding, size=size, channels=kind.channels, flip=flip)
    else:
        transform = by_image(
            augment, size=size, interpolation=interpolation, channels=kind.channels, flip=flip
        )
    if mean is None or std is None:
        measured = measure(found.sources["train"])
        mean, std = mean or measured.mean, std or measured.std
        found = found._replace(notes=[*found.notes, measured.note])
    contract = DataContract(
        classes=found.classes,
        in_channels=kind.channels,
        image_size=size,
        mean=tuple(mean),
        std=tuple(std),
        interpolation=interpolation,
    )
    return image_data(found, contract, transform, {"batch_size": batch_size, **options})


class First(NamedTuple):
    """Of the first training image: height and width, channels."""

    size: tuple[int, int]
    channels: int


def _first_images(parts: Mapping[str, MapStyle], in_channels: int | None) -> First:
    """Read some items of each part twice: training needs the same image each time.

    Raises:
        ItemError: they differ.
    """
    for part, dataset in parts.items():
        for row in range(min(READ_TWICE, len(dataset))):
            one, again = (read_item(dataset, row, part, None) for _ in range(2))
            if one[1] != again[1] or one[0].tobytes() != again[0].tobytes():
                raise ItemError(
                    f"{place(part, row)}: differs when it is read again, so the data set draws "
                    "random numbers; return its images unchanged, and pass transforms as "
                    "data.augment=[...]"
                )
    image, _ = read_item(parts["train"], 0, "train", None)
    return First((image.height, image.width), in_channels or count_channels(image))


def _read(dataset: MapStyle, part: str, kind: Kind, reading: Reading, *, in_memory: bool) -> Source:
    """All images in memory, or their labels alone."""
    items = Items(dataset, torch.empty(0, dtype=torch.long), part=part, kind=kind, **reading)
    if in_memory:
        return load(items, images=True)
    stated = stated_labels(dataset)
    rows = range(min(READ_TWICE, len(dataset)))
    trusted = stated is not None and all(
        int(stated[row]) == read_item(dataset, row, part, kind)[1] for row in rows
    )
    labels = stated if trusted and stated is not None else load(items, images=False).labels
    return Items(dataset, labels, part=part, kind=kind, **reading)


def _name_classes(
    parts: Mapping[str, MapStyle],
    sources: Mapping[str, Source],
    given: Sequence[str] | None,
    origin: str,
) -> list[str]:
    """The names of the classes.

    Raises:
        ValueError: they are not names, or a label lies outside them.
    """
    if given is not None:
        if isinstance(given, str) or not isinstance(given, Sequence) or len(given) < 2:
            raise wrong_value("classes", given, "must be at least two names", "[cat,dog]")
        names = [str(name) for name in given]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise wrong_value("classes", given, f"names {twice} twice", "[cat,dog]")
        source = "data.classes"
    else:
        stated = {part: stated_classes(dataset) for part, dataset in parts.items()}
        for part, other in stated.items():
            if other and stated["train"] and other != stated["train"]:
                raise ArgumentError(
                    f"{origin}: the classes of {part} are {first_names(other)}, those of train are "
                    f"{first_names(stated['train'])}; they must be the same, in the same order",
                    KEY,
                )
        names = stated["train"] or [
            str(label) for label in range(int(sources["train"].labels.max()) + 1)
        ]
        source = "the training data"
    for part, read in sources.items():
        outside = (read.labels < 0) | (read.labels >= len(names))
        if outside.any():
            row = int(outside.nonzero()[0])
            raise ItemError(
                f"{place(part, row)}: its label is {int(read.labels[row])}; must be from 0 to "
                f"{len(names) - 1}, for the {len(names)} classes of {source}"
            )
    if len(names) < 2:
        raise ArgumentError(f"{origin}: all labels are 0; it needs two classes", KEY)
    return names


def _complete(
    sources: dict[str, Source], parts: Mapping[str, MapStyle], names: list[str], holdout: float
) -> Found:
    """Hold validation images out of the training images if there are none."""
    train = sources["train"]
    if "val" in sources:
        return Found(sources, names, {})
    kept, held = hold_out(train.labels, holdout)
    if isinstance(train, Stored):
        split = [Stored(train.images[rows], train.labels[rows]) for rows in (kept, held)]
        sources |= {"train": split[0], "val": split[1]}
    else:
        assert isinstance(train, Items)
        sources |= {"train": train.take(kept), "val": train.take(held)}
    origins = {"val": "held out of the training images, the same for every seed"}
    return Found(sources, names, origins, note_single(train.labels, names))
