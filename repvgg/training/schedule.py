"""How many optimizer steps a run takes: the learning rate reaches 0 after the last of them."""

import math
from typing import Any, NamedTuple, cast

from repvgg.cli import Config
from repvgg.data.module import ImageData
from repvgg.training.settings import Settings

LENGTH_KEYS = (  # arguments of lightning.Trainer that set the number of steps
    "max_epochs",
    "max_steps",
    "accumulate_grad_batches",
    "limit_train_batches",
    "overfit_batches",
    "fast_dev_run",
)


class Schedule(NamedTuple):
    """Optimizer steps of a run.

    Attributes:
        total: of the whole run.
        epoch: of one epoch.
        batches: of one epoch, on each device.
    """

    total: int
    epoch: int
    batches: int


def optimizer_steps(
    num_batches: int,
    *,
    max_epochs: int,
    max_steps: int = -1,
    accumulate_grad_batches: int = 1,
    limit_train_batches: float | None = None,
    overfit_batches: float = 0.0,
    fast_dev_run: bool | int = False,
) -> Schedule:
    """Count the optimizer steps that a `lightning.Trainer` with these arguments takes.

    The last steps of an epoch that accumulate fewer batches count as one.

    Args:
        num_batches: in the training data, of each device.
        max_steps: -1 is no limit.
        limit_train_batches, overfit_batches: an integer is a number of batches, a float in [0, 1]
            a share of them, rounded down. 0 turns `overfit_batches` off.
        fast_dev_run: that many batches of one epoch; True is 1.

    Raises:
        ValueError: no step would be taken, or a share is not one.
    """
    limit = 1.0 if limit_train_batches is None else limit_train_batches
    key = "trainer.limit_train_batches"
    if overfit_batches > 0:
        limit, key = overfit_batches, "trainer.overfit_batches"
    elif fast_dev_run:
        limit = int(fast_dev_run)
    if limit < 0 or (limit > 1 and limit % 1):
        raise ValueError(f"{key}={limit}: must be a share in [0, 1] or a number of batches")
    whole = isinstance(limit, int) or limit > 1
    batches = min(num_batches, int(limit) if whole else int(num_batches * limit))
    epoch = math.ceil(batches / accumulate_grad_batches)
    total = epoch * (1 if fast_dev_run else max_epochs)
    most = int(fast_dev_run) if fast_dev_run else max_steps
    if most >= 0:
        total = min(total, most)
    if total == 0:
        given = f"{key}={limit}" if batches == 0 else f"trainer.max_steps={most}"
        raise ValueError(f"{given}: trains on none of the {num_batches} batches of an epoch")
    return Schedule(total, epoch, batches)


def from_trainer_arguments(num_batches: int, arguments: Config) -> Schedule:
    """`optimizer_steps` with those arguments of a trainer that set the number of steps."""
    given = {key: arguments[key] for key in LENGTH_KEYS if arguments.get(key) is not None}
    return optimizer_steps(num_batches, **cast(dict[str, Any], given))


class Steps(NamedTuple):
    """The length of a run.

    Attributes:
        total: optimizer steps of the run.
        epoch: optimizer steps of an epoch.
        warmup: optimizer steps in which the learning rate grows.
        rdrop_warmup: optimizer steps in which the weight of R-Drop grows.
        images: in an optimizer step of all devices.
        batches: of each device in an epoch.
    """

    total: int
    epoch: int
    warmup: int
    rdrop_warmup: int
    images: int
    batches: int


def count_steps(settings: Settings, data: ImageData, devices: int) -> Steps:
    """Count the steps of a run on all devices together.

    Raises:
        ValueError: a batch exceeds the data, no step is taken, or a warm-up exceeds the run.
    """
    trainer = settings.trainer
    data.check_batch(data.batch_size * devices)
    batches = len(data.train.labels) // (data.batch_size * devices)
    counted = from_trainer_arguments(batches, trainer.scalars())
    images = data.batch_size * devices * trainer.accumulate_grad_batches
    own = settings.scheduler is not None  # it has no warm-up of ours
    epochs = (0 if own else settings.optim.warmup_epochs, settings.rdrop_warmup)
    warmup, rdrop_warmup = (round(number * counted.epoch) for number in epochs)
    if trainer.others.get("fast_dev_run"):
        warmup, rdrop_warmup = min(warmup, counted.total), min(rdrop_warmup, counted.total)
    if max(warmup, rdrop_warmup) > counted.total:
        raise ValueError(
            f"optim.warmup_epochs={epochs[0]:g} rdrop_warmup={epochs[1]:g}: longer than the "
            f"{counted.total} steps that run, of {counted.epoch} in an epoch; pass for example "
            "optim.warmup_epochs=0 rdrop_warmup=0"
        )
    return Steps(counted.total, counted.epoch, warmup, rdrop_warmup, images, counted.batches)
