"""The algebra of structural re-parameterization: every linear branch is one convolution.

RepVGG (Ding et al., 2021, arXiv:2101.03697), section 3.3. A branch is an affine map, given as
`Affine(kernel, bias)`; folding, padding and merging turn affine maps into affine maps. All
functions are differentiable, compute in float64, and return the dtype and device of their inputs.
A result that is too large for that dtype is a ValueError.
To chain several without rounding in between, pass float64 tensors and cast the result once, as
`RepVGGBlock.equivalent_kernel_bias` does.

A `Convolution` is an affine map with its geometry. Four functions make one out of every block of
the field: `scale_output` (a normalization or a factor behind it), `compose` (one after another),
`embed` (in a larger kernel) and `merge` (the sum).

Kernels are (O, I / groups, *size) with one, two or three spatial dimensions, or none: a linear
layer.
"""

import itertools
import math
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


class Geometry(NamedTuple):
    """Kernel size, stride, dilation and padding of a convolution, by spatial dimension.

    Attributes:
        before: padding on the low side.
        after: padding on the high side.
        mode: of the padding, as torch names it.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    mode: str = "zeros"

    @property
    def pads(self) -> bool:
        return any(self.before + self.after)


def point_geometry(dims: int, stride: int = 1) -> Geometry:
    """The geometry of a 1x1 convolution without padding."""
    ones, zeros = (1,) * dims, (0,) * dims
    return Geometry(ones, (stride,) * dims, ones, zeros, zeros)


class Convolution(NamedTuple):
    """An affine map with the geometry and the groups by which it reads its input.

    Attributes:
        biased: whether its bias may be other than zero.
    """

    affine: Affine
    geometry: Geometry
    groups: int
    biased: bool = True

    @property
    def in_channels(self) -> int:
        return self.affine.kernel.shape[1] * self.groups


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
    total = _through(wide, shift.double(), groups)
    if bias is not None:
        total = total + bias.double()
    return rounded(wide * by_output(scale), total, kernel.dtype)


def compose(first: Convolution, second: Convolution) -> Convolution:
    """Write a sequence of two convolutions as one.

    y[n] = sum over v of W2[v] z[s2 n + d2 v - p2], where z[m] = sum over u of W1[u] x[s1 m + d1 u -
    p1]. So the taps lie at s1 d2 v + d1 u, the stride is s1 s2 and the padding p1 + s1 p2 (Ding et
    al., 2021, arXiv:2103.13425, section 3.2, for a 1x1 before a k x k). Groups that are equal stay;
    others become their greatest common divisor.

    Returns:
        a kernel in the dtype of the first one; of k1 + k2 - 1 taps if nothing is strided or
        dilated.

    Raises:
        ValueError: the channels do not fit, or the sequence is no convolution at its border: see
            `border`.
    """
    (kernel1, bias1), own, groups1, biased = first
    (kernel2, bias2), other, groups2, _ = second
    if kernel1.shape[0] != second.in_channels or kernel1.ndim != kernel2.ndim:
        raise ValueError(
            f"cannot compose kernels of shapes {tuple(kernel1.shape)} and {tuple(kernel2.shape)}: "
            f"the second one reads {second.in_channels} channels"
        )
    if reason := border(own, other, biased=biased):
        raise ValueError(f"the sequence is no convolution at its border: {reason}")
    steps = [s * d for s, d in zip(own.stride, other.dilation, strict=True)]
    # The taps of both kernels lie on a grid, whose step is the dilation of the result.
    dilation, size = [], []
    for i, (k1, k2) in enumerate(zip(own.kernel, other.kernel, strict=True)):
        grid = math.gcd(own.dilation[i] if k1 > 1 else 0, steps[i] if k2 > 1 else 0) or 1
        reach = own.dilation[i] * (k1 - 1) + steps[i] * (k2 - 1)
        dilation.append(grid)
        size.append(reach // grid + 1)
    groups = math.gcd(groups1, groups2)
    left = _dense(kernel2.double(), groups2, groups).reshape(
        groups, len(kernel2) // groups, kernel1.shape[0] // groups, -1
    )
    right = _dense(kernel1.double(), groups1, groups)
    total = left.new_zeros(*left.shape[:2], right.shape[2], *size)
    for number, taps in enumerate(itertools.product(*map(range, other.kernel))):
        spans = []
        for i, (v, k1) in enumerate(zip(taps, own.kernel, strict=True)):
            at, step = steps[i] * v // dilation[i], max(1, own.dilation[i] // dilation[i])
            spans.append(slice(at, at + step * (k1 - 1) + 1, step))
        # A tap of the second kernel, (groups, O / groups, T / groups), shifts and mixes the first.
        total[:, :, :, *spans] += torch.einsum("got,gt...->go...", left[..., number], right)
    kernel = total.flatten(0, 1)
    shift = _through(kernel2.double(), bias1.double(), groups2) + bias2.double()
    before, after = (
        tuple(p1 + s * p2 for p1, s, p2 in zip(inner, own.stride, outer, strict=True))
        for inner, outer in ((own.before, other.before), (own.after, other.after))
    )
    stride = tuple(s1 * s2 for s1, s2 in zip(own.stride, other.stride, strict=True))
    mode = other.mode if other.pads else own.mode
    geometry = Geometry(tuple(size), stride, tuple(dilation), before, after, mode)
    affine = rounded(kernel, shift, kernel1.dtype)
    return Convolution(affine, geometry, groups, biased or second.biased)


def regroup(kernel: Tensor, groups: int, fewer: int) -> Tensor:
    """Write a kernel with fewer groups, which hold whole groups of it: zeros between those."""
    return _dense(kernel, groups, fewer).flatten(0, 1)


def border(first: Geometry, second: Geometry, *, biased: bool) -> str | None:
    """Why two convolutions in sequence are no convolution at the border, or None if they are one.

    The second one pads what the first one gave: a zero there is the value 0. The kernel of both
    pads the input instead, where a zero becomes the bias of the first.

    Args:
        biased: whether the first one has a bias that is not zero.
    """
    if not second.pads:
        return None
    padded = [bool(before or after) for before, after in zip(*second[3:5], strict=True)]
    if second.mode == "zeros":
        if biased:
            return "the first convolution has a bias, and the second pads with zeros"
        reads_past = [
            inner and (k > 1 or before or after)
            for inner, k, before, after in zip(
                padded, first.kernel, first.before, first.after, strict=True
            )
        ]
        if any(reads_past) or (first.pads and first.mode != "zeros"):
            return "both read beyond the border"
        return None
    if first.pads or any(k > 1 for k in first.kernel) or any(s > 1 for s in first.stride):
        return f"the second one pads by mode {second.mode}, so the first must be 1x1 of stride 1"
    return None


def _dense(kernel: Tensor, groups: int, blocks: int) -> Tensor:
    """(O, I / groups, *size) -> (blocks, O / blocks, I / blocks, *size): zeros between groups."""
    out, width, *size = kernel.shape
    inside = groups // blocks
    split = kernel.reshape(blocks, inside, out // groups, width, *size)
    wide = kernel.new_zeros(blocks, inside, out // groups, inside, width, *size)
    each = torch.arange(inside, device=kernel.device)
    wide[:, each, :, each] = split.transpose(0, 1)
    return wide.reshape(blocks, out // blocks, inside * width, *size)


def _through(kernel: Tensor, values: Tensor, groups: int) -> Tensor:
    """The outputs of a kernel for an input that is constant in each channel: (I,) -> (O,)."""
    out, width = kernel.shape[:2]
    rows = values.reshape(groups, width).repeat_interleave(out // groups, 0)
    return (kernel.reshape(out, width, -1).sum(2) * rows).sum(1)


def embedding(own: Geometry, target: Geometry) -> list[tuple[int, int]] | None:
    """For each dimension the first tap and the step by which a kernel lies in another one.

    A step above 1 spreads a dilated kernel over a dense one (Ding et al., 2023, arXiv:2311.15599,
    section 3.1). None if the outputs would differ in size or position, or at the border.
    """
    if len(own.kernel) != len(target.kernel) or own.stride != target.stride:
        return None
    if own.pads and own.mode != target.mode:
        return None
    places = []
    for i, (size, large) in enumerate(zip(own.kernel, target.kernel, strict=True)):
        grid = target.dilation[i]
        step, between = divmod(own.dilation[i], grid) if size > 1 else (1, 0)
        first, odd = divmod(target.before[i] - own.before[i], grid)
        left = large - 1 - first - step * (size - 1)
        if between or odd or first < 0 or left < 0:
            return None
        if target.after[i] - own.after[i] != left * grid:
            return None
        places.append((first, step))
    return places


def embed(kernel: Tensor, own: Geometry, target: Geometry) -> Tensor | None:
    """Write a kernel with the geometry of another one: zeros around its taps, and between them.

    Returns:
        (O, I / groups, *size) of the target, or None as `embedding`.
    """
    places = embedding(own, target)
    if places is None:
        return None
    wide = kernel.new_zeros(*kernel.shape[:2], *target.kernel)
    spans = [
        slice(first, first + step * (size - 1) + 1, step)
        for (first, step), size in zip(places, own.kernel, strict=True)
    ]
    wide[:, :, *spans] = kernel
    return wide


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
