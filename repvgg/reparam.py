"""The algebra of structural re-parameterization: every linear branch is one convolution.

RepVGG (Ding et al., 2021, arXiv:2101.03697), section 3.3. A branch is an affine map, given as
`Affine(kernel, bias)`; folding, padding and merging turn affine maps into affine maps. All
functions are differentiable, compute in float64, and return the dtype and device of their inputs.
A result that is too large for that dtype is a ValueError.
To chain several without rounding in between, pass float64 tensors and cast the result once, as
`RepVGGBlock.equivalent_kernel_bias` does.

Kernels are (O, I / groups, *size) with one, two or three spatial dimensions.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Reparameterizable(Protocol):
    """A module whose branches can become one convolution: a block, or a network of blocks."""

    def switch_to_deploy(self) -> None:
        """Replace the branches by the convolution that equals their sum, in place."""


def is_reparameterizable(module: object) -> bool:
    """Whether a module has a method `switch_to_deploy`."""
    return callable(getattr(module, "switch_to_deploy", None))


class Affine(NamedTuple):
    """A convolution: kernel (O, I / groups, *size) and bias (O,)."""

    kernel: Tensor
    bias: Tensor


def bare_affine(kernel: Tensor, bias: Tensor | None = None) -> Affine:
    """A convolution without BatchNorm as an affine map; without a bias it gets zeros."""
    return Affine(kernel, kernel.new_zeros(kernel.shape[0]) if bias is None else bias)


def rounded(kernel: Tensor, bias: Tensor, dtype: torch.dtype) -> Affine:
    """Cast a kernel and bias in float64 to a dtype; NaN and inf stay.

    Raises:
        ValueError: a finite number is too large for the dtype.
    """
    narrow = Affine(kernel.to(dtype), bias.to(dtype))
    for wide, cast in zip((kernel, bias), narrow, strict=True):
        if dtype != wide.dtype and not wide.is_meta and (cast.isinf() & wide.isfinite()).any():
            raise ValueError(f"the folded weights are too large for {dtype}")
    return narrow


def fold_bn(kernel: Tensor, bias: Tensor | None, bn: nn.modules.batchnorm._BatchNorm) -> Affine:
    """Fold an eval-mode BatchNorm into the convolution before it (RepVGG, eq. 3).

    BN(W*x + b) = (gamma / sigma) (W*x + b - mu) + beta with sigma = sqrt(running_var + eps) is
    again affine in x, hence a convolution. A BatchNorm without gamma and beta has 1 and 0.

    Args:
        kernel: (O, I / groups, *size).
        bias: (O,), or None for a convolution without bias.
        bn: normalizes O channels and tracks running statistics. The result is its function in
            eval mode, whatever its mode is.

    Raises:
        ValueError: `bn` has no running statistics, so its output depends on the batch; or it
            normalizes another number of channels than the kernel produces.
    """
    scale, shift = bn_affine(bn)
    if bn.num_features != kernel.shape[0]:
        raise ValueError(
            f"cannot fold a BatchNorm of {bn.num_features} channels into a kernel that "
            f"produces {kernel.shape[0]}"
        )
    return scale_output(kernel, bias, scale, shift)


def bn_affine(bn: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """An eval-mode BatchNorm as x -> scale * x + shift, by channel.

    scale = gamma / sigma and shift = beta - mu gamma / sigma, sigma = sqrt(running_var + eps).

    Returns:
        scale and shift, (C,), in float64.

    Raises:
        ValueError: `bn` has no running statistics.
    """
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError(
            "cannot fold a BatchNorm without running statistics: its output depends on the batch; "
            "build it with track_running_stats=True"
        )
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.double()
    shift = -bn.running_mean.double() * scale
    if bn.bias is not None:
        shift = shift + bn.bias.double()
    return scale, shift


def scale_output(kernel: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> Affine:
    """Fold y -> scale * y + shift, by channel, into the convolution before it.

    Args:
        kernel: (O, I / groups, *size).
        bias: (O,), or None for a convolution without bias.
        scale: (O,).
        shift: (O,).
    """
    if bias is not None:
        shift = shift.double() + bias.double() * scale.double()
    folded = kernel.double() * scale.double().reshape(-1, *[1] * (kernel.ndim - 1))
    return rounded(folded, shift, kernel.dtype)


def scale_input(
    kernel: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, *, groups: int = 1
) -> Affine:
    """Fold x -> scale * x + shift, by channel, into the convolution after it.

    W*(s x + t) + b = (W s)*x + (b + sum of W t). This needs a border without zero padding, where t
    is missing.

    Args:
        kernel: (O, I / groups, *size).
        bias: (O,), or None for a convolution without bias.
        scale: (I,).
        shift: (I,).
    """
    out, width = kernel.shape[:2]
    ones = [1] * (kernel.ndim - 2)

    def by_output(values: Tensor) -> Tensor:
        """(I,) -> (O, I / groups, 1, ...): what each output channel reads."""
        rows = values.double().reshape(groups, width).repeat_interleave(out // groups, 0)
        return rows.reshape(out, width, *ones)

    wide = kernel.double()
    total = (wide * by_output(shift)).flatten(1).sum(1)
    if bias is not None:
        total = total + bias.double()
    return rounded(wide * by_output(scale), total, kernel.dtype)


def transpose_kernel(kernel: Tensor, groups: int) -> Tensor:
    """Swap the two channel axes of a grouped kernel, as transposed convolutions store it.

    Shapes: (I, O / groups, *size) -> (O, I / groups, *size), and back.
    """
    first, second, *size = kernel.shape
    split = kernel.reshape(groups, first // groups, second, *size)
    return split.transpose(1, 2).reshape(groups * second, first // groups, *size)


def pad_kernel(kernel: Tensor, size: int) -> Tensor:
    """Embed a kernel in zeros so that it covers `size` taps in every spatial dimension.

    Its center tap, (k - 1) // 2 of k, becomes the center tap of the result. If the padding grows
    too (0 for 1x1, 1 for 3x3, or "same"), the convolution computes the same function. A result of
    even size needs padding "same" and dilation 1, as it has no center.

    Args:
        kernel: (O, I / groups, *k), odd in every spatial dimension.
        size: taps of the result in every spatial dimension.

    Raises:
        ValueError: a dimension of the kernel is even, so it has no center, or exceeds `size`.
    """
    taps = kernel.shape[2:]
    if any(k % 2 == 0 or k > size for k in taps):
        raise ValueError(
            f"cannot embed a kernel of size {tuple(taps)} in {size} taps: "
            f"every dimension must be odd and at most {size}"
        )
    padding: list[int] = []
    for k in reversed(taps):  # torch pads the last dimension first
        before = (size - 1) // 2 - (k - 1) // 2
        padding += [before, size - k - before]
    return nn.functional.pad(kernel, padding)


def identity_kernel(
    channels: int,
    groups: int = 1,
    *,
    dims: int = 2,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Write x -> x as a convolution of one tap (RepVGG, section 3.3, and section 3.4 for groups).

    Within a group, output channel i reads input channel i mod (C / groups) of that group.

    Returns:
        (C, C / groups, 1, ...) with `dims` trailing dimensions.

    Raises:
        ValueError: `groups` does not divide `channels`.
    """
    if channels % groups:
        raise ValueError(f"groups={groups} does not divide channels={channels}")
    width = channels // groups
    eye = torch.eye(width, dtype=dtype, device=device).repeat(groups, 1)  # (C, C / groups)
    return eye.reshape(channels, width, *[1] * dims)


def merge(*branches: Affine) -> Affine:
    """Add parallel branches: the sum of convolutions of one shape is a convolution (section 3.3).

    Args:
        branches: at least one; all of one shape, stride, dilation, padding and groups.

    Raises:
        ValueError: the kernels differ in shape: pad the smaller ones.
    """
    shapes = {tuple(branch.kernel.shape) for branch in branches}
    if len(shapes) != 1:
        raise ValueError(f"cannot merge kernels of different shapes {sorted(shapes)}: pad them")
    dtype = branches[0].kernel.dtype
    kernel, bias = branches[0].kernel.double(), branches[0].bias.double()
    for branch in branches[1:]:  # a stack of them all would be copied first
        kernel = kernel + branch.kernel.double()
        bias = bias + branch.bias.double()
    return rounded(kernel, bias, dtype)
