"""The optimizer and the learning rate schedule of a run, if they are not the default ones."""

import functools
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import lightning as L
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from repvgg.targets import rejections, signature_of
from repvgg.training.parts import Part
from repvgg.training.schedule import Steps

Groups = list[dict[str, Any]]  # parameter groups, as torch's optimizers take them

# Arguments that schedulers of torch, transformers and timm name for their length.
LENGTHS = ("total_steps", "num_training_steps", "T_max", "t_initial")
# Schedulers that take one of these are made for optimizer steps, the others for epochs.
BY_STEP = {"total_steps", "num_training_steps", "step_size_up"}


class MakeOptimizer(Protocol):
    """Makes the optimizer from parameter groups."""

    def __call__(self, groups: Groups, /, *, lr: float, weight_decay: float) -> Optimizer: ...


@runtime_checkable
class TimmScheduler(Protocol):
    """A scheduler of timm, which is a function of the epoch or of the step."""

    def step(self, epoch: int, metric: float | None = None) -> None: ...

    def step_update(self, num_updates: int, metric: float | None = None) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


Scheduler = LRScheduler | TimmScheduler


class MakeScheduler(NamedTuple):
    """Makes the schedule of a run.

    Attributes:
        make: from the optimizer.
        interval: "step" or "epoch", after which the rate changes.
        length: of the run, in such intervals.
    """

    make: Callable[[Optimizer], Scheduler]
    interval: str
    length: int


def optimizer_maker(part: Part) -> MakeOptimizer:
    """What makes the optimizer that a configuration names."""
    return functools.partial(_make_optimizer, part)


def scheduler_maker(part: Part, interval: str | None, steps: Steps) -> MakeScheduler:
    """What makes the schedule that a configuration names.

    Arguments for the length of the run (`LENGTHS`) and for peak rates (`max_lr`) are filled in,
    unless the configuration has them.

    Args:
        interval: None takes that for which the scheduler is made.
    """
    signature = signature_of(part.function())
    known = set(signature.parameters) if signature else set()
    if interval is None:
        interval = "step" if known & BY_STEP else "epoch"
    length = steps.total if interval == "step" else math.ceil(steps.total / steps.epoch)
    filled: dict[str, object] = {name: length for name in LENGTHS if name in known}
    if "t_in_epochs" in known:
        filled["t_in_epochs"] = interval == "epoch"
    if "steps_per_epoch" in part.arguments:  # another way to give the length
        filled.pop("total_steps", None)
    return MakeScheduler(
        functools.partial(_make_scheduler, part, filled, "max_lr" in known), interval, length
    )


def try_schedule(part: Part, maker: MakeScheduler, optimizer: Optimizer) -> None:
    """Make a schedule and take its first steps, which compute with its arguments.

    Raises:
        ArgumentError: a library rejects an argument. Errors of the user's own code pass through.
    """
    scheduler = maker.make(optimizer)
    with warnings.catch_warnings(), rejections(part.function(), part.key, part.name):
        warnings.simplefilter("ignore")  # torch's: the optimizer has taken no step
        for number in range(1, min(maker.length, 2) + 1):
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(1.0)
            else:
                step_scheduler(scheduler, number if maker.interval == "step" else None, number)


def for_lightning(
    optimizer: Optimizer, scheduler: Scheduler, interval: str
) -> OptimizerLRSchedulerConfig:
    """What `configure_optimizers` returns."""
    config: dict[str, Any] = {"scheduler": scheduler, "interval": interval}
    if isinstance(scheduler, ReduceLROnPlateau):  # see `step_on_plateau`
        config |= {"interval": "epoch", "reduce_on_plateau": False, "frequency": sys.maxsize}
    return cast(OptimizerLRSchedulerConfig, {"optimizer": optimizer, "lr_scheduler": config})


def step_scheduler(scheduler: LRScheduler | TimmScheduler, step: int | None, epoch: int) -> None:
    """Set the rate after an optimizer step, or after an epoch.

    Args:
        step: of how many optimizer steps; None after an epoch.
        epoch: that is running.
    """
    if isinstance(scheduler, LRScheduler):
        scheduler.step()
    elif step is not None:
        scheduler.step_update(step)
    else:
        scheduler.step(epoch + 1)


def step_on_plateau(scheduler: object, trainer: L.Trainer) -> None:
    """Step ReduceLROnPlateau at the end of an epoch that was validated.

    It watches val/loss, or val/accuracy with mode=max. Lightning would step it after the
    checkpoint of the epoch, so a resumed run would miss one step.
    """
    validated = (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0
    if isinstance(scheduler, ReduceLROnPlateau) and validated:
        name = "val/loss" if scheduler.mode == "min" else "val/accuracy"
        if name in trainer.callback_metrics:
            scheduler.step(trainer.callback_metrics[name].item())


def follow_rates(
    checkpoint: dict[str, Any], groups: Groups, lr: float, factor: float | None
) -> None:
    """Put the weight decay and the rates of parameter groups in the place of those saved.

    Groups that the user's own optimizer made itself have other names or none. They keep their
    weight decay, and their rates change as much as `lr`.

    Args:
        lr: of groups without their own.
        factor: share of the peak rate at the saved step; None keeps the saved rates.
    """
    named = {group["name"]: group for group in groups}
    before = checkpoint.get("hyper_parameters", {}).get("lr", lr)  # 0.1 has none
    for optimizer in checkpoint.get("optimizer_states", ()):
        rates = []
        for group in optimizer["param_groups"]:
            given = named.get(group.get("name"))
            if given is not None:
                group["weight_decay"] = given["weight_decay"]
                rates.append(given.get("lr", lr))
            else:
                peak = group.get("initial_lr", group["lr"])
                rates.append(peak if before == lr else peak * lr / before)
            if factor is not None:
                group["lr"], group["initial_lr"] = rates[-1] * factor, rates[-1]
        for scheduler in checkpoint.get("lr_schedulers", ()) if factor is not None else ():
            scheduler["base_lrs"] = rates


def _make_optimizer(part: Part, groups: Groups, *, lr: float, weight_decay: float) -> Optimizer:
    made = part.call(groups, lr=lr, weight_decay=weight_decay)
    if not isinstance(made, Optimizer):
        raise part.wrong_result(made, "a torch.optim.Optimizer")
    return made


def _make_scheduler(
    part: Part, filled: dict[str, object], has_peak: bool, optimizer: Optimizer
) -> Scheduler:
    peak = {"max_lr": [group["lr"] for group in optimizer.param_groups]} if has_peak else {}
    made = part.call(optimizer, **peak, **filled)
    if not isinstance(made, LRScheduler | TimmScheduler):
        raise part.wrong_result(made, "a torch.optim.lr_scheduler.LRScheduler")
    return made
