"""What Python and torch answer themselves is asked of the tracer while a forward is followed."""

import contextlib
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from repvgg.proxies import asked_by_torch, is_value

_BUILDERS = ("zeros", "ones", "empty", "rand", "randn", "full", "tensor")  # of torch, from sizes
_RESHAPES = ("expand", "view", "reshape", "repeat")  # of constant tensors
_QUERIES: tuple[tuple[types.ModuleType, Callable[[], bool]], ...] = (
    (torch.jit, torch.jit.is_scripting),
    (torch.jit, torch.jit.is_tracing),
    (torch.compiler, torch.compiler.is_exporting),
    (torch.compiler, torch.compiler.is_compiling),
    (torch.compiler, torch.compiler.is_dynamo_compiling),
    (torch.onnx, torch.onnx.is_in_onnx_export),
    (torch, torch.is_grad_enabled),
)


class _IntMeta(type):
    """Of what stands for `int`: it is `int` for all that asks."""

    original: type = int

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.original)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.original)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.original, name)

    def __eq__(cls, other: object) -> bool:
        return other is cls.original or other is cls

    def __hash__(cls) -> int:
        return hash(cls.original)


class _TypeMeta(_IntMeta):
    """Of what stands for `type`."""

    original: type = type


def _globals_of(classes: Collection[type]) -> list[dict[str, Any]]:
    """The names that the code of classes sees, torch's apart."""
    found: dict[int, dict[str, Any]] = {}
    for base in {base for cls in classes for base in cls.__mro__}:
        for value in vars(base).values():
            function = getattr(value, "fget", None) or getattr(value, "__func__", value)
            for code in (function, inspect.unwrap(function) if callable(function) else function):
                names = getattr(code, "__globals__", None)
                if isinstance(names, dict) and names.get("__name__", "").split(".")[0] != "torch":
                    found[id(names)] = names
    return list(found.values())


@contextlib.contextmanager
def patched(root: nn.Module, tracer: Any) -> Iterator[None]:
    """Let the code of a network ask `isinstance`, `len`, `int` and `range` of values.

    Python answers them without asking the value, or demands a number of it.
    """

    def is_instance(value: Any, classes: Any) -> bool:
        classes = tuple(int if c is whole else c for c in flat(classes))
        return tracer.is_instance(value, classes) if is_value(value) else isinstance(value, classes)

    def length(value: Any) -> Any:
        if not is_value(value):
            return len(value)
        return tracer.create_proxy("call_function", len, (value,), {})

    class whole(metaclass=_IntMeta):  # noqa: N801
        def __new__(cls, value: Any = 0, *rest: Any) -> Any:
            if not is_value(value):
                return int(value, *rest)
            if tracer.kind(value.node) is int:
                return value
            return tracer.create_proxy("call_function", int, (value,), {})

    def indices(*bounds: Any) -> Any:
        if not any(map(is_value, bounds)):
            return range(*bounds)
        if tracer.exact:
            raise tracer.refuse("it counts to a value")
        return [tracer.create_proxy("call_function", an_index, (bounds[-1], i), {}) for i in (0, 1)]

    def builder(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def build(*args: Any, **kwargs: Any) -> Any:
            if any(is_value(leaf) for leaf in tree_leaves((args, kwargs))):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return build

    def query(function: Callable[[], bool]) -> Callable[[], bool]:
        def asked() -> bool:
            if not asked_by_torch(sys._getframe(1)):
                tracer.queries.add(f"{function.__name__}()")
            return function()

        return asked

    queries = {id(function): query(function) for _, function in _QUERIES}
    originals: dict[str, Any] = {}

    def choose(function: Callable[..., Any]) -> Callable[..., Any]:
        """`max` or `min`, which would compare."""

        def chosen(*args: Any, **kwargs: Any) -> Any:
            if len(args) > 1 and any(map(is_value, args)):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return chosen

    class kind(metaclass=_TypeMeta):  # noqa: N801
        def __new__(cls, *args: Any) -> Any:
            if len(args) == 1 and is_value(args[0]):
                return tracer.exact_class(args[0])
            return type(*args)

    new: dict[str, Any] = {
        **{"isinstance": is_instance, "len": length, "int": whole, "range": indices},
        **{"type": kind, "max": choose(max), "min": choose(min)},
    }
    patched: list[tuple[dict[str, Any], str]] = []
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    set_attribute = nn.Module.__setattr__

    def noted(module: nn.Module, name: str, value: Any) -> None:
        if module in tracer.steps and name != "training":
            tracer.changed.setdefault(module, name)
        set_attribute(module, name, value)

    nested = torch._dynamo.config.error_on_nested_fx_trace if _has_dynamo() else None
    try:
        for names in _globals_of({type(part) for part in root.modules()}):
            for name, function in new.items():
                if name not in names:
                    names[name] = function
                    patched.append((names, name))
            for name, function in list(names.items()):
                if id(function) in queries:
                    names[name] = queries[id(function)]
                    replaced.append((names, name, function))
        for home, function in _QUERIES:
            replaced.append((vars(home), function.__name__, function))
            setattr(home, function.__name__, queries[id(function)])
        for name in _BUILDERS:
            originals[name] = getattr(torch, name)
            setattr(torch, name, builder(originals[name]))
        for name in _RESHAPES:
            setattr(Tensor, name, builder(getattr(Tensor, name)))
        nn.Module.__setattr__ = noted  # type: ignore[method-assign,assignment]
        if nested is not None:
            torch._dynamo.config.error_on_nested_fx_trace = False
        yield
    finally:
        for name, function in originals.items():
            setattr(torch, name, function)
        for name in _RESHAPES:
            if name in vars(Tensor):
                delattr(Tensor, name)
        nn.Module.__setattr__ = set_attribute  # type: ignore[method-assign]
        if nested is not None:
            torch._dynamo.config.error_on_nested_fx_trace = nested
        for names, name in patched:
            names.pop(name, None)
        for names, name, function in replaced:
            names[name] = function


def _has_dynamo() -> bool:
    return "torch._dynamo" in sys.modules


def flat(classes: Any) -> list[type]:
    if isinstance(classes, tuple | list):
        return [each for part in classes for each in flat(part)]
    return [each for part in typing.get_args(classes) for each in flat(part)] or [classes]


def an_index(count: Any, place: int) -> int:
    """A number below a count that is not known. Never run."""
    return place
