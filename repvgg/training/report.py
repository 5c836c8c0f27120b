"""What a run prints: what it is, why it stopped, and its results."""

import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import lightning as L
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

import repvgg
from repvgg import cli
from repvgg.checks import escape
from repvgg.data.batches import WorkersDied
from repvgg.data.module import ImageData
from repvgg.models.size import Size
from repvgg.signals import Interrupted
from repvgg.terminal import Facts
from repvgg.training import runs
from repvgg.training.classifier import Classifier
from repvgg.training.divergence import Diverged
from repvgg.training.resuming import recorded_choices
from repvgg.training.schedule import Steps
from repvgg.training.settings import LearningRate, Settings, TrainerArguments, is_emulated


def warn_of_pictures(what: str, reason: str) -> None:
    print(escape(f"TensorBoard shows no {what}: {reason}"), file=sys.stderr)


def warn_of_emulation(arguments: TrainerArguments) -> None:
    if is_emulated(arguments):
        print(
            "trainer.precision=bf16-mixed: this CPU has no instructions for it and emulates them, "
            "many times slower than 32-true",
            file=sys.stderr,
        )


def describe_run(
    settings: Settings,
    name: str,
    data: ImageData,
    module: Classifier,
    steps: Steps,
    rate: LearningRate,
    sizes: tuple[Size, Size | None],
    trainer: L.Trainer,
    folder: Path,
) -> Facts:
    """What a run is, before it starts.

    Args:
        name: of the network.
        sizes: of the network before and after folding; None if it cannot be folded or counted.
    """
    # A resumed run is composed anew: the choices of that are today's defaults.
    choices = recorded_choices(folder) if settings.resume else HydraConfig.get().runtime.choices
    source = choices.get("data") or settings.data["_target_"]
    height, width = data.contract.image_size
    channels = data.contract.in_channels
    pixels = f"{height}x{width} pixels, {_count(channels, 'channel')}"
    trained, folded = (f"{_size(size)}" if size else "not folded" for size in sizes)
    form = f", folded {folded}" if sizes[1] else ""
    optimizer = settings.optim.name if settings.optimizer is None else settings.optimizer.name
    recipe = _choices("experiment/default", "experiment", "hparams_search", "debug")
    commit = find_commit(cli.start_folder()) or find_commit(Path(repvgg.__file__).parent)
    return [
        ("data", f"{source}: {data.summary().splitlines()[0]}, {pixels}"),
        ("model", f"{name}: {trained}{form}"),
        (
            "optimizer",
            f"{optimizer}, peak learning rate {rate.scaled:.4g}{rate.explained}, weight "
            f"decay {module.weight_decay:g}",
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
    ]


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
