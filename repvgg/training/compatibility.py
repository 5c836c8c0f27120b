"""Checks that the settings, the data, the network and a resumed run fit each other.

What can be checked before the data is read is checked then.
"""

import copy
import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.profilers import Profiler
from torch import Tensor, nn

from repvgg import checkpoint
from repvgg.checks import unknown_key, wrong_value
from repvgg.cli import Config
from repvgg.contract import ModelConfig
from repvgg.data.module import ImageData
from repvgg.models import libraries
from repvgg.models.libraries import Factory
from repvgg.models.modes import evaluating
from repvgg.models.network import RepVGG
from repvgg.models.rebuild import is_expanded
from repvgg.models.registry import build_model
from repvgg.targets import check_arguments, is_from_user_code, make_importable
from repvgg.training import callbacks, processes, resuming, schedule
from repvgg.training.parts import read_part
from repvgg.training.schedule import Steps
from repvgg.training.settings import Settings, TrainerArguments, section
from repvgg.training.setup import build_classifier

# States of optimizers that have the shape of their parameter.
AVERAGES = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg")


def check_sweep(num_devices: int) -> None:
    """Check that a sweep trains on one device: Lightning would start the whole sweep for each.

    Raises:
        ValueError: a sweep trains on several devices.
    """
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if sweep and num_devices > 1 and not processes.started_together():
        raise ValueError(
            f"trainer.devices={num_devices}: a sweep trains on one device; start each run "
            "separately, without -m"
        )


