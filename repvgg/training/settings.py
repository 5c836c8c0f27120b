"""What a training run is given: its settings, checked before anything is read or written."""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

from repvgg.checks import check_integer, check_number, did_you_mean, refusal

# Arguments of lightning.Trainer that train.py sets or cannot honour, and what to type instead.
REFUSED_TRAINER_KEYS = {
    "enable_checkpointing": "train.py always keeps best.ckpt and last.ckpt",
    "barebones": "it turns off the checkpoints and the metrics of which the best is chosen",
    "use_distributed_sampler": "the data deals its batches out to the devices itself",
    "reload_dataloaders_every_n_epochs": "a resumed run goes on within an epoch's data",
    "default_root_dir": "type hydra.run.dir=FOLDER",
    "max_time": "the learning rate is planned by steps; type +trainer.max_steps=N",
    "min_epochs": "nothing here stops a run early; type trainer.max_epochs=N",
    "min_steps": "nothing here stops a run early; type +trainer.max_steps=N",
    "model_registry": "train.py keeps its checkpoints in the run's folder",
}
_SWITCHES = (
    *("enable_progress_bar", "enable_model_summary", "deterministic", "benchmark"),
    *("inference_mode", "detect_anomaly", "sync_batchnorm", "enable_autolog_hparams"),
)
NEEDED_TRAINER_KEYS = (
    *("_target_", "max_epochs", "accelerator", "devices", "num_nodes", "strategy", "precision"),
    *("sync_batchnorm", "accumulate_grad_batches", "check_val_every_n_epoch"),
    *("log_every_n_steps", "enable_progress_bar"),
)
PARTS = ("callbacks", "logger", "plugins")  # of the Trainer, each built by its _target_
PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}  # Lightning's short names


@dataclass(frozen=True)
class Optim:
    """The optimizer and its schedule; see configs/train.yaml."""

    name: str
    lr: float
    base_batch_size: int | None
    momentum: float
    weight_decay: float
    warmup_epochs: float


@dataclass(frozen=True)
class Settings:
    """The keys of configs/train.yaml, which says what they mean.

    Attributes:
        model: arguments of `repvgg.models.registry.build_model`.
        trainer: arguments of lightning.Trainer.
        data: a function that gives an `ImageData`, under `_target_`, and its arguments.
    """

    rdrop: float | bool
    rdrop_warmup: float
    label_smoothing: float
    mixup: float
    cutmix: float
    ema: float
    deployed_validation: bool
    channels_last: bool
    compile: bool
    activation_checkpointing: bool
    keep_memory: bool
    seed: int
    init: str | None
    resume: str | None
    model: dict[str, Any]
    optim: Optim
    trainer: dict[str, Any]
    data: dict[str, Any]

    @classmethod
    def read(cls, config: dict[str, Any]) -> "Settings":
        """Read a composed configuration.

        Raises:
            ValueError: a key is unknown or missing, or a value is outside its range.
        """
        for section in ("model", "optim", "trainer", "data"):
            if section in config and not isinstance(config[section], dict):
                raise ValueError(
                    f"{section}={config[section]}: must be keys, as in {section}.KEY=VALUE"
                )
        _check_keys(config, cls, "")
        _check_keys(config["optim"], Optim, "optim.")
        for key in NEEDED_TRAINER_KEYS:
            if key not in config["trainer"]:
                raise ValueError(f"trainer.{key} is missing: the configuration must set it")
        for section, key in (("model", "name"), ("data", "_target_")):
            if key not in config[section]:
                raise ValueError(f"{section}.{key} is missing: the configuration must set it")
        trainer = dict(config["trainer"])
        precision = str(trainer["precision"])
        trainer["precision"] = PRECISIONS.get(precision, precision)
        settings = cls(**config | {"optim": Optim(**config["optim"]), "trainer": trainer})
        _check(settings)
        _check_trainer(trainer)
        _check_trainer_keys(trainer)  # imports Lightning, which takes seconds
        return settings


class LearningRate(NamedTuple):
    """The peak rate, and how it came about, for the reader."""

    scaled: float
    explained: str


def scale_learning_rate(optim: Optim, images: int) -> LearningRate:
    """Scale the rate to the images in a step: linearly for SGD, by the root for AdamW.

    Goyal et al., 2017, arXiv:1706.02677; Malladi et al., 2022, arXiv:2205.10287.
    """
    rate, base = optim.lr, optim.base_batch_size
    if base is None:
        return LearningRate(rate, "")
    if optim.name == "adamw":
        return LearningRate(rate * (images / base) ** 0.5, f" ({rate:g} x sqrt({images} / {base}))")
    return LearningRate(rate * images / base, f" ({rate:g} x {images} / {base})")


def _check_keys(config: dict[str, Any], kind: type, prefix: str) -> None:
    known = [field.name for field in dataclasses.fields(kind)]
    for key in config:
        if key not in known:
            everywhere = [*known, *(f"optim.{field.name}" for field in dataclasses.fields(Optim))]
            raise ValueError(
                f"{prefix}{key}: there is no such key; {did_you_mean(prefix + key, everywhere)}"
                f"allowed are {', '.join(prefix + name for name in known)}"
            )
    for key in known:
        if key not in config:
            raise ValueError(f"{prefix}{key} is missing: the configuration must set it")


