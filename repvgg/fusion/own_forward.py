"""The forward of one module as a graph that can replace it."""

import contextlib
import itertools
from collections.abc import Callable, Collection, Sequence

from torch import fx, nn

from repvgg.fusion import foldable
from repvgg.fusion.attributes import has_attribute
from repvgg.fusion.bytecode import code_of, is_decorated
from repvgg.fusion.dataflow import (
    CanonicalNodes,
    Dataflow,
    Flags,
    canonical,
    erase,
    is_transparent,
    shared_copy,
)
from repvgg.fusion.flags import (
    Values,
    alternatives,
    held_values,
    other_callables,
    plain_attributes,
    setting,
    value_of,
)
from repvgg.fusion.hooks import has_hooks
from repvgg.fusion.source import is_of_torch
from repvgg.fusion.surgery import Case
from repvgg.fusion.tracer import Tracer

OUTSIDE = ("placeholder", "output")
MAX_CASES = 8  # graphs of one forward


def inlined_children(owner: nn.Module) -> set[nn.Module]:
    """Children that only call layers in a chain. Their layers count as those of the owner."""
    inlined: set[nn.Module] = set()
    for module in reversed(list(owner.modules())):
        if module is owner or is_of_torch(module) or foldable.is_leaf(module):
            continue
        if type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            inlined.add(module)
            continue
        if has_hooks(module) or is_decorated(module) or alternatives(module):
            continue
        clone = shared_copy(module)
        leaves = {m for m in clone.modules() if m is not clone}
        tracer = Tracer(leaves, exact=True, tensors=True)
        try:
            graph = tracer.trace(clone)
        except Exception:
            continue
        calls = [node for node in graph.nodes if node.op not in OUTSIDE]
        only_calls = all(node.op == "call_module" and len(node.args) == 1 for node in calls)
        if only_calls and not tracer.failures and not tracer.switches_context and len(calls) > 0:
            inlined.add(module)
    return inlined


def is_own(flow: Dataflow, path: str, owner: str, inlined: Collection[str]) -> bool:
    """Whether all calls of a module stand in the forward of `owner`, or in an inlined child."""
    calls = flow.calls.get(path, [])
    for call in calls:
        callers = list(flow.callers[call])
        if owner not in callers:
            return False
        if not set(callers[callers.index(owner) + 1 :]) - {path} <= set(inlined):
            return False
    return bool(calls)


