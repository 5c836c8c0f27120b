"""Checkpoints that describe themselves: each rebuilds its network and proves it.

Beside the weights a checkpoint holds the arguments of the network, the data description (classes,
image size, mean and std, interpolation) and a probe batch: validation images with the logits of the
trained network. All are plain types and tensors. So a checkpoint loads with
`torch.load(weights_only=True)`, without Lightning, and runs no code from the file.

Third-party checkpoints hold only weights, in other key layouts (`checkpoint.layouts`). They are
opened too, with ImageNet's data description and a probe batch of noise. `open_network` also opens
networks without a classifier, such as the backbone of a detector; `load` needs logits.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repvgg.checkpoint import recognize
from repvgg.checkpoint.layouts import holds_folded
from repvgg.checkpoint.tensors import METADATA, Content, read
from repvgg.checks import ArgumentError, check_integer
from repvgg.contract import (
    METADATA_KEY,
    DataContract,
    Description,
    ModelConfig,
    Normalize,
    Plain,
    to_float,
)
from repvgg.models.network import RepVGG
from repvgg.models.registry import build_model, imagenet_classes

KEY = "repvgg"  # of our entry beside those of Lightning
FORMAT = 1
NETWORK_PREFIX = "net."  # of the network's weights in the Lightning module
UNKNOWN = -1  # the label of a probe image without one
NUM_NOISE = 8  # images in the probe batch of a third-party checkpoint


class Probe(NamedTuple):
    """Images and the logits of the trained network for them.

    Attributes:
        images: (N, C, H, W), uint8.
        labels: (N,), int64; `UNKNOWN` if the images are noise.
        logits: (N, K), float32, in eval mode.
    """

    images: Tensor
    labels: Tensor
    logits: Tensor


class Network(NamedTuple):
    """A network from a file, ours or not: see `Checkpoint`. `data` is None if not recorded."""

    model: nn.Module
    config: dict[str, Plain]
    data: DataContract | None
    origin: str

    @property
    def in_channels(self) -> int:
        return check_integer("in_channels", self.config["in_channels"], minimum=1, example=3)


class Checkpoint(NamedTuple):
    """A checkpoint that was opened.

    Attributes:
        model: the network, in eval mode, on the CPU; folded if the file is.
        config: the arguments of `repvgg.models.registry.build_model` that rebuilt it.
        data: the data description.
        probe: the recorded images, labels and logits.
        origin: the third-party checkpoint that it comes from; empty if it is ours.
        predictor: images (N, C, H, W), float32 in [0, 1] -> logits; normalizes, then runs `model`.
    """

    model: nn.Module
    config: dict[str, Plain]
    data: DataContract
    probe: Probe
    origin: str = ""

    @property
    def predictor(self) -> nn.Module:
        return nn.Sequential(Normalize(self.data.mean, self.data.std), self.model).eval()


class Assumptions(TypedDict, total=False):
    """What the caller knows about a third-party file; None or missing: what is usual.

    Attributes:
        weights: which of several networks in the file, such as "state_dict_ema".
        bn_eps, strides: of the network: see `from_state_dict`.
    """

    weights: str | None
    bn_eps: float | None
    strides: Sequence[int] | None


def describe(
    model: nn.Module,
    *,
    config: ModelConfig,
    data: DataContract,
    images: Tensor,
    labels: Tensor,
) -> dict[str, object]:
    """Make the entry that a checkpoint of `model` needs to describe itself.

    Runs `model` once on the probe images, in eval mode, float32 and without TF32. The mode and the
    random state stay.

    Args:
        config: arguments of `repvgg.models.registry.build_model`.
        images: (N, C, H, W), uint8, for the probe batch.
        labels: (N,).

    Returns:
        the entry to store under `KEY` beside the `state_dict`.
    """
    return {
        "format": FORMAT,
        "model": dict(config),
        "data": asdict(data),
        "probe": _record(model, data, images, labels)._asdict(),
    }


def _record(model: nn.Module, data: DataContract, images: Tensor, labels: Tensor) -> Probe:
    device = next(model.parameters()).device
    normalize = Normalize(data.mean, data.std).to(device)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            logits = model(normalize(to_float(images.to(device)))).float().cpu()
    finally:
        for module, training in modes.items():
            module.training = training
    # Copies: torch saves the whole storage of a slice.
    return Probe(images.cpu().clone(), labels.cpu().clone(), logits)


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint of ours, whole or not at all, without any training state."""
    entry = describe(
        checkpoint.model,
        config=checkpoint.config,
        data=checkpoint.data,
        images=checkpoint.probe.images,
        labels=checkpoint.probe.labels,
    )
    content = {
        "state_dict": {
            NETWORK_PREFIX + key: value for key, value in checkpoint.model.state_dict().items()
        },
        KEY: entry | {"origin": checkpoint.origin},
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path, **assumptions: Unpack[Assumptions]) -> Checkpoint:
    """Open a checkpoint, ours or a RepVGG in any known layout, and rebuild its network.

    A third-party file gets ImageNet's data description (see `imagenet`), unless deploy.py wrote it.

    Args:
        path: of a file of torch, safetensors or numpy (.npz).
        assumptions: weights, bn_eps, strides; for third-party files alone. See `Assumptions`.

    Raises:
        ValueError: the file is missing or truncated, or loading it needs code; it holds no RepVGG,
            several, or one without a classifier; or its weights do not fit.
    """
    opened = _open(Path(path), assumptions)
    if isinstance(opened, Checkpoint):
        return opened
    try:
        return with_noise(opened, opened.data or imagenet(opened.config))
    except ValueError as error:
        raise _of_file(error, path) from error


