"""The way back: a deployed network becomes one with branches again, so that it can train.

Folding keeps the sum of the branches alone, so any division of it is as good: here the centre tap
of every kernel is divided evenly among the branches that have one. The new BatchNorms take the
statistics of given images and undo them by their own weights, so the function stays.
"""

from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from repvgg.block import QARepVGGBlock, RepVGGBlock
from repvgg.copying import copied, plain_weights
from repvgg.reparam import identity_kernel, pad_kernel
from repvgg.rewriting import put

Model = TypeVar("Model", bound=nn.Module)
BATCH = 64  # images in a forward


@torch.no_grad()
def switch_to_train(model: Model, images: Tensor) -> Model:
    """Copy a deployed network and give every RepVGG block of the copy its branches back.

    In eval mode the copy computes what `model` computes. In training mode it begins near it, as its
    BatchNorms have the statistics of the images. Dropout stays as it is; `branch_drop`, `drop_path`
    and auxiliary classifiers were given up when it was deployed.

    Args:
        model: has RepVGG blocks, all in their deployed form; it is not changed.
        images: (N, C, H, W), as the network takes them, N at least 2; a few hundred suffice.

    Returns:
        the copy, in training mode.

    Raises:
        ValueError: the network has no RepVGG block, or one that is not deployed; there is one image
            or none; what it computes on them is no finite number.
    """
    model = cast(Model, copied(model)).eval()
    plain_weights(model)
    deployed = {
        name: module for name, module in model.named_modules() if isinstance(module, RepVGGBlock)
    }
    if not deployed:
        raise ValueError(f"{type(model).__name__} has no RepVGG block to give branches to")
    for name, block in deployed.items():
        if block.reparam is None:
            raise ValueError(f"{name} is in its training form: there is nothing to switch")
    if len(images) < 2:
        raise ValueError(f"{len(images)} images: statistics need two at least")
    parts = {block: _Unfolded(block) for block in deployed.values()}
    hooks = [block.register_forward_pre_hook(part.watch) for block, part in parts.items()]
    for batch in images.split(BATCH):
        model(batch)
    for hook in hooks:
        hook.remove()
    if not all(part.of_sum.is_finite() for part in parts.values()):
        raise ValueError("the network gives NaN or infinite values on these images")
    for block, part in parts.items():
        put(model, block, part.finish())
    return model.train()


class _Unfolded:
    """A deployed block, and the one with branches that takes its place."""

    def __init__(self, deployed: RepVGGBlock) -> None:
        assert deployed.reparam is not None
        self.deployed = deployed.reparam
        with torch.device("meta"):  # draws no numbers, which would all be replaced
            block = type(deployed)(
                deployed.in_channels,
                deployed.out_channels,
                stride=deployed.stride,
                groups=deployed.groups,
                dilation=deployed.dilation,
                padding_mode=deployed.padding_mode,
                bn_eps=deployed.bn_eps,
            ).to(self.deployed.weight.dtype)
        self.block = block.to_empty(device=self.deployed.weight.device)
        for name in ("relu", "se_before_relu", "se_after_relu"):
            setattr(self.block, name, getattr(deployed, name))
        self.dense, self.point = self.block.branch_3x3, self.block.branch_1x1
        self._divide(self.deployed.weight.double())
        self.of_dense, self.of_point, self.of_input, self.of_sum = (_Moments() for _ in range(4))

    def watch(self, _: nn.Module, arguments: tuple[Tensor]) -> None:
        """Measure what the branches give for what the deployed block is given."""
        assert self.dense is not None
        assert self.point is not None
        (x,) = arguments
        stride = self.block.stride
        self.of_dense.see(self.dense.conv(x))
        self.of_point.see(self.point.conv(x[..., ::stride, ::stride]))
        self.of_input.see(x)
        self.of_sum.see(self.deployed(x))

    def finish(self) -> RepVGGBlock:
        """Give the BatchNorms what was measured; in eval mode they are then no steps at all."""
        assert self.dense is not None
        assert self.point is not None
        assert self.deployed.bias is not None
        bias = self.deployed.bias.double()
        one, zero = torch.ones_like(bias), torch.zeros_like(bias)
        if isinstance(self.block, QARepVGGBlock):
            _set(self.dense.bn, self.of_dense, one, zero)
            self.of_sum.mean = self.of_sum.mean - bias
            _set(self.block.post_bn, self.of_sum, one, bias)
            return self.block
        _set(self.dense.bn, self.of_dense, one, bias)
        _set(self.point.bn, self.of_point, one, zero)
        if self.block.branch_identity is not None:
            _set(self.block.branch_identity, self.of_input, self.share, zero)
        return self.block

    def _divide(self, kernel: Tensor) -> None:
        assert self.dense is not None
        assert self.point is not None
        centre = kernel[..., 1:2, 1:2]
        same = torch.zeros_like(centre)  # the identity branch, as a 1x1 convolution
        if self.block.branch_identity is not None:
            same = identity_kernel(kernel.shape[0], self.block.groups, device=kernel.device)
            if not isinstance(self.block, QARepVGGBlock):  # whose identity has no weight
                same = same * centre / 3
        self.share = same.flatten(1).sum(1)
        point = (centre - same) / 2
        self.point.conv.weight.copy_(point)
        self.dense.conv.weight.copy_(kernel - pad_kernel(point + same, kernel.shape[-1]))


class _Moments:
    """Mean and variance by channel of all that was seen, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)  # of the distances from the mean

    def see(self, x: Tensor) -> None:
        """Take in (N, C, H, W)."""
        x = x.transpose(0, 1).flatten(1).double()
        count, mean = x.shape[1], x.mean(1)
        apart = mean - self.mean
        between = apart.square() * (self.count * count / (self.count + count))
        self.squares = self.squares + (x - mean[:, None]).square().sum(1) + between
        self.mean = self.mean + apart * (count / (self.count + count))
        self.count += count

    def is_finite(self) -> bool:
        return bool((self.mean + self.squares).isfinite().all())

    def variance(self) -> Tensor:
        return self.squares / max(1, self.count - 1)


def _set(bn: nn.Module | None, seen: _Moments, scale: Tensor, shift: Tensor) -> None:
    """Make a BatchNorm compute scale * x + shift in eval mode, with statistics that were seen."""
    assert isinstance(bn, nn.BatchNorm2d)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    assert bn.num_batches_tracked is not None
    bn.running_mean.copy_(seen.mean)
    bn.running_var.copy_(seen.variance())
    bn.num_batches_tracked.fill_(1)
    # By what was stored, which is rounded.
    bn.weight.copy_(scale * (bn.running_var.double() + bn.eps).sqrt())
    bn.bias.copy_(shift + scale * bn.running_mean.double())