def _check(settings: Settings) -> None:
    """Check what no constructor checks before data is read; `Classifier` checks the rest."""
    optim = settings.optim
    if optim.base_batch_size is not None:
        check_integer("optim.base_batch_size", optim.base_batch_size, minimum=1, example=256)
    check_number("mixup", settings.mixup, example=0.2)
    check_number("cutmix", settings.cutmix, example=1.0)
    check_number("ema", settings.ema, below=1, example=0.999)
    check_integer("seed", settings.seed, minimum=0, example=0)
    if "batch_size" in settings.data:  # before the images are read
        check_integer("data.batch_size", settings.data["batch_size"], minimum=1, example=64)
    for key in ("channels_last", "compile", "activation_checkpointing", "keep_memory"):
        if not isinstance(getattr(settings, key), bool):
            raise refusal(key, getattr(settings, key), "must be true or false", "true")
    if settings.compile and settings.activation_checkpointing:
        raise ValueError(
            "compile=true activation_checkpointing=true: one or the other; inductor decides by "
            "itself what it computes again"
        )
    epochs = settings.trainer["max_epochs"]
    check_integer("trainer.max_epochs", epochs, minimum=1, example=24)
    for key, given in (
        ("optim.warmup_epochs", optim.warmup_epochs),
        ("rdrop_warmup", settings.rdrop_warmup),
    ):
        if check_number(key, given, example=1) > epochs:
            raise refusal(key, given, f"must be at most trainer.max_epochs={epochs}", 0)
    if settings.rdrop_warmup > 0 and not settings.rdrop:
        raise refusal("rdrop_warmup", settings.rdrop_warmup, "has no effect without rdrop", 0)


def _check_trainer(trainer: dict[str, Any]) -> None:
    """Refuse what Lightning would accept, or refuse only after hours of training."""
    import torch

    epochs, every = trainer["max_epochs"], trainer["check_val_every_n_epoch"]
    check_integer("trainer.check_val_every_n_epoch", every, minimum=1, example=1)
    if every > epochs:
        raise refusal(
            "trainer.check_val_every_n_epoch", every, f"must be at most max_epochs={epochs}", 1
        )
    check_integer(
        "trainer.accumulate_grad_batches", trainer["accumulate_grad_batches"], minimum=1, example=1
    )
    check_integer("trainer.num_nodes", trainer["num_nodes"], minimum=1, example=1)
    on_gpu = trainer["accelerator"] != "cpu" and torch.accelerator.is_available()
    devices = trainer["devices"]
    if isinstance(devices, int) and not isinstance(devices, bool):
        here = torch.accelerator.device_count() if on_gpu else os.cpu_count() or 1
        if not (1 <= devices <= here or (devices == -1 and on_gpu)):
            allowed = f"this machine has {here} {'accelerators' if on_gpu else 'processors'}"
            raise refusal("trainer.devices", devices, allowed, 1)
    if trainer["sync_batchnorm"] and not on_gpu:
        allowed = "torch normalizes across devices on GPUs alone"
        raise refusal("trainer.sync_batchnorm", trainer["sync_batchnorm"], allowed, "false")
    strategy = str(trainer["strategy"])
    if strategy != "auto" and not strategy.startswith("ddp"):
        allowed = "must be auto or ddp; the largest RepVGG fits on one device"
        raise refusal("trainer.strategy", strategy, allowed, "ddp")
    allowed_precisions = ["32-true", "bf16-mixed", *(["16-mixed"] if on_gpu else [])]
    if trainer["precision"] not in allowed_precisions:
        raise refusal(
            "trainer.precision",
            trainer["precision"],
            f"must be one of {', '.join(allowed_precisions)} on this device",
            "32-true",
        )


def _check_trainer_keys(trainer: dict[str, Any]) -> None:
    import inspect

    from lightning import Trainer

    known = list(inspect.signature(Trainer).parameters)
    for key, value in trainer.items():
        if key in REFUSED_TRAINER_KEYS:
            raise ValueError(f"trainer.{key}={value}: {REFUSED_TRAINER_KEYS[key]}")
        if key not in (*known, "_target_"):
            raise ValueError(
                f"trainer.{key}: lightning.Trainer has no such argument; "
                f"{did_you_mean(key, known)}allowed are {', '.join(known)}"
            )
        if key in PARTS and not (isinstance(value, dict | list) or value is None):
            if key != "logger" or not isinstance(value, bool):
                example = "{_target_: package.Class}"
                raise refusal(f"trainer.{key}", value, "must name a class", f"'{example}'")
        elif key == "deterministic" and value == "warn":
            continue
        elif key in _SWITCHES and not (isinstance(value, bool) or value is None):
            raise refusal(f"trainer.{key}", value, "must be true or false", "true")


def is_emulated(trainer: dict[str, Any]) -> bool:
    """Whether training is to compute in bf16 on a processor that has no instructions for it."""
    import torch

    on_gpu = trainer["accelerator"] != "cpu" and torch.accelerator.is_available()
    in_bf16 = trainer["precision"] == "bf16-mixed"
    return in_bf16 and not on_gpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
