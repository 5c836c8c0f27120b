"""Train a network: python train.py model=repvgg_a0 rdrop=true

Configured by configs/train.yaml; `python train.py --help` lists what can be set. A run lives in
runs/<data>-<model>/<time>/: its configuration, TensorBoard events and checkpoints.
"""

import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

from repvgg import cli

CONFIG = Path(__file__).absolute().parent / "configs" / "train.yaml"


def main(config: dict[str, Any], folder: Path) -> None:
    try:
        train(config, folder)
    finally:
        discard_if_empty(folder)


def train(config: dict[str, Any], folder: Path) -> None:
    """Fit, keep the best and the last checkpoint, test the best, say where everything is."""
    check_settings(config)  # before the imports below, which take seconds
    resume = config["resume"]
    last = folder / "checkpoints" / "last.ckpt"
    if resume is None and (folder / ".hydra").exists():
        path = shlex.quote(relative(last))
        raise ValueError(
            f"{relative(folder)} belongs to another run: type resume={path} to go on from it, or "
            "give another hydra.run.dir"
        )

    import lightning as L
    from hydra.utils import instantiate
    from lightning.pytorch.callbacks import TQDMProgressBar
    from lightning.pytorch.loggers import TensorBoardLogger

    from repvgg import callbacks, checkpoint
    from repvgg.model import to_float
    from repvgg.module import Classifier
    from repvgg.rdrop import find_noise

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
    check_fit(config, data)
    steps = count_steps(config, data)
    module = Classifier(
        model,
        lr=config["optim"]["lr"],
        momentum=config["optim"]["momentum"],
        weight_decay=config["optim"]["weight_decay"],
        num_steps=steps.total,
        num_warmup_steps=steps.warmup,
        rdrop=config["rdrop"],
        num_rdrop_warmup_steps=steps.rdrop_warmup,
        rdrop_views=config["rdrop_views"],
        label_smoothing=config["label_smoothing"],
        seed=config["seed"],
    )
    if resume is not None:
        recorded = checkpoint.load(resume).config
        if recorded != model:
            raise ValueError(f"resume={resume}: it holds {recorded}, this run wants {model}")
    images, labels = data.probe()
    check_runs(module.net, to_float(images[:2]), model["name"])
    if module.rdrop > 0 and module.rdrop_views == 1:
        module.noise = find_noise(module.net, to_float(images))
        if not any(module.noise):
            raise ValueError(
                f"rdrop={module.rdrop:g}: nothing in {model['name']} is random while it trains, so "
                "two predictions are equal; type rdrop=false, or model.over_parameterize=true "
                "model.branch_drop=0.1, or rdrop_views=2"
            )
    logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    if config["trainer"]["log_every_n_steps"] is None:
        config["trainer"]["log_every_n_steps"] = max(1, steps.batches // 10)
    progress_bar = []
    if config["trainer"]["enable_progress_bar"]:
        # In a file or a pipe, one line an epoch.
        rate = 1 if sys.stdout.isatty() else steps.batches
        progress_bar = [TQDMProgressBar(refresh_rate=rate)]
    trainer: L.Trainer = instantiate(
        config["trainer"],
        logger=logger,
        plugins=[callbacks.WholeFileIO()],
        callbacks=[
            *([callbacks.ReestimateBN()] if model["branch_drop"] or model["drop_path"] else []),
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
            *progress_bar,
        ],
        enable_model_summary=False,
        num_sanity_val_steps=0,
        _convert_="all",
    )
    print(
        f"{model['name']}: {sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters, "
        f"{steps.total} steps of {data.batch_size} images, {describe_rdrop(module)}, "
        f"into {folder}"
    )
    record(config, folder)
    best = last.with_name("best.ckpt")
    try:
        with callbacks.interruptible():
            trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
            (metrics,) = trainer.test(
                module, datamodule=data, ckpt_path=best, weights_only=True, verbose=False
            )
    except callbacks.Interrupted as interrupted:
        path = shlex.quote(relative(last))
        saved = f"saved {path}; resume with: python train.py resume={path}"
        cli.fail(
            f"{interrupted}; {saved if last.exists() else 'nothing was saved yet'}",
            128 + interrupted.signum,
        )
    logger.log_hyperparams(flatten(config | {"rdrop": module.rdrop}), metrics)
    logger.finalize("success")
    checkpoint_path = shlex.quote(relative(best))
    print(f"test accuracy {metrics['test/accuracy']:.4f}, loss {metrics['test/loss']:.4f}")
    print(f"checkpoint    {checkpoint_path}")
    print(f"deploy it     python deploy.py ckpt={checkpoint_path}")
    logs = "runs" if folder.is_relative_to(Path("runs").absolute()) else relative(folder)
    print(f"watch it      tensorboard --logdir {shlex.quote(logs)}")


def check_settings(config: dict[str, Any]) -> None:
    """Refuse what the constructors would accept, or refuse only after hours of training."""
    import torch

    from repvgg.arguments import check_integer, refusal

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
    if settings["devices"] != 1:
        raise refusal("trainer.devices", settings["devices"], "training uses one device so far", 1)
    on_gpu = settings["accelerator"] != "cpu" and torch.accelerator.is_available()
    precisions = ["32-true", "bf16-mixed", *(["16-mixed"] if on_gpu else [])]
    if settings["precision"] not in precisions:
        raise refusal(
            "trainer.precision",
            settings["precision"],
            f"must be one of {', '.join(precisions)} on this device",
            "32-true",
        )


def check_fit(config: dict[str, Any], data: Any) -> None:
    """Refuse a network that does not fit the images or the classes."""
    model = config["model"]
    for key, wanted in (
        ("num_classes", len(data.contract.classes)),
        ("in_channels", data.contract.in_channels),
    ):
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
    """Optimizer steps of the run, those of the two warm-ups, and batches in an epoch."""

    total: int
    warmup: int
    rdrop_warmup: int
    batches: int


def count_steps(config: dict[str, Any], data: Any) -> Steps:
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
    batches = len(data.train_dataloader())
    steps = math.ceil(batches / accumulated)
    return Steps(epochs * steps, *(round(warmup * steps) for warmup in warmups), batches)


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


def relative(path: Path) -> str:
    """A path as the user would type it from here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def record(config: dict[str, Any], folder: Path) -> None:
    """Write down what the run was given, for the reader and for `resume`."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    (folder / ".hydra").mkdir(exist_ok=config["resume"] is not None)
    OmegaConf.save(HydraConfig.get().overrides.task, folder / ".hydra" / "overrides.yaml")
    OmegaConf.save(config, folder / ".hydra" / "config.yaml")


def discard_if_empty(folder: Path) -> None:
    """Remove the folder Hydra made for a run that was refused, and empty ones above it in runs/."""
    runs = Path("runs").absolute()
    for path in (folder, *(above for above in folder.parents if above.is_relative_to(runs))):
        if path == Path.cwd() or not path.is_dir() or any(path.iterdir()):
            return
        path.rmdir()


# Keys that do what they say beside `resume`; the others are part of what is resumed.
RESUMABLE = (
    "trainer.max_epochs",
    "trainer.accelerator",
    "trainer.check_val_every_n_epoch",
    "trainer.log_every_n_steps",
    "trainer.enable_progress_bar",
)


def continue_run(arguments: list[str]) -> list[str]:
    """For `resume=PATH`: repeat that run's own arguments first, and run in its folder."""
    from omegaconf import OmegaConf

    typed = {argument.partition("=")[0]: argument for argument in arguments}
    if typed.get("resume", "resume=null") == "resume=null":
        return arguments
    path = Path(typed["resume"].partition("=")[2].strip("'\"")).expanduser()
    if not path.is_file():
        raise ValueError(f"resume={path}: there is no such file; give a run's last.ckpt")
    folder = path.absolute().parent.parent
    source = folder / ".hydra" / "overrides.yaml"
    if not source.is_file():
        raise ValueError(f"resume={path}: not in the folder of a run, which holds {source}")
    recorded = {entry.partition("=")[0]: entry for entry in OmegaConf.load(source)}
    for key, argument in typed.items():
        if key not in ("resume", *RESUMABLE) and recorded.get(key) != argument:
            raise ValueError(
                f"{argument}: a resumed run keeps what it was started with; allowed beside "
                f"resume are {', '.join(RESUMABLE)}"
            )
    return [*(recorded | typed).values(), f"hydra.run.dir={folder}"]


if __name__ == "__main__":
    cli.run(main, CONFIG, prepare=continue_run)
