"""Whole networks: from the form that trains to the form that is deployed."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from repvgg import branches, dataflow, linear
from repvgg.reparam import Affine

Model = TypeVar("Model", bound=nn.Module)


def switch_to_deploy(model: Model) -> Model:
    """Copy a network and fold every re-parameterizable block of the copy.

    Every module that has a method `switch_to_deploy()` is switched, innermost first. One that was
    made by `over_parameterize` gives its place back to the layers that it replaced. The copy
    computes what `model` computes in eval mode; `model` itself does not change, so its optimizer
    and EMA stay valid.

    Returns:
        the copy, in eval mode.

    Raises:
        ValueError: the network has nothing to switch, or a BatchNorm without running statistics;
            the block is named.
    """
    model = copy.deepcopy(model)
    switches = _switches(model)
    if not switches:
        raise ValueError(
            f"{type(model).__name__} has no block to switch: "
            "no module of it has a method switch_to_deploy()"
        )
    for name, module in reversed(switches):
        try:
            module.switch_to_deploy()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if hasattr(module, "originals"):
            for old, new in module.originals():
                branches.put(model, old, new)
    return model.eval()


def deployed_form(model: nn.Module) -> tuple[nn.Module, "FusionReport"]:
    """Copy a network, switch its blocks and fold every other BatchNorm that allows it.

    Unlike `fuse_conv_bn` this folds statistics that were never updated, and on the meta device it
    gives the form alone: what a file of deployed weights is loaded into.

    Returns:
        the copy, in eval mode, and the report of `fuse_conv_bn`.

    Raises:
        ValueError: as `switch_to_deploy` and `fuse_conv_bn`.
    """
    model = switch_to_deploy(model) if _switches(model) else copy.deepcopy(model).eval()
    if not any(linear.is_normalization(module) for module in model.modules()):
        return model, FusionReport()
    return _fuse(model, values=False)


def _switches(model: nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "switch_to_deploy")
    ]


@torch.no_grad()
def reestimate_bn(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of every BatchNorm by those of given images, in place.

    All but the BatchNorms is in eval mode meanwhile (torch's `update_bn` leaves dropout on), so the
    statistics are those of the network without its training noise: what is folded after training
    with `branch_drop` or `drop_path`.
    They are plain averages over the batches ("precise BN", Wu and Johnson, 2021, arXiv:2105.07576,
    section 3). Weights, modes and momenta stay, and the statistics of a BatchNorm that no image
    reaches.

    Args:
        batches: of images (N, C, H, W), as the network takes them; a few thousand images suffice.

    Raises:
        ValueError: there is no batch. Whatever is raised, the statistics are then the old ones.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    modes = {module: module.training for module in model.modules()}
    momenta = [bn.momentum for bn in norms]
    old = [[buffer.clone() for buffer in bn.buffers()] for bn in norms]
    model.eval()
    for bn in norms:
        bn.reset_running_stats()
        bn.train()
        bn.momentum = None  # a plain average
    done = False
    try:
        for images in batches:
            model(images)
            done = True
        if not done:
            raise ValueError("there is no batch of images to estimate statistics from")
    except BaseException:
        done = False
        raise
    finally:
        for module, training in modes.items():
            module.training = training
        for bn, momentum, buffers in zip(norms, momenta, old, strict=True):
            bn.momentum = momentum
            if not done or bn.num_batches_tracked == 0:  # an auxiliary classifier's did not run
                for buffer, before in zip(bn.buffers(), buffers, strict=True):
                    buffer.copy_(before)


@dataclass(frozen=True)
class FusionReport:
    """What `fuse_conv_bn` did. Modules are known by their names in the network.

    Attributes:
        fused: pairs of a convolution or linear layer and a normalization, in the order in which
            they ran; they are one module now, under the name of the convolution.
        merged: convolutions and what was added to them, one module now, which has the first name.
        kept: every normalization that is left, and why.
        untraced: modules whose forward could not be followed, and why; inside them less is fused.
    """

    fused: list[tuple[str, str]] = field(default_factory=list)
    merged: list[tuple[str, ...]] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    untraced: dict[str, str] = field(default_factory=dict)

    @property
    def moved(self) -> set[str]:
        """Modules whose own outputs are others than before, as another one does their part."""
        moved = {name for names in self.merged for name in names}
        for place, (first, second) in enumerate(self.fused):
            moved.add(first)
            if any(first == later for later, _ in self.fused[place + 1 :]):
                moved.add(second)  # one BatchNorm behind another
        return moved


def fuse_conv_bn(model: nn.Module) -> tuple[nn.Module, FusionReport]:
    """Copy a network and fold every BatchNorm of the copy that can be proven to allow it.

    BN(W*x + b) is one convolution (RepVGG, eq. 3), and so is W*BN(x) + b where no border is padded
    with zeros, and a sum of parallel convolutions of one x (section 3.3), x itself among them. What
    feeds what is read off the forward (`repvgg.dataflow`), never off the order of children: a
    BatchNorm is folded into the convolutions that feed it if all it is ever given comes from them
    and all they ever give goes to it.

    The copy computes what `model` computes in eval mode; `model` does not change. A folded
    convolution keeps its name, and an `nn.Identity` (or what a normalization did besides
    normalizing, timm's activation) stands in the place of its BatchNorm. For BatchNorm1d and
    SyncBatchNorm it refuses inputs of which another axis would have been normalized. Where a sum
    was merged, the module whose forward adds gets a forward that was written anew. At the end the
    copy is followed again: if it takes other steps than `model`, because a forward asks what its
    modules are, nothing is fused. Assumed is that a network is used by calling it, not by single
    methods or parts of it, and that its forward does not depend on what it did before.

    Returns:
        the copy, in eval mode, and a report of what was fused, and of what was not and why.

    Raises:
        ValueError: the network is in training mode, or cannot be copied: it has lazy parameters
            that were never initialized, or weights that a hook computes (pruning, old weight_norm).
    """
    if model.training:
        raise ValueError(
            f"{type(model).__name__} is in training mode, where BatchNorm cannot be folded: "
            "call .eval() first, or pass copy.deepcopy(model).eval()"
        )
    return _fuse(model, values=True)


def _fuse(model: nn.Module, *, values: bool) -> tuple[nn.Module, FusionReport]:
    for name, module in model.named_modules():
        _require_copyable(name, module)
    given = dataflow.copied(model)
    training = {
        name
        for name, module in given.named_modules()
        if module.training and linear.is_normalization(module)
    }
    given.eval()
    flow = dataflow.trace(given, linear.is_step)
    for name in training:
        flow.reached[name] = "it is in training mode: call .eval()"

    report = FusionReport(untraced=flow.untraced)
    folded = dataflow.shared_copy(given)
    _Folding(folded, flow, report, values).run()
    after = dataflow.trace(folded, linear.is_step)
    if not dataflow.equal(flow, after):
        reason = "some forward depends on what would be replaced (its class, or what it says)"
        kept = {name: report.kept.get(name, reason) for name in _norms(given)}
        return given, FusionReport(kept=kept, untraced=flow.untraced)

    merged = dataflow.shared_copy(folded)
    sums = _merge_sums(merged, after, values)
    if not sums:
        return folded, report
    owners = {owner for owner, _ in sums}

    def trace_around(network: nn.Module) -> dataflow.Dataflow:
        known = {network.get_submodule(owner) for owner in owners}
        return dataflow.trace(network, lambda module: module in known or linear.is_step(module))

    if not dataflow.equal(trace_around(folded), trace_around(merged), apart_from=owners):
        return folded, report
    for _, names in sums:
        report.merged.append(names)
        for name in names[1:]:
            if report.kept.pop(name, None) is not None:
                report.fused.append((names[0], name))
    return merged, report


def _require_copyable(name: str, module: nn.Module) -> None:
    """Refuse what holds no numbers of its own."""
    tensors = dataflow.own_tensors(module).values()
    if any(isinstance(t, UninitializedBuffer | UninitializedParameter) for t in tensors):
        raise ValueError(f"{name} is not initialized: run the network once")
    for key, value in vars(module).items():
        computed = any(f"{key}{end}" in module._parameters for end in ("_orig", "_g", "_v"))
        if isinstance(value, Tensor) and value.grad_fn is not None and computed:
            raise ValueError(
                f"{name}.{key} is computed by a hook: make it permanent first "
                "(torch.nn.utils.prune.remove, remove_weight_norm, remove_spectral_norm)"
            )


def _norms(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if linear.is_normalization(m)]


def _merge_sums(
    model: nn.Module, flow: dataflow.Dataflow, values: bool
) -> list[tuple[str, tuple[str, ...]]]:
    """Merge sums of branches in every forward that adds; the owners and names of each."""
    return [
        (owner, names)
        for owner in branches.owners(flow)
        for names in branches.merge_sums(model, owner, flow, values=values)
    ]


class _Folding:
    """Folds pairs until no more can be; sums stay in float64 until they are written."""

    def __init__(
        self, model: nn.Module, flow: dataflow.Dataflow, report: FusionReport, of_values: bool
    ) -> None:
        self.modules = dict(model.named_modules())
        self.model = model
        self.flow = flow
        self.report = report
        self.of_values = of_values
        self.values: dict[str, Affine] = {}

    def run(self) -> None:
        pending = [name for name, m in self.modules.items() if linear.is_normalization(m)]
        readings = {name: linear.read_normalization(self.modules[name]) for name in pending}
        progress = True
        while progress:
            progress = False
            for fold in (self._fold_behind, self._fold_before):
                for name in list(pending):
                    found = readings[name]
                    reason = found if isinstance(found, str) else self._refuse(name)
                    if reason is None and isinstance(found, linear.Normalization):
                        reason = fold(name, found)
                    if reason is None:
                        pending.remove(name)
                        self.report.kept.pop(name, None)
                        progress = True
                    elif fold == self._fold_behind:
                        self.report.kept[name] = reason
        for name, value in self.values.items():
            module = self.modules[name]
            assert linear.is_linear(module)
            linear.write(module, value)

    def _fold_behind(self, name: str, found: linear.Normalization) -> str | None:
        """Fold a normalization into all that feeds it; or why not."""
        calls = self.flow.calls.get(name, [])
        if name in self.flow.reached:
            return self.flow.reached[name]
        if not calls:
            return "nothing calls it"
        sources: dict[str, None] = {}
        for call in calls:
            given = call.all_input_nodes
            if call.kwargs:
                return "it is called with keywords"
            source = self.flow.called(given[0]) if len(given) == 1 else None
            module = None if source is None else self.modules[source]
            if source is None or not isinstance(module, nn.Linear | _ConvNd):
                return f"it is fed by {self._describe(given)}, not by a convolution"
            if not linear.is_linear(module):
                return f"{source}: {self._refuse(source) or 'it has code of its own'}"
            sources[source] = None
        values = {}
        for source in sources:
            module = self.modules[source]
            assert linear.is_linear(module)
            reason = self._refusal(source, calls) or self._mismatch(module, found)
            if reason is not None:
                return f"{source}: {reason}"
            value = linear.absorb_behind(self._value(source), found)
            if not linear.fits(module, value):
                return f"{source}: the folded numbers overflow {module.weight.dtype}"
            values[source] = value
        ndims = {self._ndim(self.modules[source]) for source in sources}
        if len(ndims) > 1:
            return "it is fed by convolutions of different dimensions"
        self._take(name, found, calls, values, ndims.pop(), [(source, name) for source in sources])
        return None

    def _fold_before(self, name: str, found: linear.Normalization) -> str | None:
        """Fold a normalization into the one that it feeds; or why not."""
        calls = self.flow.calls.get(name, [])
        if name in self.flow.reached or not calls or found.tail or found.dtype is not None:
            return "it cannot be folded into what is behind it"
        targets: dict[str, None] = {}
        for call in calls:
            users = dataflow.uses(call)
            if call.kwargs or len(call.args) != 1:
                return "it is called with keywords"
            target = self.flow.called(users[0]) if len(users) == 1 else None
            if target is None or not linear.is_linear(self.modules[target]):
                return "it does not feed a convolution alone"
            if self._is_overwritten_between(call, users[0]):
                return "something in between may work in place"
            targets[target] = None
        if len(targets) > 1:
            return "it feeds several convolutions"
        (target,) = targets
        module = self.modules[target]
        assert linear.is_linear(module)
        fed = {user for call in calls for user in dataflow.uses(call)}
        if target in self.flow.reached or self._refuse(target) is not None:
            return "the convolution may not be changed"
        if set(self.flow.calls[target]) != fed or linear.pads_with_zeros(module):
            return "the convolution has other inputs, or pads its border with zeros"
        channels = getattr(module, "in_channels", getattr(module, "in_features", None))
        if self._mismatch(module, found, channels) is not None:
            return "the convolution does not fit"
        value = linear.absorb_before(module, self._value(target), found)
        if not linear.fits(module, value):
            return "the folded numbers overflow"
        ndim = self._ndim(module)
        self._take(name, found, calls, {target: value}, ndim, [(name, target)])
        return None

    def _refusal(self, source: str, calls: list[fx.Node]) -> str | None:
        """Why the output of a convolution may not be changed."""
        if source in self.flow.reached:
            return self.flow.reached[source]
        others = {
            user
            for call in self.flow.calls[source]
            for user in dataflow.uses(call) or [call]
            if user not in calls
        }
        if others:
            return f"its output is also used by {self._describe(others)}"
        return self._refuse(source)

    def _refuse(self, name: str) -> str | None:
        return linear.refusal(self.modules[name], values=self.of_values)

    def _is_overwritten_between(self, first: fx.Node, last: fx.Node) -> bool:
        """Whether the input of the first step may have changed when the last one runs."""
        node = first.next
        while node is not last:
            called = self.flow.called(node)
            if linear.may_overwrite(node, None if called is None else self.modules[called]):
                return True
            node = node.next
        return False

    def _mismatch(
        self, module: linear.Linear, found: linear.Normalization, channels: int | None = None
    ) -> str | None:
        """Why a normalization does not work on the channels of a convolution."""
        if channels is None:
            channels = getattr(module, "out_channels", getattr(module, "out_features", None))
        dims = linear.dimensions(module)
        if found.dims is not None and found.dims != (dims or 1):
            return "the normalization is for inputs of other dimensions"
        if channels != len(found.scale):
            return "the normalization has another number of channels"
        if found.dtype is not None and found.dtype != module.weight.dtype:
            return "the normalization works in another precision"
        if module.weight.device != found.scale.device:
            return "it is on another device than the normalization"
        return None

    def _take(
        self,
        name: str,
        found: linear.Normalization,
        calls: list[fx.Node],
        values: dict[str, Affine],
        ndim: int,
        pairs: list[tuple[str, str]],
    ) -> None:
        self.values |= values
        self.report.fused.extend(pairs)
        old = self.modules[name]
        self.modules[name] = linear.replacement(old, found, ndim)
        branches.put(self.model, old, self.modules[name])
        if not found.tail:
            for call in calls:
                call.replace_all_uses_with(call.all_input_nodes[0])
                call.graph.erase_node(call)

    def _value(self, name: str) -> Affine:
        module = self.modules[name]
        assert linear.is_linear(module)
        return self.values[name] if name in self.values else linear.affine(module)

    def _ndim(self, module: nn.Module) -> int:
        assert linear.is_linear(module)
        return 2 + linear.dimensions(module)

    def _describe(self, nodes: Iterable[fx.Node]) -> str:
        """The steps, for the reader."""
        shown = sorted(self.flow.called(node) or _kind(node) for node in nodes)
        return ", ".join(shown) or "nothing"


def _kind(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"the input {node.target}"
    if node.op == "output":
        return "the output"
    return getattr(node.target, "__name__", str(node.target))
