"""Train a network: python train.py model=repvgg_a0 rdrop=true

Configured by configs/train.yaml; `python train.py --help` lists what can be set. A run lives in
runs/<data>-<model>/<time>/: its configuration, TensorBoard events and checkpoints.
"""

import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from repvgg import cli, runs

CONFIG = Path(__file__).absolute().parent / "configs" / "train.yaml"
MOST_CALIBRATED = 512  # training images that give a deployed network its statistics back


def main(config: dict[str, Any], folder: Path) -> None:
    try:
        train(config, folder)
    finally:
        runs.discard_if_empty(folder)


def train(config: dict[str, Any], folder: Path) -> None:
    """Fit, keep the best and the last checkpoint, test the best, say where everything is."""
    from hydra.core.hydra_config import HydraConfig

    check_settings(config)  # before the imports below, which take seconds
    resume = config["resume"]
    last = folder / runs.LAST
    typed = [argument.partition("=")[0] for argument in HydraConfig.get().overrides.hydra]
    runs.check_folder(folder, resumed=resume is not None, chosen="hydra.run.dir" in typed)

    import lightning as L
    from hydra.utils import instantiate
    from lightning.pytorch.loggers import TensorBoardLogger

    from repvgg import callbacks, checkpoint
    from repvgg.memory import keep_memory
    from repvgg.model import to_float
    from repvgg.module import Diverged

    quieten()
    L.seed_everything(config["seed"], verbose=False)
    data = instantiate(
        config["data"],
        views=config["rdrop_views"],
        mixup=config["mixup"],
        cutmix=config["cutmix"],
        seed=config["seed"],
    )
    model = config["model"]
    fit_model(model, data)
    images, labels = data.probe()
    settings = config["trainer"]
    logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    trainer: L.Trainer = instantiate(
        settings,
        logger=logger,
        plugins=[callbacks.WholeFileIO()],
        callbacks=[
            *([callbacks.ReestimateBN()] if model["branch_drop"] or model["drop_path"] else []),
            *([callbacks.EMA(config["ema"])] if config["ema"] else []),
            callbacks.SelfDescribing(
                checkpoint.KEY,
                lambda net: checkpoint.describe(
                    net, config=model, data=data.contract, images=images, labels=labels
                ),
            ),
            callbacks.SaveOnSignal(last),
            callbacks.Throughput(),
            callbacks.BestCheckpoint(last.parent),
            callbacks.LastCheckpoint(last.parent),
            *progress_bar(settings),
        ],
        enable_model_summary=False,
        num_sanity_val_steps=0,
        _convert_="all",
    )
    if config["keep_memory"] and trainer.strategy.root_device.type == "cpu":
        keep_memory()
    steps = count_steps(config, data, trainer.world_size)
    if settings["log_every_n_steps"] is None:
        settings["log_every_n_steps"] = max(1, steps.batches // 10)
        trainer.log_every_n_steps = settings["log_every_n_steps"]
    rate = scale_learning_rate(config["optim"], steps.images)
    start = None
    if config["init"] is not None and resume is None:
        start = checkpoint.open_network(config["init"])
        if "bn_eps" in start.config:
            model.setdefault("bn_eps", start.config["bn_eps"])
    module = build_module(config, steps, rate.scaled)
    begun = ""
    if start is not None:
        begun = initialize(module.net, start, data, config["init"])
    if resume is not None:
        recorded = checkpoint.load(resume).config
        if recorded != model:
            raise ValueError(f"resume={resume}: it holds {recorded}, this run wants {model}")
    check_runs(module.net, to_float(images[:2]), model["name"])
    prepare(module, config, to_float(images))
    if runs.rank() == 0:
        print(describe(config, module, steps, rate, folder) + begun)
        record(config, folder)
    best = last.with_name("best.ckpt")
    try:
        with callbacks.interruptible():
            trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
            (metrics,) = trainer.test(
                module, datamodule=data, ckpt_path=best, weights_only=True, verbose=False
            )
    except (callbacks.Interrupted, Diverged) as stopped:
        report_stop(stopped, last)
    logger.log_hyperparams(flatten(config | {"rdrop": module.rdrop}), metrics)
    logger.finalize("success")
    if runs.rank() == 0:
        report(metrics, data, best, folder)


def build_module(config: dict[str, Any], steps: "Steps", rate: float) -> Any:
    from repvgg.module import Classifier

    return Classifier(
        config["model"],
        lr=rate,
        optimizer=config["optim"]["name"],
        momentum=config["optim"]["momentum"],
        weight_decay=config["optim"]["weight_decay"],
        num_steps=steps.total,
        num_warmup_steps=steps.warmup,
        rdrop=config["rdrop"],
        num_rdrop_warmup_steps=steps.rdrop_warmup,
        rdrop_views=config["rdrop_views"],
        label_smoothing=config["label_smoothing"],
        seed=config["seed"],
        deployed_validation=config["deployed_validation"],
    )


def initialize(network: Any, start: Any, data: Any, path: str) -> str:
    """Take over the weights of a checkpoint; a line for the reader that says which did not come."""
    from repvgg import checkpoint
    from repvgg.model import Normalize, to_float

    normalize = Normalize(data.contract.mean, data.contract.std)
    images, _ = data.spread(data.train, MOST_CALIBRATED)
    try:
        new = checkpoint.initialize(network, start, normalize(to_float(images)))
    except ValueError as error:
        raise ValueError(f"init={path}: {error}") from error
    what = start.origin or start.config["name"]
    return f"\nbegins as {what}; new: {', '.join(new) or 'nothing'}"


def prepare(module: Any, config: dict[str, Any], images: Any) -> None:
    """Find the noise for R-Drop; lay out, compile, checkpoint the network as it was asked for."""
    import torch
    from torch import nn

    from repvgg.block import RepVGGBlock, compile_blocks
    from repvgg.rdrop import find_noise

    name = config["model"]["name"]
    if module.rdrop > 0 and module.rdrop_views == 1:
        module.noise = find_noise(module.net, images)
        if not any(module.noise):
            raise ValueError(
                f"rdrop={module.rdrop:g}: nothing in {name} is random while it trains, so "
                "two predictions are equal; type rdrop=false, or model.over_parameterize=true "
                "model.branch_drop=0.1, or rdrop_views=2"
            )
    blocks = [part for part in module.net.modules() if isinstance(part, RepVGGBlock)]
    if config["activation_checkpointing"]:
        if not blocks:
            raise ValueError(
                f"activation_checkpointing=true: {name} has no RepVGG block, which is what is "
                "computed again; type activation_checkpointing=false"
            )
        for block in blocks:
            block.recompute = True
    if config["channels_last"]:
        on_cpu = config["trainer"]["accelerator"] == "cpu" or not torch.accelerator.is_available()
        for path, part in module.net.named_modules():
            pointwise = isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1)
            if on_cpu and pointwise and part.stride != (1, 1):
                raise ValueError(
                    f"channels_last=true: {name} has a 1x1 convolution of stride "
                    f"{part.stride[0]}, {path}, whose gradient in channels_last corrupts memory on "
                    "a CPU; type channels_last=false"
                )
        module.net.to(memory_format=torch.channels_last)
    if config["compile"] and not compile_blocks(module.net):
        module.net.compile()


