"""Batches in an order that is a function of (seed, epoch): a run can stop and resume anywhere.

A source reads images from memory or from files. This module decides which images form a batch, on
which device, and with which seed they are augmented.

Several devices take the batches of an epoch in turn: device r of W takes batch i * W + r as its
i-th, with the order and the augmentation that one device would give it. So W devices see what one
device sees that accumulates gradients over W batches. In evaluation device r takes the images r,
r + W, ... A device without images gets one empty batch: Lightning skips the hooks of a loader
without batches, and the other devices would wait.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler

Batch = tuple[Tensor, Tensor]
Augmentation = Callable[[Tensor, torch.Generator], Tensor]
AnyAugmentation = Callable[..., Tensor]  # of the kind that a source takes
Mixture = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class WorkersDied(ChildProcessError):  # noqa: N818 - as for `Diverged`
    """Worker processes were killed, hang or have no shared memory left."""


class Request(NamedTuple):
    """A batch to be read.

    Attributes:
        rows: (N,), int64: the images of the source.
        seed: of the augmentation; None reads the images as they are evaluated.
    """

    rows: Tensor
    seed: int | None = None


class Source(Protocol):
    """Images and their labels, in memory or in files."""

    @property
    def labels(self) -> Tensor:
        """(N,), int64."""

    def order(self, generator: torch.Generator) -> Tensor:
        """All rows in a random order; it may group rows that are read together."""

    def read(self, requests: Sequence[Request], augment: AnyAugmentation | None) -> Iterable[Batch]:
        """For each request its images (N, C, H, W), uint8, and labels (N,)."""


class Stored(NamedTuple):
    """A source in memory: images (N, C, H, W), uint8, and labels (N,), int64."""

    images: Tensor
    labels: Tensor

    def order(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(len(self.labels), generator=generator)

    def read(self, requests: Sequence[Request], augment: Augmentation | None) -> Iterator[Batch]:
        for rows, seed in requests:
            images, labels = self.images[rows], self.labels[rows]
            if augment is not None and seed is not None:
                images = augment(images, torch.Generator().manual_seed(seed))
            yield images, labels


class Batches:
    """Batches of a source, in an order that can be resumed anywhere.

    Args:
        source: the images.
        batch_size: images in a batch.
        shuffle_seed: None keeps the order and the last, smaller batch. A number shuffles each epoch
            differently and drops the remainder at the end of it.
        same_epoch: repeats the batches of epoch 0 in every epoch, to test whether a network can fit
            them.
        augment: changes the images of a shuffled batch; of the kind that the source takes.
        mix: then blends the images of a batch and their labels. It draws from torch's global
            generator, which is seeded for it and restored.
        rank, world_size: number of this device, and number of devices.
        device: where a batch is mixed and returned; None leaves it in place.
    """

    batch_sampler = None  # Lightning reads it if there is a sampler

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        shuffle_seed: int | None = None,
        same_epoch: bool = False,
        augment: AnyAugmentation | None = None,
        mix: Mixture | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self.source = source
        self.batch_size = batch_size
        self.shuffle_seed = shuffle_seed
        self.same_epoch = same_epoch
        self.augment = augment
        self.mix = mix
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.epoch = 0
        self._yielded = 0  # batches of the current epoch
        self._resume_at = (-1, 0)  # epoch, batch

    @property
    def sampler(self) -> "Batches | _Unshuffled":
        """Lightning calls its `set_epoch`, and reads from its type whether the order changes."""
        return _Unshuffled(self) if self.shuffle_seed is None or self.same_epoch else self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        count = len(self.source.labels)
        if self.shuffle_seed is None:
            own = len(range(self.rank, count, self.world_size))
            return max(1, math.ceil(own / self.batch_size))
        return count // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing runs before the first batch is read. Lightning makes iterators that
        # it never reads, and makes the first one before it sets the epoch.
        epoch, batch = self._resume_at
        first = batch if epoch == self.epoch else 0
        requests = self._requests()[first:]
        for i, (images, labels) in enumerate(self.source.read(requests, self.augment), first):
            self._yielded = i + 1
            if self.device is not None:
                images = images.to(self.device, non_blocking=True)
                labels = labels.to(self.device, non_blocking=True)
            if self.mix is not None:
                images, labels = self._mix(self.mix, images, labels, self._position(i))
            yield images, labels

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self._yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resume_at = (state["epoch"], state["batch"])

    def _requests(self) -> list[Request]:
        """The requests of the whole epoch, for this device."""
        count = len(self.source.labels)
        if self.shuffle_seed is None:
            rows = torch.arange(self.rank, count, self.world_size)
            return [Request(part) for part in torch.split(rows, self.batch_size)]
        generator = torch.Generator().manual_seed(self._seed())
        order = self.source.order(generator)
        requests = []
        for i in range(len(self)):
            position = self._position(i)
            start = position * self.batch_size
            rows = order[start : start + self.batch_size]
            requests.append(Request(rows, self._seed(position)))
        return requests

    def _position(self, i: int) -> int:
        """The position of this device's i-th batch in the epoch."""
        return i * self.world_size + self.rank

    def _mix(self, mix: Mixture, images: Tensor, labels: Tensor, position: int) -> Batch:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._seed(position, "mix"))  # on the CPU alone
            return mix(images.float(), labels)

    def _seed(self, *position: int | str) -> int:
        """A seed as a function of (seed, epoch) and a position in the epoch."""
        epoch = 0 if self.same_epoch else self.epoch
        return zlib.crc32(repr((self.shuffle_seed, epoch, *position)).encode())


class _Unshuffled(SequentialSampler):
    """Shows Lightning that each epoch has the same order, and passes the epoch on."""

    def __init__(self, batches: Batches) -> None:
        super().__init__(batches.source.labels)
        self.set_epoch = batches.set_epoch


def same_seed(seeds: Iterable[int]) -> int:
    """One seed out of several, in their order."""
    return zlib.crc32(repr(tuple(seeds)).encode())
