"""What a run prints: what it is, why it stopped, what came out."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch.loggers import TensorBoardLogger

from repvgg import cli
from repvgg.training import processes, runs
from repvgg.training.classifier import Diverged, parameter_groups
from repvgg.training.schedule import Steps
from repvgg.training.settings import LearningRate, Settings, is_emulated


def warn_of_emulation(settings: Settings) -> None:
    if is_emulated(settings.trainer) and processes.rank() == 0:
        print(
            "trainer.precision=bf16-mixed: this processor has no instructions for it and emulates "
            "them, many times slower than 32-true",
            file=sys.stderr,
        )


def describe(
    settings: Settings, module: Any, steps: Steps, rate: LearningRate, folder: Path
) -> str:
    """What the run is, before it starts."""
    count = sum(parameter.numel() for parameter in module.parameters())
    lines = [
        f"{settings.model['name']}: {count / 1e6:.2f} M parameters, {steps.total} steps of "
        f"{steps.images} images, {describe_rdrop(module)}, into {folder}",
        f"learning rate {rate.scaled:.4g}{rate.explained}",
        f"{'weight decay':<13}{'tensors':>8}{'parameters':>12}",
    ]
    for group in parameter_groups(module.net, module.weight_decay):
        sizes = [parameter.numel() for parameter in group["params"]]
        lines.append(f"{group['weight_decay']:<13.4g}{len(sizes):>8}{sum(sizes):>12,}")
    return "\n".join(lines)


def describe_rdrop(module: Any) -> str:
    """What R-Drop does in this run, and what it costs."""
    rdrop = f"R-Drop {module.rdrop:g}" if module.rdrop > 0 else "no R-Drop"
    if module.rdrop == 0:
        return rdrop
    if module.noise.trunk:
        return f"{rdrop}, each image twice in the batch, each step at the price of two"
    return f"{rdrop} in one forward"


def show(names: Sequence[str]) -> str:
    return ", ".join(names if len(names) <= 20 else [*names[:19], f"... ({len(names)})"])


def report_stop(stopped: Any, last: Path) -> NoReturn:
    """Say why it stopped, and how to go on; the status tells a signal from a mistake."""
    path = shlex.quote(runs.relative(last))
    if isinstance(stopped, Diverged):
        kept = f"the last good checkpoint is {path}" if last.exists() else "nothing was saved yet"
        cli.fail(f"{stopped}; {kept}; try a lower optim.lr or trainer.gradient_clip_val=1")
    saved = f"saved {path}; resume with: {cli.command('train')} resume={path}"
    message = f"{stopped}; {saved if last.exists() else 'nothing was saved yet'}"
    cli.fail(message, 128 + stopped.signum if hasattr(stopped, "signum") else 1)


def report(metrics: Any, data: Any, best: Path) -> None:
    """What came out, and what to type next."""
    for part in (data.train, data.val, *([data.test] if data.has_test else [])):
        if unreadable := sorted(getattr(part, "unreadable", ())):
            print(f"{len(unreadable)} images could not be read; others took their place:")
            print(*unreadable, sep="\n")
    checkpoint_path = shlex.quote(runs.relative(best))
    if metrics:
        what = "test accuracy" if data.has_test else "validation accuracy of the checkpoint"
        why = "" if data.has_test else "; these images chose the checkpoint, there are no others"
        print(f"{what} {metrics['test/accuracy']:.4f}, loss {metrics['test/loss']:.4f}{why}")
    print(f"checkpoint    {checkpoint_path}")
    print(f"deploy it     {cli.command('deploy')} ckpt={checkpoint_path}")


def show_logs(loggers: list[Any], folder: Path) -> None:
    """What to type to see the curves, where TensorBoard has them."""
    if any(isinstance(logger, TensorBoardLogger) for logger in loggers):
        own = folder.is_relative_to(cli.start_folder() / runs.RUNS)
        logs = str(runs.RUNS) if own else runs.relative(folder)
        print(f"watch it      tensorboard --logdir {shlex.quote(logs)}")


def log_hyperparameters(logger: Any, settings: dict[str, Any], metrics: Any) -> None:
    """Tell a logger what the run was, with how it ended where it takes that."""
    if isinstance(logger, TensorBoardLogger):
        logger.log_hyperparams(settings, metrics)
    else:
        logger.log_hyperparams(settings)
    logger.finalize("success")


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as TensorBoard takes them: a.b.c -> a number or a string."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, bool):
            flat[prefix + key] = "on" if value else "off"
        else:
            flat[prefix + key] = value if isinstance(value, int | float) else str(value)
    return flat
