"""The dataflow of a network: which module feeds which, and what cannot be known.

`trace` traces the forward with torch.fx, along every path that its decisions may take. A forward
that converts a value to a Python number, say, cannot be traced. Its module becomes one opaque node
for its parent, and its source is read instead (`repvgg.fusion.source`). A child that it only calls
is traced separately, with unknown inputs. Everything else that the code may use is marked so. The
order of children never matters.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import PH
from torch.nn.modules.dropout import _DropoutNd

from repvgg.fusion.attributes import stored
from repvgg.fusion.bytecode import compares_identities, compares_with_none, names_argument
from repvgg.fusion.copying import copied, inside_wrapper
from repvgg.fusion.errors import UntraceableError, in_a_line, is_deliberate
from repvgg.fusion.flags import Values
from repvgg.fusion.hooks import has_hooks
from repvgg.fusion.paths import with_own_containers
from repvgg.fusion.source import is_of_torch, read_forward
from repvgg.fusion.tracer import Tracer, storage_of

MAX_NODES = 1500  # in larger graphs optional arguments are tried one at a time, and all at once
MAX_VARIANTS = 32  # combinations of optional arguments of one forward
METADATA = {"shape", "ndim", "dtype", "device", "size", "dim", "numel", "is_cuda", "requires_grad"}
CanonicalNodes = list[tuple[object, ...]]  # in a form that can be compared
Flags = Mapping[str, Sequence[Values]]  # of modules: attributes, and other values to try


@dataclass
class Dataflow:
    """What is known about a network. Modules are identified by their first names in it.

    Attributes:
        graphs: the traced graphs, of the network or of parts of it, and the names of those.
        calls: the nodes that call a module, in all graphs.
        reached: modules that may be used in ways that no graph shows, or whose tensors other
            modules read, and the reason.
        untraced: modules whose forward could not be traced, and why.
        inspected: modules whose attributes such a forward reads, or that it may use in any way.
        callers: for each node, the modules in whose forward it stands, innermost last. A key
            distinguishes the calls of one module.
        assumed: arguments of the network that must be tensors, because the forward could not be
            traced for others.
        checked: nodes whose value a module checks that has no node (`Transparent`).
        names: for each node that calls a module or reads a tensor, the name of that.
    """

    graphs: dict[fx.Graph, str] = field(default_factory=dict)
    calls: dict[str, list[fx.Node]] = field(default_factory=dict)
    reached: dict[str, str] = field(default_factory=dict)
    untraced: dict[str, str] = field(default_factory=dict)
    inspected: set[str] = field(default_factory=set)
    callers: dict[fx.Node, dict[str, str]] = field(default_factory=dict)
    assumed: set[str] = field(default_factory=set)
    checked: set[fx.Node] = field(default_factory=set)
    names: dict[fx.Node, str] = field(default_factory=dict)

    def called(self, node: fx.Node) -> str | None:
        """The name of the module or tensor of a node."""
        return self.names.get(node)


def shared_copy(model: nn.Module) -> nn.Module:
    """Copy a network without its weights, which the copy shares.

    Raises:
        ValueError: it holds something that cannot be copied.
    """
    memo: dict[int, object] = {
        id(t): t for t in itertools.chain(model.parameters(), model.buffers())
    }
    return copied(model, memo)


def trace(
    model: nn.Module, is_leaf: Callable[[nn.Module], bool], flags: Flags | None = None
) -> Dataflow:
    """Trace a network in its present mode. It does not change.

    Args:
        model: of any class.
        is_leaf: whether a module becomes one node, as those of torch do.
        flags: attributes of modules that may change later, and the values to try.
    """
    # Tracing runs the code of a forward, which may store proxies in the network: use a copy.
    names = dict(model.named_modules())
    model = shared_copy(model)
    tracing = _Tracing(
        names={module: name for name, module in model.named_modules()},
        leaves={model.get_submodule(name) for name, module in names.items() if is_leaf(module)},
        flags={model.get_submodule(name): tries for name, tries in (flags or {}).items()},
        root=model,
    )
    done: set[nn.Module] = set()
    scopes = [(model, "")]
    with torch.random.fork_rng(devices=[]):
        while scopes:
            scope, caller = scopes.pop()
            if scope not in done:
                done.add(scope)
                scopes += tracing.visit(scope, caller)
            if not scopes:
                # The user may still call what this forward does not.
                idle = tracing.uncalled(model, done)
                scopes += [(module, "nothing calls it but the user") for module in idle]
    return tracing.flow


class Transparent(nn.Module):
    """A module that returns its input or raises. It has no node in the dataflow."""


class _Tracing:
    """Traces the parts of one network and records the dataflow."""

    def __init__(
        self,
        names: dict[nn.Module, str],
        leaves: set[nn.Module],
        flags: dict[nn.Module, Sequence[Values]],
        root: nn.Module,
    ) -> None:
        self.names = names
        self.leaves = leaves
        self.flags = flags
        self.root = root
        self.flow = Dataflow()
        self.held = {
            module: with_own_containers(vars(module))
            for module in names
            if not isinstance(module, torch.jit.ScriptModule)
        }
        self.holders: dict[int, list[nn.Module]] = {}  # of tensors, by storage; tied ones share it
        self.storages: dict[tuple[nn.Module, str], int] = {}
        for module in names:
            for key, tensor in own_tensors(module).items():
                self.storages[module, key] = storage_of(tensor)
                self.holders.setdefault(storage_of(tensor), []).append(module)

    def visit(self, scope: nn.Module, caller: str) -> list[tuple[nn.Module, str]]:
        """Trace one module. Returns what has to be traced then, and by whom it is called."""
        inner = inside_wrapper(scope)
        if inner is not None:
            return [(inner, caller)]
        if scope in self.leaves or is_of_torch(scope):
            if _has_forward(scope):
                self._reach(scope.modules(), caller or "the network is this module alone")
            return []
        if has_hooks(scope):
            self._reach(scope.modules(), "a hook of a parent may use it")
        found: list[tuple[nn.Module, str]] = []
        for module, reason in self._trace(scope).items():
            name = self.names[module]
            self.flow.untraced[name] = reason
            by = f"{name or type(module).__name__}, which could not be traced ({reason}), uses it"
            reading = read_forward(module)
            found += [(child, by) for child in reading.called if child in self.names]
            inside = [inner for child in reading.escaped for inner in child.modules()]
            self._reach(inside, by)
            inside += reading.inspected
            self.flow.inspected |= {self.names[m] for m in inside if m in self.names}
            # The attributes of a BatchNorm or convolution change when it is folded.
            self._reach([m for m in reading.inspected if m in self.leaves], by)
        return found

    def uncalled(self, model: nn.Module, done: set[nn.Module]) -> list[nn.Module]:
        """The outermost modules of which no part is called, reached or untraced."""
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

    def _trace(self, scope: nn.Module) -> dict[nn.Module, str]:
        """Add the graphs of one module with unknown inputs. Returns what is opaque, and why."""
        opaque: dict[nn.Module, str] = {}
        try:
            variants = _variants(scope)
        except (UntraceableError, ValueError, TypeError) as error:
            return {scope: in_a_line(error)}
        traced, failure = False, "no arguments were found with which it runs"
        large = False
        for fixed, may_fail, others in variants:
            if large and 1 < others < max(variant.others for variant in variants):
                continue
            tracer = Tracer(self.leaves, flags=self.flags, assume=scope is self.outermost())
            for module in scope.modules():  # undo what an earlier forward stored in it
                if module in self.held:
                    vars(module).clear()
                    vars(module).update(with_own_containers(self.held[module]))
            try:
                graph = tracer.trace(scope, fixed)
            except Exception as error:
                if may_fail or is_deliberate(error):
                    failure = in_a_line(error)
                    continue
                return opaque | tracer.opaque | {scope: in_a_line(error)}
            if may_fail and (tracer.opaque or tracer.failures):
                continue
            traced = True
            large = large or len(graph.nodes) > MAX_NODES
            opaque |= tracer.opaque
            if tracer.opaque and compares_with_none(scope):
                tracer.untraceable("it compares the output of an untraceable module with None")
            if tracer.failures:
                return opaque | {scope: tracer.failures[-1]}
            for storage in tracer.read_storages:
                self._reach(self.holders.get(storage, []), "its weights are read")
            for module, attribute in tracer.changed.items():
                self._reach([module], f"a forward sets its {attribute}")
            self.flow.assumed |= tracer.assumed
            self._add(graph, scope)
        return opaque if traced else {scope: failure}

    def outermost(self) -> nn.Module:
        """The network inside its wrappers."""
        module = self.root
        while (inner := inside_wrapper(module)) is not None:
            module = inner
        return module

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
                if is_transparent(node, module):
                    if isinstance(module, Transparent):
                        flow.checked.update(node.all_input_nodes)
                    erase(node)
                    continue
                flow.calls.setdefault(self.names[module], []).append(node)
                flow.names[node] = self.names[module]
                if module not in self.leaves and is_of_torch(module):  # may use its children
                    inside = [inner for inner in module.modules() if inner is not module]
                    self._reach(inside, f"{self.names[module]} may use it")
            elif node.op == "get_attr":
                path, _, key = node.target.rpartition(".")
                owner = scope.get_submodule(path)
                flow.names[node] = f"{self.names[owner]}.{key}"
                holders = self.holders.get(self.storages.get((owner, key), 0), [])
                self._reach(holders, f"its {key} is read")

    def _reach(self, modules: Iterable[nn.Module], reason: str) -> None:
        for module in modules:
            if module in self.names:
                self.flow.reached.setdefault(self.names[module], reason)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module, without those of its children."""
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))


