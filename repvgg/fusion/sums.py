"""Merges sums of parallel linear branches into one convolution, in any network.

W3*x + W1*x + x is one convolution of x (RepVGG, Ding et al., 2021, arXiv:2101.03697, section 3.3).
A branch is a chain of linear layers (`repvgg.fusion.chains`), which the sum may scale or subtract.
The dataflow must prove that the terms have the same input. The sum is code of a forward, so the
module of that forward gets a new one, generated from its graph.
"""

import inspect
import operator
from collections.abc import Callable
from operator import add
from typing import ClassVar, Protocol

import torch
from torch import fx, nn

from repvgg.fusion import foldable
from repvgg.fusion.attributes import has_trainable_bias, tensor_of
from repvgg.fusion.batchnorms import FusionReport
from repvgg.fusion.bytecode import is_decorated
from repvgg.fusion.chains import (
    Factor,
    Layer,
    Step,
    Term,
    convolution,
    cost,
    dimensions,
    has_class,
    in_format_of,
    is_layer,
    new_layer,
    placed,
    read_step,
    widest,
)
from repvgg.fusion.dataflow import Dataflow, Flags, uses
from repvgg.fusion.flags import global_flags
from repvgg.fusion.hooks import has_hooks
from repvgg.fusion.kinds import is_finite_number, target_home
from repvgg.fusion.normalizations import is_normalization, read_normalization
from repvgg.fusion.own_forward import OwnForward, inlined_children, is_own
from repvgg.fusion.surgery import drop_tensors, erase_unused, put, set_forward
from repvgg.reparam import Affine, Convolution, merge

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
SUBTRACTIONS = (operator.sub, torch.sub, "sub")
PRODUCTS = (operator.mul, torch.mul, "mul")
QUOTIENTS = (operator.truediv, torch.div, "div")
NEGATIONS = (operator.neg, torch.neg, "neg")
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
        if _is_sum(node) and _adds_branches(node, get)
    )
    return sorted(found, key=lambda name: -name.count(".") if name else 1)


def _adds_branches(root: fx.Node, get: Callable[[fx.Node], nn.Module | None]) -> bool:
    """Whether a sum contains a layer and another term of the same input."""
    layered: list[set[fx.Node]] = []
    met: list[set[fx.Node]] = []
    for node, _ in _terms(root, lambda _: 1.0)[1]:
        passed, behind, convolves = {node}, set[fx.Node](), False
        while (step := _next_step(node, get)) is not None:
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


def _next_step(node: fx.Node, get: Callable[[fx.Node], nn.Module | None]) -> Step | None:
    module = get(node)
    if type(module) is foldable.Rows:
        return Step(node)
    return read_step(node, get, 2)


class Rewriter(Protocol):
    """Rewrites one graph of a module's forward, and then its modules.

    Attributes:
        of_numbers: whether numbers of the module are constants at once. Otherwise they are only if
            nothing is merged without them, as factors; then they must not change any more.
        costlier: as in `FusionReport`.
        totals: kernels in float64 of the layers that the graph then calls, by name.
    """

    of_numbers: ClassVar[bool]
    costlier: dict[str, str]
    totals: dict[str, Affine]

    def __init__(
        self,
        model: nn.Module,
        owner: nn.Module,
        name: str,
        graph: fx.Graph,
        flow: Dataflow,
        values: dict[str, Affine],
        check_values: bool,
        inlined: set[str],
    ) -> None: ...

    def merge(self) -> list[tuple[str, ...]]: ...

    def misfit(self) -> str | None: ...

    def write(self) -> None: ...


def rewrite(
    rewriter: type[Rewriter],
    model: nn.Module,
    name: str,
    flow: Dataflow,
    values: dict[str, Affine],
    report: FusionReport,
    *,
    check_values: bool = True,
    flags: Flags | None = None,
) -> list[tuple[str, ...]]:
    """Rewrite the forward of one module, in place, as to merge its sums.

    The module gets a forward that is generated from its graph, with one graph for each value of its
    flags. If that is impossible, the module does not change.

    Args:
        model: the network of `flow`.
        name: of the module in it.
        values: kernels in float64 that are rounded in `model`, by name. Merged ones are added.
        report: its `unmerged` gets the reason if nothing is merged.
        check_values: as `values` in `repvgg.fusion.foldable.obstacle`.
        flags: those of the trace that made `flow`.

    Returns:
        for each sum the names of the merged modules, first the one that remains.
    """
    owner = model.get_submodule(name)
    if not _takes_one_input(owner) or name in flow.inspected or name in flow.untraced:
        return []
    inlined = inlined_children(owner)
    names = {module: path for path, module in model.named_modules()}
    inlined_names = {names[module] for module in inlined}
    own = OwnForward(owner, model, name, flow, flags or {}, inlined)
    if not own.is_consistent():
        return []
    for reads in ([],) if rewriter.of_numbers else (own.reads, []):
        own.reads = reads
        base = own.graph(())
        if base is None:
            return []
        sums = rewriter(model, owner, name, base, flow, values, check_values, inlined_names)
        merged = sums.merge()
        if merged:
            break
    assert base is not None
    report.costlier.update(sums.costlier)
    # The code of a graph turns `x += y` into `x = x + y`.
    if not merged or any(_is_augmented(node) for node in base.nodes):
        return []

    def merges_alike(graph: fx.Graph) -> bool:
        other = rewriter(model, owner, name, graph, flow, dict(values), check_values, inlined_names)
        return other.merge() == merged and _are_equal(other.totals, sums.totals)

    cases = sums.misfit() or _obstacle(own) or own.cases(base, merges_alike)
    if isinstance(cases, str):
        report.unmerged[name] = cases
        return []
    sums.write()
    set_forward(owner, cases, own.fixed())
    return merged


