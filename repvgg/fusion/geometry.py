"""The geometry and the kernel of a branch, read from its layer.

An identity or a normalization is a kernel of size 1. Average pooling is a kernel of equal taps
(Ding et al., 2021, arXiv:2103.13425, section 3.2).
"""

from collections.abc import Sequence
from operator import getitem

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from repvgg.fusion import foldable
from repvgg.fusion.normalizations import is_normalization, read_normalization
from repvgg.reparam import (
    Affine,
    Geometry,
    bare_affine,
    identity_kernel,
    point_geometry,
    scale_output,
)

POOLS = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}


def read_subsampling(node: object, dims: int) -> tuple[fx.Node, int] | None:
    """Read x and s from a node x[..., ::s, ::s] over all spatial dimensions."""
    if not isinstance(node, fx.Node) or node.target is not getitem:
        return None
    source, index = node.args
    if not isinstance(source, fx.Node) or not isinstance(index, tuple) or index[:1] != (...,):
        return None
    steps = {part.step for part in index[1:] if isinstance(part, slice)}
    plain = all(isinstance(s, slice) and s.start is None and s.stop is None for s in index[1:])
    if len(steps) != 1 or not plain or len(index) != 1 + dims:
        return None
    (step,) = steps
    return (source, step) if isinstance(step, int) and step > 0 else None


def small_kernel(
    module: nn.Module | None, conv: _ConvNd, value: Affine | None = None
) -> Affine | None:
    """The kernel of a branch, not yet padded, or None if its channels differ from those of `conv`.

    Args:
        value: the kernel of a convolution in float64, if its weights are a rounded copy.
    """
    weight = conv.weight
    if isinstance(module, _ConvNd):
        shape = (module.in_channels, module.out_channels, module.groups)
        same = shape == (conv.in_channels, conv.out_channels, conv.groups) and (
            module.weight.dtype == weight.dtype and module.weight.device == weight.device
        )
        if not same:
            return None
        return foldable.affine(module) if value is None else value
    if conv.in_channels != conv.out_channels:
        return None
    dims = len(conv.kernel_size)
    eye = identity_kernel(conv.in_channels, conv.groups, dims=dims, device=weight.device)
    if module is None:
        return bare_affine(eye)
    if type(module) in POOLS:
        geometry = read_geometry(module)
        assert geometry is not None
        size = torch.Size(geometry.kernel)
        return bare_affine((eye / size.numel()).expand(*eye.shape[:2], *size))
    found = read_normalization(module)
    if isinstance(found, str) or found.tail or found.dims not in (None, dims):
        return None
    if len(found.scale) != len(eye) or found.scale.device != eye.device:
        return None
    return scale_output(eye, None, found.scale, found.shift)


def read_geometry(module: nn.Module | None, like: _ConvNd | None = None) -> Geometry | None:
    """The geometry of a module, or None if it is no branch."""
    if isinstance(module, _ConvNd):
        known = foldable.is_linear(module)
        if isinstance(module, _ConvTransposeNd) or not known:
            return None
        size, stride, dilation = module.kernel_size, module.stride, module.dilation
        if module.padding == "same":
            total = [d * (k - 1) for k, d in zip(size, dilation, strict=True)]
            before = tuple(t // 2 for t in total)
            after = tuple(t - b for t, b in zip(total, before, strict=True))
        elif module.padding == "valid":
            before = after = (0,) * len(size)
        else:
            before = after = tuple(int(amount) for amount in module.padding)
        return Geometry(size, stride, dilation, before, after, module.padding_mode)
    dims = POOLS.get(type(module)) if module is not None else None
    if dims is not None:
        assert isinstance(module, nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d)
        exact = module.count_include_pad and not module.ceil_mode
        overrides = not isinstance(module, nn.AvgPool1d) and module.divisor_override is not None
        if not exact or overrides:
            return None

        def each(value: int | Sequence[int]) -> tuple[int, ...]:
            return (value,) * dims if isinstance(value, int) else tuple(value)

        pad = each(module.padding)
        ones = (1,) * dims
        return Geometry(each(module.kernel_size), each(module.stride), ones, pad, pad, "zeros")
    if module is None or is_normalization(module):
        return point_geometry(2 if like is None else len(like.kernel_size))
    return None
