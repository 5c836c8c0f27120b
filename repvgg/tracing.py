"""Following a forward with proxies that refuse every question whose answer they do not know.

torch.fx's own proxies answer some: they are no tensors, never None, equal by identity, and `x += y`
makes a new one. Here such questions end the tracing of the module that asks, even where its code
catches the error. What no proxy can notice (`type(x)`, `x is y`) is found in the byte code.
"""

import dis
import functools
import inspect
import itertools
import operator
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from repvgg.reading import is_of_torch

_ONE_TENSOR = ("activation", "batchnorm", "conv", "dropout", "linear")  # modules of torch.nn
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class UntraceableError(ValueError):
    """A forward asked for something that is only known when it runs."""


class _Unknown:
    """Nothing is known about a value, mostly not its type: who asks cannot be followed."""

    node: Any
    tracer: Any

    @property
    def __class__(self) -> type:
        if _asked_by_torch(sys._getframe(1)):
            return type(self)
        if self.tracer.is_tensor(self.node):
            return torch.Tensor
        raise self.tracer.refuse("it asks for the type of a value")

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
        return _Attribute(self, name)  # type: ignore[arg-type]

    def __hash__(self) -> int:
        if _asked_by_torch(sys._getframe(1)):
            return object.__hash__(self)
        raise self.tracer.refuse("it looks a value up")

    def __repr__(self) -> str:
        return _Text(object.__getattribute__(self, "tracer"))

    __str__ = __repr__

    def __format__(self, _: str) -> str:
        return _Text(self.tracer)


class _Text(str):
    """A value in words: good for messages, not for decisions."""

    tracer: "Tracer"

    def __new__(cls, tracer: "Tracer") -> "_Text":
        text = super().__new__(cls, "(a value)")
        text.tracer = tracer
        return text

    def __eq__(self, other: object) -> bool:
        raise self.tracer.refuse("it compares a value as text")

    def __hash__(self) -> int:
        raise self.tracer.refuse("it compares a value as text")

    __ne__ = __eq__
    __contains__ = __eq__


def _asked_by_torch(frame: Any) -> bool:
    """Whether a question comes from inside torch, which knows its proxies."""
    home = frame.f_globals.get("__name__", "")
    return home.split(".")[0] == "torch" and frame.f_code.co_name != "is_tensor"


class _Value(_Unknown, fx.Proxy):
    pass


class _Attribute(_Unknown, fx.proxy.Attribute):
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
for _name in ("len", "int", "float", "complex", "index", "contains", "setitem", "delitem"):
    setattr(_Unknown, f"__{_name}__", _refused(f"__{_name}__"))


