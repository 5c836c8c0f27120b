"""Merges sums of parallel linear branches into one convolution, in any network.

W3*x + W1*x + x is one convolution of x (RepVGG, Ding et al., 2021, arXiv:2101.03697, section 3.3).
A branch is a chain of linear layers (`repvgg.fusion.chains`), which the sum may scale or subtract.
The dataflow must prove that the terms have the same input. The sum is code of a forward, so the
module of that forward gets a new one, generated from its graph.
"""

from collections.abc import Callable
from operator import add
from typing import cast

from torch import fx, nn

from repvgg.fusion import foldable
from repvgg.fusion.attributes import has_trainable_bias, tensor_of
from repvgg.fusion.chains import (
    Factor,
    Layer,
    Step,
    Term,
    convolution,
    cost,
    dimensions,
    has_class,
    is_layer,
    new_layer,
    placed,
    read_step,
    widest,
)
from repvgg.fusion.dataflow import Dataflow, uses
from repvgg.fusion.kinds import is_finite_number
from repvgg.fusion.normalizations import is_normalization, read_normalization, read_scaling
from repvgg.fusion.rewriting import Place, Rewriter
from repvgg.fusion.surgery import erase_unused, put
from repvgg.fusion.terms import adds_zero, is_sum, read_factor, read_terms
from repvgg.reparam import Convolution, merge

Found = tuple[Term, Convolution]


def owners(flow: Dataflow, model: nn.Module) -> list[str]:
    """Modules whose forward adds parallel branches, inner ones first."""

    def get(node: fx.Node) -> nn.Module | None:
        name = flow.called(node)
        return model.get_submodule(name) if name and node.op == "call_module" else None

    found = dict.fromkeys(
        list(flow.callers[node])[-1]
        for graph in flow.graphs
        for node in graph.nodes
        if is_sum(node) and (adds_zero(node) or _adds_branches(node, get))
    )
    return sorted(found, key=lambda name: -name.count(".") if name else 1)


def _adds_branches(root: fx.Node, get: Callable[[fx.Node], nn.Module | None]) -> bool:
    """Whether a sum contains a layer and another term of the same input."""
    layered: list[set[fx.Node]] = []
    met: list[set[fx.Node]] = []

    def factor(value: object) -> Factor | None:
        calls = isinstance(value, fx.Node) and value.op == "call_module"
        return None if calls and read_scaling(get(cast(fx.Node, value))) is None else 1.0

    for node, _ in read_terms(root, factor)[1]:
        passed, behind, convolves = {node}, set[fx.Node](), False
        while (step := read_step(node, get, 2)) is not None:
            convolves = convolves or is_layer(step.module)
            node = node.all_input_nodes[0]
            passed.add(node)
            if convolves:
                behind.add(node)
        met.append(passed)
        layered.append(behind)
    return any(
        first & second for i, first in enumerate(layered) for j, second in enumerate(met) if i != j
    )