def _are_equal(first: dict[str, Affine], second: dict[str, Affine]) -> bool:
    """Whether two graphs call layers with the same numbers; without values, of the same shapes."""
    return first.keys() == second.keys() and all(
        part.shape == other.shape and (part.is_meta or torch.equal(part, other))
        for name, total in first.items()
        for part, other in zip(total, second[name], strict=True)
    )


def _takes_one_input(module: nn.Module) -> bool:
    """Whether a call of a module runs the forward of its class, of one argument, and no hooks."""
    plain_call = type(module).__call__ is nn.Module.__call__ or isinstance(module, fx.GraphModule)
    if has_hooks(module) or not plain_call or "forward" in vars(module):
        return False
    parameters = list(inspect.signature(module.forward).parameters.values())
    return len(parameters) == 1 and parameters[0].kind is parameters[0].POSITIONAL_OR_KEYWORD


def _obstacle(own: OwnForward) -> str | None:
    """Why a graph does not show everything that a forward may do, or None."""
    if own.switches_context:
        return "its forward switches gradients, inference mode or autocast"
    if is_decorated(own.owner):
        return "its forward is decorated, and the graph does not show what the decorator does"
    if own.has_side_effects:
        return "its forward changes something outside of the network"
    if switches := global_flags(own.owner):
        return f"its forward reads {', '.join(switches)} of its Python module, which may change"
    if own.queries:
        return f"its forward calls {', '.join(sorted(own.queries))}, whose answer may change"
    return None


class Sums:
    """The sums in one graph of a module's forward."""

    of_numbers: ClassVar = False

    def __init__(
        self,
        model: nn.Module,
        owner: nn.Module,
        name: str,
        graph: fx.Graph,
        flow: Dataflow,
        values: dict[str, Affine],
        check_values: bool,
        inlined: set[str],
    ) -> None:
        self.model = model
        self.owner = owner
        self.name = name
        self.graph = graph
        self.flow = flow
        self.values = values
        self.check_values = check_values
        self.inlined = inlined
        self.totals: dict[str, Affine] = {}
        self.costlier: dict[str, str] = {}  # layers that stay, and why
        self.replaced: dict[nn.Module, nn.Module] = {}
        self.order: dict[fx.Node, int] = {}
        self.read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        self.names = {module: path for path, module in model.named_modules()}
        self.calls: dict[nn.Module, int] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                module = owner.get_submodule(node.target)
                self.calls[module] = self.calls.get(module, 0) + 1

    def merge(self) -> list[tuple[str, ...]]:
        """Merge the sums of the graph. `write` changes the modules."""
        merged = []
        for node in [node for node in self.graph.nodes if _is_sum(node)]:
            if node.graph is self.graph and not self._is_inner(node):
                merged += self._merge_sum(node)
        return merged

    def _is_inner(self, node: fx.Node) -> bool:
        """Whether a sum is a term of another sum."""
        users = uses(node)
        while len(users) == 1 and _read_factor(users[0], self._factor) is not None:
            users = uses(users[0])
        return len(users) == 1 and _is_sum(users[0])

    def _merge_sum(self, root: fx.Node) -> list[tuple[str, ...]]:
        nodes, parts = _terms(root, self._factor)
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
        return Term(added, node, tuple(steps), factors, check)

    def _step(self, node: fx.Node, dims: int | None) -> Step | None:
        """A layer that nothing but its call in this forward uses, or a strided slice."""
        step = read_step(node, self._module, dims)
        if step is None or step.module is None:
            return step
        module, path = step.module, self.names[step.module]
        free = (
            is_own(self.flow, path, self.name, self.inlined)
            and foldable.obstacle(module, values=self.check_values) is None
            and self.calls[module] == 1
            and path not in self.flow.reached
        )
        return step._replace(name=path) if free else None

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.owner.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _factor(self, value: object) -> Factor | None:
        """A number, or a tensor of the module, as a factor."""
        if is_finite_number(value):
            return float(value)
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        path, _, key = str(value.target).rpartition(".")
        tensor = tensor_of(self.owner.get_submodule(path), key)
        return None if tensor is None or not tensor.is_floating_point() else tensor

    def _is_check(self, node: fx.Node) -> bool:
        """Whether a node only checks the rank of its input."""
        return type(self._module(node)) is foldable.Rows

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
            if (whole := convolution(term, channels, layer, self.values)) is not None
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
            module = self._module(node)
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
        layer = new_layer(old, whole)
        terms = [term for term, _ in found]
        steps = [step for term in terms for step in term.steps if step.module is not None]
        trains = any(has_trainable_bias(step.module) for step in steps)
        layer.weight = nn.Parameter(
            in_format_of(old.weight, total.kernel), old.weight.requires_grad
        )
        layer.bias = nn.Parameter(total.bias.to(old.weight), trains)
        self.totals[main.last.name] = total
        for step in steps:
            assert step.module is not None
            self.replaced[step.module] = nn.Identity()
        self.replaced[old] = layer.eval()
        checks = [term.check for term in terms if term.check is not None]
        with self.graph.inserting_before(root):
            node = self.graph.call_module(str(main.last.node.target), (source,))
            for check in checks[:1]:
                node = self.graph.call_module(str(check.target), (node,))
        return node

    def misfit(self) -> str | None:
        """Why a sum cannot be written in the dtype of its convolution, or None."""
        for name, total in self.totals.items():
            module = self.model.get_submodule(name)
            assert isinstance(module, Layer)
            if reason := foldable.misfit(module, total):
                return f"{name}: {reason}"
        return None

    def write(self) -> None:
        """Put the merged layers in place, and identities for the others."""
        for old, new in self.replaced.items():
            put(self.model, old, new.eval())
            self.values.pop(self.names[old], None)
        self.values.update(self.totals)
        left = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        drop_tensors(self.owner, self.read - left, self.flow, self.name, self.names)