class Tracer(fx.Tracer):
    """Takes a module that cannot be followed as one step, and remembers it."""

    proxy_buffer_attributes = True

    def __init__(
        self, steps: Collection[nn.Module], names: Collection[nn.Module] | None = None
    ) -> None:
        super().__init__(param_shapes_constant=True)
        self.steps = steps
        self.names = names  # what may be taken as one step if it cannot be followed; None is all
        self.read_storages: set[int] = set()
        self.opaque: dict[nn.Module, str] = {}
        self.refusals: list[str] = []

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        before = set(vars(root))
        try:
            with _Reads() as reads:
                return super().trace(root, concrete_args)
        finally:
            self.read_storages = reads.storages
            for constant in set(vars(root)) - before:
                if constant.startswith("_tensor_constant"):
                    delattr(root, constant)

    def refuse(self, reason: str) -> UntraceableError:
        """The error to raise. It counts even where the network's own code catches it."""
        self.refusals.append(reason)
        return UntraceableError(reason)

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether a step is sure to give one tensor."""
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            home = type(module).__module__
            plain = home in (f"torch.nn.modules.{name}" for name in _ONE_TENSOR)
            return module in self.steps or (plain and not isinstance(module, nn.MultiheadAttention))
        adds = node.op == "call_function" and node.target in (operator.add, operator.mul)
        return adds and any(self.is_tensor(given) for given in node.all_input_nodes)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.opaque or m in self.steps or is_of_torch(m)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        # torch's proxies of constant shape are for parameters alone.
        self.param_shapes_constant = isinstance(attr_val, nn.Parameter)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise self.refuse("its control flow depends on a value")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        raise self.refuse("it iterates over a value")

    def keys(self, obj: fx.Proxy) -> Any:
        raise self.refuse("it asks for the keys of a value")

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        stack, num_refusals = self.module_stack.copy(), len(self.refusals)
        num_opaque = len(self.opaque)
        try:
            result = super().call_module(m, forward, args, kwargs)
            if not self.is_leaf_module(m, ""):
                given = [value.node for value in tree_leaves((args, kwargs)) if _is_value(value)]
                unknown = any(
                    node.op == "call_module"
                    and self.root.get_submodule(str(node.target)) in self.opaque
                    for node in given
                )
                if asks_for_types(m):
                    self.refuse("it asks for the type of a value")
                elif (unknown or len(self.opaque) > num_opaque) and compares_with_none(m):
                    self.refuse("it tests for None what another could not be followed to give")
            if len(self.refusals) == num_refusals:
                return result
            reason = self.refusals[-1]
        except Exception as error:
            reason = in_a_line(error)
            if self.names is not None and m not in self.names:
                raise  # nobody knows it by name
        # What it did before it failed stays in the graph, as uses that nobody needs: they can
        # only forbid a fusion.
        del self.refusals[num_refusals:]
        self.module_stack = stack
        self.opaque[m] = reason
        return super().call_module(m, forward, args, kwargs)


class _Reads(TorchDispatchMode):
    """Notes which tensors a forward computes with while it is followed; proxies compute nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for value in tree_leaves((args, kwargs or {})):
            if type(value) in (Tensor, nn.Parameter):
                self.storages.add(storage_of(value))
        return func(*args, **(kwargs or {}))


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_value(value: object) -> bool:
    return type(value) in (_Value, _Attribute)


def _instructions(cls: type[nn.Module]) -> Iterator[tuple[str, list[dis.Instruction]]]:
    """The byte code of a forward and of what it calls of its class, and the name of self there."""
    todo, seen = ["forward"], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for base in cls.__mro__:
            function = inspect.unwrap(vars(base).get(name))  # type: ignore[arg-type]
            if base is nn.Module or not inspect.isfunction(function):
                continue
            codes = [function.__code__]
            itself = (*codes[0].co_varnames, "")[0]
            while codes:
                code = codes.pop()
                todo += code.co_names
                codes += [const for const in code.co_consts if inspect.iscode(const)]
                yield itself, list(dis.get_instructions(code))


def asks_for_types(module: nn.Module) -> bool:
    """Whether a forward calls `type` on something, or compares identities.

    Proxies cannot refuse that.
    """
    return _asks_for_types(type(module))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def _asks_for_types(cls: type[nn.Module]) -> bool:
    for itself, instructions in _instructions(cls):
        for first, second in itertools.pairwise(instructions):
            if first.opname == "LOAD_GLOBAL" and first.argval == "type":
                if second.argval != itself:
                    return True
            elif second.opname == "IS_OP" and first.opname != "LOAD_CONST":
                return True
    return False


def mentions(module: nn.Module, name: str) -> bool:
    """Whether a forward, or what it calls of its class, mentions a name."""
    return any(
        instruction.argval == name
        for _, instructions in _instructions(type(module))
        for instruction in instructions
    )


def compares_with_none(module: nn.Module) -> bool:
    """Whether a forward compares a variable with None: a proxy never is, a value may be."""
    return _compares_with_none(type(module))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def _compares_with_none(cls: type[nn.Module]) -> bool:
    for _, instructions in _instructions(cls):
        for i, instruction in enumerate(instructions):
            operand = i - 1 if instruction.opname.endswith("NONE") else i - 2
            asks = instruction.opname == "IS_OP" or (
                "JUMP" in instruction.opname and instruction.opname.endswith("NONE")
            )
            if asks and instructions[operand].opname.startswith("LOAD_FAST"):
                return True
    return False


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to a module's calls, or changes what goes in or comes out."""
    return any(getattr(module, key) for key in _HOOKS)


def in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text if isinstance(error, UntraceableError) else f"{type(error).__name__}: {text}")[
        :200
    ]
