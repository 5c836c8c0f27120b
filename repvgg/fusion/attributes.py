"""Attributes of objects of any class, which may lack them."""

import inspect
from collections.abc import Mapping
from typing import Final, Protocol, runtime_checkable

from torch import Tensor, nn


class _Missing:
    """The type of `MISSING`."""


MISSING: Final = _Missing()  # stands for an attribute that an object lacks


@runtime_checkable
class Wrapper(Protocol):
    """A function that a decorator returned, with the original inside (functools.wraps)."""

    __wrapped__: object


def stored(owner: object, name: str) -> object:
    """An attribute as stored, or `MISSING`. No property and no `__getattr__` runs."""
    if isinstance(owner, type):  # faster than getattr_static
        return next((vars(base)[name] for base in owner.__mro__ if name in vars(base)), MISSING)
    return inspect.getattr_static(owner, name, MISSING)


def attributes_of(value: object) -> Mapping[str, object]:
    """The `__dict__` of an object, empty for objects without one."""
    try:
        return vars(value)
    except TypeError:
        return {}


def has_attribute(module: nn.Module, name: str) -> bool:
    """Whether a forward that calls `hasattr(self, name)` finds the attribute."""
    return hasattr(module, name)


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """A parameter, buffer or other tensor of a module, None if the module has no such tensor."""
    value = getattr(module, name, None)
    return value if isinstance(value, Tensor) else None


def has_trainable_bias(module: nn.Module | None) -> bool:
    """Whether a module has a bias that requires gradients."""
    bias = None if module is None else module._parameters.get("bias")
    return bias is not None and bias.requires_grad