class OwnForward:
    """The forward of one module of a network, traced separately.

    Attributes:
        reads: numbers of the module that the graph reads when it runs.
        decided: flags that determine which graph runs.
        switches_context, queries, has_side_effects: as in `Tracer`.
    """

    def __init__(
        self,
        owner: nn.Module,
        model: nn.Module,
        name: str,
        flow: Dataflow,
        flags: Flags,
        inlined: set[nn.Module],
    ) -> None:
        self.owner = owner
        self.name = name
        self.flow = flow
        self.inlined = {path for path, module in owner.named_modules() if module in inlined}
        self.names = {module: path for path, module in model.named_modules()}
        self.flags = {
            path: flags[self.names[module]]
            for path, module in owner.named_modules()
            if self.names[module] in flags
        }
        self.reads = _numbers(owner)
        self.decided: set[str] = set()
        self.switches_context = False
        self.queries: set[str] = set()
        self.has_side_effects = False

    def is_consistent(self) -> bool:
        """Whether each call in the network runs the same nodes as the separate trace."""
        expected = [self._canonical(flags) for flags in (self.flags, {})]
        if any(nodes is None for nodes in expected):
            return False
        occurrences: dict[tuple[int, str], list[fx.Node]] = {}
        for number, each in enumerate(self.flow.graphs):
            for node in each.nodes:
                if self.name in self.flow.callers[node] and node.op not in OUTSIDE:
                    call = (number, self.flow.callers[node][self.name])
                    occurrences.setdefault(call, []).append(node)
        alike = all(canonical(nodes, self.flow) in expected for nodes in occurrences.values())
        return bool(occurrences) and alike

    def _canonical(self, flags: Flags) -> CanonicalNodes | None:
        clone = shared_copy(self.owner)
        leaves = {
            clone.get_submodule(path)
            for path, module in self.owner.named_modules()
            if foldable.is_leaf(module)
        }
        tries = {clone.get_submodule(path): values for path, values in flags.items()}
        tracer = Tracer(leaves, flags=tries, tensors=True)
        before = _state(clone)
        try:
            graph = tracer.trace(clone)
        except Exception:
            return None  # the dataflow of the network has the reason
        if tracer.opaque or tracer.failures or tracer.read_storages or _state(clone) != before:
            return None
        if tracer.changed:
            return None
        own = self._named(graph)
        nodes = [node for node in graph.nodes if node.op not in OUTSIDE]
        passing = [n for n in nodes if n.op == "call_module" and is_transparent(n, self._module(n))]
        return canonical(nodes, own, skipping=passing)

    def _module(self, node: fx.Node) -> nn.Module:
        return self.owner.get_submodule(str(node.target))

    def _named(self, graph: fx.Graph) -> Dataflow:
        own = Dataflow()
        for node in graph.nodes:
            if node.op == "call_module":
                own.names[node] = self.names[self._module(node)]
            elif node.op == "get_attr":
                path, _, key = str(node.target).rpartition(".")
                own.names[node] = f"{self.names[self.owner.get_submodule(path)]}.{key}"
        return own

    def graph(self, values: Values) -> fx.Graph | None:
        """The graph for these values of flags, in which each child is one node."""
        found = self._trace(values, self.reads)
        if found is None and self.reads:
            self.reads = []
            found = self._trace(values, [])
        return found

    def _trace(self, values: Values, reads: Sequence[str]) -> fx.Graph | None:
        clone = shared_copy(self.owner)
        leaves = {
            module for path, module in clone.named_modules() if path and path not in self.inlined
        }
        tracer = Tracer(leaves, exact=True, tensors=True, reads=reads)
        try:
            with contextlib.ExitStack() as stack:
                for attribute, value in values:
                    stack.enter_context(setting(clone, attribute, value))
                graph = tracer.trace(clone)
        except Exception:
            return None
        if tracer.opaque or tracer.failures:
            return None
        if any(
            node.op == "get_attr" and not _has(self.owner, str(node.target)) for node in graph.nodes
        ):
            return None  # a tensor that the forward creates
        self.switches_context = self.switches_context or tracer.switches_context
        self.queries |= tracer.queries
        self.has_side_effects = self.has_side_effects or tracer.has_side_effects
        for node in list(graph.nodes):
            module = self._module(node) if node.op == "call_module" else None
            if type(module) is nn.Identity and is_transparent(node, module):
                erase(node)
        return graph

    def cases(
        self,
        base: fx.Graph,
        merge: Callable[[fx.Graph], bool],
    ) -> list[Case] | str:
        """A graph for each value of the flags that the forward depends on, or why that fails.

        Args:
            base: the graph for the present values, with its sums merged.
            merge: merges the sums of another graph, and returns whether they are the same.
        """
        code = code_of(self.owner)
        if code.properties:
            return f"its forward reads the property {', '.join(sorted(code.properties))}"
        if code.passes_itself:
            return "its forward passes the module to other code, which may read any attribute"
        flags = [  # numbers must not change: see `fixed`
            (attribute, value)
            for attribute, value in alternatives(self.owner)
            if not _is_number(value)
        ]
        flags.append(("training", not self.owner.training))
        plain = self.graph(())
        assert plain is not None
        usual = canonical(plain.nodes, self._named(plain))
        tries: dict[str, list[object]] = {}
        known = {"training", *plain_attributes(self.owner)}
        for attribute, value in flags:
            other = self.graph(((attribute, value),))
            if other is not None and canonical(other.nodes, self._named(other)) != usual:
                if attribute not in known:
                    return f"its forward looks for {attribute}, which may be set later"
                tries.setdefault(attribute, [value_of(self.owner, attribute)]).append(value)
        found: list[Case] = []
        combinations = list(itertools.product(*tries.values()))
        if len(combinations) > MAX_CASES:
            return f"its forward depends on too many values of {', '.join(tries)}"
        for combination in combinations:
            values = tuple(zip(tries, combination, strict=True))
            if not found:
                found.append((values, base))
                continue
            graph = self.graph(values)
            if graph is None:
                continue  # the forward does not run with these values
            if not merge(graph):
                return (
                    f"its forward depends on {', '.join(tries)}: with other values it adds other "
                    "branches"
                )
            found.append((values, graph))
        if len(found) > 1 and isinstance(self.owner, fx.GraphModule):
            return "it is a graph of torch.fx that depends on flags"
        self.decided = set(tries)
        return found

    def fixed(self) -> dict[str, object]:
        """Attributes that are constants in the graphs, and so must not change."""
        if isinstance(self.owner, fx.GraphModule):
            return {}
        harmless = {*self.reads, *self.decided}
        plain = {
            name: value
            for name, value in plain_attributes(self.owner).items()
            if name not in harmless and not isinstance(value, bool)
        }
        return plain | held_values(self.owner) | other_callables(self.owner)


def _numbers(owner: nn.Module) -> list[str]:
    """Numbers that a forward reads from its module."""
    return [
        name
        for name, value in plain_attributes(owner).items()
        if _is_number(value) and name.isidentifier()
    ]


def _has(owner: nn.Module, path: str) -> bool:
    inner, _, key = path.rpartition(".")
    return has_attribute(owner.get_submodule(inner), key)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _state(module: nn.Module) -> list[dict[str, object]]:
    """The attributes of a module and all inside it, by identity, containers included."""
    return [
        {key: _identity(value) for key, value in vars(part).items()} for part in module.modules()
    ]


def _identity(value: object) -> object:
    if isinstance(value, dict) and type(value) is dict:
        return {key: id(item) for key, item in value.items()}
    if isinstance(value, list | set) and type(value) in (list, set):
        return [id(item) for item in value]
    return id(value)