def describe(
    config: dict[str, Any], module: Any, steps: "Steps", rate: "LearningRate", folder: Path
) -> str:
    """What the run is, before it starts."""
    from repvgg.module import parameter_groups

    count = sum(parameter.numel() for parameter in module.parameters())
    lines = [
        f"{config['model']['name']}: {count / 1e6:.2f} M parameters, {steps.total} steps of "
        f"{steps.images} images, {describe_rdrop(module)}, into {folder}",
        f"learning rate {rate.scaled:.4g}{rate.explained}",
        f"{'weight decay':<13}{'tensors':>8}{'parameters':>12}",
    ]
    for group in parameter_groups(module.net, module.weight_decay):
        sizes = [parameter.numel() for parameter in group["params"]]
        lines.append(f"{group['weight_decay']:<13.4g}{len(sizes):>8}{sum(sizes):>12,}")
    return "\n".join(lines)


def report_stop(stopped: Any, last: Path) -> NoReturn:
    """Say why it stopped, and how to go on; the status tells a signal from a mistake."""
    path = shlex.quote(runs.relative(last))
    if not hasattr(stopped, "signum"):
        kept = f"the last good checkpoint is {path}" if last.exists() else "nothing was saved yet"
        cli.fail(f"{stopped}; {kept}; try a lower optim.lr or trainer.gradient_clip_val=1")
    saved = f"saved {path}; resume with: python train.py resume={path}"
    message = f"{stopped}; {saved if last.exists() else 'nothing was saved yet'}"
    cli.fail(message, 128 + stopped.signum)


