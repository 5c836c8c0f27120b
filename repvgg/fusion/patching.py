"""What Python and torch answer themselves is asked of the tracer while a forward is followed."""

import contextlib
import copy
import functools
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from repvgg.fusion.proxies import asked_by_torch, is_value

MAX_FUNCTIONS = 2000  # whose names are looked at
MAX_HELD = 10_000  # things in a list or dictionary of a Python module
OWN = (
    "repvgg.fusion.tracer",
    "repvgg.fusion.proxies",
    __name__,
    "repvgg.fusion.kinds",
    "repvgg.fusion.flags",
)
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


def genuine(value: Any) -> Any:
    """`int` and `type` in place of what stands for them."""
    return value.original if type(value) in (_IntMeta, _TypeMeta) else value


def _globals_of(classes: Collection[type]) -> list[dict[str, Any]]:
    """The names that the code of classes sees, and of the functions it calls; torch's apart."""
    found: dict[int, dict[str, Any]] = {}
    todo: list[Any] = []
    for base in {base for cls in classes for base in cls.__mro__}:
        parts = vars(base).values()
        todo += [getattr(part, "fget", None) or getattr(part, "__func__", part) for part in parts]
    seen: set[int] = set()
    while todo and len(seen) < MAX_FUNCTIONS:
        function = todo.pop()
        if isinstance(function, types.FunctionType):
            todo.append(getattr(function, "__wrapped__", None))
        names = getattr(function, "__globals__", None)
        if id(function) in seen or not isinstance(names, dict) or not _is_of_user(names):
            continue
        seen.add(id(function))
        found[id(names)] = names
        code = getattr(function, "__code__", None)
        mentioned = code.co_names if code is not None else ()
        for name in mentioned:
            value = names.get(name)
            if isinstance(value, types.ModuleType):  # helpers.is_list(x)
                todo += [vars(value).get(other) for other in mentioned]
            elif isinstance(value, types.FunctionType):
                todo.append(value)
    return list(found.values())


def _is_of_user(names: dict[str, Any]) -> bool:
    """Whether a Python module is nobody's whose code knows of proxies, or is compiled."""
    name = str(names.get("__name__", ""))
    home = name.split(".")[0]
    known = home in ("torch", "numpy") or home in sys.stdlib_module_names
    return not known and name not in OWN


class _Outside:
    """Lists, dictionaries and sets that classes and Python modules hold, and what is in them.

    A forward that is followed may leave values there, which are none outside of it.
    """

    def __init__(self, homes: Sequence[dict[str, Any]], classes: Collection[type]) -> None:
        own = {base for cls in classes for base in cls.__mro__ if not _is_of_torch(base)}
        self.classes = {cls: dict(vars(cls)) for cls in own}
        self.homes = [(names, dict(names)) for names in homes]
        held = [v for _, names in self.homes for v in names.values()]
        held += [v for names in self.classes.values() for v in names.values()]
        self.containers = [
            (value, copy.copy(value))
            for value in {id(v): v for v in held if type(v) in (list, dict, set)}.values()
            if len(value) < MAX_HELD
        ]

    def restore(self) -> bool:
        """Put back what was there; whether anything had changed."""
        changed = False
        for cls, before in self.classes.items():
            for name, value in dict(vars(cls)).items():
                if before.get(name, self) is not value and not name.startswith("__"):
                    changed = True
                    if name in before:
                        setattr(cls, name, before[name])
                    else:
                        delattr(cls, name)
        for names, before in self.homes:
            for name, value in dict(names).items():
                if before.get(name, self) is not value:
                    changed = True
                    if name in before:
                        names[name] = before[name]
                    else:
                        del names[name]
        for value, before in self.containers:
            now = [*value.items()] if isinstance(value, dict) else [*value]
            then = [*before.items()] if isinstance(before, dict) else [*before]
            if len(now) != len(then) or not all(
                _same(a, b) for a, b in zip(now, then, strict=True)
            ):
                changed = True
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(before)
        return changed


def _same(first: Any, second: Any) -> bool:
    if type(first) is tuple and type(second) is tuple and len(first) == len(second) == 2:
        return first[0] is second[0] and first[1] is second[1]
    return first is second


def _is_of_torch(cls: type) -> bool:
    return cls.__module__.split(".")[0] in ("torch", "builtins", "typing", "abc")


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
        return _rounds(tracer, bounds[-1], sys._getframe(1))

    def builder(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def build(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = tree_map(genuine, (args, kwargs))
            if any(is_value(leaf) for leaf in tree_leaves((args, kwargs))):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return build

    def query(function: Callable[[], bool]) -> Callable[[], bool]:
        def asked() -> bool:
            if not asked_by_torch(sys._getframe(1)):
                tracer.queries.add(f"{function.__name__}()")
                if tracer.frames and not tracer.exact:
                    reason = f"it asks torch for {function.__name__}()"
                    return tracer.decide(function.__name__, reason, first=function())
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

    classes = {type(part) for part in root.modules()}
    homes = _globals_of(classes)
    outside = _Outside(homes, classes)
    nested = torch._dynamo.config.error_on_nested_fx_trace if _has_dynamo() else None
    try:
        for names in homes:
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
        tracer.leaves_traces = outside.restore()


def _has_dynamo() -> bool:
    return "torch._dynamo" in sys.modules


def flat(classes: Any) -> list[type]:
    if isinstance(classes, tuple | list):
        return [each for part in classes for each in flat(part)]
    return [each for part in typing.get_args(classes) for each in flat(part)] or [classes]


def _rounds(tracer: Any, count: Any, frame: types.FrameType) -> Iterator[Any]:
    """Run the body of a loop whose rounds are not known, if it leaves nothing behind.

    How often it runs does not matter then. Else the loop cannot be followed.
    """

    def held() -> dict[str, Any]:
        return {
            key: len(value) if isinstance(value, list | dict | set) else id(value)
            for key, value in frame.f_locals.items()
            if not (is_value(value) and value.node.target is an_index)
        }

    before, layers = held(), tracer.num_layers
    for place in (0, 1):
        yield tracer.create_proxy("call_function", an_index, (count, place), {})
        if held() != before or tracer.num_layers != layers:
            raise tracer.refuse("it does something for each of a number that is not known")


def an_index(count: Any, place: int) -> int:
    """A number below a count that is not known. Never run."""
    return place
