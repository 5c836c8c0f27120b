"""Train a network: python train.py model=repvgg_a0 rdrop=true

Configured by configs/train.yaml; `python train.py --help` lists what can be set. A run lives in
runs/<data>-<model>/<time>/: its configuration, TensorBoard events and checkpoints.
"""

import contextlib
import functools
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from repvgg import cli
from repvgg.training import lock, processes, runs, schedule
from repvgg.training.settings import LearningRate, Settings, is_emulated, scale_learning_rate

CONFIG = Path(__file__).absolute().parent / "configs" / "train.yaml"
MOST_CALIBRATED = 512  # training images that give a deployed network its statistics back


def main(config: dict[str, Any], folder: Path) -> None:
    """Check what can be checked before anything is read, then train in a folder of its own."""
    try:
        settings = Settings.read(config)
        trainer = settings.trainer
        processes.check_processes(
            trainer["devices"], trainer["num_nodes"], accelerator=trainer["accelerator"]
        )
        with lock.hold(folder) if processes.rank() == 0 else contextlib.nullcontext():
            train(settings, config, folder)
    finally:
        runs.discard_if_empty(folder)


def train(settings: Settings, config: dict[str, Any], folder: Path) -> None:
    """Fit, keep the best and the last checkpoint, test the best, say where everything is."""
    from hydra.core.hydra_config import HydraConfig

    resume = settings.resume
    last = folder / runs.LAST
    typed = [argument.partition("=")[0] for argument in HydraConfig.get().overrides.hydra]
    runs.check_folder(folder, resumed=resume is not None, chosen="hydra.run.dir" in typed)

    import lightning as L
    from hydra.utils import instantiate

    from repvgg import checkpoint
    from repvgg.contract import to_float
    from repvgg.data.batches import WorkersDied
    from repvgg.data.module import ImageData
    from repvgg.training import callbacks
    from repvgg.training.classifier import Diverged
    from repvgg.training.malloc import keep_memory

    quieten()
    if is_emulated(settings.trainer) and processes.rank() == 0:
        print(
            "trainer.precision=bf16-mixed: this processor has no instructions for it and emulates "
            "them, many times slower than 32-true",
            file=sys.stderr,
        )
    L.seed_everything(settings.seed, verbose=False)
    describing = callbacks.SelfDescribing(checkpoint.KEY)
    trainer = build_trainer(settings, folder, describing)
    check_devices(trainer)
    check_network(settings)
    start = checkpoint.open_network(settings.init) if settings.init and not resume else None
    data = instantiate(
        settings.data,
        views=settings.rdrop_views,
        mixup=settings.mixup,
        cutmix=settings.cutmix,
        seed=settings.seed,
    )
    if not isinstance(data, ImageData):
        raise ValueError(
            f"data._target_={settings.data['_target_']}: gives a {type(data).__name__}; must give "
            "a repvgg.data.module.ImageData, which says what the images are. Any other "
            "LightningDataModule trains with training.classifier.Classifier in your own Trainer"
        )
    model = fit_model(settings.model, data)
    if start is not None and "bn_eps" in start.config:
        model = {"bn_eps": start.config["bn_eps"]} | model
    images, labels = data.probe()
    describing.describe = functools.partial(
        checkpoint.describe, config=model, data=data.contract, images=images, labels=labels
    )
    if settings.keep_memory and trainer.strategy.root_device.type == "cpu":
        keep_memory()
    steps = count_steps(settings, data, trainer.world_size)
    if settings.trainer["log_every_n_steps"] is None:
        trainer.log_every_n_steps = max(1, steps.batches // 10)
    rate = scale_learning_rate(settings.optim, steps.images)
    module = build_module(settings, model, steps, rate.scaled)
    begun = ""
    if start is not None:
        begun = initialize(module.net, start, data, str(settings.init))
    if resume is not None:
        begun = check_resumed(resume, config, model, data, images, folder)
        check_same_steps(resume, config, len(data.train.labels), steps, folder)
    check_runs(module.net, to_float(images[:2]), model["name"])
    check_batch_of_one(module.net, to_float(images[:1]), data.batch_size)
    prepare(module, settings, to_float(images))
    if processes.rank() == 0:
        print(data.summary(), describe(settings, module, steps, rate, folder) + begun, sep="\n")
        if not trainer.fast_dev_run:
            runs.record(config, folder)
    best = last.with_name("best.ckpt")
    try:
        with callbacks.interruptible():
            trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
            tested = trainer.test(
                module,
                datamodule=data,
                ckpt_path=None if trainer.fast_dev_run else best if best.exists() else last,
                weights_only=True,
                verbose=False,
            )
    except (callbacks.Interrupted, Diverged, WorkersDied) as stopped:
        report_stop(stopped, last)
    if trainer.fast_dev_run:
        if processes.rank() == 0:
            print("fast_dev_run: trained, validated and tested; nothing was saved")
        return
    metrics = tested[0] if tested else {}
    shown = flatten(config | {"rdrop": module.rdrop, "model": model})
    for logger in trainer.loggers:
        log_hyperparameters(logger, shown, metrics)
    if processes.rank() == 0:
        if trainer.checkpoint_callback.best_model_score is None:
            print("no validation ran: best.ckpt is the last checkpoint")
        report(metrics, data, best)
        show_logs(trainer.loggers, folder)


def build_trainer(settings: Settings, folder: Path, describing: Any) -> Any:
    """Lightning's Trainer, with the callbacks and loggers of the settings beside those of a run."""
    from hydra.utils import instantiate
    from lightning.pytorch.loggers import TensorBoardLogger

    from repvgg.training import callbacks

    given = dict(settings.trainer)
    more = instantiate(given.pop("callbacks", None) or [], _convert_="all")
    plugins = instantiate(given.pop("plugins", None) or [], _convert_="all")
    logger = given.pop("logger", None)
    if logger is None or logger is True:
        logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    elif logger is not False:
        logger = instantiate(logger, _convert_="all")
    checkpoints = (folder / runs.LAST).parent
    noisy = settings.model.get("branch_drop") or settings.model.get("drop_path")
    return instantiate(
        {"enable_model_summary": False, "num_sanity_val_steps": 0} | given,
        default_root_dir=folder,
        logger=logger,
        plugins=[*plugins, callbacks.WholeFileIO(), *processes.cluster_plugins()],
        callbacks=[
            *([callbacks.ReestimateBN()] if noisy else []),
            *([callbacks.EMA(settings.ema)] if settings.ema else []),
            describing,
            callbacks.SaveOnSignal(folder / runs.LAST),
            callbacks.Throughput(),
            callbacks.BestCheckpoint(checkpoints),
            callbacks.LastCheckpoint(checkpoints),
            *progress_bar(settings.trainer),
            *(more.values() if isinstance(more, dict) else more),
        ],
        _convert_="all",
    )


def check_devices(trainer: Any) -> None:
    """Refuse several devices where Lightning cannot start a process for each.

    Raises:
        ValueError: likewise.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if sweep and trainer.world_size > 1 and not processes.started_together():
        raise ValueError(
            f"trainer.devices={trainer.num_devices}: a sweep trains on one device; start each run "
            "by itself, without -m"
        )


def check_network(settings: Settings) -> None:
    """Build the network without its weights, so that a mistake is told before data is read."""
    import torch

    wanted = {"num_classes": 2, "in_channels": 3}
    model = settings.model | {
        key: value for key, value in wanted.items() if settings.model.get(key) is None
    }
    try:
        with torch.device("meta"):
            build_module(settings, model, Steps(1, 1, 0, 0, 1, 1), settings.optim.lr)
    except (NotImplementedError, RuntimeError):  # of a network that cannot be built like this
        return


def build_module(settings: Settings, model: dict[str, Any], steps: "Steps", rate: float) -> Any:
    from repvgg.training.classifier import Classifier

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
        rdrop_views=settings.rdrop_views,
        label_smoothing=settings.label_smoothing,
        seed=settings.seed,
        deployed_validation=settings.deployed_validation,
    )


def check_resumed(
    resume: str,
    config: dict[str, Any],
    model: dict[str, Any],
    data: Any,
    images: Any,
    folder: Path,
) -> str:
    """Refuse a checkpoint of another network or of other classes; lines on what is taken over."""
    import torch

    from repvgg import checkpoint

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
    resume: str, config: dict[str, Any], num_images: int, steps: "Steps", folder: Path
) -> None:
    """Refuse other batches or devices if the steps of the run would be others."""
    import torch

    def split(given: dict[str, Any]) -> tuple[Any, ...]:
        trainer = given["trainer"]
        return (
            *(given["data"]["batch_size"], trainer["devices"], trainer["num_nodes"]),
            trainer["accumulate_grad_batches"],
        )

    before, now = split(runs.read_config(folder)), split(config)
    if before == now:
        return
    keys = ("data.batch_size", "trainer.devices", "trainer.num_nodes")
    keys += ("trainer.accumulate_grad_batches",)
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


def show(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 20 else [*names[:19], f"... ({len(names)})"])


def log_hyperparameters(logger: Any, settings: dict[str, Any], metrics: Any) -> None:
    """Tell a logger what the run was, with how it ended where it takes that."""
    from lightning.pytorch.loggers import TensorBoardLogger

    if isinstance(logger, TensorBoardLogger):
        logger.log_hyperparams(settings, metrics)
    else:
        logger.log_hyperparams(settings)
    logger.finalize("success")


def initialize(network: Any, start: Any, data: Any, path: str) -> str:
    """Take over the weights of a checkpoint; a line for the reader that says which did not come."""
    from repvgg import checkpoint
    from repvgg.contract import Normalize, to_float

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
    import torch
    from torch import nn

    from repvgg.models.block import RepVGGBlock, compile_blocks
    from repvgg.rdrop import find_noise

    name = settings.model["name"]
    if module.rdrop > 0 and module.rdrop_views == 1:
        module.noise = find_noise(module.net, images)
        if not any(module.noise):
            raise ValueError(
                f"rdrop={module.rdrop:g}: nothing in {name} is random while it trains, so "
                "two predictions are equal; type rdrop=false, or model.over_parameterize=true "
                "model.branch_drop=0.1, or rdrop_views=2"
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


def describe(
    settings: Settings, module: Any, steps: "Steps", rate: LearningRate, folder: Path
) -> str:
    """What the run is, before it starts."""
    from repvgg.training.classifier import parameter_groups

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


def report_stop(stopped: Any, last: Path) -> NoReturn:
    """Say why it stopped, and how to go on; the status tells a signal from a mistake."""
    from repvgg.training.classifier import Diverged

    path = shlex.quote(runs.relative(last))
    if isinstance(stopped, Diverged):
        kept = f"the last good checkpoint is {path}" if last.exists() else "nothing was saved yet"
        cli.fail(f"{stopped}; {kept}; try a lower optim.lr or trainer.gradient_clip_val=1")
    saved = f"saved {path}; resume with: python train.py resume={path}"
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
    print(f"deploy it     python deploy.py ckpt={checkpoint_path}")


def show_logs(loggers: list[Any], folder: Path) -> None:
    """What to type to see the curves, where TensorBoard has them."""
    from lightning.pytorch.loggers import TensorBoardLogger

    if any(isinstance(logger, TensorBoardLogger) for logger in loggers):
        own = folder.is_relative_to(cli.start_folder() / runs.RUNS)
        logs = str(runs.RUNS) if own else runs.relative(folder)
        print(f"watch it      tensorboard --logdir {shlex.quote(logs)}")


def progress_bar(settings: dict[str, Any]) -> list[Any]:
    from lightning.pytorch.callbacks import TQDMProgressBar

    from repvgg.training.callbacks import EpochLines

    if not settings["enable_progress_bar"]:
        return []
    return [TQDMProgressBar() if sys.stdout.isatty() else EpochLines()]


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


def check_batch_of_one(network: Any, image: Any, batch_size: int) -> None:
    """Refuse a batch of one image where a BatchNorm would see one value for each channel."""
    import copy

    import torch

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
    """Optimizer steps of the run, of an epoch and of the two warm-ups; images in a step of all
    devices; batches of each device in an epoch."""

    total: int
    epoch: int
    warmup: int
    rdrop_warmup: int
    images: int
    batches: int


def count_steps(settings: Settings, data: Any, devices: int) -> Steps:
    accumulated = settings.trainer["accumulate_grad_batches"]
    data.check_batch(data.batch_size * devices)
    batches = len(data.train.labels) // (data.batch_size * devices)
    counted = schedule.from_trainer_settings(batches, settings.trainer)
    images = data.batch_size * devices * accumulated
    warmups = (settings.optim.warmup_epochs, settings.rdrop_warmup)
    warmup, rdrop_warmup = (round(warmup * counted.epoch) for warmup in warmups)
    if settings.trainer.get("fast_dev_run"):
        warmup, rdrop_warmup = min(warmup, counted.total), min(rdrop_warmup, counted.total)
    if max(warmup, rdrop_warmup) > counted.total:
        raise ValueError(
            f"optim.warmup_epochs={warmups[0]:g} rdrop_warmup={warmups[1]:g}: longer than the "
            f"{counted.total} steps that run, of {counted.epoch} in an epoch; pass for example "
            "optim.warmup_epochs=0 rdrop_warmup=0"
        )
    return Steps(counted.total, counted.epoch, warmup, rdrop_warmup, images, counted.batches)


def quieten() -> None:
    """Silence what every run of the stack says and no user can act on."""
    import logging
    import warnings

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # prints its report
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


if __name__ == "__main__":
    cli.run(main, CONFIG, prepare=runs.plan)