def is_transparent(node: fx.Node, module: nn.Module) -> bool:
    """Whether the call of a module returns its input: an identity, or dropout in eval mode."""
    passes = type(module) is nn.Identity or isinstance(module, Transparent)
    passes = passes or (isinstance(module, _DropoutNd) and not module.training)
    plain = not has_hooks(module) and not node.kwargs and len(node.args) == 1
    return passes and plain and isinstance(node.args[0], fx.Node)


def erase(node: fx.Node) -> None:
    """Remove a node that returns its input."""
    node.replace_all_uses_with(node.all_input_nodes[0])
    node.graph.erase_node(node)


def canonical(
    nodes: Iterable[fx.Node], flow: Dataflow, *, skipping: Collection[fx.Node] = ()
) -> CanonicalNodes:
    """Nodes in a form that can be compared with those of another graph.

    Values from outside are "given". Tensors of the network are identified by their names.

    Args:
        skipping: nodes that return their input.
    """
    places: dict[fx.Node, int | str | None] = {}

    def refer(node: fx.Node) -> int | str | None:
        return places.get(node, "given")

    found: CanonicalNodes = []
    for node in nodes:
        if node.op == "get_attr":
            constant = str(node.target).rpartition(".")[2].startswith("_tensor_constant")
            places[node] = "a constant" if constant else flow.called(node)
            continue
        if node in skipping:
            places[node] = refer(node.all_input_nodes[0])
            continue
        places[node] = len(found)
        arguments = fx.map_arg((node.args, node.kwargs), refer)
        found.append((node.op, flow.called(node) or node.target, arguments))
    return found


