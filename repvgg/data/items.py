"""A map-style data set of the user's as a source: `dataset[row]` is an image and its label.

Images are PIL images, uint8 tensors (C, H, W) or uint8 arrays (H, W, C). Floats are taken if they
are uint8 values divided by 255, as torchvision's ToTensor gives: the pixels stay exact. Labels are
integers. Anything else is an error that names the row.
"""

import copy
import functools
from collections.abc import Iterator
from typing import NamedTuple, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from repvgg.data import progress
from repvgg.data.batches import Stored
from repvgg.data.files import CHUNK, Files, Reading, concatenate
from repvgg.data.images import to_channels, to_tensor
from repvgg.data.map_style import MapStyle
from repvgg.data.workers import Workers

ALLOWED = "return a PIL image, a uint8 tensor (C, H, W) or a uint8 array (H, W, C)"
ROUNDING = 1e-3  # of uint8 values that were divided by 255 in float32
Rows = tuple[Tensor | None, list[int]]  # images and labels
NAMES = {"train": "training", "val": "validation", "test": "test"}


class ItemError(ValueError):
    """An item of a data set is not an image with a label; the message names its row."""


class Kind(NamedTuple):
    """What all images of a data set have in common.

    Attributes:
        size: height and width in pixels; None allows any, which are scaled.
        channels: 1 or 3.
        converts: from other numbers of channels.
    """

    size: tuple[int, int] | None
    channels: int
    converts: bool


class Items(Files):
    """A source that reads a map-style data set, batch by batch.

    Args:
        dataset: gives images and labels.
        labels: (N,), int64; each item is compared with it when it is read.
        part: "train", "val" or "test", for the errors.
        kind: of the images.
        options: evaluate, num_workers, ..., of `Files`.

    Raises, while it is read:
        ItemError: an item is not as described. Errors of the data set itself pass through.
    """

    SKIPPABLE = ()

    def __init__(
        self,
        dataset: MapStyle,
        labels: Tensor,
        *,
        part: str,
        kind: Kind,
        **options: Unpack[Reading],
    ) -> None:
        super().__init__([], labels, **options)
        self.dataset = dataset
        self.part = part
        self.kind = kind
        self.rows = torch.arange(len(labels))

    def take(self, rows: Tensor) -> "Items":
        """A source of some of the rows. Errors name the rows of the whole data set."""
        taken = copy.copy(self)
        taken.labels, taken.rows = self.labels[rows], self.rows[rows]
        return taken

    def open(self, row: int) -> Image.Image:
        row, expected = int(self.rows[row]), int(self.labels[row])
        image, label = read_item(self.dataset, row, self.part, self.kind)
        if label != expected:
            raise ItemError(
                f"{place(self.part, row)}: its label is {label}, and was {expected} before; a data "
                "set gives the same item each time"
            )
        return image


def place(part: str, row: int) -> str:
    return f"row {row} of the {NAMES[part]} data"


def read_item(dataset: MapStyle, row: int, part: str, kind: Kind | None) -> tuple[Image.Image, int]:
    """Read an image and its label.

    Args:
        kind: what the image must be; None allows all.

    Raises:
        ItemError: the item is not an image of this kind with an integer.
    """
    where = place(part, row)
    try:
        item = dataset[row]
    except Exception as error:
        error.add_note(f"while reading {where}")
        raise
    if not isinstance(item, tuple | list) or len(item) != 2:
        what = f"{len(item)} values" if isinstance(item, tuple | list) else _describe(item)
        raise ItemError(f"{where}: is {what}; return (image, label)")
    image = to_image(item[0], where)
    if kind is not None:
        channels = count_channels(image)
        if channels != kind.channels and not kind.converts:
            raise ItemError(
                f"{where}: the image has {channels} channels, the first has {kind.channels}; pass "
                "data.in_channels=1 or data.in_channels=3 to convert all"
            )
        if kind.size not in (None, (image.height, image.width)):
            assert kind.size is not None
            raise ItemError(
                f"{where}: the image has {image.height}x{image.width} pixels, the first has "
                f"{kind.size[0]}x{kind.size[1]}; pass data.image_size={max(8, kind.size[0])} to "
                "scale and crop all"
            )
        try:
            image = to_channels(image, kind.channels, where)
        except ValueError as error:
            raise ItemError(str(error)) from error
    return image, to_label(item[1], where)


