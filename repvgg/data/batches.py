"""Batches in an order that is a function of (seed, epoch): a run can stop and resume anywhere.

Where an image comes from, memory or a file, is the source's affair; what is drawn, by whom and with
which noise is decided here. With several devices the batches of an epoch are dealt out in turn:
device r of W takes batch i * W + r as its i-th, with the order and the noise that one device would
give it. W devices therefore see what one device sees that accumulates gradients over W batches.
In evaluation device r takes the images r, r + W, ... A device without any gets one batch of no
images: Lightning skips a loader of no batches with its hooks, where the other devices would wait.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler

Batch = tuple[Tensor, Tensor]
Augmentation = Callable[[Tensor, torch.Generator], Tensor]
Mixture = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class WorkersDied(ChildProcessError):  # noqa: N818 - as for `Diverged`
    """Worker processes were killed, hang or have no shared memory left: one line, with advice."""


class Request(NamedTuple):
    """A batch to be read.

    Attributes:
        rows: (N,), int64: which images of the source.
        seed: of the augmentation; None reads the images as they are evaluated.
    """

    rows: Tensor
    seed: int | None = None


class Source(Protocol):
    """Images and their labels, wherever they are kept."""

    @property
    def labels(self) -> Tensor:
        """(N,), int64."""

    def order(self, generator: torch.Generator) -> Tensor:
        """All rows in a random order, which may keep together what is read together."""

    def read(self, requests: Sequence[Request], augment: Any) -> Iterable[Batch]:
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
    """Batches of a source, with an order that can be resumed anywhere.

    Args:
        source: the images.
        batch_size: images in a batch.
        shuffle_seed: None keeps the order and the last, smaller batch. A number shuffles, anew
            every epoch, and drops what is left over at the end of it.
        same_epoch: gives the batches of epoch 0 in every epoch, to see whether a network can fit
            them.
        augment: changes the images of a shuffled batch; of the kind that the source takes.
        mix: then blends the images of a batch and their labels, with torch's global randomness,
            which is seeded for it and restored.
        rank, world_size: which device this is, of how many.
        device: on which a batch is mixed and handed out; None leaves it where it is.
    """

    batch_sampler = None  # Lightning asks for it where there is a sampler

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        shuffle_seed: int | None = None,
        same_epoch: bool = False,
        augment: Any = None,
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
    def sampler(self) -> Any:
        """Where Lightning looks for `set_epoch`, and whether the order changes."""
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
        # A generator: nothing happens before the first batch is asked for. Lightning makes
        # iterators that it never reads, and makes the first one before it sets the epoch.
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

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "batch": self._yielded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resume_at = (state["epoch"], state["batch"])

    def _requests(self) -> list[Request]:
        """Those of the whole epoch, for this device."""
        count = len(self.source.labels)
        if self.shuffle_seed is None:
            rows = torch.arange(self.rank, count, self.world_size)
            return [Request(part) for part in rows.split(self.batch_size)]
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
        """Of this device's i-th batch among all of the epoch."""
        return i * self.world_size + self.rank

    def _mix(self, mix: Mixture, images: Tensor, labels: Tensor, position: int) -> Batch:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._seed(position, "mix"))  # no GPU's
            return mix(images.float(), labels)

    def _seed(self, *position: int | str) -> int:
        """Randomness as a function of (seed, epoch) and a position in the epoch."""
        epoch = 0 if self.same_epoch else self.epoch
        return zlib.crc32(repr((self.shuffle_seed, epoch, *position)).encode())


class _Unshuffled(SequentialSampler):
    """Tells Lightning that each epoch has the same order, and passes the epoch on."""

    def __init__(self, batches: Batches) -> None:
        super().__init__(batches.source.labels)
        self.set_epoch = batches.set_epoch


def same_seed(seeds: Iterable[int]) -> int:
    """One seed out of several, in their order."""
    return zlib.crc32(repr(tuple(seeds)).encode())
