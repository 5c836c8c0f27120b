"""Following a forward with proxies that refuse every question whose answer they do not know.

torch.fx's own proxies answer some: they are no tensors, never None, equal by identity, and `x += y`
makes a new one. Here a question that has a few answers (is it a tensor, is its size even) is
answered each way in turn, and any other ends the tracing of the module that asks, even where its
code catches the error. What no proxy can notice (`type(x)`, `x is y`) is found in the byte code.
"""

import contextlib
import copy
import dis
import functools
import inspect
import io
import itertools
import operator
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from repvgg.kinds import kind_of
from repvgg.reading import is_of_torch

VAR_ARGUMENTS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
MAX_WAYS = 16  # through one forward, by its decisions
MAX_DECISIONS = 12  # on one way
_ONE_TENSOR = (  # modules of torch.nn that give one tensor
    *("activation", "batchnorm", "conv", "dropout", "linear", "flatten", "padding", "pooling"),
    *("pixelshuffle", "upsampling", "normalization", "instancenorm", "channelshuffle"),
)
_ASKS = {"isinstance", "issubclass", "__class__", "is_tensor", "is_torch_tensor"}
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
_is_grad_enabled = torch.is_grad_enabled  # not what stands there while a forward is followed
_OF_MODULES = {"training", *vars(nn.Module())}
MAX_TRIES = 8  # other values of one flag
_SIZES = {"size", "dim", "numel", "ndimension", len, getattr}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class UntraceableError(ValueError):
    """A forward asked for something that is only known when it runs."""


class _Unknown:
    """Nothing is known about a value, mostly not its type: who asks cannot be followed."""

    node: Any
    tracer: Any

    @property
    def __class__(self) -> type:
        asker = sys._getframe(1)
        return type(self) if _asked_by_torch(asker) else self.tracer.class_of(self, asker)

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
for _name in ("int", "float", "complex", "contains", "setitem", "delitem"):
    setattr(_Unknown, f"__{_name}__", _refused(f"__{_name}__"))


def _length(self: Any) -> int:
    """Functions of C ask for a length and go on without. Code that may catch the error is not."""
    if sys._getframe(1).f_code.co_exceptiontable:
        raise self.tracer.refuse("it needs a value when it calls __len__")
    raise TypeError("the length of a value is not known")


setattr(_Unknown, "__len__", _length)  # noqa: B010


