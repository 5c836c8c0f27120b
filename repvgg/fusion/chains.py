"""A term of a sum as one convolution: the chain of linear layers that computes it.

Convolutions, linear layers, normalizations, average pooling and strided slices in a chain are one
convolution (Ding et al., 2021, arXiv:2103.13425, section 3.2). A chain ends where its value has
other users, or where two of its layers are no convolution at the border.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from repvgg.fusion import foldable
from repvgg.fusion.geometry import POOLS, read_geometry, read_subsampling
from repvgg.fusion.normalizations import (
    Normalization,
    is_normalization,
    read_normalization,
    read_scaling,
)
from repvgg.reparam import (
    Affine,
    Convolution,
    Geometry,
    bare_affine,
    compose,
    embed,
    point_geometry,
    regroup,
    scale_output,
)

Layer = _ConvNd | nn.Linear
Factor = float | Tensor  # of a term: a number, or one for each channel


class Step(NamedTuple):
    """A linear layer in a chain.

    Attributes:
        node: the one that computes its output.
        module: None for a strided slice.
        name: of the module.
        stride: of the slice.
    """

    node: fx.Node
    module: nn.Module | None = None
    name: str = ""
    stride: int = 1


class Term(NamedTuple):
    """One term of a sum.

    Attributes:
        added: the node that is added.
        source: the node whose value is the input of the chain.
        steps: from the source to the sum; none for the identity.
        factors: that the sum multiplies it with.
        check: a node behind the chain that only checks the rank of its input.
        entry: such a node in front of the chain.
    """

    added: fx.Node
    source: fx.Node
    steps: tuple[Step, ...] = ()
    factors: tuple[Factor, ...] = ()
    check: fx.Node | None = None
    entry: fx.Node | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(step.name for step in self.steps if step.module is not None)

    @property
    def last(self) -> Step:
        """The last convolution or linear layer."""
        return next(step for step in reversed(self.steps) if is_layer(step.module))

    @property
    def convolves(self) -> bool:
        return any(is_layer(step.module) for step in self.steps)


def is_layer(module: nn.Module | None) -> bool:
    """Whether a module has the weights of a convolution or linear layer."""
    return isinstance(module, Layer)


def read_step(
    node: fx.Node, get: Callable[[fx.Node], nn.Module | None], dims: int | None
) -> Step | None:
    """The linear layer that a node calls, or None.

    Args:
        get: the module that a node calls.
        dims: spatial dimensions of its output, if they are known.
    """
    if node.op != "call_module":
        found = None if dims is None else read_subsampling(node, dims)
        return None if found is None else Step(node, stride=found[1])
    module = get(node)
    plain = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)
    known = (
        read_geometry(module) is not None
        or is_normalization(module)
        or read_scaling(module) is not None
    )
    return Step(node, module) if plain and known else None


def dimensions(module: nn.Module | None) -> int | None:
    """Spatial dimensions of a layer's inputs, or None if they may be any."""
    if isinstance(module, Layer):
        return foldable.dimensions(module)
    return POOLS.get(type(module)) if module is not None else None


def convolution(
    term: Term, channels: int, like: Layer, values: Mapping[str, Affine]
) -> Convolution | None:
    """A term as one convolution in float64, or None if it is none.

    Args:
        channels: of the sum.
        like: a layer of the sum, which has its dimensions, dtype and device.
        values: kernels in float64 of layers whose weights are rounded, by name.
    """
    whole: Convolution | None = None
    dims = foldable.dimensions(like)
    for step in reversed(term.steps):
        width = channels if whole is None else whole.in_channels
        found = _of_step(step, width, dims, like.weight, values)
        if found is None:
            return None
        try:
            whole = found if whole is None else compose(found, whole)
        except ValueError:
            return None
    if whole is None:
        ones = like.weight.new_ones(channels, dtype=torch.float64)
        whole = by_channel(ones, None, dims)
    for factor in term.factors:
        scale = _as_vector(factor, channels, dims)
        if scale is None:
            return None
        scale = scale.to(whole.affine.kernel)
        affine = scale_output(*whole.affine, scale, torch.zeros_like(scale))
        whole = whole._replace(affine=affine)
    return whole if len(whole.affine.kernel) == channels else None


def placed(branch: Convolution, target: Convolution) -> Affine | None:
    """A convolution with the geometry and groups of another one, or None."""
    if branch.in_channels != target.in_channels or branch.groups % target.groups:
        return None
    kernel = regroup(branch.affine.kernel, branch.groups, target.groups)
    wide = embed(kernel, branch.geometry, target.geometry)
    return None if wide is None else Affine(wide, branch.affine.bias)


def cost(term: Term, dims: int) -> int:
    """Multiplications of a chain's layers for each position of its output."""
    total, positions = 0, 1
    for step in reversed(term.steps):
        if isinstance(step.module, Layer):
            total += step.module.weight.numel() * positions
        found = read_geometry(step.module)
        positions *= step.stride**dims if found is None else math.prod(found.stride)
    return total


