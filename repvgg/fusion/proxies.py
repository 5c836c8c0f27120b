"""Values of a forward that is followed: proxies that leave every question to their tracer.

torch.fx's own proxies answer some themselves: they are no tensors, never None, equal by identity,
and `x += y` makes a new one.
"""

import operator
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from repvgg.fusion.bytecode import in_message


class UntraceableError(ValueError):
    """A forward asked for something that is only known when it runs."""


class _Unknown:
    """Nothing is known about a value, mostly not its type: who asks cannot be followed."""

    node: Any
    tracer: Any

    @property
    def __class__(self) -> type:
        asker = sys._getframe(1)
        return type(self) if asked_by_torch(asker) else self.tracer.class_of(self, asker)

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise self.tracer.refuse("it changes the type of a value")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer", "root", "attr", "_node"):
            raise self.tracer.refuse("it sets an attribute of a value")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(torch.Tensor, name):
            raise self.tracer.refuse(f"it asks a value for '{name}', which tensors do not have")
        return Attribute(self, name)  # type: ignore[arg-type]

    def __hash__(self) -> int:
        if asked_by_torch(sys._getframe(1)):
            return object.__hash__(self)
        raise self.tracer.refuse("it looks a value up")

    def __repr__(self) -> str:
        return _text(self, sys._getframe(1))

    __str__ = __repr__

    def __format__(self, _: str) -> str:
        return _text(self, sys._getframe(1))


class _Text(str):
    """A value in words: good for messages, not for decisions."""

    tracer: Any

    def __new__(cls, tracer: Any) -> "_Text":
        text = super().__new__(cls, "(a value)")
        text.tracer = tracer
        return text

    def __eq__(self, other: object) -> bool:
        raise self.tracer.refuse("it compares a value as text")

    def __hash__(self) -> int:
        raise self.tracer.refuse("it compares a value as text")

    __ne__ = __eq__
    __contains__ = __eq__


def _text(value: Any, frame: types.FrameType) -> str:
    """A value in words, where they are for the reader alone; parts of it cannot be followed."""
    tracer = object.__getattribute__(value, "tracer")
    if not asked_by_torch(frame) and not in_message(frame):
        raise tracer.refuse("it makes text of a value")
    return _Text(tracer)


def asked_by_torch(frame: Any) -> bool:
    """Whether a question comes from inside torch, which knows its proxies."""
    home = frame.f_globals.get("__name__", "")
    return home.split(".")[0] == "torch" and frame.f_code.co_name != "is_tensor"


class Value(_Unknown, fx.Proxy):
    pass


class Attribute(_Unknown, fx.proxy.Attribute):
    pass


def _in_place(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """torch's proxies take `x += y` for `x = x + y`, and so lose that x changes."""

    def method(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


def _refused(name: str) -> Callable[..., Any]:
    def method(self: Any, *_: Any) -> Any:
        raise self.tracer.refuse(f"it needs a value when it calls {name}")

    return method


_AUGMENTED = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
)
for _name in _AUGMENTED:
    setattr(_Unknown, f"__i{_name}__", _in_place(getattr(operator, f"__i{_name}__")))


def _set_item(self: Any, key: Any, value: Any) -> None:
    self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


setattr(_Unknown, "__setitem__", _set_item)  # noqa: B010
for _name in ("int", "float", "complex", "contains", "delitem"):
    setattr(_Unknown, f"__{_name}__", _refused(f"__{_name}__"))


def _length(self: Any) -> int:
    """Functions of C ask for a length and go on without. Code that may catch the error is not."""
    if sys._getframe(1).f_code.co_exceptiontable:
        raise self.tracer.refuse("it needs a value when it calls __len__")
    raise TypeError("the length of a value is not known")


setattr(_Unknown, "__len__", _length)  # noqa: B010


def is_value(value: object) -> bool:
    return type(value) in (Value, Attribute)
