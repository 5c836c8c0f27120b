"""BatchNorms and parallel branches of any network, folded into its convolutions."""

import torch
from torch import Tensor, fx, nn

from repvgg import verify
from repvgg.fusion import dataflow, foldable, sums
from repvgg.fusion.batchnorms import Folding, FusionReport
from repvgg.fusion.copying import copied, plain_weights, require_images, require_network, unwrapped
from repvgg.fusion.errors import in_a_line
from repvgg.fusion.flags import Values, settings_to_try
from repvgg.fusion.hooks import ArgumentGuard
from repvgg.fusion.normalizations import is_normalization, read_once
from repvgg.fusion.surgery import put
from repvgg.reparam import Affine
from repvgg.verify import SAME


def fuse_conv_bn(model: nn.Module, images: Tensor | None = None) -> tuple[nn.Module, FusionReport]:
    """Copy a network and fold every BatchNorm of the copy that can be proven to allow it.

    BN(W*x + b) is one convolution (RepVGG, eq. 3), and so is W*BN(x) + b where no border is padded
    with zeros, and a sum of parallel convolutions of one x (section 3.3), x itself among them. What
    feeds what is read off the forward (`fusion.dataflow`), never off the order of children: a
    BatchNorm is folded into the convolutions that feed it if all it is ever given comes from them
    and all they ever give goes to it, along every way that the forward may take: by its arguments,
    by sizes and values that it tests, by flags (truth values, texts, numbers) of its modules.
    Kernels are computed in float64 and rounded once. Folding goes on until nothing more folds.

    The copy computes what `model` computes in eval mode; `model` does not change. A folded
    convolution keeps its name, and an `nn.Identity` (or what a normalization did besides
    normalizing, timm's activation) stands in the place of its BatchNorm. For BatchNorm1d and
    SyncBatchNorm it raises on inputs of which another axis would have been normalized. Where a sum
    was merged, the module whose forward adds becomes an instance of a subclass with a new forward,
    which works for every value of its flags or raises on those that it was not written for. Where a
    forward handles other arguments than tensors in ways that cannot be followed, the copy raises on
    them. `DistributedDataParallel` and `torch.compile` around the network are taken off.

    Assumed is that a network is used by calling it, not by single methods or parts of it, that its
    forward does not depend on what it did before, and that nobody replaces its layers afterwards.

    Args:
        images: an input of the network; if given, the copy is compared with `model` on it in
            float64. Recommended for networks that are not ours.

    Returns:
        the copy, in eval mode, and a report of what was fused, and of what was not and why.

    Raises:
        ValueError: the network is in training mode, was made by torch.export or torch.jit, cannot
            be copied, or (with `images`) the copy computes something else; the first module that
            differs is named.
    """
    require_network(model)
    require_images(images)
    model = unwrapped(model)
    if isinstance(model, fx.GraphModule) and _is_exported(model):
        raise ValueError(
            "the network is a program of torch.export, in which BatchNorms are no modules: call "
            "fuse_conv_bn on the network first, then export what it returns"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "the network is a program of TorchScript, whose layers cannot be changed: call "
            "fuse_conv_bn on the network first, then torch.jit.script or torch.jit.trace"
        )
    if model.training:
        raise ValueError(
            f"{type(model).__name__} is in training mode, where BatchNorm cannot be folded: "
            "call .eval() first, or pass copy.deepcopy(model).eval()"
        )
    fused, report = fuse_any(model, values=True)
    if images is not None:
        _require_equal(model, images)
    return fused, report


def _require_equal(model: nn.Module, images: Tensor) -> None:
    """Fold a copy of a network in float64, where no kernel is rounded, and compare it.

    Where it cannot run in float64, float32 has to do.

    Raises:
        ValueError: a module gives something else; the first one is named.
    """
    failed: Exception | None = None
    for dtype, tolerance in SAME.items():
        before = copied(model).to(dtype)
        try:
            before(images.to(dtype))
        except Exception as error:
            failed = error
            continue
        after, report = fuse_any(before, values=True)
        names = {name for name, _ in before.named_modules()} - report.moved
        found = verify.first_difference(
            before, after, images.to(dtype), tolerance=tolerance, among=names
        )
        if found is not None:
            raise ValueError(
                f"{found[0] or type(model).__name__}: the folded network gives something else on "
                f"these images, by {found[1]:.1e} of the largest value: please report it, and use "
                "the network as it is"
            )
        return
    assert failed is not None
    raise ValueError(
        f"{type(model).__name__} could not be run on images of shape {tuple(images.shape)} "
        f"({in_a_line(failed)}): pass an input as the network takes it"
    )


def _is_exported(model: fx.GraphModule) -> bool:
    """Whether torch.export made a network: it has operations of ATen and no modules."""
    return any(isinstance(node.target, torch._ops.OpOverload) for node in model.graph.nodes)


