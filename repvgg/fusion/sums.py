"""Merges sums of parallel linear branches into one convolution, in any network.

W3*x + W1*x + x is one convolution of x (RepVGG, Ding et al., 2021, arXiv:2101.03697, section 3.3).
BatchNorms and average pooling may be among the branches (Ding et al., 2021, arXiv:2103.13425,
section 3.2). The dataflow must prove that the terms have the same input. The addition is code of a
forward, so the module of that forward gets a new one, generated from its graph.
"""

import inspect
from collections.abc import Callable
from operator import add, iadd
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from repvgg.fusion import foldable
from repvgg.fusion.attributes import has_trainable_bias
from repvgg.fusion.batchnorms import FusionReport
from repvgg.fusion.bytecode import is_decorated
from repvgg.fusion.dataflow import Dataflow, Flags, uses
from repvgg.fusion.flags import global_flags
from repvgg.fusion.geometry import POOLS, read_geometry, read_subsampling, small_kernel
from repvgg.fusion.hooks import has_hooks
from repvgg.fusion.kinds import target_home
from repvgg.fusion.normalizations import is_normalization, read_normalization
from repvgg.fusion.own_forward import OwnForward, inlined_children
from repvgg.fusion.surgery import put, set_forward
from repvgg.reparam import Affine, embed, merge

ADDITIONS = (add, iadd, torch.add, "add", "add_")


class Term(NamedTuple):
    """One term of a sum.

    Attributes:
        added: the node that is added.
        source: the node whose value is the input of the branch.
        call: the node that calls its module.
        module: its convolution, pool or normalization; None for the identity.
        name: of the module.
        subsampling: the stride of a slice x[..., ::s, ::s] before the module.
    """

    added: fx.Node
    source: fx.Node
    call: fx.Node
    module: nn.Module | None = None
    name: str = ""
    subsampling: int = 1


def owners(flow: Dataflow, model: nn.Module) -> list[str]:
    """Modules whose forward adds parallel branches, inner ones first."""
    found = dict.fromkeys(
        list(flow.callers[node])[-1]
        for graph in flow.graphs
        for node in graph.nodes
        if _is_addition(node) and _adds_branches(node, flow, model)
    )
    return sorted(found, key=lambda name: -name.count(".") if name else 1)


def _adds_branches(root: fx.Node, flow: Dataflow, model: nn.Module) -> bool:
    """Whether a sum contains a convolution and another term of the same input."""
    terms, todo = [], list(root.args)
    while todo:
        node = todo.pop()
        if isinstance(node, fx.Node):
            if _is_addition(node):
                todo += node.args
            else:
                terms.append(node)
    sources: list[tuple[fx.Node, bool]] = []
    for term in terms:
        name = flow.called(term)
        module = model.get_submodule(name) if name and term.op == "call_module" else None
        sources.append((term, False))
        if not term.args or module is None:
            continue
        source = term.all_input_nodes[0]
        if isinstance(module, _ConvNd):
            found = read_subsampling(source, len(module.kernel_size))
            sources.append((found[0] if found else source, True))
        elif is_normalization(module) or type(module) in POOLS:
            sources.append((source, False))
    convolved = [source for source, convolves in sources if convolves]
    return any(sum(source is s for s, _ in sources) > 1 for source in convolved)