def _terms(
    root: fx.Node, factor: Callable[[object], Factor | None]
) -> tuple[set[fx.Node], list[tuple[fx.Node, tuple[Factor, ...]]]]:
    """The nodes of a sum, and its terms with the factors by which it multiplies them."""
    nodes: set[fx.Node] = set()
    terms: list[tuple[fx.Node, tuple[Factor, ...]]] = []
    todo: list[tuple[object, tuple[Factor, ...]]] = [(root, ())]
    while todo:
        node, factors = todo.pop(0)
        if not isinstance(node, fx.Node):
            continue
        inner = node is root or len(node.users) == 1
        if inner and _is_sum(node):
            nodes.add(node)
            first, second = node.args
            sign = (-1.0,) if node.target in SUBTRACTIONS else ()
            todo = [(first, factors), (second, (*sign, *factors)), *todo]
        elif inner and (scaled := _read_factor(node, factor)) is not None:
            nodes.add(node)
            todo.insert(0, (scaled[0], (scaled[1], *factors)))
        else:
            terms.append((node, factors))
    return nodes, terms


def _is_sum(node: fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method")
        and node.target in (*ADDITIONS, *SUBTRACTIONS)
        and len(node.args) == 2
        and not node.kwargs
        and all(isinstance(a, fx.Node) or (isinstance(a, int) and a == 0) for a in node.args)
        and (isinstance(node.args[0], fx.Node) or node.target not in SUBTRACTIONS)
    )


def _read_factor(
    node: fx.Node, factor: Callable[[object], Factor | None]
) -> tuple[fx.Node, Factor] | None:
    """The value that a node multiplies, and by what."""
    if node.op not in ("call_function", "call_method") or node.kwargs:
        return None
    if node.target in NEGATIONS and len(node.args) == 1 and isinstance(node.args[0], fx.Node):
        return node.args[0], -1.0
    if len(node.args) != 2 or node.target not in (*PRODUCTS, *QUOTIENTS):
        return None
    first, second = node.args
    divides = node.target in QUOTIENTS
    for value, other in ((first, second), (second, first)):
        if isinstance(value, fx.Node) and value.op != "get_attr":
            if divides and is_finite_number(other) and other != 0 and value is first:
                return value, 1 / float(other)
            if not divides and (found := factor(other)) is not None:
                return value, found
    return None


def _is_augmented(node: fx.Node) -> bool:
    """Whether a node is x += y or another augmented assignment."""
    if node.op != "call_function" or target_home(node) != "_operator":
        return False
    return foldable.may_overwrite(node, None)
