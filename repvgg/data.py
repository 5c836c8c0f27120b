"""Data modules: what a run trains, validates and tests on, and the contract of its images.

Small data sets live in memory as uint8, are augmented by the batch, and normalized on the device.
The order of the training data is a function of (seed, epoch): a run can stop and resume anywhere.
"""

import functools
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from repvgg.arguments import check_integer, check_number, refusal
from repvgg.model import DataContract, Normalize, to_float

Batch = tuple[Tensor, Tensor]
Augmentation = Callable[[Tensor, torch.Generator], Tensor]
Mixture = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Batches:
    """Batches of a data set in memory, with an order that can be resumed anywhere.

    Args:
        images: (N, C, H, W), uint8.
        labels: (N,), int64.
        batch_size: images in a batch.
        shuffle_seed: None keeps the order and the last, smaller batch. A number shuffles, anew
            every epoch, and drops the last batch where it is smaller.
        augment: changes the images of a shuffled batch, with randomness from the generator alone.
        views: 2 augments every image twice: images (N, 2, C, H, W).
        mix: then blends the images of a batch and their labels, with torch's global randomness,
            which is seeded for it and restored. Both views of an image are blended alike.
    """

    batch_sampler = None  # Lightning asks for it where there is a sampler

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        shuffle_seed: int | None = None,
        augment: Augmentation | None = None,
        views: int = 1,
        mix: Mixture | None = None,
    ) -> None:
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.shuffle_seed = shuffle_seed
        self.augment = augment
        self.views = views
        self.mix = mix
        self.epoch = 0
        self._yielded = 0  # batches of the current epoch
        self._resume_at = (-1, 0)  # epoch, batch

    @property
    def sampler(self) -> "Batches":
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        if self.shuffle_seed is None:
            return math.ceil(len(self.images) / self.batch_size)
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing happens before the first batch is asked for. Lightning makes
        # iterators that it never reads, and makes the first one before it sets the epoch.
        epoch, batch = self._resume_at
        order = self._order()
        for i in range(batch if epoch == self.epoch else 0, len(self)):
            rows = order[i * self.batch_size : (i + 1) * self.batch_size]
            self._yielded = i + 1
            views, targets = [self.images[rows]], self.labels[rows]
            if self.augment is not None:
                noises = [self._generator(i), self._generator(i, "second view")][: self.views]
                views = [self.augment(views[0], noise) for noise in noises]
            if self.mix is not None:
                views, targets = self._mix(views, targets, i)
            yield views[0] if self.views == 1 else torch.stack(views, dim=1), targets

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "batch": self._yielded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resume_at = (state["epoch"], state["batch"])

    def _order(self) -> Tensor:
        if self.shuffle_seed is None:
            return torch.arange(len(self.images))
        return torch.randperm(len(self.images), generator=self._generator())

    def _mix(self, views: list[Tensor], labels: Tensor, i: int) -> tuple[list[Tensor], Tensor]:
        assert self.mix is not None
        mixed = []
        for view in views:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self._seed(i, "mix"))  # no GPU's
                images, targets = self.mix(view.float(), labels)
            mixed.append(images)
        return mixed, targets

    def _generator(self, *position: int | str) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(*position))

    def _seed(self, *position: int | str) -> int:
        """Randomness as a function of (seed, epoch) and a position in the epoch."""
        return zlib.crc32(repr((self.shuffle_seed, self.epoch, *position)).encode())


def random_affine(images: Tensor, generator: torch.Generator, *, strength: float) -> Tensor:
    """Rotate, scale and shift each image by its own small amount; what comes in is black.

    Uniform in +-15 degrees, +-10 % and +-half a pixel of 8, all times `strength`. Bilinear.

    Args:
        images: (N, C, H, W), uint8. The result has the same shape and type.
    """
    angle, scale, x, y = (torch.rand(4, len(images), generator=generator) * 2 - 1) * strength
    angle, scale = angle * math.radians(15), 1 + scale * 0.1
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cos, -sin, x / 8], dim=1), torch.stack([sin, cos, y / 8], dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False).round().to(torch.uint8)


