"""The geometry of a layer, read from its attributes."""

from collections.abc import Sequence
from operator import getitem

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from repvgg.fusion import foldable
from repvgg.reparam import Geometry

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


def read_geometry(module: nn.Module | None) -> Geometry | None:
    """The geometry of a convolution, linear layer or average pool; None for other modules."""
    if isinstance(module, nn.Linear):
        return Geometry((), (), (), (), ()) if foldable.is_linear(module) else None
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
    return None