def open_network(path: str | Path, **assumptions: Unpack[Assumptions]) -> Network:
    """Open a checkpoint as `load` does, but assume no data description.

    A network without a classifier is opened too. It has num_classes=0 in its config and returns
    pooled features (N, C).

    Raises:
        ValueError: as `load`, apart from the classifier.
    """
    opened = _open(Path(path), assumptions)
    return Network(opened.model, opened.config, opened.data, opened.origin)


def with_noise(network: Network, data: DataContract) -> Checkpoint:
    """Make a checkpoint of a network without a probe batch: record its logits of noise.

    Raises:
        ValueError: the network has another number of classes or channels, or no classifier.
    """
    _require_classifier(network.config)
    for what, given, held in (
        ("classes", len(data.classes), network.config["num_classes"]),
        ("channels", data.in_channels, network.config["in_channels"]),
    ):
        if given != held:
            raise ValueError(f"data has {given} {what}, but the network has {held}")
    probe = _record(network.model, data, _noise(data), torch.full((NUM_NOISE,), UNKNOWN))
    return Checkpoint(network.model, network.config, data, probe, network.origin)


def is_ours(content: Content) -> bool:
    """Whether the content of a file describes itself as `describe` does."""
    entry = content.get(KEY)
    return isinstance(entry, Mapping) and "format" in entry


def _open(path: Path, assumptions: Assumptions) -> Checkpoint | Network:
    """Open a file, ours or not."""
    content = read(path)
    if not is_ours(content):
        try:
            return _open_foreign(content, **assumptions)
        except ValueError as error:
            raise _of_file(error, path) from error
    if keys := [key for key, value in assumptions.items() if value is not None]:
        raise ValueError(
            f"'{path}' is a checkpoint of ours, which records this: leave out {', '.join(keys)}"
        )
    return _open_ours(content, path)


def _of_file(error: ValueError, path: str | Path) -> ValueError:
    message = f"'{path}': {error}"
    return (
        ArgumentError(message, *error.names)
        if isinstance(error, ArgumentError)
        else ValueError(message)
    )


def _open_ours(content: Content, path: Path) -> Checkpoint:
    entry: Any = content[KEY]  # of a file, so anything; what is wrong raises one of the below
    try:
        weights: Any = content["state_dict"]
        if entry["format"] != FORMAT:
            raise ValueError(
                f"'{path}' has checkpoint format {entry['format']}, this version reads {FORMAT}: "
                "update the package"
            )
        config, data, probe = entry["model"], DataContract(**entry["data"]), entry["probe"]
        if config.get("num_classes") == 0:
            raise ValueError(f"'{path}' has a damaged description: a network of 0 classes")
        model = build_model(**config)
        stored = {
            key.removeprefix(NETWORK_PREFIX): value
            for key, value in weights.items()
            if key.startswith(NETWORK_PREFIX)
        }
        if isinstance(model, RepVGG) and holds_folded(stored):
            model.switch_to_deploy()
        model.load_state_dict(stored)
        probe = Probe(**probe)
        if probe.images.ndim != 4 or len(probe.logits) != len(probe.images):
            raise ValueError(f"'{path}' has a damaged probe batch")
        return Checkpoint(model.eval(), config, data, probe, entry.get("origin", ""))
    except ArgumentError as error:  # of the network's config
        raise ValueError(f"'{path}' has a damaged description: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' has a damaged description: {error!r}") from error
    except RuntimeError as error:  # of load_state_dict, whose second line names a key
        detail = " ".join(str(error).split()[:60])
        raise ValueError(f"'{path}' does not fit its own description: {detail}") from error


