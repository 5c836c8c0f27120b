"""Networks that show fold errors: random BatchNorm statistics, BatchNorm counts, output errors."""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from repvgg import verify
from repvgg.fusion.normalizations import is_normalization

Network = TypeVar("Network", bound=nn.Module)


@torch.no_grad()
def randomize_batchnorms(network: Network) -> Network:
    """Draw the statistics and weights of every BatchNorm; fresh ones hide fold errors.

    Returns:
        the same network, in eval mode.
    """
    for module in network.modules():
        if not is_normalization(module):
            continue
        mean, variance = (getattr(module, name) for name in ("running_mean", "running_var"))
        weight, bias = (getattr(module, name) for name in ("weight", "bias"))
        if isinstance(mean, Tensor):
            mean.normal_(0, 0.5)
            variance.uniform_(0.2, 4)
            if isinstance(weight, Tensor):
                weight.uniform_(0.3, 1.5)
                weight.mul_(torch.randn_like(weight).sign())
                bias.normal_(0, 0.5)
    return network.eval()


def count_batchnorms(network: nn.Module) -> int:
    return sum(is_normalization(module) for module in network.modules())


def largest_error(expected: list[Tensor], found: list[Tensor]) -> float:
    """Relative error of the worst tensor; infinite if their number differs."""
    if len(found) != len(expected):
        return math.inf
    return max(verify.relative_error(a, b) for a, b in zip(expected, found, strict=True))