class Tracer(fx.Tracer):
    """Follows a forward along every way that its decisions may go.

    A decision (`if x.shape[2] % 2:`) is taken both ways, one after the other, in the module that
    takes it. What the ways give is joined by a step `either`, so a fold must hold on all of them. A
    way that ends in an exception of the forward's own gives nothing. A module that cannot be
    followed is taken as one step, and remembered.

    Args:
        steps: modules that are one step each.
        names: what may be taken as one step if it cannot be followed; None is all.
        flags: for some modules, attributes and other values of theirs that are tried too.
        exact: the graph is to be run: decisions and unknown counts end the tracing.
        reads: attributes of the root that the graph is to read when it runs.
        tensors: arguments are tensors.
        assume: a first argument whose other types cannot be followed is assumed to be a tensor.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        steps: Collection[nn.Module],
        names: Collection[nn.Module] | None = None,
        *,
        flags: Mapping[nn.Module, Sequence[tuple[str, Any]]] | None = None,
        exact: bool = False,
        reads: Collection[str] = (),
        tensors: bool = False,
        assume: bool = False,
    ) -> None:
        super().__init__(param_shapes_constant=True)
        self.steps = steps
        self.names = names
        self.flags = flags or {}
        self.exact = exact
        self.reads = reads
        self.tensors = tensors
        self.assume = assume
        self.read_storages: set[int] = set()
        self.opaque: dict[nn.Module, str] = {}
        self.refusals: list[str] = []
        self.changed: dict[nn.Module, str] = {}  # steps, and the attribute that a forward sets
        self.assumed: set[str] = set()  # arguments that are taken for tensors
        self.contexts = False  # whether a step switches gradients or autocast
        self.queries: set[str] = set()  # what a forward asks torch about how it runs
        self.frames: list[_Frame] = []
        self.flipping = False
        self.decided = False
        self.kinds: dict[fx.Node, type] = {}  # what does not depend on a decision
        self.modules: dict[str, nn.Module] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self.modules = dict(root.named_modules(remove_duplicate=False))
        before = set(vars(root))
        with torch.enable_grad():
            self.start = _context()
        try:
            with torch.enable_grad(), _Reads() as reads, _patched(root, self):
                return super().trace(root, concrete_args)
        finally:
            self.read_storages = reads.storages
            for constant in set(vars(root)) - before:
                if constant.startswith("_tensor_constant"):
                    delattr(root, constant)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        code = inspect.unwrap(root_fn).__code__
        if code.co_argcount == 0 and code.co_flags & inspect.CO_VARARGS:  # wrapper(*args, **kwargs)
            args = [self.root, self.create_proxy("placeholder", "x", (), {})]
        else:
            root_fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        root = self.root
        for name in self.reads:
            vars(root)[name] = self.create_proxy("get_attr", name, (), {})
        if self.assume and code.co_argcount > 1 and code.co_flags & VAR_ARGUMENTS:
            args = [self._without_extras(value) for value in args]
        arguments = [value.node for value in args if isinstance(value, fx.Proxy)]
        self.inputs = {node: str(node.target) for node in arguments[:1]} if self.assume else {}

        def run(*given: Any) -> Any:
            results = self._explore(root, lambda: root_fn(*given))
            joined = [self._join(group) for group in self._alike(results)]
            return joined[0] if len(joined) == 1 else joined

        return run, args

    def _without_extras(self, value: Any) -> Any:
        """Follow a network without the arguments that its forward does not name."""
        name = str(value.node.target) if _is_value(value) else ""
        if not name.startswith("*"):
            return value
        self.graph.erase_node(value.node)
        self.assumed.add(name)
        return {} if name.startswith("**") else ()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _context() != self.start:
            self.contexts = True
        return super().create_node(*args, **kwargs)

    def refuse(self, reason: str) -> UntraceableError:
        """The error to raise. It counts even where the network's own code catches it."""
        self.refusals.append(reason)
        return UntraceableError(reason)

    def kind(self, node: fx.Node) -> type | None:
        """The type of what a step gives, if that is known."""
        found = self.kinds.get(node)
        if found is None:
            self.decided = False
            found = kind_of(node, self._kind_of_source)
            if found is not None and not self.decided:
                self.kinds[node] = found
        return found

    def _kind_of_source(self, node: fx.Node) -> type | None:
        for frame in self.frames:
            if node in frame.kinds:
                self.decided = True
                return frame.kinds[node]
        if node.op == "placeholder":
            return Tensor if self.tensors else None
        if node.op != "call_module":
            return None
        module = self.modules[str(node.target)]
        home = type(module).__module__
        plain = home in (f"torch.nn.modules.{name}" for name in _ONE_TENSOR)
        plain = plain and not getattr(module, "return_indices", False)
        if module in self.steps or (plain and not isinstance(module, nn.MultiheadAttention)):
            return Tensor
        return None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.opaque or m in self.steps or is_of_torch(m)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        # torch's proxies of constant shape are for parameters alone.
        self.param_shapes_constant = isinstance(attr_val, nn.Parameter)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self.decide(_meaning(obj.node), "its control flow depends on a value")

    def decide(self, question: Any, reason: str, *, first: bool = False) -> bool:
        """Answer a question of the forward, another way each time that it is run."""
        if self.exact or not self.frames:
            raise self.refuse(reason)
        # An argument of the network is the same everywhere; all else is decided where it is asked.
        about = question[0] if isinstance(question, tuple) else question
        outer = isinstance(about, fx.Node) and about.op == "placeholder"
        frame = self.frames[0 if outer else -1]
        for known in self.frames:
            if question in known.answers:
                return known.answers[question]
        if len(frame.taken) >= MAX_DECISIONS:
            raise self.refuse(reason)
        place = len(frame.taken)
        answer = frame.script[place] if place < len(frame.script) else first
        frame.taken.append((answer, first))
        frame.answers[question] = answer
        return answer

    def is_instance(self, value: Any, classes: Any) -> bool:
        """`isinstance` of a value of the forward."""
        kind = self.kind(value.node)
        if kind is None:
            kind = self._ask_for_tensor(value.node)
        if kind is not _Other:
            return issubclass(kind, classes)
        others = [c for c in _flat(classes) if c is not Tensor and c is not nn.Parameter]
        question = (value.node, tuple(others))
        return bool(others) and self.decide(question, "it depends on the type of an argument")

    def _ask_for_tensor(self, node: fx.Node) -> type:
        question = (node, Tensor)
        reason = "it depends on the type of an argument"
        kind = Tensor if self.decide(question, reason, first=True) else _Other
        self.frames[0 if node.op == "placeholder" else -1].kinds[node] = kind
        return kind

    def exact_class(self, value: Any) -> type:
        """`type` of a value of the forward."""
        kind = self.kind(value.node) or self._ask_for_tensor(value.node)
        if kind is _Other:
            raise self.refuse("it depends on the type of an argument")
        return kind

    def class_of(self, value: Any, asker: types.FrameType) -> type:
        """The class of a value, for code that reads `__class__`, as `isinstance` does."""
        if _ASKS.isdisjoint(asker.f_code.co_names):
            return type(value)  # a function of torch that is written in C
        return self.exact_class(value)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        node = obj.node
        if self.kind(node) is torch.Size and node.target is operator.getitem:
            part = node.args[1]
            if isinstance(part, slice) and part.step is None:
                if part.start is None and isinstance(part.stop, int) and part.stop > 0:
                    return iter([obj[i] for i in range(part.stop)])  # type: ignore[index]
                if part.stop is None and isinstance(part.start, int) and part.start < 0:
                    return iter([obj[i] for i in range(-part.start)])  # type: ignore[index]
        if self.exact:
            raise self.refuse("it iterates over a value")
        return iter([obj[0], obj[1]])  # type: ignore[index]

    def keys(self, obj: fx.Proxy) -> Any:
        raise self.refuse("it asks for the keys of a value")

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if m not in (self.submodule_paths or {}):  # made in a forward: it is part of that
            return forward(*args, **kwargs)
        stack, num_refusals = self.module_stack.copy(), len(self.refusals)
        num_opaque = len(self.opaque)
        inner = inside_wrapper(m)
        if inner is not None:
            forward = inner
        run = forward

        def explored(*args: Any, **kwargs: Any) -> Any:
            kept = tree_map(lambda leaf: leaf, (args, kwargs))  # a way may change its lists
            given = iter([(args, kwargs)])

            def run_anew() -> Any:
                own = next(given, None) or tree_map(lambda leaf: leaf, kept)
                return run(*own[0], **own[1])

            return self._choose(self._explore(m, run_anew))

        try:
            result = super().call_module(m, explored, args, kwargs)
            if not self.is_leaf_module(m, ""):
                given = [value.node for value in tree_leaves((args, kwargs)) if _is_value(value)]
                unknown = any(
                    node.op == "call_module" and self.modules[str(node.target)] in self.opaque
                    for node in given
                )
                if compares_identities(m):
                    self.refuse("it compares the identities of values (is)")
                elif (unknown or len(self.opaque) > num_opaque) and compares_with_none(m):
                    self.refuse("it tests for None what another could not be followed to give")
            if len(self.refusals) == num_refusals:
                return result
            reason = self.refusals[-1]
        except Exception as error:
            reason = in_a_line(error)
            if is_deliberate(error) and len(self.refusals) == num_refusals and self._decided():
                raise  # this way ends here
        # What it did before it failed stays in the graph, as uses that nobody needs: they can
        # only forbid a fusion.
        del self.refusals[num_refusals:]
        self.module_stack = stack
        self.opaque[m] = reason
        return super().call_module(m, forward, args, kwargs)

    def _decided(self) -> bool:
        return any(frame.taken for frame in self.frames)

    def _explore(self, module: nn.Module, run: Callable[[], Any]) -> list[Any]:
        """What a forward gives, along each way that its decisions and flags may go."""
        if self.exact:
            return [run()]
        state = _State(module)
        results = self._follow_ways(run, state)
        if self.flipping or module not in self.flags:
            return results
        after = _State(module)
        self.flipping = True
        for attribute, value in self.flags[module]:
            opaque, num_refusals = dict(self.opaque), len(self.refusals)
            state.restore()
            held = vars(module)
            own = attribute in held
            old = held.get(attribute)
            held[attribute] = value
            stack, frames = self.module_stack.copy(), len(self.frames)
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    others = self._follow_ways(run, _State(module))
                # What another structure would do to the caller, its code is not made for.
                usual = {_structure(result) for result in results}
                results += [result for result in others if _structure(result) in usual]
            except Exception:  # this value does not run, or cannot be followed: its uses count
                self.module_stack = stack
                del self.frames[frames:]
            finally:
                if own:
                    held[attribute] = old
                else:
                    held.pop(attribute, None)
            self.opaque = opaque
            del self.refusals[num_refusals:]
        self.flipping = False
        after.restore()
        return results

    def _follow_ways(self, run: Callable[[], Any], state: "_State") -> list[Any]:
        results: list[Any] = []
        script: list[bool] = []
        ended: Exception | None = None
        after: _State | None = None
        for _ in range(MAX_WAYS):
            frame = _Frame(script)
            self.frames.append(frame)
            depth = len(self.frames)
            stack, num_refusals, opaque = self.module_stack.copy(), len(self.refusals), self.opaque
            self.opaque = dict(opaque)
            try:
                result = run()
                if len(self.refusals) > num_refusals and self._assumes(frame):
                    raise UntraceableError(self.refusals[-1])
                results.append(result)
            except Exception as error:
                self.module_stack = stack
                assumed = self._assumes(frame)
                untraceable = len(self.refusals) > num_refusals or not is_deliberate(error)
                if assumed and untraceable:
                    del self.refusals[num_refusals:]
                    self.opaque = opaque
                    self.assumed |= assumed
                elif untraceable or not frame.taken:
                    raise
                else:
                    ended = error
            finally:
                del self.frames[depth - 1 :]
            taken = frame.taken
            while taken and taken[-1][0] != taken[-1][1]:
                taken.pop()
            if not taken:
                break
            script = [answer for answer, _ in taken]
            script[-1] = not script[-1]
            after = after or _State(state.module)
            state.restore()
        else:
            raise self.refuse("its control flow depends on values in too many ways")
        if after is not None:
            after.restore()
        if not results and ended is not None:
            raise ended
        return results

    def _assumes(self, frame: "_Frame") -> set[str]:
        """Arguments that are no tensors on this way, where that may be ruled out."""
        return {
            self.inputs[node]
            for node, kind in frame.kinds.items()
            if kind is _Other and node in self.inputs
        }

    def _choose(self, results: list[Any]) -> Any:
        """Join what the ways gave, or decide between them where their structures differ."""
        *others, last = self._alike(results)
        for group in others:
            if self.decide(object(), "what a module gives depends on a value", first=True):
                return self._join(group)
        return self._join(last)

    def _alike(self, results: list[Any]) -> list[list[Any]]:
        """Results, by their structure and the constants in it."""
        groups: dict[Any, list[Any]] = {}
        for result in results:
            groups.setdefault(_structure(result), []).append(result)
        return list(groups.values())

    def _join(self, results: list[Any]) -> Any:
        if len(results) == 1:
            return results[0]
        flat = [tree_flatten(result) for result in results]
        joined = []
        for alternatives in zip(*(leaves for leaves, _ in flat), strict=True):
            nodes = [leaf.node for leaf in alternatives if _is_value(leaf)]
            if len(set(nodes)) < 2:
                joined.append(alternatives[0])
            else:
                distinct = [alternatives[nodes.index(node)] for node in dict.fromkeys(nodes)]
                joined.append(self.create_proxy("call_function", either, tuple(distinct), {}))
        return tree_unflatten(joined, flat[0][1])


