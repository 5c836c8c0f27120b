"""Following a forward along every way that it may take.

A question that has a few answers (is it a tensor, is its size even) is answered each way in turn.
Any other ends the tracing of the module that asks, even where its code catches the error.
"""

import contextlib
import copy
import dis
import inspect
import io
import itertools
import operator
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from repvgg.fusion.bytecode import compares_identities, compares_with_none
from repvgg.fusion.flags import TRACKED, Values, setting, tracked, value_of
from repvgg.fusion.kinds import kind_of
from repvgg.fusion.patching import OWN, flat, genuine, patched
from repvgg.fusion.proxies import UntraceableError, Value, is_value
from repvgg.fusion.source import is_of_torch

VAR_ARGUMENTS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
MAX_WAYS = 16  # through one forward, by its decisions
MAX_DECISIONS = 12  # on one way
_ONE_TENSOR = (  # modules of torch.nn that give one tensor
    *("activation", "batchnorm", "conv", "dropout", "linear", "flatten", "padding", "pooling"),
    *("pixelshuffle", "upsampling", "normalization", "instancenorm", "channelshuffle"),
)
_ASKS = {"isinstance", "issubclass", "__class__", "is_tensor", "is_torch_tensor"}
_is_grad_enabled = torch.is_grad_enabled  # not what stands there while a forward is followed
_METADATA = (int, float, bool, torch.Size, torch.dtype, torch.device)


