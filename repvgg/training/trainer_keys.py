"""Checks of the arguments that a configuration passes to `lightning.Trainer`."""

import inspect
import os
from typing import TYPE_CHECKING

from repvgg.checks import check_integer, did_you_mean, listed, wrong_value
from repvgg.cli import Config

if TYPE_CHECKING:
    from repvgg.training.settings import TrainerArguments

# Arguments of lightning.Trainer that a run sets or cannot honour, and what to pass instead.
REJECTED_TRAINER_KEYS = {
    "enable_checkpointing": "a run always keeps best.ckpt and last.ckpt",
    "barebones": "it turns off the checkpoints and the metrics that choose the best",
    "use_distributed_sampler": "the data module splits the batches among the devices",
    "reload_dataloaders_every_n_epochs": "a resumed run continues within an epoch's data",
    "default_root_dir": "pass hydra.run.dir=FOLDER",
    "max_time": "the learning rate is planned by steps; pass +trainer.max_steps=N",
    "model_registry": "a run keeps its checkpoints in its folder",
    "logger": "pass logger=csv, logger=wandb, ... or +logger.mine._target_=package.Class",
    "callbacks": "pass callbacks=early_stopping, ... or +callbacks.mine._target_=package.Class",
}
EARLY_KEYS = {  # that matter only if a callback stops the run
    "min_epochs": "nothing here stops a run early; pass trainer.max_epochs=N",
    "min_steps": "nothing here stops a run early; pass +trainer.max_steps=N",
}
SWITCHES = (
    *("enable_progress_bar", "enable_model_summary", "deterministic", "benchmark"),
    *("inference_mode", "detect_anomaly", "sync_batchnorm", "enable_autolog_hparams"),
)


def check_arguments(trainer: "TrainerArguments") -> None:
    """Reject what Lightning would accept, or reject only after hours of training.

    Raises:
        ValueError: a value is outside its range, or this machine cannot train with it.
    """
    import torch

    epochs, every = trainer.max_epochs, trainer.check_val_every_n_epoch
    check_integer("trainer.check_val_every_n_epoch", every, minimum=1, example=1)
    if every > epochs:
        raise wrong_value(
            "trainer.check_val_every_n_epoch", every, f"must be at most max_epochs={epochs}", 1
        )
    check_integer(
        "trainer.accumulate_grad_batches", trainer.accumulate_grad_batches, minimum=1, example=1
    )
    check_integer("trainer.num_nodes", trainer.num_nodes, minimum=1, example=1)
    if trainer.log_every_n_steps is not None:
        check_integer("trainer.log_every_n_steps", trainer.log_every_n_steps, minimum=0, example=50)
    on_gpu = trainer.accelerator != "cpu" and torch.accelerator.is_available()
    devices = trainer.devices
    if isinstance(devices, int) and not isinstance(devices, bool):
        here = torch.accelerator.device_count() if on_gpu else os.cpu_count() or 1
        if not (1 <= devices <= here or (devices == -1 and on_gpu)):
            allowed = f"this machine has {here} {'accelerators' if on_gpu else 'CPUs'}"
            raise wrong_value("trainer.devices", devices, allowed, 1)
    if trainer.sync_batchnorm and not on_gpu:
        allowed = "torch normalizes across devices on GPUs alone"
        raise wrong_value("trainer.sync_batchnorm", trainer.sync_batchnorm, allowed, "false")
    strategy = str(trainer.strategy)
    if strategy != "auto" and not strategy.startswith("ddp"):
        allowed = "must be auto or ddp; the largest RepVGG fits on one device"
        raise wrong_value("trainer.strategy", strategy, allowed, "ddp")
    allowed_precisions = ["32-true", "bf16-mixed", *(["16-mixed"] if on_gpu else [])]
    if trainer.precision not in allowed_precisions:
        raise wrong_value(
            "trainer.precision",
            trainer.precision,
            f"must be one of {', '.join(allowed_precisions)} on this device",
            "32-true",
        )


def check_keys(trainer: Config, *, stops_early: bool) -> None:
    """Check that Lightning's Trainer has such arguments, which a run can honour.

    Args:
        stops_early: a callback may end the run.

    Raises:
        ValueError: an argument is unknown, has no effect, or has a value of the wrong kind.
    """
    from lightning import Trainer

    known = list(inspect.signature(Trainer).parameters)
    rejected = REJECTED_TRAINER_KEYS | ({} if stops_early else EARLY_KEYS)
    for key, value in trainer.items():
        if key in rejected:
            raise ValueError(f"trainer.{key}={value}: {rejected[key]}")
        if key not in (*known, "_target_"):
            raise ValueError(
                f"trainer.{key}: lightning.Trainer has no such argument; "
                f"{did_you_mean(key, known)}allowed are {listed(key, known)}"
            )
        if key == "plugins" and not (isinstance(value, dict | list) or value is None):
            example = "{_target_: package.Class}"
            raise wrong_value(f"trainer.{key}", value, "must name a class", f"'{example}'")
        if key == "deterministic" and value == "warn":
            continue
        if key in SWITCHES and not (isinstance(value, bool) or value is None):
            raise wrong_value(f"trainer.{key}", value, "must be true or false", "true")
