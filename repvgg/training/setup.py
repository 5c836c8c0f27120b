"""What a run is made of: the trainer, the data, the module; and the checks that they fit."""

import copy
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from repvgg import checkpoint
from repvgg.contract import Normalize, to_float
from repvgg.models.block import RepVGGBlock, compile_blocks
from repvgg.rdrop import find_noise
from repvgg.training import callbacks, checkpoints, processes, runs, schedule
from repvgg.training.classifier import Classifier
from repvgg.training.report import show
from repvgg.training.schedule import Steps
from repvgg.training.settings import Settings

MOST_CALIBRATED = 512  # training images that give a deployed network its statistics back


def build_trainer(settings: Settings, folder: Path, describing: Any) -> Any:
    """Lightning's Trainer, with the callbacks and loggers of the settings beside those of a run."""
    given = dict(settings.trainer)
    more = instantiate(given.pop("callbacks", None) or [], _convert_="all")
    plugins = instantiate(given.pop("plugins", None) or [], _convert_="all")
    logger = given.pop("logger", None)
    if logger is None or logger is True:
        logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    elif logger is not False:
        logger = instantiate(logger, _convert_="all")
    place = (folder / runs.LAST).parent
    noisy = settings.model.get("branch_drop") or settings.model.get("drop_path")
    return instantiate(
        {"enable_model_summary": False, "num_sanity_val_steps": 0} | given,
        default_root_dir=folder,
        logger=logger,
        plugins=[*plugins, checkpoints.WholeFileIO(), *processes.cluster_plugins()],
        callbacks=[
            *([callbacks.ReestimateBN()] if noisy else []),
            *([callbacks.EMA(settings.ema)] if settings.ema else []),
            describing,
            callbacks.SaveOnSignal(folder / runs.LAST),
            callbacks.Throughput(),
            checkpoints.BestCheckpoint(place),
            checkpoints.LastCheckpoint(place),
            *progress_bar(settings.trainer),
            *(more.values() if isinstance(more, dict) else more),
        ],
        _convert_="all",
    )


def build_module(settings: Settings, model: dict[str, Any], steps: Steps, rate: float) -> Any:
    return Classifier(
        model,
        lr=rate,
        optimizer=settings.optim.name,
        momentum=settings.optim.momentum,
        weight_decay=settings.optim.weight_decay,
        num_steps=steps.total,
        num_warmup_steps=steps.warmup,
        rdrop=settings.rdrop,
        num_rdrop_warmup_steps=steps.rdrop_warmup,
        label_smoothing=settings.label_smoothing,
        seed=settings.seed,
        deployed_validation=settings.deployed_validation,
    )


def fit_model(model: dict[str, Any], data: Any) -> dict[str, Any]:
    """Fill in what the images and the classes say; refuse a network that does not fit them."""
    fitted = dict(model)
    for key, wanted in (
        ("num_classes", len(data.contract.classes)),
        ("in_channels", data.contract.in_channels),
    ):
        if fitted.setdefault(key, None) is None:
            fitted[key] = wanted
        if fitted[key] != wanted:
            raise ValueError(
                f"model.{key}={fitted[key]}: the data has {wanted}; type model.{key}={wanted}"
            )
    return fitted


def initialize(network: Any, start: Any, data: Any, path: str) -> str:
    """Take over the weights of a checkpoint; a line for the reader that says which did not come."""
    normalize = Normalize(data.contract.mean, data.contract.std)
    images, _ = data.spread(data.train, MOST_CALIBRATED)
    try:
        new = checkpoint.initialize(
            network, start, normalize(to_float(images)), classes=data.contract.classes
        )
    except ValueError as error:
        raise ValueError(f"init={path}: {error}") from error
    what = start.origin or start.config["name"]
    return f"\nbegins as {what}; new: {', '.join(new) or 'nothing'}"


def prepare(module: Any, settings: Settings, images: Any) -> None:
    """Find the noise for R-Drop; lay out, compile, checkpoint the network as it was asked for."""
    name = settings.model["name"]
    if module.rdrop > 0:
        module.noise = find_noise(module.net, images)
        if not any(module.noise):
            raise ValueError(
                f"rdrop={module.rdrop:g}: nothing in {name} is random while it trains, so "
                "two predictions are equal; type rdrop=false, or model.over_parameterize=true "
                "model.branch_drop=0.1"
            )
    blocks = [part for part in module.net.modules() if isinstance(part, RepVGGBlock)]
    if settings.activation_checkpointing:
        if not blocks:
            raise ValueError(
                f"activation_checkpointing=true: {name} has no RepVGG block, which is what is "
                "computed again; type activation_checkpointing=false"
            )
        for block in blocks:
            block.recompute = True
    if settings.channels_last:
        on_cpu = settings.trainer["accelerator"] == "cpu" or not torch.accelerator.is_available()
        for path, part in module.net.named_modules():
            pointwise = isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1)
            if on_cpu and pointwise and part.stride != (1, 1):
                raise ValueError(
                    f"channels_last=true: {name} has a 1x1 convolution of stride "
                    f"{part.stride[0]}, {path}, whose gradient in channels_last corrupts memory on "
                    "a CPU; type channels_last=false"
                )
        module.net.to(memory_format=torch.channels_last)
    if settings.compile and not compile_blocks(module.net):
        module.net.compile()


