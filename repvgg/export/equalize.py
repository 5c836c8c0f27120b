"""Cross-layer equalization: balance the channels of a folded network so that int8 loses less.

Nagel et al., 2019, arXiv:1906.04721, section 4.1. The network computes the same.
"""

import copy
import itertools

import torch
from torch import Tensor, nn

from repvgg.models.block import RepVGGBlock
from repvgg.models.forms import is_deployed
from repvgg.models.network import RepVGG
from repvgg.reparam import scale_input, scale_output

EQUALIZING_ROUNDS = 50


def can_equalize(model: nn.Module) -> bool:
    """Whether `equalize` supports the network: a RepVGG without squeeze-and-excite."""
    return isinstance(model, RepVGG) and all(
        isinstance(block.se_before_relu, nn.Identity)
        and isinstance(block.se_after_relu, nn.Identity)
        for block in model.modules()
        if isinstance(block, RepVGGBlock)
    )


@torch.no_grad()
def equalize(model: RepVGG) -> RepVGG:
    """Copy a folded network and balance the channels between each two consecutive layers.

    ReLU(s y) = s ReLU(y) for s > 0, and pooling is linear. So output channel i of a layer can be
    divided by s_i if the next layer's input channel i is multiplied by it. With
    s = sqrt(r1 / r2), r1 and r2 the largest weights of the channel on either side, both sides use
    their ranges equally (Nagel et al., 2019, arXiv:1906.04721, section 4.1). No data is needed.
    s is rounded to a power of two, so the outputs are the same bit for bit.

    Raises:
        ValueError: `can_equalize` is false, or the network was not folded.
    """
    if not can_equalize(model):
        raise ValueError(
            f"model is a {type(model).__name__} that cannot be equalized: it must be a RepVGG "
            "without squeeze-and-excite"
        )
    model = copy.deepcopy(model)
    if not is_deployed(model):
        raise ValueError("model has branches: pass repvgg.switch_to_deploy(model)")
    blocks = [module for module in model.modules() if isinstance(module, RepVGGBlock)]
    chain: list[nn.Conv2d | nn.Linear] = [
        block.reparam for block in blocks if block.reparam is not None
    ]
    if isinstance(model.linear, nn.Linear):  # else there is no classifier, and the features stay
        chain.append(model.linear)
    for _ in range(EQUALIZING_ROUNDS):
        scales = [_equalize(*pair) for pair in itertools.pairwise(chain)]
        if all((scale == 1).all() for scale in scales):
            break
    return model


def _equalize(first: nn.Conv2d | nn.Linear, second: nn.Conv2d | nn.Linear) -> Tensor:
    groups = second.groups if isinstance(second, nn.Conv2d) else 1
    given = first.weight.double().abs().flatten(1).amax(1)  # (C,)
    out, width = second.weight.shape[:2]
    taken = second.weight.double().abs().reshape(groups, out // groups, width, -1)
    taken = taken.amax((1, 3)).flatten()  # (C,)
    usable = (given > 0) & (taken > 0)
    ratio = torch.where(usable, given, 1.0) / torch.where(usable, taken, 1.0)
    scale = (ratio.log2() / 2).round().exp2()
    zero = torch.zeros_like(scale)
    kernel, bias = scale_output(first.weight, first.bias, 1 / scale, zero)
    first.weight.copy_(kernel)
    assert first.bias is not None
    first.bias.copy_(bias)
    second.weight.copy_(scale_input(second.weight, None, scale, zero, groups=groups).kernel)
    return scale
