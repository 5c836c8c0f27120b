"""Checkpoints that describe themselves: each rebuilds its network and proves it.

Beside the weights a checkpoint holds the arguments of the network, the data description (classes,
image size, mean and std, interpolation) and a probe batch: validation images with the logits of the
trained network. All are plain types and tensors. So a checkpoint loads with
`torch.load(weights_only=True)`, without Lightning, and runs no code from the file.
"""

import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repvgg import whole
from repvgg.checkpoint.layouts import holds_folded
from repvgg.checkpoint.tensors import Content
from repvgg.checks import ArgumentError, brief, check_integer
from repvgg.contract import (
    DataContract,
    ModelConfig,
    Normalize,
    Plain,
    to_float,
)
from repvgg.models.libraries import Factory
from repvgg.models.modes import evaluating
from repvgg.models.rebuild import is_expanded, rebuild

KEY = "repvgg"  # of our entry beside those of Lightning
FORMAT = 1
NETWORK_PREFIX = "net."  # of the network's weights in the Lightning module
UNKNOWN = -1  # the label of a probe image without one


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
    """A network from a file, ours or not.

    Attributes:
        model: the network, in eval mode, on the CPU; folded if the file is.
        config: the arguments of `repvgg.models.registry.build_model` that rebuilt it.
        data: the data description; None if it is not recorded.
        origin: the third-party checkpoint that it comes from; empty if it is ours.
    """

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

    Raises:
        ValueError: the logits of the probe batch are NaN or infinite.
    """
    return {
        "format": FORMAT,
        "model": dict(config),
        "data": asdict(data),
        "probe": record_probe(model, data, images, labels)._asdict(),
    }


def record_probe(model: nn.Module, data: DataContract, images: Tensor, labels: Tensor) -> Probe:
    """Run a network once on the probe images; its mode and the random state stay.

    Raises:
        ValueError: its logits are NaN or infinite.
    """
    device = next(model.parameters()).device
    normalize = Normalize(data.mean, data.std).to(device)
    with (
        torch.no_grad(),
        evaluating(model),
        torch.autocast(device.type, enabled=False),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        logits = model(normalize(to_float(images.to(device)))).float().cpu()
    if not logits.isfinite().all():  # no file with them could be loaded
        raise ValueError("the network's logits on the probe batch are NaN or infinite")
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
    saved = io.BytesIO()  # torch.save replaces the error of a full disk with another
    torch.save(content, saved)
    whole.write(path, saved.getbuffer())


def is_ours(content: Content) -> bool:
    """Whether the content of a file describes itself as `describe` does."""
    entry = content.get(KEY)
    return isinstance(entry, Mapping) and "format" in entry


def open_ours(content: Content, path: Path, network: Factory | None = None) -> Checkpoint:
    """Rebuild the network of a checkpoint of ours; see `repvgg.checkpoint.load`.

    Raises:
        ValueError: the description or the weights are damaged.
    """
    entry: Any = content[KEY]  # of a file, so anything; what is wrong raises one of the below
    try:
        weights: Any = content["state_dict"]
        if entry["format"] != FORMAT:
            raise ValueError(
                f"'{path}' has checkpoint format {brief(entry['format'])}, this version reads "
                f"{FORMAT}: update the package"
            )
        config, probe = entry["model"], entry["probe"]
        try:
            data = DataContract(**entry["data"])
        except ValueError as error:
            raise ValueError(f"'{path}' has a damaged description: {error}") from error
        if config.get("num_classes") == 0:
            raise ValueError(f"'{path}' has a damaged description: a network of 0 classes")
        stored = {
            key.removeprefix(NETWORK_PREFIX): value
            for key, value in weights.items()
            if key.startswith(NETWORK_PREFIX)
        }
        if any(not isinstance(value, Tensor) for value in stored.values()):
            raise ValueError(f"'{path}' holds weights that are no tensors")
        folded = config.get("library", "repvgg") == "repvgg" and holds_folded(stored)
        probe = Probe(**probe)
        _require_probe(probe, data, path)
        try:
            model = rebuild(config, stored, folded=folded, network=network)
        except ArgumentError:
            raise
        except ValueError as error:
            raise ValueError(f"'{path}' does not fit its own description: {error}") from error
        return Checkpoint(model, config, data, probe, str(entry.get("origin", "")))
    except ArgumentError as error:  # of the network's config
        if "network" in error.names:  # missing, or not what the file was written with
            raise ArgumentError(f"'{path}': {error}", "network") from error
        raise ValueError(f"'{path}' has a damaged description: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' has a damaged description: {brief(repr(error))}") from error


def _require_probe(probe: Probe, data: DataContract, path: Path) -> None:
    """Raise ValueError unless a probe batch is of the images and classes of its description."""
    count, classes = len(probe.images), len(data.classes)
    fits = (
        all(isinstance(tensor, Tensor) and tensor.layout == torch.strided for tensor in probe)
        and not any(tensor.is_meta or is_expanded(tensor) for tensor in probe)
        and (probe.images.dtype, probe.labels.dtype) == (torch.uint8, torch.int64)
        and count > 0
        and probe.images.shape == (count, data.in_channels, *data.image_size)
        and probe.labels.shape == (count,)
        and probe.logits.shape == (count, classes)
        and probe.logits.is_floating_point()
        and bool(probe.logits.isfinite().all())
        and int(probe.labels.min()) >= -1
        and int(probe.labels.max()) < classes
    )
    if not fits:
        raise ValueError(
            f"'{path}' has a damaged probe batch: it is not {count} images of {data.in_channels} "
            f"channels and {brief(list(data.image_size))} pixels, with {classes} finite logits each"
        )
