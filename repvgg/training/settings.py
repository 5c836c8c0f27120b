"""The settings of a training run, checked before anything is read or written."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from repvgg.checks import (
    check_boolean,
    check_integer,
    check_number,
    unknown_key,
    wrong_value,
)
from repvgg.cli import Config, habits
from repvgg.training import trainer_keys
from repvgg.training.parts import Part, read_part, read_parts

PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}  # Lightning's short names
STOCHASTIC_KEYS = ("dropout", "branch_drop", "drop_path")  # of a model
OPTIMIZERS = ("sgd", "adamw")
INTERVALS = ("step", "epoch")
# Arguments that the run sets, and where they come from.
OPTIMIZER_KEYS = {
    "params": "the run passes the parameters; optim.layer_decay and freeze=[...] select among them",
    "lr": "pass optim.lr=RATE",
    "weight_decay": "pass optim.weight_decay=DECAY",
}
SCHEDULER_KEYS = {"optimizer": "the run passes the optimizer"}


@dataclass(frozen=True)
class Optim:
    """The optimizer and its schedule; see the comments in configs/train.yaml."""

    name: str
    lr: float
    base_batch_size: int | None
    momentum: float
    weight_decay: float
    warmup_epochs: float
    layer_decay: float = 1.0
    repopt: bool = False


@dataclass(frozen=True)
class TrainerArguments:
    """Arguments of lightning.Trainer; those without a default must be in the configuration.

    Attributes:
        plugins: configurations with a `_target_`, which Hydra instantiates.
        others: all further arguments.
    """

    _target_: str
    max_epochs: int
    accelerator: str
    devices: int | str | list[int]
    num_nodes: int
    strategy: str
    sync_batchnorm: bool
    precision: str
    accumulate_grad_batches: int
    check_val_every_n_epoch: int
    log_every_n_steps: int | None
    enable_progress_bar: bool
    plugins: object = None
    others: Config = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, config: Config) -> "TrainerArguments":
        """Read the section of a configuration.

        Raises:
            ValueError: a key is missing.
        """
        fields = [field for field in dataclasses.fields(cls) if field.name != "others"]
        needed = [field.name for field in fields if field.default is dataclasses.MISSING]
        _check_missing(config, needed, "trainer.")
        names = {field.name for field in fields}
        given = {key: value for key, value in config.items() if key in names}
        given["others"] = {key: value for key, value in config.items() if key not in names}
        precision = str(config["precision"])
        given["precision"] = PRECISIONS.get(precision, precision)
        return cls(**cast(dict[str, Any], given))

    def scalars(self) -> dict[str, object]:
        """All arguments but the plugins, with their class."""
        named = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("plugins", "others")
        }
        return named | dict(self.others)


@dataclass(frozen=True)
class Settings:
    """The keys of configs/train.yaml; see the comments there.

    Attributes:
        rdrop: weight of the KL divergence; `true` was read as 1.
        model: arguments of `repvgg.models.registry.build_model`.
        data: a function that gives an `ImageData`, under `_target_`, and its arguments.
        optimizer, scheduler, loss: in place of the default ones, which are None.
        logger, callbacks: further ones, by name.
    """

    rdrop: float
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
    objective: str
    init: str | None
    resume: str | None
    model: Config
    optim: Optim
    trainer: TrainerArguments
    data: Config
    optimizer: Part | None
    scheduler: Part | None
    scheduler_interval: str | None
    loss: Part | None
    freeze: list[str]
    logger: dict[str, Part]
    callbacks: dict[str, Part]

    @classmethod
    def read(cls, config: Config) -> "Settings":
        """Read a composed configuration. `check_trainer` checks the section `trainer`.

        Raises:
            ValueError: a key is unknown or missing, or a value is outside its range.
        """
        _check_keys(config, cls, "")
        model, data = section(config, "model"), section(config, "data")
        optim, trainer = section(config, "optim"), section(config, "trainer")
        _check_keys(optim, Optim, "optim.")
        _check_missing(model, ["name"], "model.")
        _check_missing(data, ["_target_"], "data.")
        rdrop = config["rdrop"]
        completed = {
            **config,
            "rdrop": float(rdrop) if isinstance(rdrop, bool) else rdrop,
            "optim": Optim(**cast(dict[str, Any], optim)),
            "trainer": TrainerArguments.read(trainer),
            "optimizer": read_part("optimizer", config["optimizer"], from_run=OPTIMIZER_KEYS),
            "scheduler": read_part("scheduler", config["scheduler"], from_run=SCHEDULER_KEYS),
            "loss": read_part("loss", config["loss"]),
            "freeze": _read_names(config["freeze"]),
            "logger": read_parts("logger", config["logger"]),
            "callbacks": read_parts("callbacks", config["callbacks"]),
        }
        settings = cls(**cast(dict[str, Any], completed))
        _check(settings)
        _check_optim(settings)
        _check_rdrop(settings)
        return settings

    def check_trainer(self) -> None:
        """Check the arguments of Lightning's Trainer. This imports Lightning, which takes seconds.

        Raises:
            ValueError: an argument is unknown or wrong, or this machine cannot train with it.
        """
        trainer_keys.check_arguments(self.trainer)
        given = {**self.trainer.scalars(), "plugins": self.trainer.plugins}
        trainer_keys.check_keys(given, stops_early=bool(self.callbacks))


class LearningRate(NamedTuple):
    """The peak rate, and how it was scaled, for the reader."""

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


def section(config: Config, key: str) -> dict[str, object]:
    """A section of a configuration.

    Raises:
        ValueError: it is a single value.
    """
    given = config[key]
    if not isinstance(given, dict):
        raise ValueError(f"{key}={given}: must be keys, as in {key}.KEY=VALUE")
    return given


def is_emulated(trainer: TrainerArguments) -> bool:
    """Whether the run computes in bf16 on a CPU that has no instructions for it."""
    import torch

    on_gpu = trainer.accelerator != "cpu" and torch.accelerator.is_available()
    in_bf16 = trainer.precision == "bf16-mixed"
    return in_bf16 and not on_gpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _check_keys(config: Config, kind: type, prefix: str) -> None:
    known = [field.name for field in dataclasses.fields(kind)]
    for key in config:
        if key not in known:
            if key == "experiment":
                raise ValueError("experiment: the recipe must begin with # @package _global_")
            if not prefix and (instead := habits.key(key, str(config[key]), known)):
                raise ValueError(f"{key}: there is no such key; {instead}")
            others = (
                [] if prefix else [f"optim.{field.name}" for field in dataclasses.fields(Optim)]
            )
            raise unknown_key(key, known, section=prefix, elsewhere=others)
    _check_missing(config, known, prefix)


def _check_missing(config: Config, needed: Iterable[str], prefix: str) -> None:
    for key in needed:
        if key not in config:
            raise ValueError(f"{prefix}{key} is missing: the configuration must set it")


def _check(settings: Settings) -> None:
    """Check what no constructor checks before data is read; `Classifier` checks the rest."""
    check_number("mixup", settings.mixup, example=0.2)
    check_number("cutmix", settings.cutmix, example=1.0)
    check_number("ema", settings.ema, below=1, example=0.999)
    check_integer("seed", settings.seed, minimum=0, example=0)
    presets = [f"repvgg.data.{name}" for name in ("cifar10", "cifar100", "imagefolder")]
    augment = settings.data.get("augment")
    if settings.data["_target_"] in presets and isinstance(augment, str):
        raise ValueError(
            f"data.augment={augment}: must be a list of transforms or null; presets are a group, "
            f"pass data/augment={augment}"
        )
    if "batch_size" in settings.data:  # before the images are read
        check_integer("data.batch_size", settings.data["batch_size"], minimum=1, example=64)
    for key in (
        *("deployed_validation", "channels_last", "compile", "activation_checkpointing"),
        "keep_memory",
    ):
        check_boolean(key, getattr(settings, key))
    if settings.compile and settings.activation_checkpointing:
        raise ValueError(
            "compile=true activation_checkpointing=true: choose one; inductor decides which "
            "activations it computes again"
        )


def _read_names(given: object) -> list[str]:
    """The names of modules; those of an nn.Sequential are numbers."""
    if not isinstance(given, list) or not {type(name) for name in given} <= {str, int}:
        raise wrong_value("freeze", given, "must be a list of module names", "[stem,stages.0]")
    return [str(name) for name in given]


def _check_optim(settings: Settings) -> None:
    optim, epochs = settings.optim, settings.trainer.max_epochs
    if optim.name not in OPTIMIZERS:
        allowed = f"must be one of {', '.join(OPTIMIZERS)}"
        raise wrong_value("optim.name", optim.name, allowed, "sgd")
    if not isinstance(optim.repopt, bool):
        raise wrong_value("optim.repopt", optim.repopt, "must be true or false", "true")
    if optim.repopt and (optim.name != "sgd" or settings.optimizer is not None):
        allowed = "needs SGD, whose steps follow the size of the gradient"
        raise wrong_value("optim.repopt", optim.repopt, allowed, "false")
    if optim.repopt and settings.trainer.others.get("gradient_clip_val") is not None:
        allowed = "does not fit trainer.gradient_clip_val, which sees another gradient"
        raise wrong_value("optim.repopt", optim.repopt, allowed, "false")
    if optim.base_batch_size is not None:
        check_integer("optim.base_batch_size", optim.base_batch_size, minimum=1, example=256)
    check_integer("trainer.max_epochs", epochs, minimum=1, example=24)
    if settings.scheduler is None:
        _check_warmup("optim.warmup_epochs", optim.warmup_epochs, epochs)
    interval = settings.scheduler_interval
    if interval is not None and interval not in INTERVALS:
        allowed = f"must be null or one of {', '.join(INTERVALS)}"
        raise wrong_value("scheduler_interval", interval, allowed, "epoch")
    if interval is not None and settings.scheduler is None:
        allowed = "has no effect without scheduler._target_"
        raise wrong_value("scheduler_interval", interval, allowed, "null")


def _check_rdrop(settings: Settings) -> None:
    check_number("rdrop", settings.rdrop, example=1)
    _check_warmup("rdrop_warmup", settings.rdrop_warmup, settings.trainer.max_epochs)
    if settings.rdrop_warmup > 0 and not settings.rdrop:
        raise wrong_value("rdrop_warmup", settings.rdrop_warmup, "has no effect without rdrop", 0)
    model = settings.model
    ours = model.get("library", "repvgg") == "repvgg"  # other networks are checked once built
    if settings.rdrop and ours and not any(model.get(key) for key in STOCHASTIC_KEYS):
        raise wrong_value(
            "model.dropout",
            model.get("dropout", 0.0),
            f"rdrop={settings.rdrop:g} compares two predictions, which are equal without a "
            f"stochastic layer, so one of model.{', model.'.join(STOCHASTIC_KEYS)} must be above 0 "
            "(or pass rdrop=false)",
            0.2,
        )


def _check_warmup(key: str, given: object, epochs: int) -> None:
    if check_number(key, given, example=1) > epochs:
        raise wrong_value(key, given, f"must be at most trainer.max_epochs={epochs}", 0)
