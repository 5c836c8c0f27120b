"""Images in files as a source, decoded by worker processes while one trains."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from PIL import Image
from torch import Tensor

from repvgg.checks import ArgumentError
from repvgg.data import progress
from repvgg.data.batches import Batch, Request, Stored, same_seed
from repvgg.data.images import MOST_PIXELS, TooManyPixels, fit, open_image, pixel_limit, to_tensor
from repvgg.data.workers import Workers
from repvgg.targets import is_from_user_code

Fit = Callable[[Image.Image], Image.Image]
Transform = Callable[[Image.Image], Tensor]
Decoded = tuple[Tensor | None, list[int], list[str]]  # images, their rows, failures
Task = tuple[list[int], int | None]  # rows, seed of the augmentation
CHUNK = 256  # images that a worker decodes at a time, into memory


class Decoding(TypedDict, total=False):
    """Arguments of `Files` with a default, but for `skip_unreadable`."""

    num_workers: int
    max_pixels: int | None
    channels: int


class Reading(Decoding):
    """All arguments of `Files` but the images."""

    evaluate: Fit
    skip_unreadable: bool


class Files:
    """A source that reads its images from files, batch by batch.

    Args:
        paths: of the images.
        labels: (N,), int64.
        evaluate: a decoded image -> the image for evaluation; all have one size.
        num_workers: processes that decode; 0 decodes in this process.
        skip_unreadable: replaces an image that cannot be read by the next one that can.
        max_pixels: a larger image is an error, which names this argument; None is Pillow's limit.
        channels: 3, or 1 for greyscale.

    Attributes:
        SKIPPABLE: errors of `open` that mean an image cannot be read; others pass through.
        unreadable: files that could not be read so far.

    Raises, while it is read:
        ValueError: an image cannot be read; the message names it.
        WorkersDied: worker processes failed; the message says why.
    """

    SKIPPABLE: tuple[type[Exception], ...] = (ValueError,)

    def __init__(
        self,
        paths: Sequence[Path | str],
        labels: Tensor,
        *,
        evaluate: Fit,
        num_workers: int = 0,
        skip_unreadable: bool = False,
        max_pixels: int | None = None,
        channels: int = 3,
    ) -> None:
        self.paths = [str(path) for path in paths]  # smaller than Path when pickled
        self.labels = labels
        self.evaluate = evaluate
        self.num_workers = num_workers
        self.skip_unreadable = skip_unreadable
        self.max_pixels = max_pixels
        self.channels = channels
        self.unreadable: set[str] = set()
        self._workers: Workers[Task, Decoded] | None = None
        self._augment: Transform | None = None  # of these workers

    def open(self, row: int) -> Image.Image:
        """Decode one image.

        Raises:
            ValueError: it cannot be read; the message names it.
        """
        return open_image(Path(self.paths[row]), self.channels)

    def order(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(len(self.labels), generator=generator)

    def read(self, requests: Sequence[Request], augment: Transform | None) -> Iterator[Batch]:
        for images, rows, failures in self.decode(requests, augment):
            if failures and not self.skip_unreadable:
                raise ArgumentError(
                    f"{failures[0]}; repair or delete it, or pass skip_unreadable=true to read "
                    "another image in its place",
                    *("skip_unreadable", "max_pixels"),
                )
            if images is None:
                raise ValueError(f"none of the images can be read: {failures[0]}")
            self.unreadable.update(failures)
            if torch.cuda.is_available():
                images = images.pin_memory()
            yield images, self.labels[rows]

    def decode(self, requests: Sequence[Request], augment: Transform | None) -> Iterator[Decoded]:
        """As `read`, with rows in place of labels, and with the failures."""
        tasks: Iterator[Task] = ((rows.tolist(), seed) for rows, seed in requests)
        if self.num_workers:
            return self._start_workers(augment).map(tasks)
        return map(_Decode(self, augment), tasks)

    def close(self) -> None:
        """End the worker processes, which otherwise wait for the next epoch."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def _start_workers(self, augment: Transform | None) -> Workers[Task, Decoded]:
        """Running workers, unless they augment in another way; without seeds none augments."""
        stale = augment is not None and augment is not self._augment
        if self._workers is None or self._workers.closed or stale:
            self._augment = augment
            self._workers = Workers(_Decode(self, augment), self.num_workers)
        return self._workers

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_workers": None, "_augment": None}


