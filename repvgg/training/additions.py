"""What the settings add to a run or replace in it: built, tried before the start, described."""

from pathlib import Path
from typing import NamedTuple, cast

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateFinder
from torch import Tensor
from torch.nn.functional import one_hot

from repvgg.checks import did_you_mean
from repvgg.cli import Config
from repvgg.targets import make_importable
from repvgg.training import resuming
from repvgg.training.classifier import Classifier
from repvgg.training.criterion import check_loss
from repvgg.training.loggers import check_loggers
from repvgg.training.optimizers import try_schedule
from repvgg.training.parts import Part
from repvgg.training.repopt import layers_of
from repvgg.training.settings import Settings


class Parts(NamedTuple):
    """What the settings add to a trainer, each built from its `_target_`."""

    callbacks: list[Callback]
    plugins: list[object]


def build_parts(settings: Settings) -> Parts:
    """Build the callbacks and plugins of the settings, and check the packages of the loggers.

    Raises:
        ValueError: one cannot be built, or it cannot work in a run.
    """
    check_loggers(settings.logger)
    return Parts(
        [_build_callback(part) for part in settings.callbacks.values()],
        _instances(settings.trainer.plugins),
    )


def check_parts(
    module: Classifier, settings: Settings, parts: Parts, images: Tensor, labels: Tensor
) -> None:
    """Try the optimizer, the schedule and the loss of the settings, before anything is written.

    Early stopping must watch a metric of the run, or have strict=false.

    Raises:
        ValueError: one of them is not what it must be. Their own errors pass through.
    """
    optimizer = module.make_optimizer()
    if settings.scheduler is not None and module.scheduler is not None:
        try_schedule(settings.scheduler, module.scheduler, optimizer)
    if settings.loss is not None and module.loss is not None:
        kinds = [labels]  # validation has classes, also beside mixtures
        if settings.mixup or settings.cutmix:
            kinds.append(one_hot(labels, module.num_classes).float())
        for targets in kinds:
            check_loss(settings.loss, module.loss, module.net, images, targets)
    validated = [f"val/{name}" for name in module.measured("val")]
    for part in parts.callbacks:
        watches = part.monitor if isinstance(part, EarlyStopping) and part.strict else validated[0]
        if watches not in validated and not watches.startswith("train/"):
            raise ValueError(
                f"callbacks: EarlyStopping watches monitor={watches}, which is not measured; "
                f"{did_you_mean(watches, validated)}allowed are {', '.join(validated)}"
            )


def check_passed(settings: Settings, folder: Path) -> None:
    """Reject keys of the command line that the user's own optimizer or schedule does not read.

    Raises:
        ValueError: one was passed.
    """
    overrides = HydraConfig.get().overrides.task
    passed = {line.lstrip("+").partition("=")[0] for line in overrides}
    optimizer, scheduler = settings.optimizer, settings.scheduler
    if optimizer is not None:
        for key in sorted(passed & {"optim.name", "optim.momentum"}):
            raise ValueError(
                f"{key}: has no effect with {optimizer.key}={optimizer.name}; pass "
                "+optimizer.KEY=VALUE"
            )
    if scheduler is not None and "optim.warmup_epochs" in passed:
        raise ValueError(
            f"optim.warmup_epochs: has no effect with {scheduler.key}={scheduler.name}, which "
            "replaces warm-up and cosine decay"
        )
    if scheduler is not None and settings.resume is not None:
        recorded = resuming.read_config(folder)
        for key, now in (
            ("optim.lr", settings.optim.lr),
            ("trainer.max_epochs", settings.trainer.max_epochs),
        ):
            section, _, name = key.partition(".")
            before = cast(Config, recorded[section]).get(name, now)
            if now != before:
                raise ValueError(
                    f"{key}={now}: a resumed {scheduler.name} continues as it was saved, with "
                    f"{key}={before}"
                )


def describe_parts(module: Classifier, settings: Settings) -> list[str]:
    """Lines for the reader on what the settings change in the training."""
    lines = []
    if settings.scheduler is not None and module.scheduler is not None:
        lines.append(f"schedule {settings.scheduler.name}, by {module.scheduler.interval}")
    if settings.loss is not None:
        lines.append(f"loss {settings.loss.name}")
    if settings.optim.layer_decay != 1:
        groups = module.parameter_groups()
        first, last = groups[0]["lr"], groups[-1]["lr"]
        lines.append(f"learning rate {first:.3g} of the first layer, {last:.3g} of the last")
    if settings.optim.repopt:
        count = len(layers_of(module.net))
        lines.append(f"repopt {count} convolutions train as 3x3, 1x1 and identity branches")
    if settings.freeze:
        sizes = [p.numel() for p in module.net.parameters() if not p.requires_grad]
        lines.append(f"frozen {', '.join(settings.freeze)}: {sum(sizes):,} parameters")
    return lines


def describe_end(parts: Parts) -> list[str]:
    """A line for each callback that stopped the run early."""
    return [
        f"{type(part).__name__} ended the run after epoch {part.stopped_epoch}: best "
        f"{part.monitor} {float(part.best_score):.4f}"
        for part in parts.callbacks
        if isinstance(part, EarlyStopping) and part.stopped_epoch > 0
    ]


def _build_callback(part: Part) -> Callback:
    made = part.call()
    if not isinstance(made, Callback):
        raise part.wrong_result(made, "a lightning.pytorch.callbacks.Callback")
    if isinstance(made, LearningRateFinder):
        raise ValueError(
            f"{part.key}={part.name}: the schedule would overwrite the rate that it finds; compare "
            "rates with -m optim.lr=0.01,0.03,0.1"
        )
    return made


def _instances(config: object) -> list[object]:
    """The objects that a configuration names: one, a list, or a dictionary of them."""
    make_importable(config)
    made = instantiate(config or [], _convert_="all")
    if isinstance(made, dict):
        return list(made.values())
    return made if isinstance(made, list) else [made]
