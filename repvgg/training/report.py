"""What a run prints: what it is, why it stopped, and its results."""

import math
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn, cast

import lightning as L
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

import repvgg
from repvgg import cli
from repvgg.checks import did_you_mean
from repvgg.data.batches import WorkersDied
from repvgg.data.module import ImageData
from repvgg.models.size import Size
from repvgg.signals import Interrupted
from repvgg.training import runs
from repvgg.training.checkpoints import read_best
from repvgg.training.classifier import Classifier
from repvgg.training.divergence import Diverged
from repvgg.training.groups import parameter_groups
from repvgg.training.schedule import Steps
from repvgg.training.settings import LearningRate, Settings, TrainerArguments, is_emulated

NAME_WIDTH = 14

Facts = list[tuple[str, str]]  # names and values, one a line


def warn_of_emulation(arguments: TrainerArguments) -> None:
    if is_emulated(arguments):
        print(
            "trainer.precision=bf16-mixed: this CPU has no instructions for it and emulates them, "
            "many times slower than 32-true",
            file=sys.stderr,
        )


def describe_run(
    settings: Settings,
    data: ImageData,
    module: Classifier,
    steps: Steps,
    rate: LearningRate,
    sizes: tuple[Size, Size | None],
    trainer: L.Trainer,
    folder: Path,
) -> Facts:
    """What a run is, before it starts."""
    choices = HydraConfig.get().runtime.choices
    source = choices.get("data") or settings.data["_target_"]
    height, width = data.contract.image_size
    channels = data.contract.in_channels
    pixels = f"{height}x{width} pixels, {_count(channels, 'channel')}"
    trained, folded = (f"{_size(size)}" if size else "not folded" for size in sizes)
    form = f", folded {folded}" if sizes[1] else ""
    groups = parameter_groups(module.net, module.weight_decay)
    counts = [sum(part.numel() for part in group["params"]) for group in groups]
    recipe = _choices("experiment/default", "experiment", "hparams_search", "debug")
    place = ("folder", runs.relative(folder))
    commit = find_commit(cli.start_folder()) or find_commit(Path(repvgg.__file__).parent)
    return [
        ("data", f"{source}: {data.summary().splitlines()[0]}, {pixels}"),
        ("model", f"{settings.model['name']}: {trained}{form}"),
        (
            "optimizer",
            f"{settings.optim.name}, peak learning rate {rate.scaled:.4g}{rate.explained}, weight "
            f"decay {module.weight_decay:g} on {counts[0]:,} of {sum(counts):,} parameters",
        ),
        (
            "schedule",
            f"{_count(math.ceil(steps.total / steps.epoch), 'epoch')}, "
            f"{_count(steps.total, 'step')} of {steps.images} images, {describe_rdrop(module)}",
        ),
        *([("recipe", recipe)] if recipe and settings.resume is None else []),
        (
            "device",
            f"{_device(trainer)}, precision {settings.trainer.precision}, seed {settings.seed}",
        ),
        (
            "versions",
            f"repvgg {repvgg.__version__}, torch {torch.__version__}, lightning {L.__version__}"
            f"{', commit ' if commit else ''}{commit}",
        ),
        *([] if settings.trainer.others.get("fast_dev_run") else [place]),
    ]


def print_facts(facts: Facts) -> None:
    """Print a name and a value on each line."""
    for name, value in facts:
        print(f"{name:<{NAME_WIDTH}}{value}")


def _size(size: Size) -> str:
    macs = "" if size.macs is None else f" and {_short(size.macs)} MACs"
    return f"{_short(size.parameters)} parameters{macs}"


def _short(count: int) -> str:
    """1,513,000,000 -> 1.51 G."""
    for unit, name in ((1e9, " G"), (1e6, " M")):
        if count >= unit:
            return f"{count / unit:.2f}{name}"
    return f"{count / 1e6:.2f} M" if count >= 1e4 else f"{count:,}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _choices(*groups: str) -> str:
    """The chosen configs of some groups, as they are passed on the command line."""
    choices = HydraConfig.get().runtime.choices
    loader = GlobalHydra.instance().config_loader()
    named = [
        f"{group}={choices[group]}"
        for group in groups
        if choices.get(group) in loader.get_group_options(group)
    ]
    return ", ".join(named)