class _Decode:
    """The work of a worker: a request -> images (N, C, H, W), the rows that it read, failures."""

    def __init__(self, files: Files, augment: Transform | None) -> None:
        self.files = files
        self.augment = augment

    def __call__(self, task: Task) -> Decoded:
        rows, batch_seed = task
        images: list[Tensor] = []
        taken: list[int] = []
        failures: list[str] = []
        with pixel_limit(self.files.max_pixels or MOST_PIXELS):
            for i, row in enumerate(rows or [0]):  # the first gives no images their size
                seed = None if batch_seed is None else same_seed((batch_seed, i))
                chosen, image = self._read(row, seed, failures)
                if image is None:
                    return None, [], failures
                taken.append(chosen)
                images.append(image)
        count = len(rows)
        return torch.stack(images)[:count], taken[:count], failures

    def _read(self, row: int, seed: int | None, failures: list[str]) -> tuple[int, Tensor | None]:
        count = len(self.files.labels)
        for chosen in ((row + shift) % count for shift in range(count)):
            try:
                return chosen, self._prepare(self.files.open(chosen), seed)
            except self.files.SKIPPABLE as error:
                if is_from_user_code(error):  # of a transform, and no fault of the image
                    raise
                failures.append(_one_line(error, self.files.max_pixels))
                if not self.files.skip_unreadable:
                    break
        return row, None

    def _prepare(self, image: Image.Image, seed: int | None) -> Tensor:
        if self.augment is None or seed is None:
            return to_tensor(self.files.evaluate(image))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.augment(image)


def _one_line(error: Exception, limit: int | None) -> str:
    if isinstance(error, TooManyPixels) and limit is not None:
        return f"{error}; pass max_pixels={error.pixels} to allow it"
    return " ".join(str(error).split())


def store(
    paths: Sequence[Path | str],
    labels: Tensor,
    size: tuple[int, int],
    *,
    interpolation: str = "bilinear",
    **options: Unpack[Decoding],
) -> Stored:
    """Decode all images into memory, scaled and cropped to one size.

    Args:
        options: num_workers, max_pixels and channels, of `Files`.

    Raises:
        ValueError: images cannot be read; the message counts them and names the first.
    """
    files = Files(
        paths,
        labels,
        evaluate=functools.partial(fit, size=size, interpolation=interpolation),
        skip_unreadable=True,
        **options,
    )
    unreadable: set[str] = set()

    def decoded() -> Iterator[Tensor]:
        rows = torch.split(torch.arange(len(labels)), CHUNK)
        parts = files.decode([Request(part) for part in rows], None)
        for images, _, failures in progress.show(parts, len(labels), CHUNK, "decoding"):
            unreadable.update(failures)
            if images is not None:
                yield images

    images = concatenate(decoded(), len(labels))
    files.close()
    if unreadable:
        raise ArgumentError(
            f"{len(unreadable)} of {len(paths)} images cannot be read, the first: "
            f"{min(unreadable)}; repair or delete them",
            "max_pixels",
        )
    return Stored(images, labels)


def concatenate(parts: Iterable[Tensor], count: int) -> Tensor:
    """Copy tensors into one of `count` rows as they come: those of workers hold open files."""
    whole: Tensor | None = None
    start = 0
    for part in parts:
        if whole is None:
            whole = part.new_empty((count, *part.shape[1:]))
        whole[start : start + len(part)] = part
        start += len(part)
    return torch.empty(0, dtype=torch.uint8) if whole is None else whole