class Sums(Rewriter):
    """The sums in one graph of a module's forward."""

    of_numbers = False

    def __init__(self, place: Place, graph: fx.Graph) -> None:
        super().__init__(place, graph)
        self.replaced: dict[nn.Module, nn.Module] = {}
        self.order: dict[fx.Node, int] = {}
        self.scalings: list[tuple[fx.Node, nn.Module]] = []

    def merge(self) -> list[tuple[str, ...]]:
        """Merge the sums of the graph. `write` changes the modules."""
        merged: list[tuple[str, ...]] = []
        for node in [node for node in self.graph.nodes if adds_zero(node)]:
            (term,) = node.all_input_nodes
            made = is_layer(self.module(term)) or is_normalization(self.module(term))
            if made and len(term.users) == 1:  # so nothing else holds its value
                node.replace_all_uses_with(term)
                self.graph.erase_node(node)
                merged.append(())
        for node in [node for node in self.graph.nodes if is_sum(node)]:
            if not self._is_inner(node):
                merged += self._merge_sum(node)
        return merged

    def _is_inner(self, node: fx.Node) -> bool:
        """Whether a sum is a term of another sum."""
        users = uses(node)
        while len(users) == 1 and read_factor(users[0], self._factor) is not None:
            users = uses(users[0])
        return len(users) == 1 and is_sum(users[0])

    def _merge_sum(self, root: fx.Node) -> list[tuple[str, ...]]:
        nodes, parts = read_terms(root, self._factor)
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        terms = [self._term(node, factors) for node, factors in parts]
        merged = []
        rest: list[fx.Node] = []
        sources = {term.source for term in terms if term.convolves}
        for source in sorted(sources, key=self.order.__getitem__):
            found = self._compatible([term for term in terms if term.source is source])
            group = [term for term, _ in found]
            if len(group) < 2 or self._is_disturbed(root, nodes, group):
                continue
            whole = len(group) == len(terms)
            accumulates = any(foldable.may_overwrite(node, None) for node in nodes)
            scaled = any(term.factors for term in terms if term not in group)
            # An accumulated sum has the dtype of its first term.
            if (not whole and (accumulates or scaled)) or not self._is_guarded(group):
                continue
            rest.append(self._write(root, source, found))
            merged.append(self._names(group))
            terms = [term for term in terms if term not in group]
        if not merged:
            return []
        with self.graph.inserting_before(root):
            total = rest[0]
            for term in [*rest[1:], *(term.added for term in terms)]:
                total = self.graph.call_function(add, (total, term))
        root.replace_all_uses_with(total)
        erase_unused(root)
        return merged

    def _names(self, group: list[Term]) -> tuple[str, ...]:
        """The layers of a group, first the one that remains."""
        first = group[0].last.name
        return (first, *(name for term in group for name in term.names if name != first))

    def _term(self, node: fx.Node, factors: tuple[Factor, ...]) -> Term:
        """Read one term. A value that is no chain of layers is the identity of itself."""
        added, check, steps = node, None, list[Step]()
        dims: int | None = None
        if self._is_check(node) and len(node.users) == 1:
            check, node = node, node.all_input_nodes[0]
        while len(node.users) == 1:
            step = self._step(node, dims)
            if step is None:
                break
            steps.insert(0, step)
            dims = dimensions(step.module) if dims is None else dims
            node = node.all_input_nodes[0]
        if not steps:
            return Term(added, added, (), factors)
        entry = node if self._is_check(node) and len(node.users) == 1 else None
        source = node if entry is None else entry.all_input_nodes[0]
        return Term(added, source, tuple(steps), factors, check, entry)

    def _step(self, node: fx.Node, dims: int | None) -> Step | None:
        """A layer that nothing but its call in this forward uses, or a strided slice."""
        step = read_step(node, self.module, dims)
        if step is None or step.module is None:
            return step
        path = self.place.names[step.module]
        free = self.is_own(step.module) and path not in self.place.flow.reached
        return step._replace(name=path) if free else None

    def _factor(self, value: object) -> Factor | None:
        """A number, a tensor of the module, or a layer that scales, as a factor."""
        if isinstance(value, fx.Node) and value.op == "call_module":
            step = self._step(value, 2)
            scale = None if step is None else read_scaling(step.module)
            if step is not None and step.module is not None and scale is not None:
                self.scalings.append((value, step.module))
            return scale
        if is_finite_number(value):
            return float(value)
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        path, _, key = str(value.target).rpartition(".")
        tensor = tensor_of(self.place.owner.get_submodule(path), key)
        return None if tensor is None or not tensor.is_floating_point() else tensor

    def _is_check(self, node: fx.Node) -> bool:
        """Whether a node only checks the rank of its input."""
        return type(self.module(node)) is foldable.Rows

    def _compatible(self, group: list[Term]) -> list[Found]:
        """The terms that are one convolution together, first the one whose geometry it has.

        Empty if there are none, or if one convolution takes more multiplications than they do.
        """
        layer = next(term.last.module for term in group if term.convolves)
        assert isinstance(layer, Layer)
        channels, dims = foldable.out_channels(layer), foldable.dimensions(layer)
        found = [
            (term, whole)
            for term in group
            if (whole := convolution(term, channels, layer, self.place.values)) is not None
        ]
        for main in widest(found):
            fitting = [pair for pair in found if pair is not main and placed(pair[1], main[1])]
            terms = [main[0], *(term for term, _ in fitting)]
            if not fitting or not has_class(main[0].last.module, main[1]):
                continue
            before = sum(cost(term, dims) for term in terms)
            after = main[1].affine.kernel.numel()
            if after <= before:
                return [main, *fitting]
            self.costlier[main[0].last.name] = (
                f"as one layer with {', '.join(self._names(terms)[1:])} it would take {after:,} "
                f"multiplications for each position of the output, in place of {before:,}"
            )
        return []

    def _is_disturbed(self, root: fx.Node, nodes: set[fx.Node], group: list[Term]) -> bool:
        """Whether a node may overwrite a value between its first use and the sum."""
        first = min(self.order[step.node] for term in group for step in term.steps)
        for node, position in self.order.items():
            module = self.module(node)
            if isinstance(module, foldable.Rows) or not foldable.may_overwrite(node, module):
                continue
            if node in nodes:
                if not self._is_fresh(node.args[0], nodes):
                    return True
            elif first < position <= self.order[root]:
                return True
        return False

    def _is_fresh(self, node: object, nodes: set[fx.Node]) -> bool:
        """Whether only the sum uses the value of a node that it overwrites."""
        assert isinstance(node, fx.Node)
        steps = self._term(node, ()).steps
        return node in nodes or any(step.module is not None for step in steps)

    def _is_guarded(self, group: list[Term]) -> bool:
        """Whether the merged branches check the rank of inputs as their BatchNorms do."""
        if any(term.check is not None for term in group):
            return True
        for step in (step for term in group for step in term.steps):
            if step.module is not None and is_normalization(step.module):
                found = read_normalization(step.module)
                if isinstance(found, str) or not found.checks:
                    return False
        return True

    def _write(self, root: fx.Node, source: fx.Node, found: list[Found]) -> fx.Node:
        """Add a node that calls the merged layer of a group."""
        main, whole = found[0]
        old = main.last.module
        assert isinstance(old, Layer)
        parts = [placed(each, whole) for _, each in found]
        total = merge(*(part for part in parts if part is not None))
        terms = [term for term, _ in found]
        steps = [step for term in terms for step in term.steps if step.module is not None]
        trains = any(has_trainable_bias(step.module) for step in steps)
        self.totals[main.last.name] = total
        for step in steps:
            assert step.module is not None
            self.replaced[step.module] = nn.Identity()
        self.replaced[old] = new_layer(old, whole, total, bias_trains=trains)
        checks = [term.check for term in terms if term.check is not None]
        entries = [term.entry for term in terms if term.entry is not None]
        with self.graph.inserting_before(root):
            for entry in entries[:1]:  # all check the same value, for the same layers
                source = self.graph.call_module(str(entry.target), (source,))
            node = self.graph.call_module(str(main.last.node.target), (source,))
            for check in checks[:1]:
                node = self.graph.call_module(str(check.target), (node,))
        return node

    def layer(self, name: str) -> Layer:
        module = self.place.model.get_submodule(name)
        assert isinstance(module, Layer)
        return module

    def write(self) -> None:
        """Put the merged layers in place, and identities for the others."""
        for old, new in self.replaced.items():
            put(self.place.model, old, new.eval())
            self.place.values.pop(self.place.names[old], None)
        self.place.values.update(self.totals)
        for node, module in self.scalings:
            if node not in self.graph.nodes:
                put(self.place.model, module, nn.Identity())
        self.drop_unread()
