"""The way back: a deployed network becomes one with branches again, so that it can train.

Folding keeps the sum of the branches alone, so any division of it is as good: here the centre tap
of every kernel is divided evenly among the branches that have one. The new BatchNorms take the
statistics of given images and undo them by their own weights, so the function stays.
"""

from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repvgg.fusion.copying import copied, plain_weights
from repvgg.fusion.foldable import is_linear
from repvgg.fusion.geometry import Geometry, embedding
from repvgg.fusion.hooks import has_hooks
from repvgg.models.block import QARepVGGBlock, RepVGGBlock
from repvgg.models.branches import conv_geometry, convolution_like
from repvgg.models.forms import is_deployed
from repvgg.reparam import bare_affine, identity_kernel

Model = TypeVar("Model", bound=nn.Module)
BATCH = 64  # images in a forward


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
        ValueError: the network has no RepVGG block, or one that is not deployed or whose
            convolution was changed so that no 1x1 fits beside it; there is one image or none; the
            network cannot run on them, or what it computes is no finite number.
    """
    with torch.inference_mode(False), torch.no_grad():
        return _switched(cast(Model, copied(model)).eval(), images)


def _switched(model: Model, images: Tensor) -> Model:
    plain_weights(model)
    deployed = {
        name: module for name, module in model.named_modules() if isinstance(module, RepVGGBlock)
    }
    if not deployed:
        raise ValueError(f"{type(model).__name__} has no RepVGG block to give branches to")
    for name, block in deployed.items():
        if not is_deployed(block):
            raise ValueError(f"{name} is in its training form: there is nothing to switch")
    if len(images) < 2:
        raise ValueError(f"{len(images)} images: statistics need two at least")
    parts: dict[RepVGGBlock, _Unfolded] = {}
    for name, block in deployed.items():
        try:
            parts[block] = _Unfolded(block)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    hooks = [block.register_forward_pre_hook(part.watch) for block, part in parts.items()]
    try:
        for batch in images.split(BATCH):
            model(batch)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot run on images of shape {tuple(images.shape)} and "
            f"{images.dtype}: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not all(part.of_sum.is_finite() for part in parts.values()):
        raise ValueError("the network gives NaN or infinite values on these images")
    for part in parts.values():
        part.finish()
    return model.train()


class _Unfolded:
    """The branches that a deployed block is given back."""

    def __init__(self, owner: RepVGGBlock) -> None:
        assert owner.reparam is not None
        self.owner = owner
        self.deployed = conv = owner.reparam
        geometry = conv_geometry(conv)
        stride = geometry.stride[0]
        taps = embedding(
            Geometry((1, 1), (stride, stride), (1, 1), (0, 0), (0, 0), "zeros"), geometry
        )
        if not is_linear(conv) or has_hooks(conv):
            raise ValueError(
                f"its convolution, a {type(conv).__name__}, has hooks or code of its own: remove "
                "them before it is given branches"
            )
        if taps is None:
            raise ValueError(
                f"its convolution has stride {geometry.stride} and padding {geometry.before}, so "
                "no 1x1 branch fits beside it; give it one stride and a padding of its dilation"
            )
        self.taps = [amount for pair in reversed(taps) for amount in pair]
        kind = QARepVGGBlock if isinstance(owner, QARepVGGBlock) else RepVGGBlock
        with torch.device("meta"):  # draws no numbers, which would all be replaced
            block = kind(
                owner.in_channels,
                owner.out_channels,
                stride=stride,
                groups=owner.groups,
                bn_eps=owner.bn_eps,
            ).to(conv.weight.dtype)
        self.block = block.to_empty(device=conv.weight.device)
        self.dense, self.point = self.block.branch_3x3, self.block.branch_1x1
        assert self.dense is not None
        self.dense.conv = convolution_like(conv, torch.empty_like(conv.weight))
        self.dense.conv.bias = None
        self._divide(conv.weight.double())
        self.block.requires_grad_(conv.weight.requires_grad)
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

    def finish(self) -> None:
        """Give the block its branches, whose BatchNorms undo what was measured in eval mode."""
        self._set_statistics()
        self.owner.stride = self.block.stride
        self.owner.branch_3x3, self.owner.branch_1x1 = self.dense, self.point
        self.owner.branch_identity = self.block.branch_identity
        self.owner.reparam = None
        if isinstance(self.owner, QARepVGGBlock):
            assert isinstance(self.block, QARepVGGBlock)
            self.owner.post_bn = self.block.post_bn

    def _set_statistics(self) -> None:
        assert self.dense is not None
        assert self.point is not None
        bias = bare_affine(self.deployed.weight, self.deployed.bias).bias.double()
        one, zero = torch.ones_like(bias), torch.zeros_like(bias)
        if isinstance(self.block, QARepVGGBlock):
            _set(self.dense.bn, self.of_dense, one, zero)
            self.of_sum.mean = self.of_sum.mean - bias
            _set(self.block.post_bn, self.of_sum, one, bias)
            return
        _set(self.dense.bn, self.of_dense, one, bias)
        _set(self.point.bn, self.of_point, one, zero)
        if self.block.branch_identity is not None:
            _set(self.block.branch_identity, self.of_input, self.share, zero)

    def _divide(self, kernel: Tensor) -> None:
        assert self.dense is not None
        assert self.point is not None
        left, _, top, _ = self.taps
        centre = kernel[..., top : top + 1, left : left + 1]
        same = torch.zeros_like(centre)  # the identity branch, as a 1x1 convolution
        if self.block.branch_identity is not None:
            same = identity_kernel(kernel.shape[0], self.block.groups, device=kernel.device)
            if not isinstance(self.block, QARepVGGBlock):  # whose identity has no weight
                same = same * centre / 3
        self.share = same.flatten(1).sum(1)
        point = (centre - same) / 2
        self.point.conv.weight.copy_(point)
        self.dense.conv.weight.copy_(kernel - F.pad(point + same, self.taps))


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
