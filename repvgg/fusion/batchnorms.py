"""Folds BatchNorms, one by one, into the convolutions before or after them."""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from repvgg.fusion import dataflow, foldable
from repvgg.fusion.attributes import has_trainable_bias
from repvgg.fusion.flags import plain_attributes
from repvgg.fusion.kinds import either, other_output, target_name
from repvgg.fusion.normalizations import Normalization, is_normalization, read_normalization
from repvgg.fusion.pass_through import PassThrough, read_pass_through, source_of
from repvgg.fusion.paths import exclude_each_other
from repvgg.fusion.report import FusionReport
from repvgg.fusion.surgery import put
from repvgg.reparam import Affine


class Folding:
    """Folds pairs until no more can be. Kernels stay in float64 and are rounded when written.

    Args:
        values: kernels in float64 of layers that were folded before, by name. It is extended.
        check_values: whether the numbers matter, or only the architecture (meta device).
    """

    def __init__(
        self,
        model: nn.Module,
        flow: dataflow.Dataflow,
        report: FusionReport,
        values: dict[str, Affine],
        *,
        check_values: bool,
    ) -> None:
        self.modules = dict(model.named_modules())
        self.model = model
        self.flow = flow
        self.report = report
        self.check_values = check_values
        self.values = values
        self.changed: set[str] = set()
        self.trains: dict[str, bool] = {}  # whether the folded normalization has a trainable bias

    def run(self) -> None:
        """Fold what can be folded, and write the kernels."""
        pending = [name for name, m in self.modules.items() if is_normalization(m)]
        readings = {name: read_normalization(self.modules[name]) for name in pending}
        progress = True
        while progress:
            progress = False
            for fold in (self._fold_into_inputs, self._fold_into_output):
                for name in list(pending):
                    found = readings[name]
                    reason = found if isinstance(found, str) else self.obstacle(name)
                    if reason is None and isinstance(found, Normalization):
                        reason = fold(name, found)
                    if reason is None:
                        pending.remove(name)
                        self.report.kept.pop(name, None)
                        progress = True
                    elif fold == self._fold_into_inputs:
                        self.report.kept[name] = reason
        for name in self.changed:
            module = self.modules[name]
            assert foldable.is_linear(module)
            foldable.write(module, self.values[name], self.trains.get(name, False))

    def _fold_into_inputs(self, name: str, found: Normalization) -> str | None:
        """Fold a normalization into all layers before it, or return why not."""
        calls = self.flow.calls.get(name, [])
        if name in self.flow.reached:
            return self.flow.reached[name]
        if not calls:
            return "nothing calls it"
        feeds: dict[str, list[_Feed]] = {}
        for call in calls:
            given = call.all_input_nodes
            if call.kwargs:
                return "it is called with keyword arguments"
            feed = self._trace_back(call, len(found.scale)) if len(given) == 1 else None
            source = None if feed is None else self.flow.called(feed.origin)
            module = None if source is None else self.modules[source]
            if feed is None or source is None or not isinstance(module, nn.Linear | _ConvNd):
                return self._not_a_layer(given if feed is None else [feed.origin])
            if not foldable.is_linear(module):
                return f"{source}: {self.obstacle(source) or 'its class overrides code of torch'}"
            feeds.setdefault(source, []).append(feed)
        values = {}
        ndims = set()
        for source, routes in feeds.items():
            module = self.modules[source]
            assert foldable.is_linear(module)
            reason = self._output_obstacle(source, routes) or self._mismatch(
                module, found, ndim=routes[0].ndim
            )
            if reason is not None:
                return f"{source}: {reason}"
            if len({feed.passing for feed in routes}) > 1:
                return f"{source}: its outputs are scaled or reshaped in several ways"
            passing = routes[0].passing
            if passing.from_last != (isinstance(module, nn.Linear) and passing.ndim is not None):
                return f"{source}: its output is reshaped, but its number of axes is unknown"
            if passing.dtype not in (None, module.weight.dtype):
                return f"{source}: its output is cast to {passing.dtype}"
            ndims.add(passing.ndim or self._ndim(module))
            # The nodes in between stay: p(inner(y)) = norm(p(y)) for their scale and shift p.
            shift = found.scale * passing.shift + found.shift - passing.shift
            inner = replace(found, shift=shift / passing.scale)
            value = foldable.fold_following(self.value(source), inner)
            if misfit := foldable.misfit(module, value):
                return f"{source}: {misfit}"
            values[source] = value
        if len(ndims) > 1:
            return "it is fed by convolutions of different dimensions"
        self._replace(name, found, calls, values, ndims.pop(), [(source, name) for source in feeds])
        return None

    def _is_an_attribute(self, node: fx.Node) -> bool:
        """Whether a constant of a node may be an attribute of its module, which may change."""
        numbers = [value for value in node.args if isinstance(value, int | float)]
        home = self.modules[list(self.flow.callers[node])[-1]]
        held = [value for value in plain_attributes(home).values() if type(value) in (int, float)]
        return any(number == value for number in numbers for value in held)

    def _not_a_layer(self, nodes: list[fx.Node]) -> str:
        shown = self._names(nodes)
        names = [target_name(node) for node in nodes if node.op == "call_function"]
        if any(name.startswith("conv") or name in ("linear", "addmm") for name in names):
            return (
                f"it is fed by {shown}, called as a function: only the weights of a layer "
                "(nn.Conv2d, nn.Linear) can be changed"
            )
        return f"it is fed by {shown}, which is no convolution or linear layer"

    def _trace_back(self, call: fx.Node, channels: int) -> "_Feed | None":
        """Go from a normalization back to the layer before it, past nodes that pass values on."""
        total = PassThrough()
        user, node = call, call.all_input_nodes[0]

        def get_module(node: fx.Node) -> nn.Module | None:
            name = self.flow.called(node)
            return None if name is None else self.modules[name]

        while True:
            name = self.flow.called(node)
            if name is not None and isinstance(self.modules.get(name), nn.Linear | _ConvNd):
                return _Feed(node, user, total)
            passing = read_pass_through(node, channels, get_module)
            source = source_of(node)
            may_change = passing not in (None, PassThrough()) and self._is_an_attribute(node)
            if passing is None or source is None or may_change or dataflow.uses(node) != [user]:
                return _Feed(node, user, total) if total == PassThrough() else None
            if None not in (passing.dtype, total.dtype) and passing.dtype != total.dtype:
                return None
            if total.from_last and passing.ndim is not None:
                return None
            # Later nodes come first here: total(passing(y)).
            total = PassThrough(
                total.scale * passing.scale,
                total.scale * passing.shift + total.shift,
                total.ndim or passing.ndim,
                total.dtype or passing.dtype,
                total.from_last or passing.from_last,
            )
            user, node = node, source

    def _fold_into_output(self, name: str, found: Normalization) -> str | None:
        """Fold a normalization into the layer after it, or return why not."""
        calls = self.flow.calls.get(name, [])
        if name in self.flow.reached or not calls or found.tail or found.dtype is not None:
            return "it cannot be folded into the layer after it"
        targets: dict[str, None] = {}
        for call in calls:
            users = dataflow.uses(call)
            if call.kwargs or len(call.args) != 1:
                return "it is called with keyword arguments"
            names = {self.flow.called(user) for user in users}
            target = names.pop() if len(names) == 1 else None
            if target is None or not foldable.is_linear(self.modules[target]):
                return "its output is not used by a convolution alone"
            if any(self.is_overwritten_between(call, user) for user in users):
                return "a node in between may overwrite its input"
            targets[target] = None
        if len(targets) > 1:
            return "its output is used by several convolutions"
        (target,) = targets
        module = self.modules[target]
        assert foldable.is_linear(module)
        fed = {user for call in calls for user in dataflow.uses(call)}
        if target in self.flow.reached or self.obstacle(target) is not None:
            return "the convolution cannot be folded"
        if set(self.flow.calls[target]) != fed or foldable.pads_with_zeros(module):
            return "the convolution has other inputs, or pads its border with zeros"
        if self._mismatch(module, found, foldable.in_channels(module)) is not None:
            return "the convolution does not fit"
        value = foldable.fold_preceding(module, self.value(target), found)
        if misfit := foldable.misfit(module, value):
            return misfit
        ndim = self._ndim(module)
        self._replace(name, found, calls, {target: value}, ndim, [(name, target)])
        return None

    def _output_obstacle(self, source: str, routes: "list[_Feed]") -> str | None:
        """Why the output of a convolution cannot change, or None."""
        if source in self.flow.reached:
            return self.flow.reached[source]
        expected = {feed.user for feed in routes}
        others = {
            user
            for call in self.flow.calls[source]
            for user in dataflow.uses(call) or [call]
            if user not in expected
        }
        if others:
            return f"its output is also used by {self._names(others)}"
        return self.obstacle(source)

    def obstacle(self, name: str) -> str | None:
        return foldable.obstacle(self.modules[name], values=self.check_values)

    def is_overwritten_between(self, first: fx.Node, last: fx.Node) -> bool:
        """Whether the input of the first node may have changed when the last one runs."""
        node = first.next
        while node is not last:
            called = self.flow.called(node)
            excluded = exclude_each_other(node, first) or exclude_each_other(node, last)
            module = None if called is None else self.modules.get(called)
            if not excluded and foldable.may_overwrite(node, module):
                return True
            node = node.next
        return False

    def _mismatch(
        self,
        module: foldable.Linear,
        found: Normalization,
        channels: int | None = None,
        ndim: int | None = None,
    ) -> str | None:
        """Why a normalization does not fit a convolution, or None."""
        if channels is None:
            channels = foldable.out_channels(module)
        dims = foldable.dimensions(module) if ndim is None else ndim - 2
        if found.dims is not None and found.dims != (dims or 1):
            return "the normalization is for inputs of other dimensions"
        if channels != len(found.scale):
            return "the normalization has another number of channels"
        if found.dtype is not None and found.dtype != module.weight.dtype:
            return "the normalization works in another precision"
        if module.weight.device != found.scale.device:
            return "it is on another device than the normalization"
        return None

    def _replace(
        self,
        name: str,
        found: Normalization,
        calls: list[fx.Node],
        values: dict[str, Affine],
        ndim: int,
        pairs: list[tuple[str, str]],
    ) -> None:
        self.values |= values
        self.changed |= values.keys()
        self.report.fused.extend(pairs)
        old = self.modules[name]
        for source in values:  # a new bias of the layer replaces that of the normalization
            self.trains[source] = self.trains.get(source, False) or has_trainable_bias(old)
        self.modules[name] = foldable.replacement(old, found, ndim)
        put(self.model, old, self.modules[name])
        if not found.tail:
            for call in calls:
                if isinstance(self.modules[name], foldable.Rows):
                    self.flow.checked.update(call.all_input_nodes)
                dataflow.erase(call)

    def value(self, name: str) -> Affine:
        module = self.modules[name]
        assert foldable.is_linear(module)
        return self.values[name] if name in self.values else foldable.affine(module)

    def _ndim(self, module: nn.Module) -> int:
        assert foldable.is_linear(module)
        return 2 + foldable.dimensions(module)

    def _names(self, nodes: Iterable[fx.Node]) -> str:
        """The nodes as text for a message."""
        shown = set()
        for node in nodes:
            if node.target is either:
                inputs = sorted({self.flow.called(n) or _text(n) for n in node.all_input_nodes})
                shown.add(f"{' or '.join(inputs)} (a flag or condition decides)")
            else:
                shown.add(self.flow.called(node) or _text(node))
        return ", ".join(sorted(shown)) or "nothing"


def _text(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"the input {node.target}"
    if node.op == "output":
        return "the output of the network"
    if node.target is either:
        return "one of several values (a flag or condition decides which)"
    if node.target is other_output:
        return "the output of the forward when a flag is set"
    name = target_name(node)
    return f"{name}()" if node.op in ("call_function", "call_method") else name


class _Feed(NamedTuple):
    """How the output of a layer reaches a normalization.

    Attributes:
        origin: the node that calls the layer.
        user: the first node that takes its output.
        passing: the scale and shift of the nodes in between.
    """

    origin: fx.Node
    user: fx.Node
    passing: PassThrough

    @property
    def ndim(self) -> int | None:
        return self.passing.ndim
