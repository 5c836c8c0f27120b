"""Images and short CPU trainings for studies."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from repvgg.contract import DataContract, to_float
from repvgg.data.batches import Augmentation, Stored
from repvgg.data.files import store
from repvgg.data.images import open_image
from repvgg.data.scan import find
from repvgg.data.sets import digits
from repvgg.training.classifier import Classifier


def load_images(root: str | None) -> tuple[Stored, Stored, DataContract, Augmentation]:
    """Training and test images, their description, and the augmentation.

    Args:
        root: a folder with train/CLASS/ and test/CLASS/; None loads the embedded digits, with the
            validation images as part of the test images.
    """
    if root is None:
        data = digits()
        train, val, test = data.train, data.val, data.test
        assert isinstance(train, Stored)
        assert isinstance(val, Stored)
        assert isinstance(test, Stored)
        assert data.augment is not None
        both = Stored(*(torch.cat(parts) for parts in zip(val, test, strict=True)))
        return train, both, data.contract, data.augment

    paths, labels, classes = find(Path(root) / "train")
    width, height = open_image(paths[0]).size
    train = store(paths, labels, (height, width))
    test = store(*find(Path(root) / "test", classes)[:2], (height, width))
    pixels = to_float(train.images)
    contract = DataContract(
        classes=classes,
        in_channels=3,
        image_size=(height, width),
        mean=tuple(pixels.mean((0, 2, 3)).tolist()),
        std=tuple(pixels.std((0, 2, 3)).clamp_min(1 / 255).tolist()),  # a channel may be constant
        interpolation="bilinear",
    )
    crop = v2.RandomCrop((height, width), padding=height // 8)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            return torch.stack([transform(image) for image in images])

    return train, test, contract, augment


def subset(images: Stored, share: float, seed: int) -> Stored:
    """A random share of every class, at least one image of each."""
    labels = images.labels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rows = []
    for label in sorted(set(labels.tolist())):
        of_class = order[labels[order] == label]
        rows.append(of_class[: max(1, round(share * len(of_class)))])
    kept = torch.cat(rows).sort().values
    return Stored(images.images[kept], labels[kept])


def classifier(
    network: nn.Module,
    *,
    num_classes: int,
    lr: float,
    steps: int,
    warmup: int = 0,
    seed: int = 0,
    rdrop: float = 0.0,
    label_smoothing: float = 0.0,
) -> Classifier:
    """A network in the module that trains it, with momentum 0.9 and weight decay 1e-4."""
    return Classifier(
        network,
        num_classes=num_classes,
        lr=lr,
        momentum=0.9,
        weight_decay=1e-4,
        num_steps=steps,
        num_warmup_steps=warmup,
        seed=seed,
        rdrop=rdrop,
        label_smoothing=label_smoothing,
    )


def trainer(**options: Any) -> L.Trainer:
    """A Lightning trainer that writes and prints nothing and does not validate."""
    return L.Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **options,
    )


def fit(
    module: L.LightningModule, data: L.LightningDataModule, steps: int, *callbacks: L.Callback
) -> None:
    """Train for a number of steps on the CPU."""
    trainer(accelerator="cpu", max_epochs=-1, max_steps=steps, callbacks=[*callbacks]).fit(
        module, datamodule=data
    )
