"""What studies share: images, and many runs in parallel, kept as they end, compared in pairs."""

import concurrent.futures
import csv
import importlib.metadata
import math
import multiprocessing
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from repvgg.contract import DataContract, to_float
from repvgg.data.batches import Augmentation, Stored
from repvgg.data.files import store
from repvgg.data.images import open_image
from repvgg.data.scan import find
from repvgg.data.sets import digits
from repvgg.fusion.normalizations import is_normalization

Row = dict[str, Any]


def load_images(root: str | None) -> tuple[Stored, Stored, DataContract, Augmentation]:
    """Training and test images, their contract, and how to augment them."""
    if root is None:
        data = digits()
        assert data.augment is not None
        test = Stored(*(torch.cat(both) for both in zip(data.val, data.test, strict=True)))
        return data.train, test, data.contract, data.augment
    from torchvision.transforms import v2

    paths, labels, classes = find(Path(root) / "train")
    size = open_image(paths[0]).size[::-1]
    train = store(paths, labels, size)
    test = store(*find(Path(root) / "test", classes)[:2], size)
    pixels = to_float(train.images)
    contract = DataContract(
        classes=classes,
        in_channels=3,
        image_size=size,
        mean=tuple(pixels.mean((0, 2, 3)).tolist()),
        std=tuple(pixels.std((0, 2, 3)).clamp_min(1 / 255).tolist()),  # a channel may be constant
        interpolation="bilinear",
    )
    transform = v2.Compose([v2.RandomCrop(size, padding=size[0] // 8), v2.RandomHorizontalFlip()])

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            return torch.stack([transform(image) for image in images])

    return train, test, contract, augment


def subset(images: Stored, share: float, seed: int) -> Stored:
    """A share of every class, at least one image, drawn by the seed."""
    labels = images.labels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rows = []
    for label in labels.unique():
        of_class = order[labels[order] == label]
        rows.append(of_class[: max(1, round(share * len(of_class)))])
    kept = torch.cat(rows).sort().values
    return Stored(images.images[kept], labels[kept])


def run(job: Callable[..., Row], calls: Sequence[tuple], path: Path, *, workers: int) -> None:
    """Make every call in processes of one thread, and append its row to a CSV file when it ends.

    What was written stays when the study is stopped; the caller leaves out what `read` finds.
    """
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=start_worker
    )
    try:
        futures = [pool.submit(job, *call) for call in calls]
        ended = concurrent.futures.as_completed(futures)
        for future in tqdm(ended, total=len(calls), unit="run", smoothing=0.05):
            append(path, future.result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def fit(module: Any, data: Any, steps: int, *callbacks: Any) -> None:
    """Train for a number of steps on the CPU, in silence."""
    import lightning as L

    L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=list(callbacks),
    ).fit(module, datamodule=data)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of the file; a last line that was cut short is taken off it."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    return list(csv.DictReader(whole.decode().splitlines()))


class Comparison(NamedTuple):
    """Difference of paired runs: mean, half-width of its 95 % interval, p of the paired t-test.

    The last two are NaN where the differences do not vary: too few runs say nothing of chance.
    """

    mean: float
    half_width: float
    p: float


def compare(ours: dict[str, float], theirs: dict[str, float]) -> Comparison:
    """Compare two ways by the seeds that both have."""
    from scipy import stats

    seeds = [seed for seed in ours if seed in theirs]
    first, second = (np.array([runs[seed] for seed in seeds]) for runs in (ours, theirs))
    mean = float((first - second).mean())
    if np.ptp(first - second) == 0:
        return Comparison(mean, math.nan, math.nan)
    test = stats.ttest_rel(first, second)
    return Comparison(mean, float(test.confidence_interval().high) - mean, float(test.pvalue))


def require_packages() -> None:
    """Say what to install now and not after hours."""
    try:
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{error.name} is missing: type pip install -e ".[study]"') from error


def machine() -> str:
    """Processor and versions, for the reader of a table."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor()}, {os.cpu_count()} processors, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def versions(*packages: str) -> str:
    """Those of packages that are installed."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


@torch.no_grad()
def settle(network: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics and weights far from fresh ones, which hide every error."""
    for module in network.modules():
        if is_normalization(module) and isinstance(module.running_mean, Tensor):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.2, 4)
            if isinstance(module.weight, Tensor):
                module.weight.uniform_(0.3, 1.5)
                module.weight.mul_(torch.randn_like(module.weight).sign())
                module.bias.normal_(0, 0.5)
    return network.eval()


def start_worker() -> None:
    """Set a process up for runs of one thread, without messages."""
    torch.set_num_threads(1)
    quieten()


def quieten() -> None:
    """Without what Lightning says of every run."""
    import logging
    import warnings

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=r"You defined a `validation_step` but have no")


def append(path: Path, row: Row) -> None:
    """Add a row to a CSV file, and its head to a new one."""
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())
