"""How big a network is: parameters and multiply-accumulates."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """Number of learned scalars; BatchNorm statistics do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_macs(model: nn.Module, images: Tensor) -> int:
    """Multiply-accumulates of one forward of `images`, by torch's counter (two FLOPs each)."""
    with FlopCounterMode(display=False) as counter:
        model(images)
    return int(counter.get_total_flops()) // 2
