"""The data module: turns sources of images into normalized batches, different on each device."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import lightning as L
import torch
from torch import Tensor
from torchvision.transforms import v2

from repvgg.checks import ArgumentError, check_integer, check_number
from repvgg.contract import DataContract, Normalize, to_float
from repvgg.data.batches import AnyAugmentation, Batch, Batches, Request, Source, Stored


@runtime_checkable
class Closeable(Protocol):
    """A source with worker processes."""

    def close(self) -> None:
        """End the processes; the next read starts them again."""


class Place(NamedTuple):
    """A device among all devices; `device` is None for a CPU."""

    rank: int = 0
    world_size: int = 1
    device: torch.device | None = None


class ImageData(L.LightningDataModule):
    """Images to train, validate and test on.

    Args:
        train: the source of the training images.
        val: that of the validation images.
        test: that of the test images; None tests on the validation images.
        contract: what the images are; its mean and std normalize them.
        batch_size: images in a batch, of each device.
        augment: changes the training images, of the kind that their source takes; None is off.
        mixup: blends pairs of images and their labels in a proportion drawn from Beta(mixup,
            mixup) (Zhang et al., 2018, arXiv:1710.09412); 0 is off.
        cutmix: pastes a rectangle of one image into another, with an area drawn from Beta(cutmix,
            cutmix) (Yun et al., 2019, arXiv:1905.04899); 0 is off. With both on, each batch takes
            one of the two.
        seed: of the order and the augmentation of the training data.
        origins: where the images of "train", "val" and "test" come from, to be printed.
        notes: lines on what else was found, to be printed.

    Attributes:
        has_test: whether there are test images. If not, the validation images test, though they
            chose the checkpoint.

    Raises:
        ValueError: a value is outside its range.
    """

    def __init__(
        self,
        train: Source,
        val: Source,
        test: Source | None,
        contract: DataContract,
        *,
        batch_size: int,
        augment: AnyAugmentation | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        seed: int = 0,
        origins: Mapping[str, str] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.has_test = test is not None
        self.test = val if test is None else test
        self.contract = contract
        self.origins = origins or {}
        self.notes = list(notes)
        self.batch_size = check_integer("batch_size", batch_size, minimum=1, example=64)
        self.augment = augment
        mixup = check_number("mixup", mixup, example=0.2)
        cutmix = check_number("cutmix", cutmix, example=1.0)
        num_classes = len(contract.classes)
        mixtures: list[v2.Transform] = []
        if mixup > 0:
            mixtures.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
        if cutmix > 0:
            mixtures.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
        self.mix = v2.RandomChoice(mixtures) if mixtures else None
        self.seed = check_integer("seed", seed, minimum=0, example=0)
        self.check_batch(batch_size)
        self._normalize = Normalize(contract.mean, contract.std)
        self._moved: tuple[Source, Stored] | None = None  # the training images, on a GPU

    def check_batch(self, size: int) -> None:
        """Check that the batches of all devices together fit into the training images.

        Raises:
            ValueError: they do not.
        """
        count = len(self.train.labels)
        if size > count:
            devices = "" if size == self.batch_size else f" on {size // self.batch_size} devices"
            raise ArgumentError(
                f"batch_size={self.batch_size}{devices}: exceeds the {count} training images; "
                f"pass for example batch_size={min(64, count * self.batch_size // size)}",
                "batch_size",
            )

    def summary(self) -> str:
        """Short lines: how many images there are, their origin, and what was left out."""
        parts = {"training": self.train, "validation": self.val}
        if self.has_test:
            parts["test"] = self.test
        counted = []
        for (part, source), key in zip(parts.items(), ("train", "val", "test"), strict=False):
            origin = f" ({self.origins[key]})" if key in self.origins else ""
            counted.append(f"{len(source.labels):,} {part}{origin}")
        lines = [f"{len(self.contract.classes):,} classes, images: {', '.join(counted)}"]
        if not self.has_test:
            lines.append(
                "no test images: the test uses the validation images, which choose the checkpoint"
            )
        return "\n".join([*lines, *self.notes])

    def read(self, source: Source, rows: Tensor) -> Batch:
        """Images (N, C, H, W), uint8, as they are evaluated, and labels (N,), of some rows."""
        requests = [Request(part) for part in torch.split(rows, 256)]
        images, labels = zip(*source.read(requests, None), strict=True)
        return torch.cat(images), torch.cat(labels)

    def spread(self, source: Source, count: int) -> Batch:
        """At most so many images and labels, evenly spread over a source: files lie by class."""
        held = len(source.labels)
        count = min(count, held)
        return self.read(source, torch.arange(count) * held // count)

    def probe(self, count: int = 32) -> Batch:
        """Some validation images and labels: (count, C, H, W) uint8 and (count,)."""
        return self.spread(self.val, count)

    def train_dataloader(self) -> Batches:
        place = self._place()
        return Batches(
            self._move(self.train, place.device),
            batch_size=self.batch_size,
            shuffle_seed=self.seed,
            same_epoch=bool(self.trainer and self.trainer.overfit_batches),  # type: ignore[attr-defined]
            augment=self.augment,
            mix=self.mix,
            **place._asdict(),
        )

    def val_dataloader(self) -> Batches:
        return Batches(self.val, batch_size=self.batch_size, **self._place()._asdict())

    def test_dataloader(self) -> Batches:
        return Batches(self.test, batch_size=self.batch_size, **self._place()._asdict())

    def teardown(self, stage: str) -> None:
        """End the worker processes; the next loader starts them again."""
        for source in (self.train, self.val, self.test):
            if isinstance(source, Closeable):
                source.close()

    def _move(self, source: Source, device: torch.device | None) -> Source:
        """Copy images in memory to the GPU that trains, once; they are augmented there."""
        if device is None or not isinstance(source, Stored):
            return source
        if (
            self._moved is None
            or self._moved[0] is not source
            or self._moved[1].images.device != device
        ):
            self._moved = source, Stored(*(tensor.to(device) for tensor in source))
        return self._moved[1]

    def _place(self) -> Place:
        if self.trainer is None:
            return Place()
        device = self.trainer.strategy.root_device
        on_cpu = device.type == "cpu"
        return Place(self.trainer.global_rank, self.trainer.world_size, None if on_cpu else device)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        images, targets = batch
        return self._normalize.to(images.device)(to_float(images)), targets
