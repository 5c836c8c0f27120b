"""Built-in functions and functions of torch that answer differently while a forward is traced.

Python answers `isinstance`, `len`, `int` and `range` without the value, or needs a number.
`patched` puts functions in their place that leave the answer to the tracer.
"""

import contextlib
import functools
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from repvgg.fusion.kinds import iteration
from repvgg.fusion.outside import Outside, globals_of
from repvgg.fusion.proxies import is_code_of_torch, is_value

if TYPE_CHECKING:
    from repvgg.fusion.tracer import Tracer

_BUILDERS = ("zeros", "ones", "empty", "rand", "randn", "full", "tensor")  # of torch, from sizes
_RESHAPES = ("expand", "view", "reshape", "repeat")  # of constant tensors
_QUERIES: tuple[tuple[types.ModuleType, Callable[[], bool]], ...] = tuple(
    (home, vars(home)[name])
    for home, names in (
        (torch.jit, ("is_scripting", "is_tracing")),
        (torch.compiler, ("is_exporting", "is_compiling", "is_dynamo_compiling")),
        (torch.onnx, ("is_in_onnx_export",)),
        (torch, ("is_grad_enabled",)),
    )
    for name in names
)


class _IntMeta(type):
    """The class of what stands in for `int`; in every comparison it counts as `int`."""

    original: type = int

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.original)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.original)

    def __getattr__(cls, name: str) -> object:
        return getattr(cls.original, name)

    def __eq__(cls, other: object) -> bool:
        return other is cls.original or other is cls

    def __hash__(cls) -> int:
        return hash(cls.original)


class _TypeMeta(_IntMeta):
    """The class of what stands in for `type`."""

    original: type = type


def genuine(value: object) -> object:
    """A value, with `int` and `type` in place of their stand-ins."""
    if type(value) in (_IntMeta, _TypeMeta):
        assert isinstance(value, _IntMeta)
        return value.original
    return value


@contextlib.contextmanager
def patched(root: nn.Module, tracer: "Tracer") -> Iterator[None]:
    """Let the tracer answer built-in functions and queries of torch for the code of a network.

    What that code leaves in classes and Python modules is undone, and noted in
    `tracer.has_side_effects`.
    """
    classes = {type(part) for part in root.modules()}
    homes = globals_of(classes)
    outside = Outside(homes, classes)

    def restore_outside() -> None:
        tracer.has_side_effects = outside.restore()

    with contextlib.ExitStack() as undo:
        undo.callback(restore_outside)
        queries = {id(function): _query(function, tracer) for _, function in _QUERIES}
        builtins = _builtins(tracer)
        for names in homes:
            for name in builtins.keys() - names.keys():
                undo.callback(names.pop, name, None)
                names[name] = builtins[name]
            for name, function in list(names.items()):
                if id(function) in queries:
                    undo.callback(names.__setitem__, name, function)
                    names[name] = queries[id(function)]
        for home, function in _QUERIES:
            _set(undo, home, function.__name__, queries[id(function)])
        for name in _BUILDERS:
            _set(undo, torch, name, _builder(vars(torch)[name], tracer))
        for name in _RESHAPES:
            undo.callback(_delete, Tensor, name)
            setattr(Tensor, name, _builder(getattr(Tensor, name), tracer))
        _set(undo, nn.Module, "__setattr__", _noted(tracer, nn.Module.__setattr__))
        if "torch._dynamo" in sys.modules:
            _set(undo, torch._dynamo.config, "error_on_nested_fx_trace", False)
        yield


def _set(undo: contextlib.ExitStack, owner: object, name: str, value: object) -> None:
    """Set an attribute until the stack unwinds."""
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _delete(owner: type, name: str) -> None:
    """Remove an attribute, so that the inherited one counts again."""
    if name in vars(owner):
        delattr(owner, name)


