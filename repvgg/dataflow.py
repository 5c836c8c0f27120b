"""Which module feeds which: the graph of a network's forward, and what cannot be known of it.

`trace` follows the forward with torch.fx. A module whose forward cannot be followed (its control
flow depends on values, say) becomes one opaque step for its parent, and its code is read instead:
a child that it does nothing with but call is followed by itself, with inputs unknown; all else that
the code may reach is marked as such. Nothing is ever concluded from the order of children.
"""

import copy
import dis
import inspect
import itertools
import operator
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from repvgg.reading import is_of_torch, read

MAX_VARIANTS = 16  # ways to call one forward that are followed, by its optional arguments
_ONE_TENSOR = ("activation", "batchnorm", "conv", "dropout", "linear")  # modules of torch.nn
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
METADATA = {"shape", "ndim", "dtype", "device", "size", "dim", "numel", "is_cuda", "requires_grad"}


@dataclass
class Dataflow:
    """What was found out about a network. Modules are known by their first names in it.

    Attributes:
        graphs: what was followed, the network itself or the parts of it that could be, and the
            names of those.
        calls: the steps at which a module is called, in all graphs.
        reached: modules that may be used in ways no graph shows, or whose tensors are read from
            outside, and by what.
        untraced: modules whose forward could not be followed, and why.
        inspected: modules of which such a forward reads attributes, or that it may do anything to.
        callers: for each step, the modules in whose forward it stands, innermost last, and a key
            that tells one call of such a module from the next.
    """

    graphs: dict[fx.Graph, str] = field(default_factory=dict)
    calls: dict[str, list[fx.Node]] = field(default_factory=dict)
    reached: dict[str, str] = field(default_factory=dict)
    untraced: dict[str, str] = field(default_factory=dict)
    inspected: set[str] = field(default_factory=set)
    callers: dict[fx.Node, dict[str, str]] = field(default_factory=dict)
    _names: dict[fx.Node, str] = field(default_factory=dict)

    def called(self, node: Any) -> str | None:
        """The module that a step calls."""
        return self._names.get(node)


def shared_copy(model: nn.Module) -> nn.Module:
    """Copy a network but for its weights, which both then hold.

    Raises:
        ValueError: it holds something that cannot be copied.
    """
    memo: dict[int, Any] = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    return copied(model, memo)


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy a network. Tensors that an earlier forward left in it are detached.

    Raises:
        ValueError: it holds something that cannot be copied.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in tree_leaves([v for k, v in vars(module).items() if k != "_parameters"]):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{type(model).__name__} cannot be copied: {error}") from error


def trace(model: nn.Module, is_step: Callable[[nn.Module], bool]) -> Dataflow:
    """Follow a network in its present mode. It is not changed.

    Args:
        model: of any kind.
        is_step: whether a module is to be taken as one step, as torch's own are.
    """
    # Following a forward runs its code, which may keep what it sees: that happens to a copy.
    names = dict(model.named_modules())
    model = shared_copy(model)
    following = _Following(
        names={module: name for name, module in model.named_modules()},
        steps={model.get_submodule(name) for name, module in names.items() if is_step(module)},
    )
    done: set[nn.Module] = set()
    scopes = [(model, "")]
    with torch.random.fork_rng(devices=[]):
        while scopes:
            scope, caller = scopes.pop()
            if scope not in done:
                done.add(scope)
                scopes += following.look_into(scope, caller)
            if not scopes:
                # What this forward leaves alone somebody may still call.
                idle = following.uncalled(model, done)
                scopes += [(module, "nothing calls it but the user") for module in idle]
    return following.flow