def either(first: Any, *others: Any) -> Any:
    """One of several values, by a decision of the forward that is not known. Never run."""
    return first


def an_index(count: Any, place: int) -> int:
    """A number below a count that is not known. Never run."""
    return place


class _Other:
    """The class of an argument that is no tensor."""


class _Frame:
    """One run of the forward of one module, with the decisions that it took.

    Attributes:
        script: the answers to give.
        taken: the answers given, and those that are given first.
        answers: to each question, so that one asked twice is answered alike.
        kinds: of values, by decisions.
    """

    def __init__(self, script: list[bool]) -> None:
        self.script = script
        self.taken: list[tuple[bool, bool]] = []
        self.answers: dict[Any, bool] = {}
        self.kinds: dict[fx.Node, type] = {}


class _State:
    """What the modules in a module hold, so that each way begins with the same."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.held = {
            part: with_own_containers(vars(part))
            for part in module.modules()
            if not isinstance(part, torch.jit.ScriptModule)
        }

    def restore(self) -> None:
        for part, held in self.held.items():
            vars(part).clear()
            vars(part).update(with_own_containers(held))


def with_own_containers(held: dict[str, Any]) -> dict[str, Any]:
    """What a module holds; its lists, dictionaries and sets are copies."""
    return {
        key: copy.copy(value) if type(value) in (list, dict, set) else value
        for key, value in held.items()
    }


def _context() -> tuple[Any, ...]:
    """What a forward may switch, which no graph shows."""
    return (
        _is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.get_default_dtype(),
    )


def _meaning(node: fx.Node) -> Any:
    """A question on sizes in a form that is equal for equal questions."""
    sizes = node.op in ("call_function", "call_method") and (
        str(getattr(node.target, "__module__", "")) in ("_operator", "builtins", "math")
        or node.target in _SIZES
    )
    if not sizes:
        return node
    arguments = [
        _meaning(value) if isinstance(value, fx.Node) else repr(value)
        for value in tree_leaves((node.args, node.kwargs))
    ]
    return (node.op, str(node.target), *arguments)


def _flat(classes: Any) -> list[type]:
    if isinstance(classes, tuple | list):
        return [each for part in classes for each in _flat(part)]
    return [each for part in typing.get_args(classes) for each in _flat(part)] or [classes]


def _structure(result: Any) -> tuple[Any, ...]:
    """What a forward gave, but for the values in it."""
    leaves, structure = tree_flatten(result)
    constants = (None if _is_value(leaf) else (type(leaf), _plain(leaf)) for leaf in leaves)
    return (str(structure), *constants)


def _plain(value: object) -> object:
    return value if isinstance(value, bool | int | float | str | None) else id(value)


def is_deliberate(error: BaseException) -> bool:
    """Whether an exception was raised by a statement of the network's own code."""
    trace = error.__traceback__
    if trace is None or isinstance(error, UntraceableError):
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    if isinstance(error, ZeroDivisionError):
        return True
    code, home = trace.tb_frame.f_code, str(trace.tb_frame.f_globals.get("__name__", ""))
    if home.split(".")[0] == "torch" or home == __name__:
        return False
    return code.co_code[trace.tb_lasti] in (dis.opmap["RAISE_VARARGS"], dis.opmap["RERAISE"])


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
def _patched(root: nn.Module, tracer: Tracer) -> Iterator[None]:
    """Let the code of a network ask `isinstance`, `len`, `int` and `range` of values.

    Python answers them without asking the value, or demands a number of it.
    """

    def is_instance(value: Any, classes: Any) -> bool:
        classes = tuple(int if c is whole else c for c in _flat(classes))
        return (
            tracer.is_instance(value, classes) if _is_value(value) else isinstance(value, classes)
        )

    def length(value: Any) -> Any:
        if not _is_value(value):
            return len(value)
        return tracer.create_proxy("call_function", len, (value,), {})

    class whole(metaclass=_IntMeta):  # noqa: N801
        def __new__(cls, value: Any = 0, *rest: Any) -> Any:
            if not _is_value(value):
                return int(value, *rest)
            if tracer.kind(value.node) is int:
                return value
            return tracer.create_proxy("call_function", int, (value,), {})

    def indices(*bounds: Any) -> Any:
        if not any(map(_is_value, bounds)):
            return range(*bounds)
        if tracer.exact:
            raise tracer.refuse("it counts to a value")
        return [tracer.create_proxy("call_function", an_index, (bounds[-1], i), {}) for i in (0, 1)]

    def builder(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def build(*args: Any, **kwargs: Any) -> Any:
            if any(_is_value(leaf) for leaf in tree_leaves((args, kwargs))):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return build

    def query(function: Callable[[], bool]) -> Callable[[], bool]:
        def asked() -> bool:
            if not _asked_by_torch(sys._getframe(1)):
                tracer.queries.add(f"{function.__name__}()")
            return function()

        return asked

    queries = {id(function): query(function) for _, function in _QUERIES}
    originals: dict[str, Any] = {}

    def choose(function: Callable[..., Any]) -> Callable[..., Any]:
        """`max` or `min`, which would compare."""

        def chosen(*args: Any, **kwargs: Any) -> Any:
            if len(args) > 1 and any(map(_is_value, args)):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return chosen

    class kind(metaclass=_TypeMeta):  # noqa: N801
        def __new__(cls, *args: Any) -> Any:
            if len(args) == 1 and _is_value(args[0]):
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


def inside_wrapper(module: nn.Module) -> nn.Module | None:
    """The network inside a wrapper of torch that only decides how it runs."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return module.module
    if type(module).__name__ == "OptimizedModule":
        return module._orig_mod  # type: ignore[return-value]
    return None


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


def _functions_of(cls: type[nn.Module]) -> Iterator[tuple[str, types.FunctionType]]:
    """A forward and what it calls of its class, as they are called."""
    todo, seen = ["forward"], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for base in cls.__mro__:
            function = vars(base).get(name)
            if base is nn.Module or not inspect.isfunction(function):
                continue
            yield name, function
            codes = [inspect.unwrap(function).__code__]
            while codes:
                code = codes.pop()
                todo += code.co_names
                codes += [const for const in code.co_consts if inspect.iscode(const)]


def _instructions(cls: type[nn.Module]) -> Iterator[tuple[str, list[dis.Instruction]]]:
    """The byte code of a forward and of what it calls of its class, and the name of self there."""
    for _, function in _functions_of(cls):
        codes = [inspect.unwrap(function).__code__]
        itself = (*codes[0].co_varnames, "")[0]
        while codes:
            code = codes.pop()
            codes += [const for const in code.co_consts if inspect.iscode(const)]
            yield itself, list(dis.get_instructions(code))


def compares_identities(module: nn.Module) -> bool:
    """Whether a forward asks if two variables are the same object. Proxies cannot refuse that."""
    return _compares_identities(type(module))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def _compares_identities(cls: type[nn.Module]) -> bool:
    for _, instructions in _instructions(cls):
        for first, second in itertools.pairwise(instructions):
            if second.opname == "IS_OP" and first.opname not in ("LOAD_CONST", "LOAD_GLOBAL"):
                return True
    return False


def alternatives(module: nn.Module) -> list[tuple[str, Any]]:
    """Flags of a module that its forward reads, and the other values that they may take.

    A flag is a plain attribute: a truth value, a text that is compared with others, or what chooses
    among modules (`self.bns[self.domain]`). `training` is none: a fused network is for eval mode.
    """
    cls = type(module)
    if cls.__module__.startswith("torch."):
        return []
    code = _code_of(cls)  # type: ignore[arg-type]
    keys: set[Any] = set()
    for part in module.children():
        if isinstance(part, nn.ModuleDict):
            keys |= set(part)
        elif isinstance(part, nn.ModuleList | nn.Sequential):
            keys |= set(range(len(part)))
    found: list[tuple[str, Any]] = []
    for name, value in plain_attributes(module).items():
        others: set[Any] = set()
        if isinstance(value, bool):
            others = {not value}
        elif isinstance(value, str) and name in code.compared:
            others = set(code.texts)
        if not isinstance(value, bool) and name in code.indices:
            others |= {key for key in keys if type(key) is type(value)}
        found += [(name, other) for other in sorted(others) if other != value][:MAX_TRIES]
    return found[: 2 * MAX_TRIES]


def plain_attributes(module: nn.Module) -> dict[str, bool | int | float | str]:
    """Attributes of a module that are texts or numbers, and that its forward names."""
    found = {}
    code = _code_of(type(module))  # type: ignore[arg-type]
    for name in sorted(code.names - _OF_MODULES):
        value = vars(module).get(name, inspect.getattr_static(type(module), name, None))
        if type(value) in (bool, int, float, str):
            found[name] = value
    return found


class _Code(NamedTuple):
    """What the byte code of a forward says of attributes.

    Attributes:
        names: of attributes, also those that stand as texts (`getattr(self, "deploy", False)`).
        texts: short constants.
        compared: attributes that are compared with something.
        indices: attributes by which something is indexed.
    """

    names: frozenset[str]
    texts: frozenset[str]
    compared: frozenset[str]
    indices: frozenset[str]


@functools.lru_cache(maxsize=4096)
def _code_of(cls: type[nn.Module]) -> _Code:
    names: set[str] = set()
    texts: set[str] = set()
    compared: set[str] = set()
    indices: set[str] = set()
    for _, instructions in _instructions(cls):
        last: list[str] = []  # attributes that were loaded since the last comparison
        for instruction in instructions:
            operation, value = instruction.opname, instruction.argval
            if operation in ("LOAD_ATTR", "LOAD_METHOD"):
                names.add(str(value))
                last.append(str(value))
            elif operation == "LOAD_CONST" and isinstance(value, str) and len(value) <= 32:
                names.add(value)
                texts.add(value)
            elif operation in ("COMPARE_OP", "CONTAINS_OP"):
                compared |= set(last)
                last = []
            elif operation == "BINARY_SUBSCR" or (
                operation == "BINARY_OP" and "[" in instruction.argrepr
            ):
                indices |= set(last[-1:])
    return _Code(*map(frozenset, (names, texts, compared, indices)))


def is_decorated(module: nn.Module) -> bool:
    """Whether a forward, or a method that it uses, is wrapped in other code."""
    return not isinstance(module, fx.GraphModule) and any(
        hasattr(function, "__wrapped__")
        or function.__code__.co_name not in (name, "<lambda>", "forward")
        for name, function in _functions_of(type(module))
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


class OnlyFollowed:
    """A hook in front of a forward that raises on arguments for which it was not followed.

    Args:
        assumed: an argument that must be a tensor, by its name; "*args" and "**kwargs" must be
            empty, or False and None.

    Raises:
        ValueError: an argument is something else.
    """

    def __init__(self, assumed: Collection[str]) -> None:
        self.assumed = frozenset(assumed)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        signature = inspect.signature(module.forward)
        bound = signature.bind(*args, **kwargs).arguments
        for name in self.assumed:
            given = bound.get(name.lstrip("*"))
            if name.startswith("*"):
                extras = given if isinstance(given, dict) else dict(enumerate(given or ()))
                for key, value in extras.items():
                    if value is not None and value is not False:
                        raise ValueError(
                            f"{type(module).__name__} was folded for calls without further "
                            f"arguments and was given {key}={type(value).__name__}: leave it "
                            "out, or use the network as it was before fuse_conv_bn"
                        )
            elif not isinstance(given, Tensor | fx.Proxy):
                raise ValueError(
                    f"{type(module).__name__} was folded for a tensor as {name} and was given a "
                    f"{type(given).__name__}: pass a tensor, or use the network as it was before "
                    "fuse_conv_bn"
                )


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to a module's calls, or changes what goes in or comes out."""
    return any(
        not isinstance(hook, OnlyFollowed)
        for key in _HOOKS
        for hook in getattr(module, key).values()
    )


def in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text if isinstance(error, UntraceableError) else f"{type(error).__name__}: {text}")[
        :200
    ]