def report(metrics: Any, data: Any, best: Path, folder: Path) -> None:
    """What came out, and what to type next."""
    for part in (data.train, data.val, data.test):
        if unreadable := sorted(getattr(part, "unreadable", ())):
            print(f"{len(unreadable)} images could not be read; others took their place:")
            print(*unreadable, sep="\n")
    checkpoint_path = shlex.quote(runs.relative(best))
    print(f"test accuracy {metrics['test/accuracy']:.4f}, loss {metrics['test/loss']:.4f}")
    print(f"checkpoint    {checkpoint_path}")
    print(f"deploy it     python deploy.py ckpt={checkpoint_path}")
    logs = "runs" if folder.is_relative_to(runs.RUNS.absolute()) else runs.relative(folder)
    print(f"watch it      tensorboard --logdir {shlex.quote(logs)}")


def progress_bar(settings: dict[str, Any]) -> list[Any]:
    from lightning.pytorch.callbacks import TQDMProgressBar

    from repvgg.callbacks import EpochLines

    if not settings["enable_progress_bar"]:
        return []
    return [TQDMProgressBar() if sys.stdout.isatty() else EpochLines()]


def check_settings(config: dict[str, Any]) -> None:
    """Refuse what the constructors would accept, or refuse only after hours of training."""
    import torch

    from repvgg.arguments import check_integer, check_number, refusal

    for section in ("model", "optim", "trainer", "data"):
        if not isinstance(config[section], dict):
            raise ValueError(
                f"{section}={config[section]}: must be keys, as in {section}.KEY=VALUE"
            )
    check_integer("seed", config["seed"], minimum=0, example=0)
    settings = config["trainer"]
    epochs = check_integer("trainer.max_epochs", settings["max_epochs"], minimum=1, example=24)
    every = settings["check_val_every_n_epoch"]
    check_integer("trainer.check_val_every_n_epoch", every, minimum=1, example=1)
    if every > epochs:
        raise refusal(
            "trainer.check_val_every_n_epoch", every, f"must be at most max_epochs={epochs}", 1
        )
    on_gpu = settings["accelerator"] != "cpu" and torch.accelerator.is_available()
    devices = settings["devices"]
    if isinstance(devices, int) and not isinstance(devices, bool):
        here = torch.accelerator.device_count() if on_gpu else os.cpu_count() or 1
        if not (1 <= devices <= here or (devices == -1 and on_gpu)):
            allowed = f"this machine has {here} {'accelerators' if on_gpu else 'processors'}"
            raise refusal("trainer.devices", devices, allowed, 1)
    if settings["precision"] == "bf16-mixed" and not (on_gpu or has_bf16()):
        print(
            "trainer.precision=bf16-mixed: this processor has no instructions for it and emulates "
            "them, many times slower than 32-true",
            file=sys.stderr,
        )
    check_integer("trainer.num_nodes", settings["num_nodes"], minimum=1, example=1)
    if settings["sync_batchnorm"] and not on_gpu:
        allowed = "torch normalizes across devices on GPUs alone"
        raise refusal("trainer.sync_batchnorm", settings["sync_batchnorm"], allowed, "false")
    strategy = str(settings["strategy"])
    if strategy != "auto" and not strategy.startswith("ddp"):
        allowed = "must be auto or ddp; the largest RepVGG fits on one device"
        raise refusal("trainer.strategy", strategy, allowed, "ddp")
    check_number("ema", config["ema"], below=1, example=0.999)
    for key in ("channels_last", "compile", "activation_checkpointing", "keep_memory"):
        if not isinstance(config[key], bool):
            raise refusal(key, config[key], "must be true or false", "true")
    if config["compile"] and config["activation_checkpointing"]:
        raise ValueError(
            "compile=true activation_checkpointing=true: one or the other; inductor decides by "
            "itself what it computes again"
        )
    precisions = ["32-true", "bf16-mixed", *(["16-mixed"] if on_gpu else [])]
    if settings["precision"] not in precisions:
        raise refusal(
            "trainer.precision",
            settings["precision"],
            f"must be one of {', '.join(precisions)} on this device",
            "32-true",
        )


