"""Values of a traced forward: proxies that leave every test to their tracer.

The proxies of torch.fx answer some tests themselves: they are no tensors, never None, equal by
identity, and `x += y` creates a new one.
"""

import operator
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TypeGuard

import torch
from torch import fx

from repvgg.fusion.attributes import MISSING, stored
from repvgg.fusion.bytecode import in_message

if TYPE_CHECKING:
    from repvgg.fusion.decisions import DecidingTracer


class _Unknown(fx.Proxy):
    """A value of which nothing is known, often not even its type."""

    tracer: "DecidingTracer"

    @property
    def __class__(self) -> type:
        reader = sys._getframe(1)
        return type(self) if is_code_of_torch(reader) else self.tracer.class_of(self, reader)

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise self.tracer.untraceable("it sets the type of a value")

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("node", "tracer", "root", "attr", "_node"):
            raise self.tracer.untraceable("it sets an attribute of a value")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> "Attribute":
        if name.startswith("__") or stored(torch.Tensor, name) is MISSING:
            raise self.tracer.untraceable(
                f"it reads '{name}' of a value, which tensors do not have"
            )
        return Attribute(self, name)

    def __hash__(self) -> int:
        if is_code_of_torch(sys._getframe(1)):
            return object.__hash__(self)
        raise self.tracer.untraceable("it hashes a value")

    def __repr__(self) -> str:
        return _text(self, sys._getframe(1))

    __str__ = __repr__

    def __format__(self, _: str) -> str:
        return _text(self, sys._getframe(1))

    def __setitem__(self, key: object, value: object) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __len__(self) -> int:
        # Functions written in C try len() and do without. Code that may catch the error does not.
        if sys._getframe(1).f_code.co_exceptiontable:
            raise self.tracer.untraceable("it calls __len__ on a value")
        raise TypeError("the length of a value is not known")


class _Text(str):
    """The text of a value: it may be shown, but not compared."""

    tracer: "DecidingTracer"

    def __new__(cls, tracer: "DecidingTracer") -> "_Text":
        text = super().__new__(cls, "(a value)")
        text.tracer = tracer
        return text

    def __eq__(self, other: object) -> bool:
        raise self.tracer.untraceable("it compares the text of a value")

    def __hash__(self) -> int:
        raise self.tracer.untraceable("it compares the text of a value")

    __ne__ = __eq__
    __contains__ = __eq__


def _text(value: _Unknown, frame: types.FrameType) -> str:
    """The text of a value for a message; any other use of it cannot be traced."""
    tracer: DecidingTracer = object.__getattribute__(value, "tracer")
    if not is_code_of_torch(frame) and not in_message(frame):
        raise tracer.untraceable("it converts a value to text")
    return _Text(tracer)


def is_code_of_torch(frame: types.FrameType) -> bool:
    """Whether code belongs to torch, which knows its proxies."""
    home: str = frame.f_globals.get("__name__", "")
    return home.split(".")[0] == "torch" and frame.f_code.co_name != "is_tensor"


class Value(_Unknown):
    """The value of a node."""


class Attribute(_Unknown, fx.proxy.Attribute):
    """An attribute or method of a value."""


def _in_place(operation: Callable[..., object]) -> Callable[[_Unknown, object], fx.Proxy]:
    """`x += y`, which the proxies of torch replace by `x = x + y`, so that x seems unchanged."""

    def method(self: _Unknown, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


def _untraceable(name: str) -> Callable[..., NoReturn]:
    def method(self: _Unknown, *_: object) -> NoReturn:
        raise self.tracer.untraceable(f"it calls {name} on a value")

    return method


_AUGMENTED = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("and", "or", "xor"),
)
for _name in _AUGMENTED:
    setattr(_Unknown, f"__i{_name}__", _in_place(vars(operator)[f"__i{_name}__"]))
for _name in ("int", "float", "complex", "contains", "delitem"):
    setattr(_Unknown, f"__{_name}__", _untraceable(f"__{_name}__"))


def is_value(value: object) -> TypeGuard[Value | Attribute]:
    """Whether an object stands for a value of the traced forward."""
    return type(value) in (Value, Attribute)
