"""Images, short CPU trainings and trained networks for studies."""

import functools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from repvgg import checkpoint
from repvgg.checkpoint.native import Checkpoint, Probe
from repvgg.contract import DataContract, to_float
from repvgg.data.batches import Augmentation, Stored
from repvgg.data.files import store
from repvgg.data.images import open_image
from repvgg.data.module import ImageData
from repvgg.data.scan import find
from repvgg.data.sets import digits
from repvgg.models.block import RepVGGBlock
from repvgg.models.registry import create_model
from repvgg.training.classifier import Classifier
from scripts.studies import runs

RECIPE = ("width", "strides", "epochs", "batch_size", "lr", "dropout")


class Job(NamedTuple):
    """One network that a study trains and saves."""

    model: str
    seed: int

    def path(self, settings: dict[str, Any]) -> Path:
        """The checkpoint; its name has a checksum of the settings it was trained with."""
        data = "" if settings["root"] is None else Path(settings["root"]).resolve().name
        trained = repr([data, *(settings[key] for key in RECIPE)])
        return Path(settings["work"]) / (
            f"{self.model}-{self.seed}-{zlib.crc32(trained.encode()):08x}.ckpt"
        )


def train_missing(models: Sequence[str], settings: dict[str, Any]) -> list[Job]:
    """Train every model with every seed, in parallel processes; saved ones are not repeated."""
    jobs = [Job(model, seed) for seed in range(settings["seeds"]) for model in models]
    calls = [(job, settings) for job in jobs if not job.path(settings).exists()]
    if calls:
        Path(settings["work"]).mkdir(parents=True, exist_ok=True)
        runs.run(train, calls, Path(settings["work"]) / "trained.csv", workers=settings["workers"])
    return jobs


def train(job: Job, settings: dict[str, Any]) -> runs.Row:
    """Train one network and save it as a self-describing checkpoint."""
    images, test, contract, augment = loaded(settings["root"])
    data = ImageData(
        images,
        test,
        test,
        contract,
        batch_size=settings["batch_size"],
        augment=augment,
        seed=job.seed,
    )
    widths = stage_widths(job.model)
    config = {
        "name": job.model,
        "num_classes": len(contract.classes),
        "in_channels": contract.in_channels,
        "strides": settings["strides"],
        "widths": [8 * round(settings["width"] * width / 8) for width in widths],
        "dropout": settings["dropout"],
    }
    steps = settings["epochs"] * len(data.train_dataloader())
    torch.manual_seed(job.seed)
    module = classifier(
        create_model(**config),
        num_classes=len(contract.classes),
        lr=settings["lr"],
        steps=steps,
        warmup=steps // 20,
        seed=job.seed,
    )
    fit(module, data, steps)
    path = job.path(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    probe = Probe(*data.probe(), torch.empty(0))
    checkpoint.save(path, Checkpoint(module.net, config, contract, probe))
    return {"model": job.model, "seed": job.seed, "steps": steps}


def stage_widths(model: str) -> list[int]:
    """Output channels of the four stages of a variant."""
    with torch.device("meta"):
        network = create_model(model)
    blocks = [stage[-1] for stage in network.stages.children() if isinstance(stage, nn.Sequential)]
    return [block.out_channels for block in blocks if isinstance(block, RepVGGBlock)]


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


loaded = functools.cache(load_images)  # once in each process


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
