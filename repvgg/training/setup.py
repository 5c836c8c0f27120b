"""The parts of a run: trainer, data, network and module, built from the settings."""

import inspect
import logging
import re
import warnings
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_method, instantiate
from lightning.pytorch.callbacks import Callback, ProgressBar
from torch import Tensor, nn

from repvgg import checkpoint, cli, terminal
from repvgg.checks import did_you_mean, listed
from repvgg.cli import Config
from repvgg.contract import DataContract, ModelConfig, Normalize, Plain, to_float
from repvgg.data.module import ImageData
from repvgg.data.opening import open_data
from repvgg.models.block import RepVGGBlock, compile_blocks
from repvgg.models.libraries import Factory
from repvgg.models.pretrained import pretrained
from repvgg.rdrop import StochasticLayers, find_stochastic_layers
from repvgg.targets import locate
from repvgg.training import callbacks, checkpoints, processes, runs
from repvgg.training.additions import Parts
from repvgg.training.classifier import Classifier
from repvgg.training.criterion import build_loss
from repvgg.training.divergence import StopOnDivergence
from repvgg.training.loggers import build_loggers
from repvgg.training.optimizers import optimizer_maker, scheduler_maker
from repvgg.training.progress import EpochLines, RunBar
from repvgg.training.repopt import TrainAsBranches
from repvgg.training.schedule import Steps
from repvgg.training.settings import Settings, TrainerArguments

NUM_CALIBRATION = 512  # training images from which a folded network gets its statistics back


def build_trainer(
    settings: Settings, parts: Parts, steps: Steps, describe: callbacks.Describe, folder: Path
) -> L.Trainer:
    """Lightning's Trainer, with the callbacks of a run and the parts of the settings."""
    arguments = settings.trainer.scalars()
    if arguments["log_every_n_steps"] is None:
        arguments = {**arguments, "log_every_n_steps": max(1, steps.batches // 10)}
    last = folder / runs.LAST
    stochastic = settings.model.get("branch_drop") or settings.model.get("drop_path")
    trainer: L.Trainer = instantiate(
        {"enable_model_summary": False, "num_sanity_val_steps": 0, **arguments},
        default_root_dir=folder,
        logger=build_loggers(settings.logger, folder),
        plugins=[*parts.plugins, checkpoints.WholeFileIO(), *processes.cluster_plugins()],
        callbacks=[  # the order matters: first statistics, then the average, then copies of both
            *([callbacks.ReestimateBN()] if stochastic else []),
            *([callbacks.EMA(settings.ema)] if settings.ema else []),
            *([callbacks.DeployedValidation()] if settings.deployed_validation else []),
            *([TrainAsBranches()] if settings.optim.repopt else []),
            StopOnDivergence(),
            callbacks.SelfDescribing(checkpoint.KEY, describe),
            # Before what may raise in `on_exception`, so that the bar ends in any case.
            *progress_bar(settings.trainer, parts.callbacks, steps),
            callbacks.SaveOnSignal(last),
            callbacks.Throughput(),
            checkpoints.BestCheckpoint(last.parent),
            checkpoints.LastCheckpoint(last.parent),
            *parts.callbacks,
        ],
        _convert_="all",
    )
    return trainer


def progress_bar(arguments: TrainerArguments, own: list[Callback], steps: Steps) -> list[Callback]:
    """A bar on a terminal, a line an epoch elsewhere; the user's own takes its place."""
    if not arguments.enable_progress_bar or any(isinstance(part, ProgressBar) for part in own):
        return []
    return [(RunBar if terminal.is_interactive() else EpochLines)(steps.total)]


def build_classifier(
    settings: Settings,
    network: nn.Module,
    num_classes: int,
    steps: Steps,
    rate: float,
    *,
    stochastic: StochasticLayers | None = None,
) -> Classifier:
    """The Lightning module of a run."""
    optimizer, scheduler, loss = settings.optimizer, settings.scheduler, settings.loss
    return Classifier(
        network,
        num_classes=num_classes,
        lr=rate,
        optimizer=optimizer_maker(optimizer) if optimizer else settings.optim.name,
        momentum=settings.optim.momentum,
        weight_decay=settings.optim.weight_decay,
        num_steps=steps.total,
        num_warmup_steps=steps.warmup,
        rdrop=settings.rdrop,
        num_rdrop_warmup_steps=steps.rdrop_warmup,
        label_smoothing=settings.label_smoothing,
        seed=settings.seed,
        stochastic=stochastic,
        scheduler=(
            scheduler_maker(scheduler, settings.scheduler_interval, steps) if scheduler else None
        ),
        loss=build_loss(loss) if loss else None,
        layer_decay=settings.optim.layer_decay,
        frozen=settings.freeze,
    )


def open_images(settings: Settings) -> ImageData:
    """Open the data of the settings.

    Raises:
        ValueError: an argument is unknown, or the errors of the data.
    """
    given = settings.data
    try:
        return open_data(given, mixup=settings.mixup, cutmix=settings.cutmix, seed=settings.seed)
    except InstantiationException as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error.__cause__))
        if unknown is None or "full_key: " in str(error):  # of a transform
            raise
        key, target = unknown[1], str(given["_target_"])
        named = inspect.signature(get_method(target)).parameters.values()
        known = {part.name for part in named if part.kind is not part.VAR_KEYWORD}
        known = (known | given.keys()) - {key, "_target_"}
        raise ValueError(
            f"data.{key}: {target} takes no such argument; {did_you_mean(key, known)}"
            f"allowed are {listed(key, sorted(known))}"
        ) from error


