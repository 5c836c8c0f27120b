"""The branches of a block: their layers, and the convolution that equals each in eval mode.

Branches are read from their layers at the time of the fold, as layers may have been replaced or
changed. If a layer cannot be folded, a ValueError names it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from repvgg.fusion.copying import (
    computes_weights,
    copied,
    has_computed_weights,
    plain_weights,
    present_value,
)
from repvgg.fusion.foldable import Rows, is_linear
from repvgg.fusion.hooks import HOOKS
from repvgg.fusion.normalizations import is_normalization, read_normalization
from repvgg.fusion.source import has_own_code
from repvgg.reparam import (
    Affine,
    Convolution,
    Geometry,
    bare_affine,
    bn_affine,
    embed,
    identity_kernel,
    point_geometry,
    scale_output,
)


class DropRows(nn.Module):
    """Drop whole images of a batch at random in training, and scale up the others.

    Kept images are multiplied by 1 / (1 - p), so the expectation is the input. On a residual branch
    this is stochastic depth (Huang et al., 2016, arXiv:1603.09382), "drop path".

    Shapes: (N, ...) -> (N, ...).

    Args:
        p: probability in [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        ones = x.new_ones([x.shape[0]] + [1] * (x.ndim - 1))
        return x * F.dropout(ones, self.p)

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


class Branch(nn.Module):
    """A convolution and the BatchNorm behind it, if there is one."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d | None) -> None:
        super().__init__()
        self.conv = conv
        self.bn = bn

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.bn is not None:
            y = self.bn(y)
        return y


def read_branch(name: str, branch: nn.Module) -> Convolution:
    """Fold a convolution and its BatchNorm, in float64.

    Raises:
        ValueError: the branch or one of its layers cannot be folded.
    """
    if type(branch) is not Branch or "forward" in vars(branch):
        raise ValueError(
            f"{name} is a {type(branch).__name__} with its own code, which cannot be folded: it "
            "must be a convolution and a BatchNorm, repvgg.models.branches.Branch"
        )
    check_hooks(name, branch)
    conv = branch.conv
    kind = type(conv).__name__
    plain = (
        isinstance(conv, nn.Conv2d)
        and (is_linear(conv) or has_computed_weights(conv))
        and type(conv).forward is nn.Conv2d.forward
        and type(conv)._conv_forward is nn.Conv2d._conv_forward
        and not {"forward", "_conv_forward"} & vars(conv).keys()
    )
    if not plain:
        what = "has its own code" if isinstance(conv, nn.Conv2d) else "is not a torch.nn.Conv2d"
        raise ValueError(f"{name}.conv, a {kind}, {what}, so it cannot be folded")
    check_hooks(f"{name}.conv", conv)
    weight, bias = present_value(conv, "weight"), present_value(conv, "bias")
    assert weight is not None
    if not weight.is_floating_point() or weight.ndim != 4:
        raise ValueError(
            f"{name}.conv has a weight of {weight.dtype} and shape {tuple(weight.shape)}; only a "
            "floating-point weight of four dimensions can be folded"
        )
    wide = bare_affine(weight.double(), None if bias is None else bias.double())
    affine = normalize(f"{name}.bn", wide, branch.bn, weight.dtype)
    return Convolution(affine, conv_geometry(conv), conv.groups)


def read_identity(name: str, module: nn.Module, dense: Convolution) -> Convolution:
    """Fold an identity branch, with or without a BatchNorm, as a 1x1 convolution."""
    kernel = dense.affine.kernel
    out, width = kernel.shape[0], kernel.shape[1] * dense.groups
    if out != width:
        raise ValueError(
            f"{name} adds the block's input of {width} channels to the {out} output channels of "
            "branch_3x3: replace it by None, or let branch_3x3.conv have as many"
        )
    eye = bare_affine(identity_kernel(width, dense.groups, device=kernel.device))
    return Convolution(normalize(name, eye, module), point_geometry(2), dense.groups)


def normalize(
    name: str, value: Affine, module: nn.Module | None, dtype: torch.dtype | None = None
) -> Affine:
    """Fold a normalization into the affine map before it, in float64."""
    if module is None:
        return value
    kind = type(module).__name__
    check_hooks(name, module)
    if type(module) in (nn.Identity, Rows):
        return value
    if not is_normalization(module):
        raise ValueError(
            f"{name} is a {kind}, which cannot be folded: only BatchNorms, SyncBatchNorm and "
            "frozen ones too, are linear in eval mode"
        )
    if has_computed_weights(module):
        module = copied(module)
        plain_weights(module)
    found = read_normalization(module)
    if isinstance(found, str):
        raise ValueError(f"{name}, a {kind}, cannot be folded: {found}")
    if found.tail or found.dims not in (2, None):
        tail = ", ".join(found.tail)
        what = f"does more than normalize ({tail})" if tail else "does not normalize images"
        raise ValueError(f"{name}, a {kind}, {what}, so it cannot be folded")
    if found.dtype is not None and dtype is not None and found.dtype != dtype:
        raise ValueError(
            f"{name}, a {kind}, has {found.dtype} and the convolution {dtype}: call .to() on the "
            "block before the fold"
        )
    channels, given = len(found.scale), value.kernel.shape[0]
    if channels != given:
        raise ValueError(f"{name} normalizes {channels} channels, but its input has {given}")
    scale, shift = found.scale, found.shift
    if isinstance(module, _BatchNorm) and not has_own_code(module, _torch_base(module)):
        scale, shift = bn_affine(module)  # gradients reach its weights
    return scale_output(value.kernel, value.bias, scale, shift)


def embed_branch(name: str, branch: Convolution, dense: Convolution) -> Affine:
    """Write a branch as a convolution with the geometry of the 3x3 branch."""
    kernel, target = branch.affine.kernel, dense.affine.kernel
    channels = (kernel.shape[0], kernel.shape[1] * branch.groups, branch.groups)
    wanted = (target.shape[0], target.shape[1] * dense.groups, dense.groups)
    if channels != wanted:
        raise ValueError(
            f"{name} has {channels[1]} input channels, {channels[0]} output channels and "
            f"{channels[2]} groups; branch_3x3 has {wanted[1]}, {wanted[0]} and {wanted[2]}"
        )
    wide = embed(kernel, branch.geometry, dense.geometry)
    if wide is None:
        raise ValueError(
            f"{name} ({_described(branch.geometry)}) does not fit into branch_3x3 "
            f"({_described(dense.geometry)}): give both the same stride and padding mode, and "
            "branch_3x3 a padding equal to its dilation"
        )
    return Affine(wide, branch.affine.bias)


def convolution_like(conv: nn.Conv2d, kernel: Tensor) -> nn.Conv2d:
    """Make a convolution with a bias and the geometry of another one.

    Args:
        conv: gives stride, padding, dilation, padding mode and groups, from its attributes.
        kernel: (O, I / groups, kH, kW), the new weight.
    """
    out, width, height, length = kernel.shape
    # On the meta device, which draws no random numbers: the weights are replaced below.
    new = nn.Conv2d(width * conv.groups, out, (height, length), groups=conv.groups, device="meta")
    set_geometry(new, conv)
    new.weight = nn.Parameter(kernel)
    new.bias = nn.Parameter(kernel.new_zeros(out))
    return new


def set_geometry(conv: nn.Conv2d, like: nn.Conv2d) -> None:
    """Set stride, dilation and padding of a convolution to those of another one."""
    conv.stride, conv.dilation = pair(like.stride), pair(like.dilation)
    conv.padding = like.padding if isinstance(like.padding, str) else pair(like.padding)
    conv.padding_mode = like.padding_mode
    conv._reversed_padding_repeated_twice = list(like._reversed_padding_repeated_twice)


def conv_geometry(conv: nn.Conv2d) -> Geometry:
    """The geometry of a convolution, from the attributes that its forward reads."""
    size = tuple(conv.weight.shape[2:])
    stride, dilation = pair(conv.stride), pair(conv.dilation)
    if conv.padding_mode != "zeros":
        width_low, width_high, height_low, height_high = conv._reversed_padding_repeated_twice
        before, after = (height_low, width_low), (height_high, width_high)
    elif conv.padding == "same":
        total = [d * (k - 1) for k, d in zip(size, dilation, strict=True)]
        before = (total[0] // 2, total[1] // 2)
        after = (total[0] - before[0], total[1] - before[1])
    else:  # a text is "valid"
        before = after = (0, 0) if isinstance(conv.padding, str) else pair(conv.padding)
    return Geometry(size, stride, dilation, before, after, conv.padding_mode)


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a layer's attribute, which may be one number for both."""
    numbers = [int(number) for number in (value if isinstance(value, Sequence) else [value])]
    height, width = numbers * 2 if len(numbers) == 1 else numbers
    return height, width


def check_drop(name: str, module: nn.Module) -> None:
    """Raise ValueError unless a module is known to do nothing in eval mode."""
    if type(module) not in (DropRows, nn.Identity) and (
        not isinstance(module, _DropoutNd) or has_own_code(module, _torch_base(module))
    ):
        raise ValueError(
            f"{name} is a {type(module).__name__}, which may change its input in eval mode: "
            "replace it by torch.nn.Identity() before the fold"
        )
    check_hooks(name, module)


def check_hooks(name: str, module: nn.Module) -> None:
    """Raise ValueError if a module has hooks, apart from those that compute its weights."""
    hooks = [
        hook
        for key in HOOKS
        for hook in getattr(module, key).values()
        if not computes_weights(hook)
    ]
    if hooks:
        raise ValueError(
            f"{name} has a hook, {getattr(hooks[0], '__qualname__', type(hooks[0]).__name__)}, "
            "which would be lost: remove it before the fold"
        )


def _torch_base(module: nn.Module) -> type[nn.Module]:
    return next(base for base in type(module).__mro__ if base.__module__.startswith("torch.nn."))


def _described(geometry: Geometry) -> str:
    shown = {
        "kernel": geometry.kernel,
        "stride": geometry.stride,
        "dilation": geometry.dilation,
        "padding": geometry.before if geometry.before == geometry.after else geometry[3:5],
    }
    mode = "" if geometry.mode == "zeros" else f", padding mode {geometry.mode}"
    return ", ".join(f"{key} {value}" for key, value in shown.items()) + mode