def _builtins(tracer: "Tracer") -> dict[str, object]:
    """Functions in place of the built-in ones, by name."""

    def is_instance(value: object, classes: object) -> bool:
        known = tuple(int if c is whole else c for c in _flat(classes))
        return (
            tracer.is_instance(value.node, known) if is_value(value) else isinstance(value, known)
        )

    def length(value: typing.Sized) -> object:
        if not is_value(value):
            return len(value)
        return tracer.create_proxy("call_function", len, (value,), {})

    # mypy wants __new__ to return an instance; a stand-in returns one of what it stands in for.
    class whole(metaclass=_IntMeta):  # noqa: N801
        def __new__(cls, value: object = 0, *rest: object) -> object:  # type: ignore[misc]
            if not is_value(value):
                return int(value, *rest)  # type: ignore[call-overload]  # as the caller wrote it
            if tracer.kind(value.node) is int:
                return value
            return tracer.create_proxy("call_function", int, (value,), {})

    class kind(metaclass=_TypeMeta):  # noqa: N801
        def __new__(cls, *args: object) -> object:  # type: ignore[misc]
            if len(args) == 1 and is_value(args[0]):
                return tracer.exact_class(args[0].node)
            return type(*args)

    def indices(*bounds: object) -> object:
        if not any(map(is_value, bounds)):
            return range(*bounds)  # type: ignore[call-overload]  # as the caller wrote it
        if tracer.exact:
            raise tracer.untraceable("it loops over range() of a value")
        return _iterations(tracer, bounds[-1], sys._getframe(1))

    def choose(function: Callable[..., object]) -> Callable[..., object]:
        """`max` or `min`, which would compare."""

        def chosen(*args: object, **kwargs: object) -> object:
            if len(args) > 1 and any(map(is_value, args)):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return chosen

    return {
        **{"isinstance": is_instance, "len": length, "int": whole, "range": indices},
        **{"type": kind, "max": choose(max), "min": choose(min)},
    }


def _builder(function: Callable[..., object], tracer: "Tracer") -> Callable[..., object]:
    """A function of torch that becomes a node if a value is among its arguments."""

    @functools.wraps(function)
    def build(*args: object, **kwargs: object) -> object:
        args, kwargs = tree_map(genuine, (args, kwargs))
        if any(is_value(leaf) for leaf in tree_leaves((args, kwargs))):
            return tracer.create_proxy("call_function", function, args, kwargs)
        return function(*args, **kwargs)

    return build


def _query(function: Callable[[], bool], tracer: "Tracer") -> Callable[[], bool]:
    """A question about how the network runs, both answers to which are traced."""

    def answer() -> bool:
        if not is_code_of_torch(sys._getframe(1)):
            tracer.queries.add(f"{function.__name__}()")
            if tracer.frames and not tracer.exact:
                reason = f"it calls {function.__name__}()"
                return tracer.decide(function.__name__, reason, first=function())
        return function()

    return answer


def _noted(
    tracer: "Tracer", set_attribute: Callable[[nn.Module, str, Tensor | nn.Module], None]
) -> Callable[[nn.Module, str, Tensor | nn.Module], None]:
    """`nn.Module.__setattr__` that notes which leaf modules a forward changes."""

    def noted(module: nn.Module, name: str, value: Tensor | nn.Module) -> None:
        if module in tracer.leaves and name != "training":
            tracer.changed.setdefault(module, name)
        set_attribute(module, name, value)

    return noted


def _flat(classes: object) -> list[type]:
    """The classes in the second argument of `isinstance`: nested tuples and unions."""
    if isinstance(classes, tuple | list):
        return [each for part in classes for each in _flat(part)]
    return [each for part in typing.get_args(classes) for each in _flat(part)] or [
        typing.cast(type, classes)
    ]


def _iterations(tracer: "Tracer", count: object, frame: types.FrameType) -> Iterator[fx.Proxy]:
    """Run the body of a loop with an unknown number of iterations, if it leaves nothing behind.

    How often it runs does not matter then. Otherwise the loop cannot be traced.
    """

    def held() -> dict[str, int]:
        return {
            key: len(value) if isinstance(value, list | dict | set) else id(value)
            for key, value in frame.f_locals.items()
            if not (is_value(value) and value.node.target is iteration)
        }

    before, layers = held(), tracer.num_layers
    for number in (0, 1):
        yield tracer.create_proxy("call_function", iteration, (count, number), {})
        if held() != before or tracer.num_layers != layers:
            raise tracer.untraceable("its loop has an unknown number of iterations")
