"""What came of a run: its metrics, seconds and next commands, printed and in `results.json`."""

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from repvgg import cli, terminal
from repvgg.checks import did_you_mean, escape
from repvgg.data.module import ImageData
from repvgg.training import runs
from repvgg.training.checkpoints import read_best
from repvgg.training.classifier import Classifier
from repvgg.training.loggers import METRICS


class Clock(Callback):
    """Measures how long training takes, with validation and without."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.validating = 0.0
        self.steps = 0  # taken in this process
        self._begin = self._pause = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin, self._first_step = time.perf_counter(), trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validating += time.perf_counter() - self._pause

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = time.perf_counter() - self._begin
        self.steps = trainer.global_step - self._first_step

    def images_per_second(self, images: int) -> float:
        """Training images in a second, with `images` in a step; validation does not count."""
        return self.steps * images / max(1e-9, self.seconds - self.validating)


def check_metric(name: str, module: Classifier) -> None:
    """Check that a metric will exist once the run has ended.

    Raises:
        ValueError: it will not.
    """
    known = [
        f"{stage}/{metric}"
        for stage, held in module.evaluation.items()
        for metric in cast(nn.ModuleDict, held)
    ]
    if name not in known:
        raise ValueError(
            f"objective={name}: there is no such metric; {did_you_mean(name, known)}"
            f"allowed are {', '.join(known)}"
        )


def collect_results(
    trainer: L.Trainer,
    tested: Mapping[str, float],
    clock: Clock,
    images: int,
    best: Path,
    *,
    tested_on: str,
) -> dict[str, object]:
    """What a run came to.

    Args:
        tested: metrics of the test.
        images: in a step.
        best: the checkpoint that was tested.
        tested_on: "test", or "validation" if there are no test images.
    """
    found = read_best(best) if best.exists() else None
    return {
        "metrics": {**(found.metrics if found else {}), **tested},
        "tested_on": tested_on,
        "best_epoch": found.epoch if found and found.metrics else None,
        "last_epoch": trainer.current_epoch - 1,
        "seconds": round(clock.seconds, 2),
        "images_per_second": round(clock.images_per_second(images), 1),
        "overrides": list(HydraConfig.get().overrides.task),
    }


def report_results(
    trainer: L.Trainer,
    results: Mapping[str, object],
    data: ImageData,
    best: Path,
    *,
    target: object = None,
) -> None:
    """Print the results and the next commands.

    Args:
        target: the dotted name of the user's own network.
    """
    metrics = cast(Mapping[str, float], results["metrics"])
    epoch = results["best_epoch"]
    if epoch is None:
        print("no validation ran: best.ckpt is the last checkpoint")
    for part in (data.train, data.val, *([data.test] if data.has_test else [])):
        if unreadable := sorted(getattr(part, "unreadable", ())):
            print(f"{len(unreadable)} images could not be read; others took their place:")
            print(*map(escape, unreadable), sep="\n")
    path, folder = shlex.quote(runs.relative(best)), best.parent.parent
    facts: list[tuple[str, str]] = []
    if results["seconds"]:  # spawned processes measure their own time alone
        speed = f"{results['images_per_second']:,.0f} images per second"
        facts.append(("trained for", f"{results['seconds']} s, {speed}"))
    if epoch is not None:
        last, accuracy = results["last_epoch"], metrics["val/accuracy"]
        facts.append(
            ("best epoch", f"{epoch} (of 0 to {last}), validation accuracy {accuracy:.4f}")
        )
    if "test/accuracy" in metrics:
        why = "" if data.has_test else " on validation images, which chose the checkpoint"
        top5 = metrics.get("test/accuracy_top5")
        shown = "" if top5 is None else f", top-5 {top5:.4f}"
        value = f"{metrics['test/accuracy']:.4f}{shown}, loss {metrics['test/loss']:.4f}{why}"
        facts.append(("test accuracy" if data.has_test else "accuracy", value))
    network = "" if target is None else f" network={target}"
    commands = [("deploy it", f"{cli.command('deploy')} ckpt={path}{network}")]
    alone = HydraConfig.get().mode != RunMode.MULTIRUN  # the table of a sweep names the folders
    if alone:
        checkpoints = (best, folder / runs.LAST)
        kept = [one.relative_to(folder) for one in checkpoints if one.exists()]
        commands = [
            ("folder", shlex.quote(runs.relative(folder))),
            ("files in it", ", ".join(map(str, (*kept, runs.RESULTS, METRICS)))),
            *commands,
        ]
    if alone and any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
        own = folder.is_relative_to(cli.start_folder() / cli.RUNS)
        logs = str(cli.RUNS) if own else runs.relative(folder)
        commands.append(("watch it", f"tensorboard --logdir {shlex.quote(logs)}"))
    terminal.print_facts("results", facts, commands)