def _of_step(
    step: Step, width: int, dims: int, weight: Tensor, values: Mapping[str, Affine]
) -> Convolution | None:
    module = step.module
    if isinstance(module, Layer):
        if module.weight.dtype != weight.dtype or module.weight.device != weight.device:
            return None
        same = foldable.dimensions(module) == dims
        return of_layer(module, values.get(step.name)) if same else None
    ones = weight.new_ones(width, dtype=torch.float64)
    if module is None:
        same_value = by_channel(ones, None, dims)
        return same_value._replace(geometry=point_geometry(dims, step.stride))
    if type(module) in POOLS:
        geometry = read_geometry(module)
        if geometry is None or len(geometry.kernel) != dims:
            return None
        size = math.prod(geometry.kernel)
        taps = (ones / size).reshape(width, 1, *[1] * dims).expand(width, 1, *geometry.kernel)
        return Convolution(bare_affine(taps), geometry, width, False)
    factors = read_scaling(module)
    if factors is not None:
        if dims != 2 or factors.device != weight.device or len(factors) not in (1, width):
            return None
        return by_channel(factors.flatten().expand(width), None, dims)
    found = read_normalization(module)
    if isinstance(found, str) or not _fits(found, width, dims, weight):
        return None
    return by_channel(found.scale, found.shift, dims)


def by_channel(scale: Tensor, shift: Tensor | None, dims: int) -> Convolution:
    """x -> scale * x + shift, by channel, as a depthwise convolution of one tap."""
    kernel = scale.reshape(-1, 1, *[1] * dims)
    affine = bare_affine(kernel, shift)
    return Convolution(affine, point_geometry(dims), len(scale), shift is not None)


def of_layer(module: Layer, value: Affine | None = None) -> Convolution | None:
    """A layer in float64; None if it is transposed or has code of its own.

    Args:
        value: its kernel, if its weights are a rounded copy.
    """
    geometry = read_geometry(module)
    if geometry is None:
        return None
    groups = 1 if isinstance(module, nn.Linear) else module.groups
    affine = foldable.affine(module) if value is None else value
    return Convolution(affine, geometry, groups, module.bias is not None)


def _fits(found: Normalization, width: int, dims: int, weight: Tensor) -> bool:
    same = len(found.scale) == width and found.scale.device == weight.device
    return same and dims > 0 and not found.tail and found.dims in (None, dims)


def _as_vector(factor: Factor, channels: int, dims: int) -> Tensor | None:
    """A factor as one number for each channel, or None if it has other axes."""
    values = torch.as_tensor(factor).detach().double()
    shape = (*[1] * (dims + 1 - values.ndim), *values.shape)
    place = len(shape) - dims - 1
    rest = math.prod(shape[:place]) * math.prod(shape[place + 1 :])
    if rest != 1 or shape[place] not in (1, channels):
        return None
    return values.reshape(-1).expand(channels)


def widest(found: Sequence[tuple[Term, Convolution]]) -> list[tuple[Term, Convolution]]:
    """Terms with a layer, those first whose kernels have the most taps and the fewest steps."""
    with_layer = [pair for pair in found if pair[0].convolves]
    return sorted(with_layer, key=lambda pair: (-_taps(pair[1].geometry), len(pair[0].steps)))


def _taps(geometry: Geometry) -> int:
    return math.prod(geometry.kernel)


def has_class(old: nn.Module | None, whole: Convolution) -> bool:
    """Whether a layer of torch, in the place of `old`, can have the geometry of a convolution."""
    own = read_geometry(old)
    return whole.geometry == own or whole.geometry.before == whole.geometry.after


def new_layer(old: Layer, whole: Convolution, total: Affine, *, bias_trains: bool) -> Layer:
    """A layer of torch, in eval mode, with the dtype, device and memory format of another one.

    Args:
        whole: gives its geometry.
        total: its kernel and bias.
    """
    kernel, geometry = total.kernel, whole.geometry
    layer: Layer
    # On the meta device: its weights are replaced, and the random state does not change.
    if isinstance(old, nn.Linear):
        layer = nn.Linear(whole.in_channels, len(kernel), device="meta")
    else:
        layer = _plain(type(old))(
            whole.in_channels,
            len(kernel),
            geometry.kernel,
            stride=geometry.stride,
            padding=old.padding if geometry == read_geometry(old) else geometry.before,
            dilation=geometry.dilation,
            groups=whole.groups,
            padding_mode=geometry.mode,
            device="meta",
        )
    weight = foldable.in_format_of(old.weight, kernel)
    layer.weight = nn.Parameter(weight, old.weight.requires_grad)
    layer.bias = nn.Parameter(total.bias.to(old.weight), bias_trains)
    return layer.eval()


def _plain(cls: type[_ConvNd]) -> Callable[..., _ConvNd]:
    """The class of torch that a convolution belongs to."""
    return next(base for base in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if issubclass(cls, base))