class Tracer(fx.Tracer):
    """Follows a forward along every way that its decisions may go.

    A decision (`if x.shape[2] % 2:`) is taken both ways, one after the other, in the module that
    takes it. What the ways give is joined by a step `either`, so a fold must hold on all of them. A
    way that ends in an exception of the forward's own gives nothing. A module that cannot be
    followed is taken as one step, and remembered.

    Args:
        steps: modules that are one step each.
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
        *,
        flags: Mapping[nn.Module, Sequence[Values]] | None = None,
        exact: bool = False,
        reads: Collection[str] = (),
        tensors: bool = False,
        assume: bool = False,
    ) -> None:
        super().__init__(param_shapes_constant=True)
        self.steps = steps
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
        self.numbers = itertools.count()
        self.leaves_traces = False  # whether a forward changes something outside of the network
        self.switches: set[str] = set()  # arguments that are true or false
        self.num_layers = 0  # calls of layers so far
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
            quiet = contextlib.redirect_stdout(io.StringIO())
            with quiet, torch.enable_grad(), _Reads() as reads, patched(root, self):
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
        parameters = inspect.signature(inspect.unwrap(root_fn)).parameters.values()
        open_ended = code.co_flags & VAR_ARGUMENTS and code.co_argcount > 1
        decorated = code is not root_fn.__code__ and (open_ended or code.co_kwonlyargcount)
        self.switches = {p.name for p in parameters if isinstance(p.default, bool)}
        if code.co_argcount == 0 and code.co_flags & inspect.CO_VARARGS:  # wrapper(*args, **kwargs)
            args = [self.root, self.create_proxy("placeholder", "x", (), {})]
        elif decorated or (open_ended and self.assume):
            root_fn, args = self._named_arguments(root_fn, list(parameters)[is_module:])
        else:
            root_fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        root = self.root
        for name in self.reads:
            vars(root)[name] = self.create_proxy("get_attr", name, (), {})
        arguments = [value.node for value in args if isinstance(value, fx.Proxy)]
        first = arguments[:1] if self.assume else []
        self.inputs = {node: str(node.target) for node in first}

        def run(*given: Any) -> Any:
            results = self._explore(root, lambda: root_fn(*given))
            joined = [self._join(group) for group in self._alike(results)]
            return joined[0] if len(joined) == 1 else joined

        return run, args

    def _named_arguments(
        self, root_fn: Callable[..., Any], parameters: list[inspect.Parameter]
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Follow a network without the arguments that its forward does not name.

        fx puts placeholders for those into the code of the outermost function, which is a
        decorator's where a forward is decorated. Arguments that have a default are given by name.
        """
        args: list[Any] = [self.root]
        keys: list[str] = []
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                if not self.assume:
                    raise self.refuse("it takes any arguments (*args, **kwargs)")
                stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
                self.assumed.add(stars + parameter.name)
                continue
            default = () if parameter.default is parameter.empty else (parameter.default,)
            args.append(self.create_proxy("placeholder", parameter.name, default, {}))
            if default or parameter.kind is parameter.KEYWORD_ONLY:
                keys.append(parameter.name)

        def called(*given: Any) -> Any:
            num_positional = len(given) - len(keys)
            named = dict(zip(keys, given[num_positional:], strict=True))
            return root_fn(*given[:num_positional], **named)

        return called, args

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _context() != self.start:
            self.contexts = True
        node = super().create_node(*args, **kwargs)
        self.num_layers += node.op == "call_module"
        node.meta["way"] = tuple((frame.call, frame.number) for frame in self.frames)
        return node

    def create_arg(self, a: Any) -> Any:
        return super().create_arg(genuine(a))

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
            if str(node.target) in self.switches:
                return bool
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
        return Value(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        # torch's proxies of constant shape are for parameters alone.
        self.param_shapes_constant = isinstance(attr_val, nn.Parameter)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self.decide(self._meaning(obj.node), "its control flow depends on a value")

    def _meaning(self, node: fx.Node) -> Any:
        """A question on sizes in a form that is equal for equal questions."""
        if node.op == "placeholder" or self.kind(node) not in _METADATA:
            return node
        arguments = [
            self._meaning(value) if isinstance(value, fx.Node) else repr(value)
            for value in tree_leaves((node.args, node.kwargs))
        ]
        return (node.op, str(node.target), *arguments)

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
        others = [c for c in flat(classes) if c is not Tensor and c is not nn.Parameter]
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
        number = self._num_parts(node)
        if number is not None:
            return iter([obj[i] for i in range(number)])  # type: ignore[index]
        raise self.refuse("it iterates over a value")

    def _num_parts(self, node: fx.Node) -> int | None:
        """Into how many parts a tensor is split, where the forward says so."""
        name = str(getattr(node.target, "__name__", node.target))
        if name not in ("chunk", "split", "split_with_sizes", "tensor_split"):
            return None
        parts = node.args[1] if len(node.args) > 1 else None
        if isinstance(parts, list | tuple):
            return len(parts) + (name == "tensor_split")
        return parts if name in ("chunk", "tensor_split") and isinstance(parts, int) else None

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
                given = [value.node for value in tree_leaves((args, kwargs)) if is_value(value)]
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
        call = next(self.numbers)
        results = self._follow_ways(run, state, call)
        if self.flipping or module not in self.flags:
            return results
        after = _State(module)
        self.flipping = True
        for values in self.flags[module]:
            opaque, num_refusals = dict(self.opaque), len(self.refusals)
            state.restore()
            stack, frames = self.module_stack.copy(), len(self.frames)
            try:
                with contextlib.ExitStack() as stack_of_values:
                    for path, value in values:
                        if value is TRACKED:
                            value = tracked(value_of(module, path), path, self)
                        stack_of_values.enter_context(setting(module, path, value))
                    others = self._follow_ways(run, _State(module), call)
                # What another structure would do to the caller, its code is not made for.
                usual = {_structure(result) for result in results}
                results += [result for result in others if _structure(result) in usual]
                for result in others:
                    leaves = [leaf for leaf in tree_leaves(result) if is_value(leaf)]
                    if _structure(result) not in usual and leaves:
                        self.create_proxy("call_function", elsewhere, tuple(leaves), {})
            except Exception:  # this value does not run, or cannot be followed: its uses count
                self.module_stack = stack
                del self.frames[frames:]
            self.opaque = opaque
            del self.refusals[num_refusals:]
        self.flipping = False
        after.restore()
        return results

    def _follow_ways(self, run: Callable[[], Any], state: "_State", call: int) -> list[Any]:
        results: list[Any] = []
        script: list[bool] = []
        ended: Exception | None = None
        after: _State | None = None
        for _ in range(MAX_WAYS):
            frame = _Frame(script, call, next(self.numbers))
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
            nodes = [leaf.node for leaf in alternatives if is_value(leaf)]
            if len(set(nodes)) < 2:
                joined.append(alternatives[0])
            else:
                distinct = [alternatives[nodes.index(node)] for node in dict.fromkeys(nodes)]
                joined.append(self.create_proxy("call_function", either, tuple(distinct), {}))
        return tree_unflatten(joined, flat[0][1])


def exclude_each_other(first: fx.Node, second: fx.Node) -> bool:
    """Whether two steps stand on different ways of one call, so that only one of them runs."""
    ways = zip(first.meta.get("way", ()), second.meta.get("way", ()), strict=False)
    differing = next((pair for pair in ways if pair[0] != pair[1]), None)
    return differing is not None and differing[0][0] == differing[1][0]


def elsewhere(*values: Any) -> None:
    """What a forward gives instead when a flag is set. Never run."""


def either(first: Any, *others: Any) -> Any:
    """One of several values, by a decision of the forward that is not known. Never run."""
    return first


class _Other:
    """The class of an argument that is no tensor."""


class _Frame:
    """One run of the forward of one module, with the decisions that it took.

    Attributes:
        script: the answers to give.
        call: the call of the forward that it is one way of, by a number.
        number: its own.
        taken: the answers given, and those that are given first.
        answers: to each question, so that one asked twice is answered alike.
        kinds: of values, by decisions.
    """

    def __init__(self, script: list[bool], call: int, number: int) -> None:
        self.script = script
        self.call = call
        self.number = number
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


def _structure(result: Any) -> tuple[Any, ...]:
    """What a forward gave, but for the values in it."""
    leaves, structure = tree_flatten(result)
    constants = (None if is_value(leaf) else (type(leaf), _plain(leaf)) for leaf in leaves)
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
    if isinstance(error, ZeroDivisionError) or "out of bounds for dimension" in str(error):
        return True  # of numbers and tensors that are no proxies
    code, home = trace.tb_frame.f_code, str(trace.tb_frame.f_globals.get("__name__", ""))
    if home.split(".")[0] == "torch" or home in OWN:
        return False
    return code.co_code[trace.tb_lasti] in (dis.opmap["RAISE_VARARGS"], dis.opmap["RERAISE"])


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


def in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text if isinstance(error, UntraceableError) else f"{type(error).__name__}: {text}")[
        :200
    ]
