"""The self-describing checkpoint: one file that rebuilds, explains and proves a network.

Beside the weights it carries the arguments that rebuild the network, the data contract (classes,
image size, mean and std, interpolation) and a probe: a few validation images with the logits the
trained network gave them. It holds plain types and tensors alone, so it loads with
`torch.load(weights_only=True)`, in a process without Lightning, and runs no code of the file.

Third-party files hold weights alone, in layouts of their own (`checkpoint.layouts`). They are
opened too; what they do not say is then assumed to be as for ImageNet, and their probe is of noise.
One without a classifier, such as the backbone of a detector, gives no logits: `open_network` opens
it, `load` does not.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repvgg.checkpoint import recognize
from repvgg.checkpoint.tensors import METADATA, read
from repvgg.contract import METADATA_KEY, DataContract, Description, Normalize, to_float
from repvgg.models.network import RepVGG
from repvgg.models.registry import build_model, imagenet_classes

KEY = "repvgg"  # of our entry beside what Lightning stores
FORMAT = 1
NETWORK_PREFIX = "net."  # of the network's weights inside the Lightning module
UNKNOWN = -1  # label of an image of the probe
NUM_NOISE = 8  # images in the probe of a file that brought none


class Probe(NamedTuple):
    """Images and what the trained network said of them.

    Attributes:
        images: (N, C, H, W), uint8.
        labels: (N,), int64; `UNKNOWN` where the images are noise.
        logits: (N, K), float32, in eval mode.
    """

    images: Tensor
    labels: Tensor
    logits: Tensor


class Network(NamedTuple):
    """What every checkpoint holds, whoever wrote it: see `Checkpoint`; `data` may be unknown."""

    model: nn.Module
    config: dict[str, Any]
    data: DataContract | None
    origin: str


class Checkpoint(NamedTuple):
    """A checkpoint that was opened.

    Attributes:
        model: the network, in eval mode, on the CPU; in its training form, or deployed if that is
            what was stored.
        config: the arguments of `repvgg.models.registry.build_model` that rebuilt it.
        data: the data contract.
        probe: the recorded images, labels and logits.
        origin: what file of others it came from; empty if it is ours.
        predictor: images (N, C, H, W), float32 in [0, 1] -> logits; normalizes, then runs `model`.
    """

    model: nn.Module
    config: dict[str, Any]
    data: DataContract
    probe: Probe
    origin: str = ""

    @property
    def predictor(self) -> nn.Module:
        return nn.Sequential(Normalize(self.data.mean, self.data.std), self.model).eval()


def describe(
    model: nn.Module,
    *,
    config: Mapping[str, Any],
    data: DataContract,
    images: Tensor,
    labels: Tensor,
) -> dict[str, Any]:
    """Write down what makes a checkpoint of `model` self-describing.

    Runs `model` once on the probe images, in eval mode, float32 and without TF32, and leaves its
    mode and the random state as they were.

    Args:
        config: arguments of `repvgg.models.registry.build_model`, of plain types.
        images: (N, C, H, W), uint8, for the probe.
        labels: (N,).

    Returns:
        the entry to store under `KEY` beside the `state_dict`.
    """
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
    return {
        "format": FORMAT,
        "model": dict(config),
        "data": asdict(data),
        # Copies: of a slice, torch would save all that it was cut from.
        "probe": {"images": images.cpu().clone(), "labels": labels.cpu().clone(), "logits": logits},
    }


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint of ours, whole or not at all. It holds no state of a training."""
    content = {
        "state_dict": {
            NETWORK_PREFIX + key: value for key, value in checkpoint.model.state_dict().items()
        },
        KEY: describe(
            checkpoint.model,
            config=checkpoint.config,
            data=checkpoint.data,
            images=checkpoint.probe.images,
            labels=checkpoint.probe.labels,
        )
        | {"origin": checkpoint.origin},
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


def load(
    path: str | Path,
    *,
    weights: str | None = None,
    bn_eps: float | None = None,
    strides: Sequence[int] | None = None,
) -> Checkpoint:
    """Open a checkpoint, ours or a RepVGG's in any known layout, and rebuild its network.

    What the images of a third-party file are is assumed to be as for ImageNet, unless deploy.py
    wrote it: see `imagenet`.

    Args:
        path: of a file of torch, safetensors or numpy (.npz).
        weights: which network of a file that holds several, such as "state_dict_ema".
        bn_eps, strides: of a file of others: see `from_state_dict`.

    Raises:
        ValueError: the file is missing, truncated, holds no RepVGG or several, or one without a
            classifier, needs arbitrary code to load, or its weights do not fit. Each says which.
    """
    opened = _open(Path(path), weights=weights, bn_eps=bn_eps, strides=strides)
    if isinstance(opened, Checkpoint):
        return opened
    try:
        return with_noise(opened, opened.data or imagenet(opened.config))
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from error


def open_network(
    path: str | Path,
    *,
    weights: str | None = None,
    bn_eps: float | None = None,
    strides: Sequence[int] | None = None,
) -> Network:
    """Open a checkpoint as `load` does, without assuming what its images are.

    A network without a classifier is opened too: its config has num_classes=0, and it returns its
    pooled features (N, C).

    Raises:
        ValueError: as `load`, but for the classifier.
    """
    opened = _open(Path(path), weights=weights, bn_eps=bn_eps, strides=strides)
    return Network(opened.model, opened.config, opened.data, opened.origin)


def with_noise(network: Network, data: DataContract) -> Checkpoint:
    """Say what the images of a network are, and record what it says of noise.

    Raises:
        ValueError: the network has another number of classes or channels, or no classifier.
    """
    _require_classifier(network.config)
    for said, given, held in (
        ("classes", len(data.classes), network.config["num_classes"]),
        ("channels", data.in_channels, network.config["in_channels"]),
    ):
        if given != held:
            raise ValueError(f"{given} {said} were given, the network has {held}")
    images = _noise(data)
    labels = torch.full((NUM_NOISE,), UNKNOWN)
    entry = describe(network.model, config=network.config, data=data, images=images, labels=labels)
    return Checkpoint(network.model, network.config, data, Probe(**entry["probe"]), network.origin)


def is_ours(content: Mapping[str, Any]) -> bool:
    """Whether a file describes itself as `describe` does."""
    entry = content.get(KEY)
    return isinstance(entry, Mapping) and "format" in entry


def _open(path: Path, **typed: Any) -> Checkpoint | Network:
    """Open a file, ours or not; what was typed is for others alone."""
    content = read(path)
    if not is_ours(content):
        try:
            return _open_foreign(content, **typed)
        except ValueError as error:
            raise ValueError(f"'{path}': {error}") from error
    if keys := [key for key, value in typed.items() if value is not None]:
        raise ValueError(
            f"'{path}' is a checkpoint of ours, which says by itself what it is: leave out "
            f"{', '.join(keys)}"
        )
    return _open_ours(content, path)


def _open_ours(content: Mapping[str, Any], path: Path) -> Checkpoint:
    entry = content[KEY]
    try:
        if entry["format"] != FORMAT:
            raise ValueError(
                f"'{path}' has checkpoint format {entry['format']}, this version reads {FORMAT}: "
                "update the package"
            )
        config, contract, probe = entry["model"], DataContract(**entry["data"]), entry["probe"]
        if config.get("num_classes") == 0:
            raise ValueError(f"'{path}' has a damaged description: a network of 0 classes")
        model = build_model(**config)
        stored = {
            key.removeprefix(NETWORK_PREFIX): value
            for key, value in content["state_dict"].items()
            if key.startswith(NETWORK_PREFIX)
        }
        if isinstance(model, RepVGG) and recognize.holds_deployed(stored):
            model.switch_to_deploy()
        model.load_state_dict(stored)
        probe = Probe(**probe)
        if probe.images.ndim != 4 or len(probe.logits) != len(probe.images):
            raise ValueError(f"'{path}' has a damaged probe")
        return Checkpoint(model.eval(), config, contract, probe, entry.get("origin", ""))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' has a damaged description: {error!r}") from error
    except RuntimeError as error:  # what load_state_dict raises; its second line names a key
        detail = " ".join(str(error).split()[:60])
        raise ValueError(f"'{path}' does not fit its own description: {detail}") from error


def from_state_dict(
    state_dict: Mapping[str, Any],
    *,
    weights: str | None = None,
    bn_eps: float = 1e-5,
    strides: Sequence[int] | None = None,
) -> RepVGG:
    """Build the RepVGG that a state_dict in any known layout belongs to, and load it.

    Layout, variant, classes and form follow from keys and shapes; depths and widths may be others
    than a variant's. Every tensor of the network is in the state_dict, and the other way round.
    Where all of the classifier is missing, the network has none (num_classes=0) and returns pooled
    features; a detector's or segmenter's tensors beside it are then left alone.

    Args:
        state_dict: of the authors' RepVGG, RepVGGplus or PSPNet, timm, mmpretrain, QARepVGG, or
            ours, in the form that trains or deployed, as tensors or arrays of numpy; in wrappers,
            and behind a prefix, if need be.
        weights: which network, where there are several: its wrappers and prefix.
        bn_eps: of its BatchNorms: no state_dict tells. Some programs train with 1e-3.
        strides: of the stem and of the first block of each stage, likewise; None is the paper's
            [2, 2, 2, 2, 2].

    Returns:
        the network in the form that was stored, in eval mode, float32, on the CPU.

    Raises:
        ValueError: there is no RepVGG or there are several, or something does not fit; the first
            keys that do not are named.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"a {type(state_dict).__name__} is no state_dict: give its state_dict()")
    found = recognize.choose(state_dict, weights)
    return recognize.load(found, recognize.plan(found, bn_eps=bn_eps, strides=strides))


def imagenet(config: Mapping[str, Any]) -> DataContract:
    """What a network of the field was most likely trained to see.

    Args:
        config: of the network. 1000 classes have ImageNet's names, others have numbers.

    Raises:
        ValueError: the network does not take images of three channels, or has no classifier.
    """
    _require_classifier(config)
    if config["in_channels"] != 3:
        raise ValueError(
            f"it takes images of {config['in_channels']} channels, so it was not trained on "
            f"ImageNet; say what they are, by channel: {recognize.IMPORT} mean=[0.5] std=[0.5]"
        )
    count = config["num_classes"]
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


def _require_classifier(config: Mapping[str, Any]) -> None:
    if config["num_classes"] == 0:
        raise ValueError(
            f"it holds {recognize.describe_variant(config)} without a classifier, so it gives no "
            "logits: train one on it, python train.py init=FILE ..., or take its features with "
            "repvgg.checkpoint.open_network(FILE).model"
        )


def _open_foreign(
    content: Mapping[str, Any],
    *,
    weights: str | None,
    bn_eps: float | None,
    strides: Sequence[int] | None,
) -> Network:
    found = recognize.choose(content, weights)
    if said := description(content):
        if bn_eps is not None or strides is not None:
            raise ValueError("it says by itself what it is: leave out bn_eps and strides")
        config, data = {**recognize.sizes(found), **said.config}, said.data
    else:
        eps = 1e-5 if bn_eps is None else bn_eps
        config, data = recognize.plan(found, bn_eps=eps, strides=strides), None
    model = recognize.load(found, config)
    return Network(model, config, data, recognize.describe(found, config))


def _noise(data: DataContract) -> Tensor:
    """Images of coarse and fine noise, the same every time: (NUM_NOISE, C, H, W), uint8."""
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_NOISE, data.in_channels)
    coarse = torch.rand(*shape, 7, 7, generator=generator)
    images = F.interpolate(coarse, size=tuple(data.image_size), mode="bilinear")
    images = images + 0.1 * torch.randn(images.shape, generator=generator)
    return (255 * images.clamp(0, 1)).to(torch.uint8)


def description(content: Mapping[str, Any]) -> Description | None:
    """What a safetensors file says of itself, if deploy.py wrote it."""
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
