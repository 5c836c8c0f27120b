"""How big a network is: parameters and multiply-accumulates."""

import copy
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from repvgg.models.forms import deployed_form


class Size(NamedTuple):
    """Of a network; `macs` is for one image, None if it cannot be counted."""

    parameters: int
    macs: int | None


def count_parameters(model: nn.Module) -> int:
    """Number of learned scalars; BatchNorm statistics do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_macs(model: nn.Module, images: Tensor) -> int:
    """Multiply-accumulates of one forward of `images`, by torch's counter (two FLOPs each)."""
    with FlopCounterMode(display=False) as counter:
        model(images)
    return int(counter.get_total_flops()) // 2


def sizes_of_forms(network: nn.Module, shape: Sequence[int]) -> tuple[Size, Size | None]:
    """The sizes of a network as it trains and folded, without computing anything.

    Both are counted on the meta device, so the weights and the random state do not change.

    Args:
        shape: (C, H, W) of an image.

    Returns:
        the size as it trains, and folded; None if it cannot be folded.
    """
    try:
        copied = _on_meta(network).eval()
    except Exception:  # of a class that cannot be copied
        return Size(count_parameters(network), None), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever the network warns of, training warns of it too
        trained = Size(count_parameters(copied), _macs_on_meta(copied, shape))
        try:
            folded, _ = deployed_form(copied)
        except Exception:  # deploying explains it; a network of the user's may raise anything
            return trained, None
        return trained, Size(count_parameters(folded), _macs_on_meta(folded, shape))


def _macs_on_meta(network: nn.Module, shape: Sequence[int]) -> int | None:
    try:
        return count_macs(network, torch.empty(1, *shape, device="meta"))
    except Exception:  # values decide what it computes, or it moves tensors itself
        return None


def _on_meta(network: nn.Module) -> nn.Module:
    """A copy of a network on the meta device; no weight is copied."""
    copies: dict[int, object] = {}
    for parameter in network.parameters():
        empty = torch.empty_like(parameter, device="meta")
        copies[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in network.buffers():
        copies[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(network, copies)