def has_bf16() -> bool:
    """Whether this processor computes convolutions in bf16."""
    import torch

    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fit_model(model: dict[str, Any], data: Any) -> None:
    """Refuse a network that does not fit the images or the classes; null takes their number."""
    for key, wanted in (
        ("num_classes", len(data.contract.classes)),
        ("in_channels", data.contract.in_channels),
    ):
        if model[key] is None:
            model[key] = wanted
        if model[key] != wanted:
            raise ValueError(
                f"model.{key}={model[key]}: the data has {wanted}; type model.{key}={wanted}"
            )


def check_runs(network: Any, images: Any, name: str) -> None:
    """Refuse a network that the images do not get through: most need a size of their own."""
    import torch

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


def describe_rdrop(module: Any) -> str:
    """What R-Drop does in this run, and what it costs."""
    rdrop = f"R-Drop {module.rdrop:g}" if module.rdrop > 0 else "no R-Drop"
    if module.rdrop_views == 2:
        return f"{rdrop}, two views of each image, each step at the price of two"
    if module.rdrop == 0:
        return rdrop
    if module.noise.trunk:
        return f"{rdrop}, each image twice in the batch, each step at the price of two"
    return f"{rdrop} in one forward"


class Steps(NamedTuple):
    """Optimizer steps of the run and of the two warm-ups; images in a step of all devices; batches
    of each device in an epoch."""

    total: int
    warmup: int
    rdrop_warmup: int
    images: int
    batches: int


class LearningRate(NamedTuple):
    """The peak rate, and how it came about, for the reader."""

    scaled: float
    explained: str


def scale_learning_rate(optim: dict[str, Any], images: int) -> LearningRate:
    """Scale the rate to the images in a step: linearly for SGD, by the root for AdamW.

    Goyal et al., 2017, arXiv:1706.02677; Malladi et al., 2022, arXiv:2205.10287.
    """
    from repvgg.arguments import check_integer, check_number

    rate = check_number("optim.lr", optim["lr"], example=0.1)
    base = optim["base_batch_size"]
    if base is None:
        return LearningRate(rate, "")
    check_integer("optim.base_batch_size", base, minimum=1, example=256)
    factor = images / base
    if optim["name"] == "adamw":
        return LearningRate(rate * factor**0.5, f" ({rate:g} x sqrt({images} / {base}))")
    return LearningRate(rate * factor, f" ({rate:g} x {images} / {base})")


def count_steps(config: dict[str, Any], data: Any, devices: int) -> Steps:
    from repvgg.arguments import check_integer, check_number, refusal

    settings = config["trainer"]
    accumulated = check_integer(
        "trainer.accumulate_grad_batches",
        settings["accumulate_grad_batches"],
        minimum=1,
        example=1,
    )
    epochs = settings["max_epochs"]
    warmups = []
    for key, given in (
        ("optim.warmup_epochs", config["optim"]["warmup_epochs"]),
        ("rdrop_warmup", config["rdrop_warmup"]),
    ):
        warmups.append(check_number(key, given, example=1))
        if given > epochs:
            raise refusal(key, given, f"must be at most trainer.max_epochs={epochs}", 0)
    if config["rdrop_warmup"] > 0 and not config["rdrop"]:
        raise refusal("rdrop_warmup", config["rdrop_warmup"], "has no effect without rdrop", 0)
    data.check_batch(data.batch_size * devices)
    batches = len(data.train.labels) // (data.batch_size * devices)
    steps = math.ceil(batches / accumulated)
    images = data.batch_size * devices * accumulated
    return Steps(epochs * steps, *(round(warmup * steps) for warmup in warmups), images, batches)


def quieten() -> None:
    """Silence what every run of the stack says and no user can act on."""
    import logging
    import warnings

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    # Raised inside Lightning by its own use of torch.utils._pytree.
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*")
    # Only a resumed run finds its folder in use: `train` refuses any other.
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* not empty")


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


def record(config: dict[str, Any], folder: Path) -> None:
    """Write down what the run was given, for the reader and for `resume`."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    (folder / ".hydra").mkdir(exist_ok=True)
    overrides = OmegaConf.to_yaml(HydraConfig.get().overrides.task)
    runs.write_whole(folder / ".hydra" / "overrides.yaml", overrides)
    runs.write_whole(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(config))


if __name__ == "__main__":
    cli.run(main, CONFIG, prepare=runs.continue_run)
