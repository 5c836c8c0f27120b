"""What a run prints: what it is, why it stopped, and its results."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from repvgg import cli
from repvgg.data.batches import WorkersDied
from repvgg.data.module import ImageData
from repvgg.signals import Interrupted
from repvgg.training import runs
from repvgg.training.classifier import Classifier
from repvgg.training.divergence import Diverged
from repvgg.training.groups import parameter_groups
from repvgg.training.schedule import Steps
from repvgg.training.settings import LearningRate, TrainerArguments, is_emulated


def warn_of_emulation(arguments: TrainerArguments) -> None:
    if is_emulated(arguments):
        print(
            "trainer.precision=bf16-mixed: this CPU has no instructions for it and emulates them, "
            "many times slower than 32-true",
            file=sys.stderr,
        )


def describe_recipe() -> list[str]:
    """A line that names the configs of strides, learning rate and epochs, if there are any."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    choices = HydraConfig.get().runtime.choices
    loader = GlobalHydra.instance().config_loader()
    named = [
        f"{group}={choices[group]}"
        for group in ("experiment/default", "experiment")
        if choices.get(group) in loader.get_group_options(group)
    ]
    return [f"recipe {', '.join(named)}"] if named else []


def print_run(name: object, module: Classifier, steps: Steps, rate: LearningRate, to: Path) -> None:
    """Print what the run is, before it starts."""
    count = sum(parameter.numel() for parameter in module.parameters())
    print(
        f"{name}: {count / 1e6:.2f} M parameters, {steps.total} steps of {steps.images} images, "
        f"{describe_rdrop(module)}, into {to}"
    )
    print(f"learning rate {rate.scaled:.4g}{rate.explained}")
    print(f"{'weight decay':<13}{'tensors':>8}{'parameters':>12}")
    for group in parameter_groups(module.net, module.weight_decay):
        sizes = [parameter.numel() for parameter in group["params"]]
        print(f"{group['weight_decay']:<13.4g}{len(sizes):>8}{sum(sizes):>12,}")


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
    """Print why the run stopped and how to resume it; exit with 128 + the number of a signal."""
    path = shlex.quote(runs.relative(last))
    if isinstance(stopped, Diverged):
        kept = f"the last good checkpoint is {path}" if last.exists() else "nothing was saved yet"
        cli.fail(f"{stopped}; {kept}; try a lower optim.lr or trainer.gradient_clip_val=1")
    saved = f"saved {path}; resume with: {cli.command('train')} resume={path}"
    message = f"{stopped}; {saved if last.exists() else 'nothing was saved yet'}"
    cli.fail(message, 128 + stopped.signum if isinstance(stopped, Interrupted) else 1)


def report_results(
    trainer: L.Trainer,
    metrics: Mapping[str, float],
    data: ImageData,
    best: Path,
    *,
    target: object = None,
) -> None:
    """Print the results and the next commands.

    Args:
        target: the dotted name of the user's own network.
    """
    keeper = trainer.checkpoint_callback
    if isinstance(keeper, ModelCheckpoint) and keeper.best_model_score is None:
        print("no validation ran: best.ckpt is the last checkpoint")
    for part in (data.train, data.val, *([data.test] if data.has_test else [])):
        if unreadable := sorted(getattr(part, "unreadable", ())):
            print(f"{len(unreadable)} images could not be read; others took their place:")
            print(*unreadable, sep="\n")
    checkpoint_path = shlex.quote(runs.relative(best))
    if metrics:
        what = "test accuracy" if data.has_test else "validation accuracy of the checkpoint"
        why = "" if data.has_test else "; these images chose the checkpoint, there are no others"
        top5 = metrics.get("test/accuracy_top5")
        shown = "" if top5 is None else f", top-5 {top5:.4f}"
        print(f"{what} {metrics['test/accuracy']:.4f}{shown}, loss {metrics['test/loss']:.4f}{why}")
    print(f"checkpoint    {checkpoint_path}")
    network = "" if target is None else f" network={target}"
    print(f"deploy it     {cli.command('deploy')} ckpt={checkpoint_path}{network}")
    if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
        folder = best.parent.parent
        own = folder.is_relative_to(cli.start_folder() / runs.RUNS)
        logs = str(runs.RUNS) if own else runs.relative(folder)
        print(f"watch it      tensorboard --logdir {shlex.quote(logs)}")