def equal(first: Dataflow, second: Dataflow, *, apart_from: Collection[str] = ()) -> bool:
    """Whether two networks run the same nodes on the same values.

    Args:
        apart_from: modules whose inside is not compared.
    """
    inside = tuple(f"{name}." if name else "" for name in apart_from)

    def counts(name: str) -> bool:
        return not (inside and name.startswith(inside))

    graphs: list[dict[str, list[CanonicalNodes]]] = [{}, {}]
    for flow, found in zip((first, second), graphs, strict=True):
        for graph, name in flow.graphs.items():
            empty = all(node.op in ("placeholder", "output") for node in graph.nodes)
            if counts(name) and not empty:  # as of identities alone, which nothing calls now
                found.setdefault(name, []).append(canonical(graph.nodes, flow))
    untraced = [set(filter(counts, flow.untraced)) for flow in (first, second)]
    return untraced[0] == untraced[1] and graphs[0] == graphs[1]


class _Variant(NamedTuple):
    """Arguments with which a forward is traced.

    Attributes:
        fixed: arguments that are constants, by name.
        may_fail: whether the forward may raise on them.
        others: how many of them are not the usual ones.
    """

    fixed: dict[str, object]
    may_fail: bool
    others: int


def _variants(scope: nn.Module) -> list[_Variant]:
    """Arguments with which a forward is traced.

    The first argument is unknown, and so are booleans. Every other argument that the code uses is
    tried twice: unknown, and with its default. One without a default is None the second time.
    """
    if "forward" in vars(scope):
        raise UntraceableError("its forward was replaced by hand")
    if type(scope).__call__ is not nn.Module.__call__ and not isinstance(scope, fx.GraphModule):
        raise UntraceableError("it overrides __call__")
    if compares_identities(scope):
        raise UntraceableError("it compares values by identity (is)")
    parameters = [
        parameter
        for parameter in inspect.signature(scope.forward).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    fixed: dict[str, list[object]] = {}
    for place, parameter in enumerate(parameters):
        if place == 0 and parameter.default is None:
            continue
        if isinstance(parameter.default, bool):
            continue  # it is unknown, and both paths are traced
        if parameter.default is not parameter.empty and not names_argument(scope, parameter.name):
            fixed[parameter.name] = [parameter.default]
        elif parameter.default is not parameter.empty:
            fixed[parameter.name] = [parameter.default, PH]
        elif place > 0:
            fixed[parameter.name] = [PH, None]
    required = {p.name for p in parameters if p.default is p.empty}
    variants = []
    if math.prod(map(len, fixed.values())) > MAX_VARIANTS:
        raise UntraceableError(f"it has {len(fixed)} optional arguments, which are too many")
    for values in itertools.product(*fixed.values()):
        chosen = {k: v for k, v in zip(fixed, values, strict=True) if v is not PH}
        may_fail = any(value is None and key in required for key, value in chosen.items())
        usual = [tries[0] for tries in fixed.values()]
        others = sum(value is not first for value, first in zip(values, usual, strict=True))
        variants.append(_Variant(chosen, may_fail, others))
    return variants


def is_metadata(node: fx.Node) -> bool:
    """Whether a node reads the shape or type of a tensor, not its values."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in METADATA
    return node.op == "call_method" and node.target in METADATA


def uses(node: fx.Node) -> list[fx.Node]:
    """The nodes that need the values of this one."""
    return [user for user in node.users if not (is_metadata(user) or _reads_shape(user, node))]


def _reads_shape(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node gives another tensor the shape of this one."""
    reshapes = user.op == "call_method" and user.target in ("reshape_as", "view_as")
    return reshapes and user.args[0] is not node


def _has_forward(module: nn.Module) -> bool:
    # The forward of TorchScript modules is a descriptor that fails when read from the class.
    return stored(type(module), "forward") is not stored(nn.Module, "forward")