class InMemory(L.LightningDataModule):
    """A data set that fits in memory.

    Args:
        train, val, test: images (N, C, H, W), uint8, and labels (N,), int64.
        contract: what the images are; its mean and std normalize them.
        batch_size: images in a batch.
        augment: of the training images; None is off.
        views: 2 gives every training image in two augmentations, for R-Drop between them.
        mixup: blends pairs of images and their labels in a proportion drawn from Beta(mixup,
            mixup) (Zhang et al., 2018, arXiv:1710.09412); 0 is off.
        cutmix: pastes a rectangle of one image into another, with an area drawn likewise (Yun et
            al., 2019, arXiv:1905.04899); 0 is off. With both on, each batch takes one of the two.
        seed: of the order and the augmentation of the training data.

    Raises:
        ValueError: a value is outside its range, or two views would be equal.
    """

    def __init__(
        self,
        train: Batch,
        val: Batch,
        test: Batch,
        contract: DataContract,
        *,
        batch_size: int,
        augment: Augmentation | None = None,
        views: int = 1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.train, self.val, self.test = train, val, test
        self.contract = contract
        self.batch_size = check_integer("data.batch_size", batch_size, minimum=1, example=64)
        self.augment = augment
        self.views = check_integer("rdrop_views", views, minimum=1, maximum=2, example=2)
        if views > 1 and augment is None:
            raise refusal("rdrop_views", views, "without augmentation all views are equal", 1)
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
        if batch_size > len(train[0]):
            raise ValueError(
                f"data.batch_size={batch_size}: exceeds the {len(train[0])} training images; type "
                f"for example data.batch_size={min(64, len(train[0]))}"
            )
        self._normalize = Normalize(contract.mean, contract.std)

    def probe(self, count: int = 32) -> Batch:
        """The first validation images and labels: (count, C, H, W) uint8 and (count,)."""
        images, labels = self.val
        return images[:count], labels[:count]

    def train_dataloader(self) -> Batches:
        return Batches(
            *self.train,
            batch_size=self.batch_size,
            shuffle_seed=self.seed,
            augment=self.augment,
            views=self.views,
            mix=self.mix,
        )

    def val_dataloader(self) -> Batches:
        return Batches(*self.val, batch_size=self.batch_size)

    def test_dataloader(self) -> Batches:
        return Batches(*self.test, batch_size=self.batch_size)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        images, targets = batch
        return self._normalize.to(images.device)(to_float(images)), targets


def digits(*, batch_size: int = 64, augment: float = 1.0, **options: Any) -> InMemory:
    """The 1,797 handwritten digits of the UCI set, 8x8 pixels, one channel; inside the package.

    E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, 1998, CC BY 4.0,
    https://doi.org/10.24432/C50P49. Of every seven images in the file's order the first validates,
    the second tests and five train: 257, 257 and 1,283, the same for every seed. Each digit is 7 to
    13 % of each part.

    Args:
        batch_size: images in a batch.
        augment: strength of `random_affine` on the training images; 0 is off.
        options: views, mixup, cutmix and seed, of `InMemory`.

    Raises:
        ValueError: a value is outside its range.
    """
    check_number("data.augment", augment, example=1.0)
    content = load_file(Path(__file__).with_name("digits.safetensors"))
    images = content["images"].float().mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = content["labels"].long()
    part = torch.arange(len(images)) % 7  # 7 and the period of the labels, 10, are coprime
    train, val, test = ((images[rows], labels[rows]) for rows in (part > 1, part == 0, part == 1))
    pixels = to_float(train[0])
    contract = DataContract(
        classes=[str(digit) for digit in range(10)],
        in_channels=1,
        image_size=(8, 8),
        mean=(pixels.mean().item(),),
        std=(pixels.std().item(),),
        interpolation="bilinear",
    )
    return InMemory(
        train,
        val,
        test,
        contract,
        batch_size=batch_size,
        augment=functools.partial(random_affine, strength=augment) if augment > 0 else None,
        **options,
    )
