"""Rewrites the forward of a module: its graph, and from it new code for each value of its flags."""

import abc
import inspect
from collections import Counter
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import fx, nn

from repvgg.fusion import foldable
from repvgg.fusion.bytecode import is_decorated
from repvgg.fusion.chains import Layer, is_layer
from repvgg.fusion.dataflow import Dataflow, Flags
from repvgg.fusion.flags import global_flags
from repvgg.fusion.hooks import has_hooks
from repvgg.fusion.kinds import target_home
from repvgg.fusion.own_forward import OwnForward, inlined_children, is_own
from repvgg.fusion.report import FusionReport
from repvgg.fusion.surgery import set_forward
from repvgg.fusion.terms import is_sum
from repvgg.reparam import Affine


class Place(NamedTuple):
    """The module whose forward is rewritten, in its network.

    Attributes:
        flow: of the network.
        values: kernels in float64 of layers whose weights are rounded, by name.
        check_values: as `values` in `repvgg.fusion.foldable.obstacle`.
        inlined: names of the children whose layers count as the module's own.
        names: of all modules.
    """

    model: nn.Module
    owner: nn.Module
    name: str
    flow: Dataflow
    values: dict[str, Affine]
    check_values: bool
    inlined: set[str]
    names: Mapping[nn.Module, str]


class Rewriter(abc.ABC):
    """Rewrites one graph of a module's forward, and then its modules.

    Attributes:
        of_numbers: whether numbers of the module are constants at once. Otherwise they are only if
            nothing is merged without them, as factors; then they must not change any more.
        costlier: as in `FusionReport`.
        totals: kernels in float64 of the layers that the graph then calls, by name.
    """

    of_numbers: ClassVar[bool]

    def __init__(self, place: Place, graph: fx.Graph) -> None:
        self.place = place
        self.graph = graph
        self.costlier: dict[str, str] = {}
        self.totals: dict[str, Affine] = {}
        self._read = self._tensors()
        modules = map(self.module, graph.nodes)
        self._calls = Counter(module for module in modules if module is not None)

    @abc.abstractmethod
    def merge(self) -> list[tuple[str, ...]]:
        """Rewrite the graph; the names of what was merged, first what remains."""

    @abc.abstractmethod
    def write(self) -> None:
        """Change the modules as the graph needs it."""

    @abc.abstractmethod
    def layer(self, name: str) -> Layer:
        """The layer of a name in `totals`, for its dtype."""

    def misfit(self) -> str | None:
        """Why a kernel cannot be written in the dtype of its layer, or None."""
        for name, total in self.totals.items():
            if reason := foldable.misfit(self.layer(name), total):
                return f"{name}: {reason}"
        return None

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        calls = node.op == "call_module"
        return self.place.owner.get_submodule(str(node.target)) if calls else None

    def is_own(self, module: nn.Module) -> bool:
        """Whether one node of this forward alone calls a module, which can be folded."""
        path = self.place.names[module]
        return (
            self._calls[module] == 1
            and is_own(self.place.flow, path, self.place.name, self.place.inlined)
            and foldable.obstacle(module, values=self.place.check_values) is None
        )

    def drop_unread(self) -> None:
        """Remove the parameters and buffers that the graph does not read any more."""
        for target in self._read - self._tensors():
            path, _, key = target.rpartition(".")
            holder = self.place.owner.get_submodule(path)
            if not self.is_used_elsewhere(holder, key):
                for tensors in (holder._parameters, holder._buffers):
                    if key in tensors:
                        tensors[key] = None

    def is_used_elsewhere(self, holder: nn.Module, key: str) -> bool:
        """Whether a layer uses a tensor of its own, or another forward does."""
        flow, names = self.place.flow, self.place.names
        if holder not in names or names[holder] in flow.calls:
            return True
        name = f"{names[holder]}.{key}".removeprefix(".")
        readers = [node for node, read in flow.names.items() if read.removeprefix(".") == name]
        return any([*flow.callers[node]][-1] != self.place.name for node in readers)

    def _tensors(self) -> set[str]:
        return {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}


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
    within = {names[module] for module in inlined}
    place = Place(model, owner, name, flow, values, check_values, within, names)
    own = OwnForward(owner, model, name, flow, flags or {}, inlined)
    if not own.is_consistent():
        return []
    for reads in ([],) if rewriter.of_numbers else (own.reads, []):
        own.reads = reads
        base = own.graph(())
        if base is None:
            return []
        sums = rewriter(place, base)
        merged = sums.merge()
        if merged:
            break
    assert base is not None
    report.costlier.update(sums.costlier)
    # The code of a graph turns `x += y` into `x = x + y`.
    if not merged or any(
        _is_augmented(node) and not _overwrites_fresh(node, owner) for node in base.nodes
    ):
        return []

    def merges_alike(graph: fx.Graph) -> bool:
        other = rewriter(place, graph)
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


def _overwrites_fresh(node: fx.Node, owner: nn.Module) -> bool:
    """Whether nothing else holds the tensor that an augmented assignment overwrites."""
    first = node.args[0]
    if not isinstance(first, fx.Node) or len(first.users) != 1:
        return False
    if first.op == "call_module":
        return is_layer(owner.get_submodule(str(first.target)))
    return is_sum(first) and (not _is_augmented(first) or _overwrites_fresh(first, owner))


def _is_augmented(node: fx.Node) -> bool:
    """Whether a node is x += y or another augmented assignment."""
    if node.op != "call_function" or target_home(node) != "_operator":
        return False
    return foldable.may_overwrite(node, None)
