"""RepOptimizer in a run: plain 3x3 convolutions train as the branches of RepVGG would.

`optim.repopt=true`. Each convolution stands for a 3x3, a 1x1 and, where it fits, a trainable
identity, with scales of 1: see `repvgg.repopt`.
"""

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from repvgg.models.block import RepVGGBlock
from repvgg.models.branches import conv_geometry
from repvgg.models.over_parameterize import is_eligible
from repvgg.reparam import point_geometry
from repvgg.repopt import MergedBranches, ScaledBranch, merge_branches, multiply_gradients
from repvgg.training.classifier import Classifier


def layers_of(network: nn.Module) -> list[nn.Conv2d]:
    """The 3x3 convolutions that stand for branches.

    Raises:
        ValueError: there is none, or the network has branches of its own.
    """
    if any(isinstance(module, RepVGGBlock) for module in network.modules()):
        raise ValueError(
            "optim.repopt=true: the network has branches of its own; pass a plain one, such as "
            "model=timm model.name=resnet18, without model.over_parameterize"
        )
    found = [m for m in network.modules() if isinstance(m, nn.Conv2d) and is_eligible(m)]
    if not found:
        raise ValueError("optim.repopt=true: the network has no 3x3 convolution, padded by 1")
    return found


def start(network: nn.Module) -> None:
    """Start each convolution of a new network from the sum of new branches."""
    with torch.no_grad():
        for conv in layers_of(network):
            point = nn.Conv2d(conv.in_channels, conv.out_channels, 1, groups=conv.groups)
            conv.weight.copy_(_merged(conv, point.weight.detach()).kernel)


class TrainAsBranches(Callback):
    """Multiplies the gradients of the convolutions of a network while it trains."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        for conv in layers_of(pl_module.net):
            if conv.weight.requires_grad:
                mask = _merged(conv, torch.zeros_like(conv.weight[..., :1, :1])).mask
                self._handles.append(multiply_gradients(conv.weight, mask))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _merged(conv: nn.Conv2d, point: Tensor) -> MergedBranches:
    geometry, weight = conv_geometry(conv), conv.weight.detach()
    one = torch.ones(conv.out_channels, device=weight.device)
    same = conv.in_channels == conv.out_channels and geometry.stride == (1, 1)
    branches = [
        ScaledBranch(weight, geometry, one),
        ScaledBranch(point.detach().to(weight), point_geometry(2, geometry.stride[0]), one),
    ]
    return merge_branches(branches, geometry, conv.groups, identity=one if same else None)
