"""From a folded network back to a multi-branch network that can be trained.

The fold keeps only the sum of the branches. Here the center tap of every kernel is divided evenly
among the branches. The new BatchNorms take their statistics from given images, and their weights
cancel these, so the function stays the same.
"""

from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from repvgg.fusion.copying import copied, plain_weights
from repvgg.fusion.foldable import is_linear
from repvgg.fusion.hooks import has_hooks
from repvgg.models.block import QARepVGGBlock, RepVGGBlock
from repvgg.models.branches import conv_geometry, convolution_like
from repvgg.models.forms import is_deployed
from repvgg.reparam import bare_affine, embed, embedding, identity_kernel, point_geometry

Model = TypeVar("Model", bound=nn.Module)
BATCH = 64  # images in a forward


def switch_to_train(model: Model, images: Tensor) -> Model:
    """Copy a folded network and replace every convolution of a RepVGG block by branches.

    In eval mode the copy computes what `model` computes. In training mode it is close at first, as
    its BatchNorms have the statistics of the images. Dropout stays. `branch_drop`, `drop_path` and
    auxiliary classifiers do not come back.

    Args:
        model: its RepVGG blocks are all folded; it is not changed.
        images: (N, C, H, W), preprocessed, at least 2; a few hundred suffice.

    Returns:
        the copy, in training mode.

    Raises:
        ValueError: the network has no RepVGG block, or a multi-branch one, or one whose convolution
            was changed so that no 1x1 branch fits; there are fewer than 2 images; the network
            cannot run on them, its outputs are NaN or inf, or their variance overflows.
    """
    with torch.inference_mode(False), torch.no_grad():
        return _switched(cast(Model, copied(model)).eval(), images)


def _switched(model: Model, images: Tensor) -> Model:
    plain_weights(model)
    folded = {
        name: module for name, module in model.named_modules() if isinstance(module, RepVGGBlock)
    }
    if not folded:
        raise ValueError(f"{type(model).__name__} has no RepVGG block")
    for name, block in folded.items():
        if not is_deployed(block):
            raise ValueError(f"{name} is a multi-branch block already")
    if len(images) < 2:
        raise ValueError(f"{len(images)} images: BatchNorm statistics need at least 2")
    parts: dict[RepVGGBlock, _Branches] = {}
    for name, block in folded.items():
        try:
            parts[block] = _Branches(block)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    hooks = [block.register_forward_pre_hook(part.watch) for block, part in parts.items()]
    try:
        for batch in torch.split(images, BATCH):
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
        raise ValueError("the network's outputs on these images are NaN or inf")
    for part in parts.values():
        part.finish()
    return model.train()


class _Branches:
    """The new branches of a folded block."""

    def __init__(self, owner: RepVGGBlock) -> None:
        assert owner.reparam is not None
        self.owner = owner
        self.folded = conv = owner.reparam
        geometry = conv_geometry(conv)
        stride = geometry.stride[0]
        point = point_geometry(2, stride)
        places = embedding(point, geometry)
        if not is_linear(conv) or has_hooks(conv):
            raise ValueError(
                f"its convolution, a {type(conv).__name__}, has hooks or its own code: remove them "
                "first"
            )
        if places is None:
            raise ValueError(
                f"its convolution has stride {geometry.stride} and padding {geometry.before}, so "
                "no 1x1 branch fits beside it; it needs one stride, and its dilation as padding"
            )
        self.places, self.geometries = places, (point, geometry)
        kind = QARepVGGBlock if isinstance(owner, QARepVGGBlock) else RepVGGBlock
        with torch.device("meta"):  # draws no random numbers: all are replaced below
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
        """Before a forward of the folded block: measure the outputs of the branches."""
        assert self.dense is not None
        assert self.point is not None
        (x,) = arguments
        stride = self.block.stride
        self.of_dense.add(self.dense.conv(x))
        self.of_point.add(self.point.conv(x[..., ::stride, ::stride]))
        self.of_input.add(x)
        self.of_sum.add(self.folded(x))

    def finish(self) -> None:
        """Set the branches of the block; in eval mode their BatchNorms cancel the statistics."""
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
        bias = bare_affine(self.folded.weight, self.folded.bias).bias.double()
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
        (top, _), (left, _) = self.places
        center = kernel[..., top : top + 1, left : left + 1]
        same = torch.zeros_like(center)  # the identity branch, as a 1x1 convolution
        if self.block.branch_identity is not None:
            same = identity_kernel(kernel.shape[0], self.block.groups, device=kernel.device)
            if not isinstance(self.block, QARepVGGBlock):  # whose identity has no weight
                same = same * center / 3
        self.share = same.flatten(1).sum(1)
        point = (center - same) / 2
        self.point.conv.weight.copy_(point)
        wide = embed(point + same, *self.geometries)
        assert wide is not None
        self.dense.conv.weight.copy_(kernel - wide)


class _Moments:
    """Mean and variance by channel over all batches, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)  # of the distances from the mean

    def add(self, x: Tensor) -> None:
        """Add a batch (N, C, H, W)."""
        x = x.transpose(0, 1).flatten(1).double()
        count, mean = x.shape[1], x.mean(1)
        distance = mean - self.mean
        between = distance.square() * (self.count * count / (self.count + count))
        self.squares = self.squares + (x - mean[:, None]).square().sum(1) + between
        self.mean = self.mean + distance * (count / (self.count + count))
        self.count += count

    def is_finite(self) -> bool:
        return bool((self.mean + self.squares).isfinite().all())

    def variance(self) -> Tensor:
        return self.squares / max(1, self.count - 1)


def _set(bn: nn.Module | None, moments: _Moments, scale: Tensor, shift: Tensor) -> None:
    """Make a BatchNorm with given statistics compute scale * x + shift in eval mode."""
    assert isinstance(bn, nn.BatchNorm2d)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    assert bn.num_batches_tracked is not None
    bn.running_mean.copy_(moments.mean)
    bn.running_var.copy_(moments.variance())
    bn.num_batches_tracked.fill_(1)
    # From the stored statistics, which are rounded.
    bn.weight.copy_(scale * (bn.running_var.double() + bn.eps).sqrt())
    bn.bias.copy_(shift + scale * bn.running_mean.double())
    if not all(tensor.isfinite().all() for tensor in bn.state_dict().values()):
        raise ValueError(
            f"the outputs of a branch on these images are too large for {bn.weight.dtype}: their "
            "variance overflows"
        )