class _Following:
    """Follows the parts of one network and writes down what it finds."""

    def __init__(self, names: dict[nn.Module, str], steps: set[nn.Module]) -> None:
        self.names = names
        self.steps = steps
        self.flow = Dataflow()
        self.holders: dict[int, list[nn.Module]] = {}  # of tensors, by storage: they may be tied
        self.storages: dict[tuple[nn.Module, str], int] = {}
        for module in names:
            for key, tensor in own_tensors(module).items():
                self.storages[module, key] = _storage(tensor)
                self.holders.setdefault(_storage(tensor), []).append(module)

    def look_into(self, scope: nn.Module, caller: str) -> list[tuple[nn.Module, str]]:
        """Follow one module; what else is to be followed then, and who calls it."""
        if scope in self.steps or is_of_torch(scope):
            if _has_forward(scope):
                self._reach(scope.modules(), caller or "the network is this module alone")
            return []
        if has_hooks(scope):
            self._reach(scope.modules(), "hooks on what holds it may use it")
        found: list[tuple[nn.Module, str]] = []
        for module, reason in self._follow(scope).items():
            name = self.names[module]
            self.flow.untraced[name] = reason
            by = f"{name or type(module).__name__}, which could not be followed ({reason}), uses it"
            reading = read(module)
            found += [(child, by) for child in reading.called if child in self.names]
            inside = [inner for child in reading.escaped for inner in child.modules()]
            self._reach(inside, by)
            inside += reading.inspected
            self.flow.inspected |= {self.names[m] for m in inside if m in self.names}
            # What a BatchNorm or convolution says of itself changes when it is folded.
            self._reach([m for m in reading.inspected if m in self.steps], by)
        return found

    def uncalled(self, model: nn.Module, done: set[nn.Module]) -> list[nn.Module]:
        """The outermost modules below which nothing is called or reached, the untraced apart."""
        busy = {"", *self.flow.untraced}
        known = [*self.flow.calls, *self.flow.reached, *(self.names[module] for module in done)]
        for name in known:
            parts = name.split(".")
            busy |= {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
        found: list[nn.Module] = []
        todo = list(model.children())
        while todo:
            module = todo.pop()
            if self.names[module] not in busy and _has_forward(module):
                found.append(module)
            elif module not in done or self.names[module] in busy:
                todo += [child for child in module.children() if child not in done]
        return found

    def _follow(self, scope: nn.Module) -> dict[nn.Module, str]:
        """Add the graphs of one module, called with unknown inputs; what was opaque, and why."""
        opaque: dict[nn.Module, str] = {}
        try:
            variants = _variants(scope)
        except (UntraceableError, ValueError, TypeError) as error:
            return {scope: in_a_line(error)}
        for fixed, may_fail in variants:
            tracer = Tracer(self.steps, self.names)
            try:
                graph = tracer.trace(scope, fixed)
            except Exception as error:
                opaque |= tracer.opaque
                if may_fail:
                    continue
                return opaque | {scope: in_a_line(error)}
            opaque |= tracer.opaque
            if tracer.opaque and _tests_for_none(scope):
                tracer.refuse("it tests for None what another could not be followed to give")
            if tracer.refusals:
                return opaque | {scope: tracer.refusals[-1]}
            for storage in tracer.read_storages:
                self._reach(self.holders.get(storage, []), "its weights are read")
            self._add(graph, scope)
        return opaque

    def _add(self, graph: fx.Graph, scope: nn.Module) -> None:
        flow = self.flow
        flow.graphs[graph] = self.names[scope]
        for node in list(graph.nodes):
            stack = {"": ("", type(scope))} | node.meta.get("nn_module_stack", {})
            flow.callers[node] = {
                self.names[scope.get_submodule(path)]: key for key, (path, _) in stack.items()
            }
            if node.op == "call_module":
                module = scope.get_submodule(node.target)
                if erase_if_transparent(node, module):
                    continue
                flow.calls.setdefault(self.names[module], []).append(node)
                flow._names[node] = self.names[module]
                if module not in self.steps and is_of_torch(module):  # may use what it holds
                    inside = [inner for inner in module.modules() if inner is not module]
                    self._reach(inside, f"{self.names[module]} may use it")
            elif node.op == "get_attr":
                path, _, key = node.target.rpartition(".")
                owner = scope.get_submodule(path)
                flow._names[node] = f"{self.names[owner]}.{key}"
                holders = self.holders.get(self.storages.get((owner, key), 0), [])
                self._reach(holders, f"its {key} is read")

    def _reach(self, modules: Iterable[nn.Module], reason: str) -> None:
        for module in modules:
            if module in self.names:
                self.flow.reached.setdefault(self.names[module], reason)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module, those of its children apart."""
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))


def erase_if_transparent(node: fx.Node, module: nn.Module) -> bool:
    """Take the call of an identity out of its graph; whether it was one."""
    passes = type(module) is nn.Identity or getattr(type(module), "transparent", False)
    if not passes or has_hooks(module) or node.kwargs or len(node.args) != 1:
        return False
    if not isinstance(node.args[0], fx.Node):
        return False
    node.replace_all_uses_with(node.args[0])
    node.graph.erase_node(node)
    return True


def describe(
    nodes: Iterable[fx.Node], flow: Dataflow, *, but: Collection[fx.Node] = ()
) -> list[tuple[Any, ...]]:
    """Steps in a form that can be compared with those of another graph.

    Values from outside are "given", tensors of the network go by their names.

    Args:
        but: steps that give what they are given, which do not count.
    """
    places: dict[fx.Node, Any] = {}

    def refer(node: fx.Node) -> Any:
        return places.get(node, "given")

    steps: list[tuple[Any, ...]] = []
    for node in nodes:
        if node.op == "get_attr":
            places[node] = flow.called(node)
            continue
        if node in but:
            places[node] = refer(node.all_input_nodes[0])
            continue
        places[node] = len(steps)
        arguments = fx.map_arg((node.args, node.kwargs), refer)
        steps.append((node.op, flow.called(node) or node.target, arguments))
    return steps


def equal(first: Dataflow, second: Dataflow, *, apart_from: Collection[str] = ()) -> bool:
    """Whether two networks run the same steps on the same values.

    Args:
        apart_from: modules whose inside does not count.
    """
    inside = tuple(f"{name}." if name else "" for name in apart_from)

    def counts(name: str) -> bool:
        return not (inside and name.startswith(inside))

    graphs: list[dict[str, list[Any]]] = [{}, {}]
    for flow, found in zip((first, second), graphs, strict=True):
        for graph, name in flow.graphs.items():
            if counts(name):
                found.setdefault(name, []).append(describe(graph.nodes, flow))
    untraced = [set(filter(counts, flow.untraced)) for flow in (first, second)]
    return untraced[0] == untraced[1] and graphs[0] == graphs[1]


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
                if _asks_for_types(m):
                    self.refuse("it asks for the type of a value")
                elif (unknown or len(self.opaque) > num_opaque) and _tests_for_none(m):
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
                self.storages.add(_storage(value))
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_value(value: object) -> bool:
    return type(value) in (_Value, _Attribute)


def _variants(scope: nn.Module) -> list[tuple[dict[str, Any], bool]]:
    """Ways to call a forward, and whether each may fail.

    Every optional argument is as it is by default, and otherwise; every other one but the first
    may be None.
    """
    if "forward" in vars(scope):
        raise UntraceableError("its forward was replaced by hand")
    if type(scope).__call__ is not nn.Module.__call__:
        raise UntraceableError("it has a __call__ of its own")
    if _asks_for_types(scope):
        raise UntraceableError("it asks for the type of a value")
    parameters = [
        parameter
        for parameter in inspect.signature(scope.forward).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    fixed: dict[str, list[Any]] = {}
    for place, parameter in enumerate(parameters):
        if isinstance(parameter.default, bool):
            fixed[parameter.name] = [True, False]
        elif parameter.default is not parameter.empty:
            fixed[parameter.name] = [parameter.default, fx.PH]
        elif place > 0:
            fixed[parameter.name] = [fx.PH, None]
    if 2 ** len(fixed) > MAX_VARIANTS:
        raise UntraceableError(f"it has {len(fixed)} arguments that may be None or otherwise")
    required = {p.name for p in parameters if p.default is p.empty}
    variants = []
    for values in itertools.product(*fixed.values()):
        chosen = {k: v for k, v in zip(fixed, values, strict=True) if v is not fx.PH}
        may_fail = any(value is None and key in required for key, value in chosen.items())
        variants.append((chosen, may_fail))
    return variants


def _instructions(module: nn.Module) -> Iterator[tuple[str, list[dis.Instruction]]]:
    """The byte code of a forward and of what it calls of its class, and the name of self there."""
    todo, seen = ["forward"], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for cls in type(module).__mro__:
            function = inspect.unwrap(vars(cls).get(name))  # type: ignore[arg-type]
            if cls is nn.Module or not inspect.isfunction(function):
                continue
            codes = [function.__code__]
            itself = (*codes[0].co_varnames, "")[0]
            while codes:
                code = codes.pop()
                todo += code.co_names
                codes += [const for const in code.co_consts if inspect.iscode(const)]
                yield itself, list(dis.get_instructions(code))


def _asks_for_types(module: nn.Module) -> bool:
    """Whether it calls `type` on something, or compares identities: proxies cannot refuse that."""
    for itself, instructions in _instructions(module):
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
        for _, instructions in _instructions(module)
        for instruction in instructions
    )


def _tests_for_none(module: nn.Module) -> bool:
    """Whether it compares a variable with None: a proxy never is, what it stands for may be."""
    for _, instructions in _instructions(module):
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


def is_metadata(node: fx.Node) -> bool:
    """Whether a step asks a tensor for its shape or kind, not for its values."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in METADATA
    return node.op == "call_method" and node.target in METADATA


def uses(node: fx.Node) -> list[fx.Node]:
    """The steps that need the values of this one."""
    return [user for user in node.users if not is_metadata(user)]


def _has_forward(module: nn.Module) -> bool:
    return getattr(type(module), "forward", None) is not nn.Module.forward


def in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text if isinstance(error, UntraceableError) else f"{type(error).__name__}: {text}")[
        :200
    ]