def fuse_any(model: nn.Module, *, values: bool) -> tuple[nn.Module, FusionReport]:
    """Fold a network as `fuse_conv_bn` does, whatever its mode.

    Args:
        values: whether the numbers count too; else the form alone, which the meta device has.
    """
    with torch.inference_mode(False), torch.no_grad():
        given = copied(model)
        plain_weights(given)
        modes = {name: module.training for name, module in given.named_modules()}
        given = _with_one_graph(given.eval())
        with read_once():
            return _fold_and_merge(given, modes, values)


def _fold_and_merge(
    network: nn.Module, modes: dict[str, bool], values: bool
) -> tuple[nn.Module, FusionReport]:
    """Fold pairs and merge sums in turn, until neither finds more."""
    report = FusionReport()
    exact: dict[str, Affine] = {}  # kernels in float64, by the names of their layers
    flow = dataflow.trace(network, foldable.is_leaf)
    flags = _flags(network, flow)
    if flags:
        flow = dataflow.trace(network, foldable.is_leaf, flags)
    while True:
        report.untraced.clear()
        report.untraced.update(flow.untraced)
        for name, module in network.named_modules():
            if is_normalization(module) and modes.get(name):
                flow.reached[name] = "it is in training mode: call .eval()"
        folded = dataflow.shared_copy(network)
        step = FusionReport()
        kernels = dict(exact)
        Folding(folded, flow, step, kernels, check_values=values).run()
        after = dataflow.trace(folded, foldable.is_leaf, flags) if step.fused else flow
        if not dataflow.equal(flow, after):
            reason = "some forward depends on what would be replaced (its class, or what it says)"
            step = FusionReport(kept={n: step.kept.get(n, reason) for n in _norms(network)})
            folded, after, kernels = network, flow, exact
        report.fused.extend(step.fused)
        report.kept.clear()
        report.kept.update(step.kept)
        network, exact = folded, kernels
        report.unmerged.clear()
        sums = _merge_all(network, after, exact, report, values, flags)
        if sums is None:
            break
        network, flow = sums
    _guard(network, flow)
    return network, report


def _merge_all(
    network: nn.Module,
    flow: dataflow.Dataflow,
    exact: dict[str, Affine],
    report: FusionReport,
    values: bool,
    flags: dataflow.Flags,
) -> tuple[nn.Module, dataflow.Dataflow] | None:
    """Merge sums of branches in every forward that adds; None where there are none."""
    merged = dataflow.shared_copy(network)
    kernels = dict(exact)
    merged_sums = [
        (owner, names)
        for owner in sums.owners(flow, network)
        for names in sums.merge_sums(
            merged, owner, flow, kernels, report, check_values=values, flags=flags
        )
    ]
    if not merged_sums:
        return None
    owners = {owner for owner, _ in merged_sums}

    def trace_around(network: nn.Module) -> dataflow.Dataflow:
        known = {network.get_submodule(owner) for owner in owners}
        return dataflow.trace(
            network, lambda module: module in known or foldable.is_leaf(module), flags
        )

    if not dataflow.equal(trace_around(network), trace_around(merged), apart_from=owners):
        report.unmerged.update(dict.fromkeys(owners, "another forward depends on what it is"))
        return None
    for _, names in merged_sums:
        report.merged.append(names)
        for name in names[1:]:
            if report.kept.pop(name, None) is not None:
                report.fused.append((names[0], name))
    exact.clear()
    exact.update(kernels)
    return merged, dataflow.trace(merged, foldable.is_leaf, flags)


def _flags(network: nn.Module, flow: dataflow.Dataflow) -> dict[str, list[Values]]:
    """Flags of the modules between a layer and the normalization that it feeds.

    They may decide whether the one still feeds the other.
    """
    names: set[str] = set()
    for name, calls in flow.calls.items():
        if not is_normalization(network.get_submodule(name)):
            continue
        for call in calls:
            for other in (*call.all_input_nodes, *dataflow.uses(call)):
                first, second = list(flow.callers[call]), list(flow.callers.get(other, {}))
                shared = 0
                while shared < min(len(first), len(second)) and first[shared] == second[shared]:
                    shared += 1
                names |= {*first[max(0, shared - 1) :], *second[max(0, shared - 1) :]}
    found = {name: settings_to_try(network.get_submodule(name)) for name in names}
    return {name: tries for name, tries in found.items() if tries}


def _with_one_graph(network: nn.Module) -> nn.Module:
    """Give GraphModules that swap graphs with their mode (torchvision's) the one of eval mode."""
    for module in list(network.modules()):
        if isinstance(module, fx.GraphModule) and "train_graph" in vars(module):
            plain = fx.GraphModule(module, module.graph, type(module).__name__).eval()
            if module is network:
                return plain
            put(network, module, plain)
    return network


def _guard(network: nn.Module, flow: dataflow.Dataflow) -> None:
    """Let the network raise on arguments that its forward was not followed for."""
    if flow.assumed:
        network.register_forward_pre_hook(ArgumentGuard(flow.assumed), with_kwargs=True)


def _norms(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if is_normalization(m)]