def merge_sums(
    model: nn.Module,
    name: str,
    flow: Dataflow,
    values: dict[str, Affine],
    report: FusionReport,
    *,
    check_values: bool = True,
    flags: Flags | None = None,
) -> list[tuple[str, ...]]:
    """Merge the sums in the forward of one module, in place.

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
    base = own.graph(())
    if base is None:
        return []
    sums = _Sums(model, owner, name, base, flow, values, check_values, inlined_names)
    merged = sums.merge()
    # The code of a graph turns `x += y` into `x = x + y`.
    if not merged or any(_is_augmented(node) for node in base.nodes):
        return []

    def merges_alike(graph: fx.Graph) -> bool:
        other = _Sums(model, owner, name, graph, flow, dict(values), check_values, inlined_names)
        return other.merge() == merged

    cases = sums.misfit() or _obstacle(own) or own.cases(base, merges_alike)
    if isinstance(cases, str):
        report.unmerged[name] = cases
        return []
    sums.write()
    set_forward(owner, cases, own.fixed())
    return merged


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


class _Sums:
    """The sums in one graph of a module's forward."""

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
        self.replaced: dict[nn.Module, nn.Module] = {}
        self.order: dict[fx.Node, int] = {}
        self.names = {module: path for path, module in model.named_modules()}
        self.calls: dict[nn.Module, int] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                module = owner.get_submodule(node.target)
                self.calls[module] = self.calls.get(module, 0) + 1

    def merge(self) -> list[tuple[str, ...]]:
        """Merge the sums of the graph. `write` changes the modules."""
        merged = []
        additions = [node for node in self.graph.nodes if _is_addition(node)]
        for node in additions:
            if not self._is_inner(node):
                self.order = {node: i for i, node in enumerate(self.graph.nodes)}
                merged += self._merge_sum(node)
        return merged

    def _is_inner(self, node: fx.Node) -> bool:
        """Whether a sum is a term of another sum."""
        users = uses(node)
        return len(users) == 1 and _is_addition(users[0])

    def _merge_sum(self, root: fx.Node) -> list[tuple[str, ...]]:
        nodes, terms = self._terms(root)
        branches = [self._branch(term) for term in terms]
        convolved = {b.source for b in branches if isinstance(b.module, _ConvNd)}
        merged = []
        rest: list[fx.Node] = []
        for source in sorted(convolved, key=self.order.__getitem__):
            group = self._compatible([b for b in branches if b.source is source])
            if len(group) < 2 or self._is_disturbed(root, nodes, group):
                continue
            accumulates = any(foldable.may_overwrite(node, None) for node in nodes)
            if accumulates and len(group) < len(branches):  # the dtype is that of the first term
                continue
            if not self._is_guarded(group):
                continue
            rest.append(self._write(root, source, group))
            merged.append(tuple(b.name for b in group if b.module is not None))
            for branch in group:
                branches.remove(branch)
        if not merged:
            return []
        with self.graph.inserting_before(root):
            total = rest[0]
            for term in [*rest[1:], *(b.added for b in branches)]:
                total = self.graph.call_function(add, (total, term))
        root.replace_all_uses_with(total)
        self._erase(root)
        return merged

    def _terms(self, root: fx.Node) -> tuple[set[fx.Node], list[fx.Node]]:
        """The additions of a sum, and their terms."""
        nodes, terms, todo = {root}, [], list(root.args)
        while todo:
            node = todo.pop(0)
            if isinstance(node, fx.Node):
                if _is_addition(node) and len(node.users) == 1:
                    nodes.add(node)
                    todo = list(node.args) + todo
                else:
                    terms.append(node)
        return nodes, terms

    def _branch(self, term: fx.Node) -> Term:
        """Read one term. A value that is no branch is the identity of itself."""
        itself = Term(term, term, term)
        node = term
        if self._is_check(node) and len(node.users) == 1:
            node = node.all_input_nodes[0]
        if node.op != "call_module" or len(node.users) != 1 or len(node.args) != 1 or node.kwargs:
            return itself
        module = self.owner.get_submodule(str(node.target))
        path = self.names[module]
        source, stride = node.all_input_nodes[0], 1
        if isinstance(module, _ConvNd) and set(module.kernel_size) == {1}:
            dims = len(module.kernel_size)
            source, stride = read_subsampling(source, dims) or (source, 1)
        calls = self.flow.calls.get(path, [])
        within = bool(calls) and all(self._is_own(call, path) for call in calls)
        known = read_geometry(module) is not None
        known = known and foldable.obstacle(module, values=self.check_values) is None
        if not within or not known or self.calls[module] != 1 or path in self.flow.reached:
            return itself
        return Term(term, source, node, module, path, stride)

    def _is_own(self, call: fx.Node, path: str) -> bool:
        """Whether a call stands in the forward, or in an inlined child."""
        callers = list(self.flow.callers[call])
        if self.name not in callers:
            return False
        between = set(callers[callers.index(self.name) + 1 :]) - {path}
        return between <= self.inlined

    def _is_check(self, node: fx.Node) -> bool:
        """Whether a node only checks the rank of its input."""
        return (
            node.op == "call_module"
            and type(self.owner.get_submodule(str(node.target))) is foldable.Rows
        )

    def _compatible(self, group: list[Term]) -> list[Term]:
        """The largest convolution of a group, and the branches that fit into it."""
        convolutions = [b for b in group if isinstance(b.module, _ConvNd)]
        main = max(convolutions, key=_num_taps)
        fitting = [b for b in group if b is not main and self._kernel(b, main) is not None]
        return [main, *fitting]

    def _kernel(self, branch: Term, main: Term) -> Affine | None:
        """The kernel of a branch in the geometry of the main one, in float64, or None."""
        conv = main.module
        assert isinstance(conv, _ConvNd)
        target, own = read_geometry(conv), read_geometry(branch.module, conv)
        assert target is not None
        small = small_kernel(branch.module, conv, self.values.get(branch.name))
        if own is None or small is None:
            return None
        wide = embed(
            small.kernel,
            own._replace(stride=tuple(s * branch.subsampling for s in own.stride)),
            target._replace(stride=tuple(s * main.subsampling for s in target.stride)),
        )
        return None if wide is None else Affine(wide, small.bias)

    def _is_disturbed(self, root: fx.Node, nodes: set[fx.Node], group: list[Term]) -> bool:
        """Whether a node may overwrite a value between its first use and the sum."""
        first = min(self.order[b.call] for b in group if b.module is not None)
        for node, position in self.order.items():
            module = None
            if node.op == "call_module":
                module = self.owner.get_submodule(str(node.target))
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
        return node in nodes or self._branch(node).module is not None

    def _is_guarded(self, group: list[Term]) -> bool:
        """Whether the merged branches check the rank of inputs as their BatchNorms do."""
        if any(b.module is not None and self._is_check(b.added) for b in group):
            return True
        for branch in group:
            if branch.module is not None and is_normalization(branch.module):
                found = read_normalization(branch.module)
                if isinstance(found, str) or not found.checks:
                    return False
        return True

    def _write(self, root: fx.Node, source: fx.Node, group: list[Term]) -> fx.Node:
        """Add a node that calls the merged convolution of a group."""
        main = group[0]
        old = main.module
        assert isinstance(old, _ConvNd)
        kernels = [self._kernel(branch, main) for branch in group]
        total = merge(*(kernel for kernel in kernels if kernel is not None))
        stride = tuple(s * main.subsampling for s in old.stride)
        # On the meta device: the weights are replaced, and the random state does not change.
        conv = _plain(type(old))(
            old.in_channels,
            old.out_channels,
            old.kernel_size,
            stride=stride,
            padding=old.padding,
            dilation=old.dilation,
            groups=old.groups,
            padding_mode=old.padding_mode,
            device="meta",
        )
        trains = any(has_trainable_bias(branch.module) for branch in group)
        kernel = foldable.in_format_of(old.weight, total.kernel)
        conv.weight = nn.Parameter(kernel, old.weight.requires_grad)
        conv.bias = nn.Parameter(total.bias.to(old.weight), trains)
        self.totals[main.name] = total
        target = str(main.call.target)
        self.replaced |= {b.module: nn.Identity() for b in group if b.module is not None}
        self.replaced[old] = conv.eval()
        checks = [b.added for b in group if b.module is not None and self._is_check(b.added)]
        with self.graph.inserting_before(root):
            node = self.graph.call_module(target, (source,))
            for check in checks[:1]:
                node = self.graph.call_module(str(check.target), (node,))
        return node

    def misfit(self) -> str | None:
        """Why a sum cannot be written in the dtype of its convolution, or None."""
        for name, total in self.totals.items():
            module = self.model.get_submodule(name)
            assert isinstance(module, _ConvNd)
            if reason := foldable.misfit(module, total):
                return f"{name}: {reason}"
        return None

    def write(self) -> None:
        """Put the merged convolutions in place, and identities for the other branches."""
        for old, new in self.replaced.items():
            put(self.model, old, new.eval())
            self.values.pop(self.names[old], None)
        self.values.update(self.totals)

    def _erase(self, root: fx.Node) -> None:
        """Remove a sum and the nodes that nothing else uses."""
        todo = [root]
        while todo:
            node = todo.pop()
            if not node.users and node.op != "placeholder":
                inputs = node.all_input_nodes
                self.graph.erase_node(node)
                todo += inputs


def _is_addition(node: fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method")
        and node.target in ADDITIONS
        and len(node.args) == 2
        and not node.kwargs
        and all(isinstance(a, fx.Node) or (isinstance(a, int) and a == 0) for a in node.args)
    )


def _num_taps(branch: Term) -> int:
    assert isinstance(branch.module, _ConvNd)
    return branch.module.weight[0, 0].numel()


def _plain(cls: type[_ConvNd]) -> Callable[..., _ConvNd]:
    """The class of torch that a convolution belongs to."""
    return next(base for base in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if issubclass(cls, base))


def _is_augmented(node: fx.Node) -> bool:
    """Whether a node is x += y or another augmented assignment."""
    if node.op != "call_function" or target_home(node) != "_operator":
        return False
    return foldable.may_overwrite(node, None)
