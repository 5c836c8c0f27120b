"""What an object of any class holds, read without running its code."""

import inspect
from collections.abc import Mapping
from typing import Final, Protocol, runtime_checkable

from torch import Tensor, nn


class _Missing:
    """The type of `MISSING`."""


MISSING: Final = _Missing()  # in place of an attribute that is not there


@runtime_checkable
class Wrapper(Protocol):
    """What a decorator made with functools.wraps, and the function inside of it."""

    __wrapped__: object


def stored(owner: object, name: str) -> object:
    """An attribute as it is stored, without running a property or `__getattr__`, or `MISSING`."""
    return inspect.getattr_static(owner, name, MISSING)


def attributes_of(value: object) -> Mapping[str, object]:
    """What an object holds in its `__dict__`; one with slots, or of C, has none."""
    try:
        return vars(value)
    except TypeError:
        return {}


def has_attribute(module: nn.Module, name: str) -> bool:
    """Whether the code of a module would find an attribute, as its own `hasattr` does."""
    return hasattr(module, name)


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """A tensor that a module of any class may have, be it a weight, a buffer or a property."""
    value = getattr(module, name, None)
    return value if isinstance(value, Tensor) else None


def has_trainable_bias(module: nn.Module | None) -> bool:
    """Whether a module has a bias that takes gradients."""
    bias = None if module is None else module._parameters.get("bias")
    return bias is not None and bias.requires_grad
