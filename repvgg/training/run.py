"""One training run, from its settings to its checkpoints."""

import contextlib
import functools
import json
import shlex
from pathlib import Path
from typing import cast

import lightning as L
from hydra.core.hydra_config import HydraConfig

from repvgg import checkpoint, terminal, whole
from repvgg.checks import escape
from repvgg.cli import Config
from repvgg.contract import ModelConfig, to_float
from repvgg.data.batches import WorkersDied
from repvgg.models.pretrained import split_weights
from repvgg.models.registry import build_model
from repvgg.models.size import sizes_of_forms
from repvgg.signals import Interrupted, interruptible
from repvgg.training import (
    additions,
    compatibility,
    lock,
    loggers,
    outcome,
    processes,
    repopt,
    report,
    resuming,
    runs,
    setup,
    tensorboard,
)
from repvgg.training.divergence import Diverged
from repvgg.training.malloc import keep_memory
from repvgg.training.pictures import Pictures
from repvgg.training.schedule import count_steps
from repvgg.training.settings import Settings, scale_learning_rate


def run(settings: Settings, config: Config, folder: Path) -> float | None:
    """Train in a folder that no other run writes into.

    Args:
        config: the settings as Hydra composed them, which are recorded in the folder.

    Returns:
        the metric that a search optimizes; None if nothing was saved.
    """
    arguments = settings.trainer
    devices = processes.check_processes(
        arguments.devices, arguments.num_nodes, accelerator=arguments.accelerator
    )
    with lock.hold(folder) if processes.rank() == 0 else contextlib.nullcontext():
        try:
            return train(settings, config, folder, devices)
        finally:
            loggers.finish_wandb()


def train(settings: Settings, config: Config, folder: Path, devices: int) -> float | None:
    """Fit, keep the best and the last checkpoint, test the best, print where everything is.

    Args:
        devices: of all machines together.

    Raises:
        ValueError: the settings, the data and the network do not fit each other.
    """
    resume = settings.resume
    last = folder / runs.LAST
    best = last.with_name("best.ckpt")
    saves = not settings.trainer.others.get("fast_dev_run")
    keys = [argument.partition("=")[0] for argument in HydraConfig.get().overrides.hydra]
    runs.check_folder(folder, resumed=resume is not None, chosen="hydra.run.dir" in keys)

    # Everything that can be checked before the data is read.
    setup.quieten()
    if processes.rank() == 0:
        report.warn_of_emulation(settings.trainer)
    L.seed_everything(settings.seed, verbose=False)
    compatibility.check_sweep(devices)
    compatibility.check_trainer(settings.trainer)
    additions.check_passed(settings, folder)
    parts = additions.build_parts(settings)
    arguments, weights = split_weights(cast(ModelConfig, settings.model))
    factory = setup.find_factory(arguments)
    compatibility.check_network(settings, arguments, factory)
    start = None if resume or not settings.init else setup.open_start(settings.init, factory)

    data = setup.open_images(settings)
    images, labels = data.probe()
    if weights is not None and start is None and not resume:
        start = setup.open_pretrained(settings.model, data.contract)
    model = setup.complete_model(arguments, data.contract, start)
    steps = count_steps(settings, data, devices)
    rate = scale_learning_rate(settings.optim, steps.images)

    network = build_model(model, network=factory)
    if not network.training:  # as of a factory that loads weights; a part in eval mode stays in it
        network.train()
    notes = data.summary().splitlines()[1:]
    if start is not None:
        key = f"init={settings.init}" if settings.init else f"model={model['name']}"
        notes += setup.initialize(network, start, data, key)
    if settings.optim.repopt:
        repopt.layers_of(network)
        if start is None and resume is None:
            repopt.start(network)
    if resume is not None:
        differences = compatibility.check_resumed(resume, model, data, images, factory)
        notes += [*resuming.describe_changes(config, folder), *differences]
        notes += compatibility.describe_rest(resume, steps)
        compatibility.check_same_steps(resume, config, len(data.train.labels), steps, folder)
    compatibility.check_runs(network, to_float(images[:2]), model)
    compatibility.check_batch_of_one(network, to_float(images[:1]), data.batch_size)
    sizes = sizes_of_forms(network, images.shape[1:]) if processes.rank() == 0 else None
    stochastic = setup.find_stochastic(network, settings, to_float(images))
    setup.lay_out(network, settings)
    module = setup.build_classifier(
        settings, network, model["num_classes"], steps, rate.scaled, stochastic=stochastic
    )
    outcome.check_metric(settings.objective, module)

    additions.check_parts(module, settings, parts, to_float(images), labels)
    notes += additions.describe_parts(module, settings)

    describe = functools.partial(
        checkpoint.describe, config=model, data=data.contract, images=images, labels=labels
    )
    clock = outcome.Clock()
    pictures = Pictures()  # after the clock, which does not count what is drawn at the end
    parts = parts._replace(callbacks=[*parts.callbacks, clock, pictures])
    trainer = setup.build_trainer(settings, parts, steps, describe, folder)
    if settings.keep_memory and trainer.strategy.root_device.type == "cpu":
        keep_memory()
    if trainer.is_global_zero and sizes is not None:
        facts = report.describe_run(
            settings, str(model["name"]), data, module, steps, rate, sizes, trainer, folder
        )
        place = [("folder", shlex.quote(runs.relative(folder)))] if saves else []
        terminal.print_facts("training", facts, place)
        print(*map(escape, notes), sep="\n", end="\n" if notes else "")
        if saves:
            runs.record(config, folder)
            pictures.start = tensorboard.describe_start(
                settings, config, facts, module, data.contract, steps, folder
            )
    shown = {**config, "rdrop": module.rdrop, "model": model}
    if saves:
        loggers.log_hyperparameters(trainer.loggers, shown)
    try:
        with interruptible():
            trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
            ended = additions.describe_end(parts)  # the test loads the states of best.ckpt
            tested = trainer.test(
                module,
                datamodule=data,
                ckpt_path=(best if best.exists() else last) if saves else None,
                weights_only=True,
                verbose=False,
            )
    except (Interrupted, Diverged, WorkersDied) as stopped:
        report.report_stop(stopped, last)

    if not saves:
        if trainer.is_global_zero:
            print("fast_dev_run: trained, validated and tested; nothing was saved")
        return None
    metrics = tested[0] if tested else {}
    loggers.finish(trainer.loggers)
    results = outcome.collect_results(
        trainer,
        metrics,
        clock,
        steps.images,
        best,
        tested_on="test" if data.has_test else "validation",
    )
    if trainer.is_global_zero:
        whole.write(folder / runs.RESULTS, json.dumps(results, indent=2).encode())
        print(*ended, sep="\n", end="\n" if ended else "")
        outcome.report_results(trainer, results, data, best, target=model.get("_target_"))
    return cast(dict[str, float], results["metrics"]).get(settings.objective)