def check_trainer(arguments: TrainerArguments) -> None:
    """Build a trainer without parts: an error in its arguments shows before data is read."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    make_importable(arguments.scalars())
    for key, value in arguments.others.items():
        part = read_part(f"trainer.{key}", value) if isinstance(value, dict) else None
        if part is not None and "_args_" not in part.arguments:
            # Before it is built: a profiler that is not prints an error when it is deleted.
            check_arguments(part.function(), part.key, part.name, **part.arguments)
    given = {**arguments.scalars(), **quiet, "enable_model_summary": False}
    trainer: L.Trainer = instantiate(given, _convert_="all")
    profiler: object = vars(trainer)["profiler"]  # Lightning sets it outside of the class
    if not isinstance(profiler, Profiler):
        allowed = "must be simple, advanced or pytorch"
        raise wrong_value("trainer.profiler", given["profiler"], allowed, "simple")


def check_network(settings: Settings, arguments: ModelConfig, factory: Factory | None) -> None:
    """Build the network without its weights: an error in its arguments shows before data is read.

    The user's own code does not run here; only its signature is checked.

    Args:
        arguments: of the network, without published weights.
        factory: of a custom network.

    Raises:
        ValueError: an argument of the network or of the training is unknown or out of its range.
    """
    assumed = {"num_classes": 2, "in_channels": 3}
    missing = {key: n for key, n in assumed.items() if arguments.get(key) is None}
    model: dict[str, Any] = {**arguments, **missing}
    if factory is not None:
        libraries.check_custom(factory, **model)
        return
    if model.get("library", "repvgg") == "repvgg":
        known = ["name", "library", *inspect.signature(RepVGG).parameters]
        for key in (key for key in model if key not in known):
            raise unknown_key(key, known, section="model.")
    try:
        with torch.device("meta"):
            network = build_model(model)
            steps = Steps(1, 1, 0, 0, 1, 1)
            trained = dataclasses.replace(settings, loss=None)  # the user's own code
            build_classifier(trained, network, model["num_classes"], steps, settings.optim.lr)
    except (NotImplementedError, RuntimeError):  # of a network that cannot be built like this
        return
    if settings.deployed_validation and not callbacks.is_foldable(network):
        allowed = f"{model['name']} has nothing to fold while it trains"
        raise wrong_value("deployed_validation", True, allowed, "false")


def check_resumed(
    resume: str, model: Config, data: ImageData, images: Tensor, factory: Factory | None
) -> list[str]:
    """Check that a checkpoint holds this network and these classes; lines on what else differs.

    Args:
        factory: of a custom network.

    Raises:
        ValueError: it is of another network or of other classes.
    """
    recorded = checkpoint.load(resume, network=factory)
    if wrong := _wrong_state(resume):
        raise ValueError(
            f"resume={resume}: its {wrong} cannot be resumed; start a new run from its weights "
            f"with init={resume}"
        )
    if recorded.config != model:
        raise ValueError(f"resume={resume}: it holds {recorded.config}, this run builds {model}")
    before, now = recorded.data.classes, data.contract.classes
    if before != now:
        raise ValueError(
            f"resume={resume}: its classes are {show(before)}, those of the data are {show(now)}; "
            "rename the folders back, or start a new run with init="
        )
    if torch.equal(recorded.probe.images, images):
        return []
    return ["the validation images are not those that the run started with"]


def _wrong_state(resume: str) -> str:
    """The first part of a checkpoint, beside the weights, that Lightning could not restore."""
    content = torch.load(resume, weights_only=True, map_location="cpu")
    done, loops, states = (content.get(key) for key in ("global_step", "loops", "optimizer_states"))
    if type(done) is not int or done < 0:
        return "global_step"
    fit = loops.get("fit_loop") if isinstance(loops, dict) else None
    if not isinstance(fit, dict) or not all(isinstance(part, dict) for part in fit.values()):
        return "loops"
    if not isinstance(states, list) or not all(
        isinstance(state, dict)
        and isinstance(state.get("state"), dict)
        and isinstance(state.get("param_groups"), list)
        and all(isinstance(values, dict) for values in state["state"].values())
        for state in states
    ):
        return "optimizer_states"
    # Of all parameters: a loss may have some too.
    shapes = {value.shape for value in content["state_dict"].values() if isinstance(value, Tensor)}
    for state in states:
        for key, value in _pairs(state["state"]):
            held = value.layout == torch.strided and not (value.is_meta or is_expanded(value))
            if not held or (key in AVERAGES and value.shape not in shapes):
                return f"{key} of the optimizer"
    for key, kind in (("lr_schedulers", list), ("callbacks", dict)):
        if not isinstance(content.get(key, kind()), kind):
            return key
    return ""


def _pairs(states: dict[int, dict[str, object]]) -> list[tuple[str, Tensor]]:
    """The tensors of an optimizer, by name, of every parameter."""
    pairs = [pair for values in states.values() for pair in values.items()]
    return [(key, value) for key, value in pairs if isinstance(value, Tensor)]


def check_same_steps(
    resume: str, config: Config, num_images: int, steps: Steps, folder: Path
) -> None:
    """Check that a resumed run with other batches or devices takes the same steps.

    Raises:
        ValueError: a step or an epoch differs, or the run stopped within an epoch.
    """
    recorded = resuming.read_config(folder)
    before, now = _step_keys(recorded), _step_keys(config)
    if before == now:
        return
    passed = " ".join(f"{key}={value}" for key, value in before.items())
    numbers = [value for value in before.values() if isinstance(value, int) and value > 0]
    if len(numbers) < len(before):
        raise ValueError(f"resume={resume}: the run started with {passed}; pass these")
    size, devices, nodes, accumulated = numbers
    step = size * devices * nodes * accumulated
    batches = num_images // (size * devices * nodes)
    epoch = schedule.from_trainer_arguments(batches, section(recorded, "trainer")).epoch
    if (step, epoch) != (steps.images, steps.epoch):
        raise ValueError(
            f"resume={resume}: a step had {step} images and an epoch {epoch} steps ({passed}), now "
            f"{steps.images} and {steps.epoch}; keep data.batch_size * devices * nodes * "
            "accumulate_grad_batches"
        )
    loops = torch.load(resume, weights_only=True, map_location="cpu")["loops"]
    if not loops["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]:
        raise ValueError(
            f"resume={resume}: the run stopped within an epoch, whose batches are counted for "
            f"{passed}; pass these"
        )


def describe_rest(resume: str, steps: Steps) -> list[str]:
    """A line for a run that has nothing left to train."""
    done = torch.load(resume, weights_only=True, map_location="cpu", mmap=True)["global_step"]
    if done < steps.total:
        return []
    return [
        f"nothing is left to train: {done} of {steps.total} steps are done; trainer.max_epochs=N "
        "makes the run longer"
    ]


def check_runs(network: nn.Module, images: Tensor, model: Config) -> None:
    """Check that a network runs on the images and gives logits of the classes.

    Raises:
        ValueError: it does not. Errors of the user's own code pass through.
    """
    name, num_classes = model["name"], model["num_classes"]
    try:
        with torch.no_grad(), evaluating(network):
            logits = network(images)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError) as error:
        if is_from_user_code(error):
            raise
        size = "x".join(map(str, images.shape[2:]))
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model.name={name}: does not run on images of {size} ({detail}); "
            "pass another model.name, or other data"
        ) from error
    given = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    if given != (len(images), num_classes):
        raise ValueError(
            f"model={model.get('_target_') or name}: for {len(images)} images it returns {given}; "
            f"the data has {num_classes} classes, so it must return logits of shape "
            f"{(len(images), num_classes)}"
        )


def check_batch_of_one(network: nn.Module, image: Tensor, batch_size: int) -> None:
    """Check that no BatchNorm sees a single value for each channel in a batch of one image.

    Raises:
        ValueError: one does.
    """
    if batch_size > 1:
        return
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copy.deepcopy(network)(image)
    except ValueError as error:
        raise ValueError(
            f"data.batch_size=1: BatchNorm cannot normalize one value for each channel ({error}); "
            "pass data.batch_size=2 or more"
        ) from error


def show(names: Sequence[str]) -> str:
    """Up to twenty names."""
    return ", ".join(names if len(names) <= 20 else [*names[:19], f"... ({len(names)})"])


def _step_keys(config: Config) -> dict[str, object]:
    """The values that set the images of an optimizer step."""
    trainer = section(config, "trainer")
    return {
        "data.batch_size": section(config, "data").get("batch_size"),
        **{f"trainer.{key}": trainer[key] for key in ("devices", "num_nodes")},
        "trainer.accumulate_grad_batches": trainer["accumulate_grad_batches"],
    }
