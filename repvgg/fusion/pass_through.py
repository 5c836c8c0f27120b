"""Nodes between a layer and a BatchNorm that do nothing in eval mode, or only scale and shift.

Dropout, `contiguous`, `flatten` and a constant factor do not prevent a fold.
"""

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import fx, nn

from repvgg.fusion.kinds import either, is_finite_number, target_name

_NOTHING = ("contiguous", "clone", "detach")
_DROPOUTS = (
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    *("stochastic_depth", "drop_path"),
)
_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}
_ADD = (operator.add, operator.iadd, torch.add)
_SUB = (operator.sub, operator.isub, torch.sub)
_MUL = (operator.mul, operator.imul, torch.mul)
_DIV = (operator.truediv, operator.itruediv, torch.div)


class PassThrough(NamedTuple):
    """y -> scale * y + shift, for each element.

    Attributes:
        ndim: number of axes of the result, if the node changes it. The second axis stays that of
            the channels.
        dtype: the only dtype that the node does not round.
        from_last: whether the second axis of the result is the last one of the input.
    """

    scale: float = 1.0
    shift: float = 0.0
    ndim: int | None = None
    dtype: torch.dtype | None = None
    from_last: bool = False


def source_of(node: fx.Node) -> fx.Node | None:
    """The value that a node of one input changes. Its sizes may be inputs too."""
    source = node.args[0] if node.args else None
    if isinstance(source, fx.Node):
        return source
    second = node.args[1] if len(node.args) > 1 else None
    return second if isinstance(second, fx.Node) else None


def read_pass_through(
    node: fx.Node, channels: int, get_module: Callable[[fx.Node], nn.Module | None]
) -> PassThrough | None:
    """The scale and shift of a node, or None if it does anything else.

    Args:
        channels: of its input.
        get_module: the module that a node calls.
    """
    source = source_of(node)
    if source is None:
        return None
    if node.op == "call_module":
        module = get_module(node)
        if not isinstance(module, nn.Flatten) or type(module) is not nn.Flatten:
            return None
        plain = len(node.args) == 1 and not node.kwargs
        return _flatten(module.start_dim, module.end_dim) if plain else None
    name = target_name(node)
    if node.op == "call_method":
        return _read_method(node, name, source, channels)
    if node.op != "call_function":
        return None
    if node.target is either:  # another path has another value
        return None
    if name in _DROPOUTS:
        return PassThrough() if _is_off(node) else None
    if node.target is torch.permute and len(node.args) == 2 and not node.kwargs:
        return _permute(node.args[1])
    if name == "flatten" and node.target is torch.flatten:
        return _flatten(*_start_and_end(node.args[1:], node.kwargs))
    return _read_arithmetic(node)


def _read_method(node: fx.Node, name: str, source: fx.Node, channels: int) -> PassThrough | None:
    rest = node.args[1:]
    if name in _NOTHING and not rest and not node.kwargs:
        return PassThrough()
    if name in _CASTS and not rest and not node.kwargs:
        return PassThrough(dtype=_CASTS[name])
    if name == "to" and len(rest) == 1 and isinstance(rest[0], torch.dtype) and not node.kwargs:
        return PassThrough(dtype=rest[0])
    if name == "flatten":
        return _flatten(*_start_and_end(rest, node.kwargs))
    if name == "permute" and not node.kwargs:
        return _permute(rest[0] if len(rest) == 1 else rest)
    if name in ("view", "reshape") and not node.kwargs:
        sizes = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
        if len(sizes) < 2 or not _is_size(sizes[0], source, 0):
            return None
        if len(sizes) == 2 and (sizes[1] == -1 or sizes[1] == channels):
            return PassThrough(ndim=2)
        if _is_size(sizes[1], source, 1) or sizes[1] == channels:
            return PassThrough(ndim=len(sizes))
    if name in ("mul", "mul_", "div", "div_", "add", "add_", "sub", "sub_") and len(rest) == 1:
        if node.kwargs or not is_finite_number(rest[0]):
            return None
        return _affine(name.rstrip("_"), float(rest[0]))
    return None


def _read_arithmetic(node: fx.Node) -> PassThrough | None:
    if node.target is operator.neg:
        return PassThrough(scale=-1.0)
    if node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    names = {"add": _ADD, "sub": _SUB, "mul": _MUL, "div": _DIV}
    name = next((key for key, targets in names.items() if node.target in targets), None)
    if name is None:
        return None
    if first is second:
        return PassThrough(scale=2.0) if name == "add" else None
    if isinstance(first, fx.Node) and is_finite_number(second):
        return _affine(name, float(second))
    if isinstance(second, fx.Node) and is_finite_number(first):
        if name == "sub":
            return PassThrough(scale=-1.0, shift=float(first))
        return None if name == "div" else _affine(name, float(first))
    return None


def _affine(name: str, number: float) -> PassThrough | None:
    if name in ("mul", "div"):
        if number == 0:
            return None
        return PassThrough(scale=number if name == "mul" else 1 / number)
    return PassThrough(shift=number if name == "add" else -number)


def _flatten(start: object, end: object) -> PassThrough | None:
    if start == 0 and end == 1:  # (N, L, C), or the normalization raises
        return PassThrough(ndim=2, from_last=True)
    if end != -1 or not isinstance(start, int) or start not in (1, 2):
        return None
    return PassThrough(ndim=start + 1)


def _permute(axes: object) -> PassThrough | None:
    """Axes of which the last one becomes the second, as from (N, H, W, C) to (N, C, H, W)."""
    if not isinstance(axes, tuple | list) or len(axes) < 3:
        return None
    return PassThrough(ndim=len(axes), from_last=True) if axes[1] in (-1, len(axes) - 1) else None


def _start_and_end(args: tuple[object, ...], kwargs: Mapping[str, object]) -> tuple[object, object]:
    given = dict(zip(("start_dim", "end_dim"), args, strict=False)) | dict(kwargs)
    return given.get("start_dim", 0), given.get("end_dim", -1)


def _is_off(node: fx.Node) -> bool:
    """Whether a dropout function is called with `training=False`."""
    assert callable(node.target)
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        bound.apply_defaults()
    except (TypeError, ValueError):
        return False
    return bound.arguments.get("training", True) is False


def _is_size(value: object, source: fx.Node, axis: int) -> bool:
    """Whether a value is the size of one axis of a tensor."""
    if not isinstance(value, fx.Node):
        return False
    if value.op == "call_method" and value.target == "size":
        return value.args == (source, axis)
    if value.target is not operator.getitem or value.args[1] != axis:
        return False
    shape = value.args[0]
    if not isinstance(shape, fx.Node) or not shape.args or shape.args[0] is not source:
        return False
    return shape.target == "size" or (shape.target is getattr and str(shape.args[1]) == "shape")
