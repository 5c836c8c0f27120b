"""One training run, from its settings to its checkpoints."""

import contextlib
import functools
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig

from repvgg import checkpoint
from repvgg.contract import to_float
from repvgg.data.batches import WorkersDied
from repvgg.data.sets import open_data
from repvgg.signals import Interrupted, interruptible
from repvgg.training import callbacks, lock, processes, runs
from repvgg.training.classifier import Diverged
from repvgg.training.malloc import keep_memory
from repvgg.training.report import (
    describe,
    flatten,
    log_hyperparameters,
    report,
    report_stop,
    show_logs,
    warn_of_emulation,
)
from repvgg.training.schedule import count_steps
from repvgg.training.settings import Settings, scale_learning_rate
from repvgg.training.setup import (
    build_module,
    build_trainer,
    check_batch_of_one,
    check_devices,
    check_network,
    check_resumed,
    check_runs,
    check_same_steps,
    fit_model,
    initialize,
    prepare,
    quieten,
)


def run(settings: Settings, config: dict[str, Any], folder: Path) -> None:
    """Train in a folder that no other run writes into."""
    trainer = settings.trainer
    processes.check_processes(
        trainer["devices"], trainer["num_nodes"], accelerator=trainer["accelerator"]
    )
    with lock.hold(folder) if processes.rank() == 0 else contextlib.nullcontext():
        train(settings, config, folder)


def train(settings: Settings, config: dict[str, Any], folder: Path) -> None:
    """Fit, keep the best and the last checkpoint, test the best, print where everything is.

    Args:
        config: the settings as they were composed, for the record.
        folder: of the run.

    Raises:
        ValueError: the settings, the data and the network do not fit each other.
    """
    resume = settings.resume
    last = folder / runs.LAST
    typed = [argument.partition("=")[0] for argument in HydraConfig.get().overrides.hydra]
    runs.check_folder(folder, resumed=resume is not None, chosen="hydra.run.dir" in typed)

    quieten()
    warn_of_emulation(settings)
    L.seed_everything(settings.seed, verbose=False)
    describing = callbacks.SelfDescribing(checkpoint.KEY)
    trainer = build_trainer(settings, folder, describing)
    check_devices(trainer)
    check_network(settings)
    start = checkpoint.open_network(settings.init) if settings.init and not resume else None
    data = open_data(
        settings.data,
        mixup=settings.mixup,
        cutmix=settings.cutmix,
        seed=settings.seed,
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
        with interruptible():
            trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
            tested = trainer.test(
                module,
                datamodule=data,
                ckpt_path=None if trainer.fast_dev_run else best if best.exists() else last,
                weights_only=True,
                verbose=False,
            )
    except (Interrupted, Diverged, WorkersDied) as stopped:
        report_stop(stopped, last)
    if processes.rank() == 0 and trainer.fast_dev_run:
        print("fast_dev_run: trained, validated and tested; nothing was saved")
    if trainer.fast_dev_run:
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