def from_state_dict(
    state_dict: Mapping[str, object],
    *,
    weights: str | None = None,
    bn_eps: float = 1e-5,
    strides: Sequence[int] | None = None,
) -> RepVGG:
    """Build the RepVGG of a state_dict in any known layout, and load it.

    Layout, variant, classes and form follow from keys and shapes; other depths and widths than
    those of a variant work too. Loading is strict. If the whole classifier is missing, the network
    has none (num_classes=0) and returns pooled features; other tensors, of a detector or segmenter,
    are then ignored.

    Args:
        state_dict: of the authors' RepVGG, RepVGGplus or PSPNet, timm, mmpretrain, QARepVGG, or
            ours; multi-branch or folded, tensors or NumPy arrays, with any wrappers and prefix.
        weights: which network, if there are several: its wrappers and prefix.
        bn_eps: of its BatchNorms, which a state_dict does not record. Some programs train with
            1e-3.
        strides: of the stem and of the first block of each stage, which a state_dict does not
            record; None is the paper's [2, 2, 2, 2, 2].

    Returns:
        the network, folded if the state_dict is, in eval mode, float32, on the CPU.

    Raises:
        ValueError: there is no RepVGG or there are several, or a tensor does not fit; the first
            such keys are named.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"a {type(state_dict).__name__} is not a state_dict: pass state_dict()")
    found = recognize.choose(state_dict, weights)
    return recognize.load(found, recognize.plan(found, bn_eps=bn_eps, strides=strides))


def imagenet(config: ModelConfig) -> DataContract:
    """The usual data description of a network that was trained on ImageNet.

    Args:
        config: of the network. 1000 classes get ImageNet's names, any other number gets numbers.

    Raises:
        ValueError: the network does not take images of three channels, or has no classifier.
    """
    _require_classifier(config)
    if config["in_channels"] != 3:
        raise ArgumentError(
            f"it takes images of {config['in_channels']} channels, so it was not trained on "
            "ImageNet: pass mean and std of its images, for example mean=[0.5] std=[0.5]",
            "mean",
            "std",
        )
    count = check_integer("num_classes", config["num_classes"], minimum=1, example=1000)
    classes = imagenet_classes() if count == 1000 else [str(number) for number in range(count)]
    large = config["name"] in ("repvgg_d2se", "repvggplus_l2pse")  # published at 320 pixels
    return DataContract(
        classes=classes,
        in_channels=3,
        image_size=[320, 320] if large else [224, 224],
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225],
        interpolation="bilinear",
        resize_size=320 if large else 256,
    )


def _require_classifier(config: ModelConfig) -> None:
    if config["num_classes"] == 0:
        raise ValueError(
            f"it holds {recognize.describe_variant(config)} without a classifier, so it has no "
            "logits: train one first, or use its features, "
            "repvgg.checkpoint.open_network(PATH).model"
        )


def _open_foreign(
    content: Content,
    *,
    weights: str | None = None,
    bn_eps: float | None = None,
    strides: Sequence[int] | None = None,
) -> Network:
    found = recognize.choose(content, weights)
    config: dict[str, Plain]
    if said := description(content):
        if bn_eps is not None or strides is not None:
            raise ValueError("it records these: leave out bn_eps and strides")
        config, data = {**recognize.sizes(found), **said.config}, said.data
    else:
        eps = 1e-5 if bn_eps is None else bn_eps
        config, data = recognize.plan(found, bn_eps=eps, strides=strides), None
    model = recognize.load(found, config)
    return Network(model, config, data, recognize.describe(found, config))


def _noise(data: DataContract) -> Tensor:
    """Images of coarse and fine noise, always the same: (NUM_NOISE, C, H, W), uint8."""
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_NOISE, data.in_channels)
    coarse = torch.rand(*shape, 7, 7, generator=generator)
    images = F.interpolate(coarse, size=tuple(data.image_size), mode="bilinear")
    images = images + 0.1 * torch.randn(images.shape, generator=generator)
    return (255 * images.clamp(0, 1)).to(torch.uint8)


def description(content: Content) -> Description | None:
    """The description in a safetensors file that deploy.py wrote; None for other files."""
    said = content.get(METADATA)
    text = said.get(METADATA_KEY) if isinstance(said, Mapping) else None
    if not isinstance(text, str):
        return None
    try:
        found = Description.from_json(text)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return None  # written by another program
    named = isinstance(found.config, Mapping) and isinstance(found.config.get("name"), str)
    return found if named else None