def find_factory(model: Config) -> Factory | None:
    """What builds the user's own network, by the name on the command line; None for other networks.

    Raises:
        ValueError: there is no such function or class.
    """
    if model.get("library") != "custom":
        return None
    if model.get("_target_") is None:
        raise ValueError("model._target_ is missing: pass model._target_=mypackage.MyNet")
    return locate(str(model["_target_"]), "model._target_")


def open_pretrained(model: Config, contract: DataContract) -> checkpoint.Network:
    """Open the published weights that a model names, for images of as many channels as the data."""
    found = pretrained(cast(ModelConfig, model), contract.in_channels)
    config: dict[str, Plain] = {"name": str(model["name"]), **found.arguments}
    return checkpoint.Network(found.network, config, found.data, found.origin)


def complete_model(
    model: Config, contract: DataContract, start: checkpoint.Network | None
) -> dict[str, Any]:
    """The arguments of a network, with those that follow from the data and from its first weights.

    Raises:
        ValueError: the network has other classes or channels than the data.
    """
    first = start.config if start else {}
    config: dict[str, Any] = {k: first[k] for k in ("bn_eps", "transform_input") if k in first}
    held = {"num_classes": len(contract.classes), "in_channels": contract.in_channels}
    for key, value in held.items():
        if model.get(key) not in (None, value):
            raise ValueError(
                f"model.{key}={model[key]}: the data has {value}; pass model.{key}={value}"
            )
    if model.get("library") == "custom" and model["name"] == "custom":
        config = config | {"name": str(model["_target_"]).rpartition(".")[2]}
        model = {key: value for key, value in model.items() if key != "name"}
    return config | dict(model) | held


def open_start(path: str, factory: Factory | None) -> checkpoint.Network:
    """Open the checkpoint that `init` names; `factory` builds a custom network in it."""
    with cli.suggest_import(path):
        return checkpoint.open_network(path, network=factory)


def initialize(
    network: nn.Module, start: checkpoint.Network, data: ImageData, key: str
) -> list[str]:
    """Copy first weights into a network; lines for the reader on what is new.

    Args:
        key: what named the weights, as in "init=PATH".
    """
    normalize = Normalize(data.contract.mean, data.contract.std)
    images, _ = data.spread(data.train, NUM_CALIBRATION)
    try:
        new = checkpoint.initialize(
            network, start, normalize(to_float(images)), classes=data.contract.classes
        )
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    what = start.origin or start.config["name"]
    lines = [f"initialized from {what}; new: {', '.join(new) or 'nothing'}"]
    if start.data is not None and not key.startswith("init"):
        before, now = (_statistics(contract) for contract in (start.data, data.contract))
        if before != now:
            lines.append(f"its images were normalized with {before}; these are with {now}")
    return lines


def find_stochastic(
    network: nn.Module, settings: Settings, images: Tensor
) -> StochasticLayers | None:
    """Where the network is stochastic, if R-Drop needs it.

    Raises:
        ValueError: nothing in the network is stochastic, so R-Drop has no effect.
    """
    if settings.rdrop == 0:
        return None
    found = find_stochastic_layers(network, images)
    if not any(found):
        advice = {
            "timm": "model.dropout=0.2",
            "custom": "give it one, such as torch.nn.Dropout",
        }.get(
            str(settings.model.get("library")),
            "model.over_parameterize=true model.branch_drop=0.1",
        )
        name = settings.model.get("_target_") or settings.model["name"]
        raise ValueError(
            f"rdrop={settings.rdrop:g}: {name} has no stochastic layer, so two predictions are "
            f"equal; pass rdrop=false, or {advice}"
        )
    return found


def lay_out(network: nn.Module, settings: Settings) -> None:
    """Set the memory format, compilation and activation checkpointing of a network, in place.

    Raises:
        ValueError: the network cannot be trained like this.
    """
    name = settings.model["name"]
    blocks = [part for part in network.modules() if isinstance(part, RepVGGBlock)]
    if settings.activation_checkpointing:
        if not blocks:
            raise ValueError(
                f"activation_checkpointing=true: {name} has no RepVGG block, whose activations are "
                "computed again; pass activation_checkpointing=false"
            )
        for block in blocks:
            block.recompute = True
    if settings.channels_last:
        on_cpu = settings.trainer.accelerator == "cpu" or not torch.accelerator.is_available()
        for path, part in network.named_modules():
            pointwise = isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1)
            if on_cpu and pointwise and part.stride != (1, 1):
                raise ValueError(
                    f"channels_last=true: {name} has a 1x1 convolution of stride "
                    f"{part.stride[0]}, {path}, whose gradient in channels_last corrupts memory on "
                    "a CPU; pass channels_last=false"
                )
        network.to(memory_format=torch.channels_last)
    if settings.compile and not compile_blocks(network):
        network.compile()


def quieten() -> None:
    """Silence the messages of Lightning that no user can act on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for prints in ("profilers", "callbacks.model_summary"):  # what the user asked for
        logging.getLogger(f"lightning.pytorch.{prints}").setLevel(logging.INFO)
    # Raised inside Lightning by its own use of torch.utils._pytree.
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*")
    # Only a resumed run finds its folder in use: `check_folder` rejects any other.
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* not empty")


def _statistics(contract: DataContract) -> str:
    mean, std = ([round(value, 2) for value in values] for values in (contract.mean, contract.std))
    return f"mean {mean}, std {std}"
