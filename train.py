"""Train a RepVGG: python train.py model=repvgg_a0 rdrop=true

Configured by configs/train.yaml; `python train.py --help` lists what can be set. A run lives in
runs/<data>-<model>/<time>/: its configuration, TensorBoard events and checkpoints.
"""

import math
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from repvgg import cli

CONFIG = Path(__file__).absolute().parent / "configs" / "train.yaml"


def main(config: dict[str, Any], folder: Path) -> None:
    try:
        train(config, folder)
    except BaseException:
        discard_if_nothing_ran(folder)
        raise


def train(config: dict[str, Any], folder: Path) -> None:
    """Fit, keep the best and the last checkpoint, test the best, say where everything is."""
    import lightning as L  # here, so that --help answers at once
    from hydra.utils import instantiate
    from lightning.pytorch.callbacks import TQDMProgressBar
    from lightning.pytorch.loggers import TensorBoardLogger

    from repvgg import callbacks, checkpoint
    from repvgg.arguments import check_integer
    from repvgg.module import Classifier

    quieten()
    check_integer("seed", config["seed"], minimum=0, example=0)
    L.seed_everything(config["seed"], verbose=False)
    resume = config["resume"]
    last = folder / "checkpoints" / "last.ckpt"
    if resume is None and last.exists():
        raise ValueError(f"{last} exists: type resume={shlex.quote(str(last))} to go on from it")
    check_devices(config["trainer"]["devices"])
    data = instantiate(config["data"])
    model = config["model"]
    check_fit(model, data.contract)
    num_steps, num_warmup_steps, batches = count_steps(config, data)
    module = Classifier(
        model,
        lr=config["optim"]["lr"],
        momentum=config["optim"]["momentum"],
        weight_decay=config["optim"]["weight_decay"],
        num_steps=num_steps,
        num_warmup_steps=num_warmup_steps,
        rdrop=config["rdrop"],
        label_smoothing=config["label_smoothing"],
        seed=config["seed"],
    )
    if resume is not None:
        recorded = checkpoint.load(resume).config
        if recorded != model:
            raise ValueError(f"resume={resume}: it holds {recorded}, this run wants {model}")
    images, labels = data.probe()
    logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    if config["trainer"]["log_every_n_steps"] is None:
        config["trainer"]["log_every_n_steps"] = max(1, batches // 10)
    progress_bar = []
    if config["trainer"]["enable_progress_bar"]:
        # In a file or a pipe, one line an epoch.
        rate = 1 if sys.stderr.isatty() else batches
        progress_bar = [TQDMProgressBar(refresh_rate=rate)]
    trainer: L.Trainer = instantiate(
        config["trainer"],
        logger=logger,
        plugins=[callbacks.WholeFileIO()],
        callbacks=[
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
        f"{num_steps} steps of {data.batch_size} images, R-Drop {module.rdrop:g}, into {folder}"
    )
    if resume is not None:
        record_arguments(config, folder)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        best = last.with_name("best.ckpt")
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


def check_devices(devices: Any) -> None:
    """Refuse more processes than there is anything to run them on."""
    import torch

    gpus, processors = torch.accelerator.device_count(), os.cpu_count() or 1
    if isinstance(devices, int) and devices > max(gpus, processors):
        raise ValueError(
            f"trainer.devices={devices}: this machine has {gpus} GPUs and {processors} "
            "processors; type for example trainer.devices=1"
        )


def check_fit(model: dict[str, Any], contract: Any) -> None:
    """Refuse a network that does not fit the images or the classes."""
    for key, wanted in (
        ("num_classes", len(contract.classes)),
        ("in_channels", contract.in_channels),
    ):
        if model[key] != wanted:
            raise ValueError(
                f"model.{key}={model[key]}: the data has {wanted}; type model.{key}={wanted}"
            )


def count_steps(config: dict[str, Any], data: Any) -> tuple[int, int, int]:
    """Optimizer steps of the run, of them warm-up, and batches in an epoch."""
    from repvgg.arguments import check_integer, check_number

    settings = config["trainer"]
    epochs = check_integer("trainer.max_epochs", settings["max_epochs"], minimum=1, example=24)
    accumulated = check_integer(
        "trainer.accumulate_grad_batches",
        settings["accumulate_grad_batches"],
        minimum=1,
        example=1,
    )
    warmup = check_number("optim.warmup_epochs", config["optim"]["warmup_epochs"], example=1)
    batches = len(data.train_dataloader())
    steps = math.ceil(batches / accumulated)
    return epochs * steps, round(warmup * steps), batches


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


def discard_if_nothing_ran(folder: Path) -> None:
    """Remove the folder Hydra made for a run that was refused before it began."""
    if folder.is_dir() and [entry.name for entry in folder.iterdir()] == [".hydra"]:
        shutil.rmtree(folder)
        for parent in (folder.parent, folder.parent.parent):
            if not any(parent.iterdir()):
                parent.rmdir()


def continue_run(arguments: list[str]) -> list[str]:
    """For `resume=PATH`: repeat that run's own arguments first, and run in its folder.

    Arguments typed beside `resume` win over those of the run.
    """
    from omegaconf import OmegaConf

    typed = {argument.partition("=")[0]: argument for argument in arguments}
    if typed.get("resume", "resume=null") == "resume=null":
        return arguments
    path = Path(typed["resume"].partition("=")[2].strip("'"))
    if not path.is_file():
        raise ValueError(f"resume={path}: there is no such file; give a run's last.ckpt")
    folder = path.absolute().parent.parent
    record = folder / ".hydra" / "overrides.yaml"
    if not record.is_file():
        raise ValueError(f"resume={path}: not in the folder of a run, which holds {record}")
    recorded = {entry.partition("=")[0]: entry for entry in OmegaConf.load(record)}
    quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    # Hydra would overwrite the record before anything is checked: `record_arguments` does it.
    hydra = ["hydra.output_subdir=null", f"hydra.run.dir='{quoted}'"]
    return [*(recorded | typed).values(), *hydra]


def record_arguments(config: dict[str, Any], folder: Path) -> None:
    """Write down what a resumed run was given, for the next `resume`."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    OmegaConf.save(HydraConfig.get().overrides.task, folder / ".hydra" / "overrides.yaml")
    OmegaConf.save(config, folder / ".hydra" / "config.yaml")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    cli.run(main, CONFIG, prepare=continue_run)