def to_image(given: object, where: str) -> Image.Image:
    """An image of Pillow.

    Raises:
        ItemError: it is of another type, shape or range.
    """
    if isinstance(given, Image.Image):
        return given
    if isinstance(given, np.ndarray):
        axes = "(H, W, C)"
        shaped = given[:, :, None] if given.ndim == 2 else given
        last = given.ndim in (2, 3) and shaped.shape[2] in (1, 3)
        pixels = torch.from_numpy(np.ascontiguousarray(shaped)) if last else None
    elif isinstance(given, Tensor):
        axes = "(C, H, W)"
        shape = given.unsqueeze(0) if given.ndim == 2 else given
        pixels = shape.permute(1, 2, 0) if shape.ndim == 3 and len(shape) in (1, 3) else None
    else:
        raise ItemError(f"{where}: the image is {_describe(given)}; {ALLOWED}")
    if pixels is None or 0 in pixels.shape:
        raise ItemError(
            f"{where}: the image has shape {tuple(given.shape)}; must be {axes} with 1 or 3 "
            "channels"
        )
    if pixels.is_floating_point():
        scaled = pixels.float() * 255
        exact = scaled.round().clamp(0, 255)
        if not (scaled - exact).abs().max() < ROUNDING:  # NaN too
            raise ItemError(
                f"{where}: the image is {_describe(given)} whose values are not uint8 values "
                f"divided by 255; {ALLOWED}, not normalized: training does that"
            )
        pixels = exact.to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise ItemError(f"{where}: the image is {_describe(given)}; {ALLOWED}")
    array = pixels.cpu().numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def count_channels(image: Image.Image) -> int:
    """1 for greyscale, black and white and uint16; else 3."""
    return 1 if image.mode in ("L", "1", "LA", "I", "F") or image.mode.startswith("I;16") else 3


def to_label(given: object, where: str) -> int:
    """An integer of at least 0.

    Raises:
        ItemError: it is something else.
    """
    if isinstance(given, np.ndarray | Tensor) and given.ndim == 0:
        given = given.item()
    if isinstance(given, bool) or not isinstance(given, int | np.integer):
        raise ItemError(
            f"{where}: its label is {_describe(given)}; return an integer, and name the classes by "
            "data.classes=[...]"
        )
    if given < 0:
        raise ItemError(f"{where}: its label is {given}; must be at least 0")
    return int(given)


def load(items: Items, *, images: bool) -> Stored:
    """Read all labels of a data set, and its images if they are kept in memory.

    Its own `labels` are not used.

    Args:
        images: False gives none, (0,).

    Raises:
        ItemError: an item is not as described.
    """
    count = len(items.dataset)
    tasks = [part.tolist() for part in torch.split(torch.arange(count), CHUNK)]
    work = functools.partial(_read_rows, items, images)
    workers = Workers(work, items.num_workers) if items.num_workers else None
    parts: Iterator[Rows] = workers.map(tasks) if workers else map(work, tasks)
    verb = "reading" if images else "reading the labels of"
    labels: list[int] = []

    def pixels() -> Iterator[Tensor]:
        for part, some in progress.show(parts, count, CHUNK, verb):
            labels.extend(some)
            if part is not None:
                yield part

    try:
        read = concatenate(pixels(), count)
    finally:
        if workers:
            workers.close()
    return Stored(read, torch.tensor(labels))


def _read_rows(items: Items, images: bool, rows: list[int]) -> Rows:
    pixels: list[Tensor] = []
    labels: list[int] = []
    for row in rows:
        image, label = read_item(items.dataset, row, items.part, items.kind)
        labels.append(label)
        if images:
            pixels.append(to_tensor(items.evaluate(image)))
    return torch.stack(pixels) if pixels else None, labels


def _describe(given: object) -> str:
    """A value for an error: its type and, of a tensor, its dtype and shape."""
    if isinstance(given, Tensor | np.ndarray):
        kind = "tensor" if isinstance(given, Tensor) else "array"
        dtype = str(given.dtype).removeprefix("torch.")
        return f"a {dtype} {kind} of shape {tuple(given.shape)}"
    if isinstance(given, str | float | bool) or given is None:
        return f"{given!r}"
    name = type(given).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