def progress_bar(settings: dict[str, Any]) -> list[Any]:
    if not settings["enable_progress_bar"]:
        return []
    return [TQDMProgressBar() if sys.stdout.isatty() else callbacks.EpochLines()]


def check_devices(trainer: Any) -> None:
    """Refuse several devices where Lightning cannot start a process for each.

    Raises:
        ValueError: likewise.
    """
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if sweep and trainer.world_size > 1 and not processes.started_together():
        raise ValueError(
            f"trainer.devices={trainer.num_devices}: a sweep trains on one device; start each run "
            "by itself, without -m"
        )


def check_network(settings: Settings) -> None:
    """Build the network without its weights, so that a mistake is told before data is read."""
    wanted = {"num_classes": 2, "in_channels": 3}
    model = settings.model | {
        key: value for key, value in wanted.items() if settings.model.get(key) is None
    }
    try:
        with torch.device("meta"):
            build_module(settings, model, Steps(1, 1, 0, 0, 1, 1), settings.optim.lr)
    except (NotImplementedError, RuntimeError):  # of a network that cannot be built like this
        return


def check_resumed(
    resume: str,
    config: dict[str, Any],
    model: dict[str, Any],
    data: Any,
    images: Any,
    folder: Path,
) -> str:
    """Refuse a checkpoint of another network or of other classes; lines on what is taken over."""
    recorded = checkpoint.load(resume)
    if recorded.config != model:
        raise ValueError(f"resume={resume}: it holds {recorded.config}, this run wants {model}")
    before, now = recorded.data.classes, data.contract.classes
    if before != now:
        raise ValueError(
            f"resume={resume}: its classes are {show(before)}, those of the data are {show(now)}; "
            "give the folders their names back, or start a new run with init="
        )
    lines = runs.describe_changes(config, folder)
    if not torch.equal(recorded.probe.images, images):
        lines.append("the validation images are not those that the run began with")
    return "".join(f"\n{line}" for line in lines)


def check_same_steps(
    resume: str, config: dict[str, Any], num_images: int, steps: Steps, folder: Path
) -> None:
    """Refuse other batches or devices if the steps of the run would be others."""

    def split(given: dict[str, Any]) -> tuple[Any, ...]:
        trainer = given["trainer"]
        return (
            *(given["data"].get("batch_size"), trainer["devices"], trainer["num_nodes"]),
            trainer["accumulate_grad_batches"],
        )

    before, now = split(runs.read_config(folder)), split(config)
    if before == now:
        return
    keys = (
        *("data.batch_size", "trainer.devices", "trainer.num_nodes"),
        "trainer.accumulate_grad_batches",
    )
    typed = " ".join(f"{key}={value}" for key, value in zip(keys, before, strict=True))
    if not all(isinstance(value, int) and value > 0 for value in before):
        raise ValueError(f"resume={resume}: it began with {typed}; type these")
    size, devices, nodes, accumulated = before
    step = size * devices * nodes * accumulated
    batches = num_images // (size * devices * nodes)
    epoch = schedule.from_trainer_settings(batches, runs.read_config(folder)["trainer"]).epoch
    if (step, epoch) != (steps.images, steps.epoch):
        raise ValueError(
            f"resume={resume}: a step had {step} images and an epoch {epoch} steps ({typed}), now "
            f"{steps.images} and {steps.epoch}; keep data.batch_size * devices * nodes * "
            "accumulate_grad_batches"
        )
    loops = torch.load(resume, weights_only=True, map_location="cpu")["loops"]
    if not loops["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]:
        raise ValueError(
            f"resume={resume}: it stopped within an epoch, whose batches are counted for {typed}; "
            "type these"
        )


def check_runs(network: Any, images: Any, name: str) -> None:
    """Refuse a network that the images do not get through: most need a size of their own."""
    network.eval()
    try:
        with torch.no_grad():
            network(images)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError) as error:
        size = "x".join(map(str, images.shape[2:]))
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model.name={name}: does not run on images of {size} ({detail}); "
            "type another model.name, or other data"
        ) from error
    network.train()


def check_batch_of_one(network: Any, image: Any, batch_size: int) -> None:
    """Refuse a batch of one image where a BatchNorm would see one value for each channel."""
    if batch_size > 1:
        return
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copy.deepcopy(network).train()(image)
    except ValueError as error:
        raise ValueError(
            f"data.batch_size=1: BatchNorm cannot normalize one value for each channel ({error}); "
            "type data.batch_size=2 or more"
        ) from error


def quieten() -> None:
    """Silence what every run of the stack says and no user can act on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # prints its report
    # Raised inside Lightning by its own use of torch.utils._pytree.
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*")
    # Only a resumed run finds its folder in use: `train` refuses any other.
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* not empty")