def _device(trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cpu":
        name = f"cpu, {_count(torch.get_num_threads(), 'thread')}"
    else:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{trainer.world_size} x {name}" if trainer.world_size > 1 else name


def find_commit(folder: Path) -> str:
    """The commit of a git repository, and whether its files differ; "" outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return f"{commit} + changes" if git("status", "--porcelain", "-uno") else commit
    except (OSError, subprocess.SubprocessError):  # no git, no repository, no commit
        return ""


def describe_rdrop(module: Classifier) -> str:
    """What R-Drop does in this run, and what it costs."""
    if module.rdrop == 0 or module.stochastic is None:
        return "no R-Drop"
    if module.stochastic.backbone:
        return (
            f"R-Drop {module.rdrop:g}, each image twice in the batch, each step at the cost of two"
        )
    return f"R-Drop {module.rdrop:g} in one forward"


def report_stop(stopped: Interrupted | Diverged | WorkersDied, last: Path) -> NoReturn:
    """Say why the run stopped and how to resume it.

    Raises:
        ValueError: it failed; in a sweep the other runs start.
        SystemExit: a signal stopped it, whose number + 128 is the status.
    """
    path = shlex.quote(runs.relative(last))
    if isinstance(stopped, Diverged):
        kept = f"the last good checkpoint is {path}" if last.exists() else "nothing was saved yet"
        raise ValueError(
            f"{stopped}; {kept}; try a lower optim.lr or trainer.gradient_clip_val=1"
        ) from stopped
    saved = f"saved {path}; resume with: {cli.command('train')} resume={path}"
    message = f"{stopped}; {saved if last.exists() else 'nothing was saved yet'}"
    if isinstance(stopped, WorkersDied):
        raise ValueError(message) from stopped
    cli.fail(message, 128 + stopped.signum)


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
    trainer: L.Trainer, tested: Mapping[str, float], clock: Clock, images: int, best: Path
) -> dict[str, object]:
    """What a run came to.

    Args:
        tested: metrics of the test.
        images: in a step.
        best: the checkpoint that was tested.
    """
    found = read_best(best) if best.exists() else None
    return {
        "metrics": {**(found.metrics if found else {}), **tested},
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
            print(*unreadable, sep="\n")
    path, folder = shlex.quote(runs.relative(best)), best.parent.parent
    facts: Facts = []
    if results["seconds"]:  # spawned processes measure their own time alone
        speed = f"{results['images_per_second']:,.0f} images per second"
        facts.append(("trained for", f"{results['seconds']} s, {speed}"))
    if epoch is not None:
        last, accuracy = results["last_epoch"], metrics["val/accuracy"]
        facts.append(("best epoch", f"{epoch}/{last}, validation accuracy {accuracy:.4f}"))
    if "test/accuracy" in metrics:
        why = "" if data.has_test else " on validation images, which chose the checkpoint"
        top5 = metrics.get("test/accuracy_top5")
        shown = "" if top5 is None else f", top-5 {top5:.4f}"
        value = f"{metrics['test/accuracy']:.4f}{shown}, loss {metrics['test/loss']:.4f}{why}"
        facts.append(("test accuracy" if data.has_test else "accuracy", value))
    network = "" if target is None else f" network={target}"
    facts += [
        ("results", shlex.quote(runs.relative(folder / runs.RESULTS))),
        ("checkpoint", path),
        ("deploy it", f"{cli.command('deploy')} ckpt={path}{network}"),
    ]
    if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
        own = folder.is_relative_to(cli.start_folder() / runs.RUNS)
        logs = str(runs.RUNS) if own else runs.relative(folder)
        facts.append(("watch it", f"tensorboard --logdir {shlex.quote(logs)}"))
    print_facts(facts)
