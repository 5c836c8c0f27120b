"""Rebuild the network that a file describes, after comparing the description with its tensors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from repvgg.checks import brief, first_of
from repvgg.contract import ModelConfig
from repvgg.models.forms import deployed_form
from repvgg.models.libraries import Factory
from repvgg.models.network import RepVGG
from repvgg.models.registry import build_model

MODULES = 100  # at most in a network for each of its tensors; a folded block begins as about 15
COUNTER = "num_batches_tracked"  # missing in old files, and not used in predictions
MISFITS = ("missing", "unknown", "of another shape", "of no use")


class Misfit(NamedTuple):
    """The tensors of a file that do not fit a network, by their keys.

    Attributes:
        missing: keys that the network needs and the file does not have.
        unknown: keys that the file has and the network does not.
        shapes: keys of another shape, with both shapes.
        values: keys of tensors that are not finite real numbers, with the reason.
    """

    missing: list[str]
    unknown: list[str]
    shapes: list[str]
    values: list[str]

    def __str__(self) -> str:
        return "; ".join(
            f"{len(keys)} {kind}: {first_of(keys)}"
            for kind, keys in zip(MISFITS, self, strict=True)
            if keys
        )


def rebuild(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    folded: bool,
    network: Factory | None = None,
) -> nn.Module:
    """Build the network of a config and load weights; both are from one file.

    A config may claim any size. So the network is built without memory, on the meta device, and
    compared with the weights. That of the user's own code is built at once.

    Args:
        weights: all its tensors, by name; floating-point types may differ from the network's.
        folded: the weights are those of the folded network.
        network: the function or class that builds a custom network.

    Returns:
        the network in eval mode, on the CPU.

    Raises:
        ArgumentError: an argument of the config is wrong, or `network` is missing or has no use.
        ValueError: the weights do not fit, or are not finite real numbers; the first are named.
    """
    if network is None:
        try:
            with torch.device("meta"):
                model = _build(config, weights, folded=folded, network=None)
        except NotImplementedError:  # torchvision's RegNets compute their sizes by tensors
            _require_sizes(config, weights)
        else:
            wanted = model.state_dict()
            _require_fit(wanted, weights)
            if isinstance(model, RepVGG):  # others may hold tensors that no file has
                copies = {
                    key: tensor.detach().to("cpu", wanted[key].dtype, copy=True)
                    for key, tensor in weights.items()
                }
                model.load_state_dict(copies, assign=True)
                return model.eval()
    model = _build(config, weights, folded=folded, network=network)
    _require_fit(model.state_dict(), weights)
    model.load_state_dict(weights)
    return model.eval()


def _build(
    config: ModelConfig, weights: Mapping[str, Tensor], *, folded: bool, network: Factory | None
) -> nn.Module:
    try:
        with _at_most(MODULES * (len(weights) + 10)):
            model = build_model(config, network=network)
            return deployed_form(model)[0] if folded else model
    except NotImplementedError:
        raise
    except (RuntimeError, OverflowError) as error:  # sizes that torch cannot represent
        raise ValueError(f"the network cannot be built: {brief(error)}") from error


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Raise ValueError when more modules are put into others."""
    left = count

    def subtract(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("it describes a larger network than its tensors are of")

    handle = register_module_module_registration_hook(subtract)
    try:
        yield
    finally:
        handle.remove()


def _require_sizes(config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    largest = max((size for tensor in weights.values() for size in tensor.shape), default=0)
    for key, value in config.items():
        if isinstance(value, int) and value > max(largest, 1):
            raise ValueError(
                f"it has {key}={brief(value)}, but its largest tensor axis is {largest}"
            )


def _require_fit(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    missing = [key for key in wanted if key not in weights]
    unknown = [key for key in weights if key not in wanted]
    shapes = [
        f"{key} {brief(tuple(tensor.shape))} for {tuple(wanted[key].shape)}"
        for key, tensor in weights.items()
        if key in wanted and tensor.shape != wanted[key].shape
    ]
    values = [
        f"{key} ({said})"
        for key, tensor in weights.items()
        if key in wanted and (said := fault(tensor, key, like=wanted[key]))
    ]
    if any(misfit := Misfit(missing, unknown, shapes, values)):
        raise ValueError(str(misfit))


def fault(tensor: Tensor, key: str, *, like: Tensor | None = None) -> str:
    """Why a tensor of a file cannot be loaded; empty if it can.

    Args:
        key: its name, of which the last part counts.
        like: the tensor that it replaces; without it every tensor but a counter is a float.
    """
    leaf = key.rpartition(".")[2]
    floating = leaf != COUNTER if like is None else like.is_floating_point()
    if tensor.is_meta:
        return "without values"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return "sparse or quantized"
    if tensor.is_complex() or tensor.is_floating_point() < floating:
        return str(tensor.dtype).removeprefix("torch.")
    if is_expanded(tensor):
        return "larger than what is stored of it"
    if not tensor.float().isfinite().all():
        return "not finite"
    return "negative" if leaf == "running_var" and (tensor.float() < 0).any() else ""


def is_expanded(tensor: Tensor) -> bool:
    """Whether a tensor has more numbers than its storage, so that a copy would need more memory."""
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
