"""Folds the BatchNorms and merges the parallel branches of any network."""

from collections.abc import Collection

import torch
from torch import Tensor, fx, nn

from repvgg import verify
from repvgg.fusion import dataflow, foldable, functions, sums
from repvgg.fusion.batchnorms import Folding
from repvgg.fusion.copying import copied, plain_weights, require_images, require_network, unwrapped
from repvgg.fusion.errors import in_a_line
from repvgg.fusion.flags import Values, settings_to_try
from repvgg.fusion.functions import Functions
from repvgg.fusion.hooks import ArgumentGuard
from repvgg.fusion.normalizations import is_normalization, read_once
from repvgg.fusion.report import FusionReport
from repvgg.fusion.rewriting import rewrite
from repvgg.fusion.sequences import merge_sequences
from repvgg.fusion.sums import Sums
from repvgg.fusion.surgery import put
from repvgg.reparam import Affine
from repvgg.verify import SAME


def fuse_conv_bn(model: nn.Module, images: Tensor | None = None) -> tuple[nn.Module, FusionReport]:
    """Copy a network, fold its BatchNorms and merge its parallel branches.

    BN(W*x + b) is one convolution (RepVGG, eq. 3). So is W*BN(x) + b, if the convolution does not
    pad with zeros, and two convolutions in sequence, if that is exact at the border and takes no
    more multiplications. So is a sum of such chains of x, scaled or subtracted, to which x may be
    added (section 3.3). Convolutions that are called as functions, with weights of parameters
    alone, become layers first.

    The forward is traced (`fusion.dataflow`); the order of children does not matter. A BatchNorm is
    folded into the convolutions before it if it has no other inputs, and they have no other users.
    That must hold on every path of the forward. Paths depend on arguments, on sizes and values that
    the forward tests, and on flags of its modules (booleans, strings, numbers). Kernels are
    computed in float64 and rounded once. Folding repeats until nothing changes.

    The copy computes what `model` computes in eval mode; `model` does not change.

    - A folded convolution keeps its name. An `nn.Identity` replaces its BatchNorm, or what else the
      normalization contained (timm's activation).
    - BatchNorm1d and SyncBatchNorm accept inputs of several ranks. Their replacement raises on
      inputs whose second axis is not that of the channels.
    - A module whose branches were merged becomes an instance of a subclass with a new forward. It
      supports every value of its flags, or raises.
    - If an argument may be other than a tensor, and that cannot be traced, the copy raises on it.
    - `DistributedDataParallel` and `torch.compile` around the network are removed.

    The fold assumes that users call the network, not its parts or other methods. It also assumes
    that the forward does not depend on earlier calls, and that no layer is replaced afterwards.

    Args:
        images: an input of the network. If given, the copy is compared with `model` on it in
            float64. Recommended for networks from elsewhere.

    Returns:
        the copy, in eval mode, and a report of what was folded and merged, and what was not and
        why.

    Raises:
        ValueError: the network is in training mode, comes from torch.export or torch.jit, or cannot
            be copied. With `images`: the outputs differ, and the first module that differs is
            named.
    """
    require_network(model)
    require_images(images)
    model = unwrapped(model)
    if isinstance(model, fx.GraphModule) and _is_exported(model):
        raise ValueError(
            "the network is a program of torch.export, in which BatchNorms are no modules: call "
            "fuse_conv_bn on the network first, then export the result"
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
    """Fold a copy of a network in float64, where no kernel is rounded, and compare the outputs.

    A network that cannot run in float64 is compared in float32.

    Raises:
        ValueError: the output of a module differs; the first one is named.
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
                f"{found[0] or type(model).__name__}: the output of the folded network differs on "
                f"these images, by {found[1]:.1e} of the largest value: please report this, and "
                "use the network without folding"
            )
        return
    assert failed is not None
    raise ValueError(
        f"{type(model).__name__} could not be run on images of shape {tuple(images.shape)} "
        f"({in_a_line(failed)}): pass an input that the network accepts"
    )


def _is_exported(model: fx.GraphModule) -> bool:
    """Whether a network comes from torch.export: its nodes call ATen operations, not modules."""
    return any(isinstance(node.target, torch._ops.OpOverload) for node in model.graph.nodes)


def fuse_any(model: nn.Module, *, values: bool) -> tuple[nn.Module, FusionReport]:
    """Fold a network as `fuse_conv_bn` does, in any mode.

    Args:
        values: whether the numbers matter, or only the architecture (meta device).
    """
    with torch.inference_mode(False), torch.no_grad():
        modes = {name: module.training for name, module in model.named_modules()}
        spared: set[str] = set()
        while True:
            network = copied(model)
            plain_weights(network)
            network = _with_one_graph(network.eval())
            with read_once():
                fused, report = _fold_and_merge(network, modes, values, spared)
            used = {name for names in (*report.fused, *report.merged) for name in names}
            owners = {name: name.rpartition(".")[0] for name in report.layers}
            useful = {owners[name] for name in report.layers if name in used}
            if not set(owners.values()) - useful:
                return fused, report
            spared |= set(owners.values()) - useful


def _fold_and_merge(
    network: nn.Module, modes: dict[str, bool], values: bool, spared: set[str]
) -> tuple[nn.Module, FusionReport]:
    """Fold pairs and merge sums in turn, until nothing changes.

    Args:
        spared: modules whose functions stay, as nothing is folded into them.
    """
    report = FusionReport()
    exact: dict[str, Affine] = {}  # kernels in float64, by the names of their layers
    flow = dataflow.trace(network, foldable.is_leaf)
    flags = _flags(network, flow)
    if flags:
        flow = dataflow.trace(network, foldable.is_leaf, flags)
    # Inner forwards first; the others see them changed in the next round.
    while layered := _rewrite_all(Functions, network, flow, exact, report, values, flags, spared):
        network, flow = layered
    while True:
        report.untraced.clear()
        report.untraced.update(flow.untraced)
        for name, module in network.named_modules():
            if is_normalization(module) and modes.get(name):
                flow.reached[name] = "it is in training mode: call .eval()"
        folded = dataflow.shared_copy(network)
        folds = FusionReport()
        kernels = dict(exact)
        folding = Folding(folded, flow, folds, kernels, check_values=values)
        folding.run()
        merge_sequences(folding)
        changed = folds.fused or folds.merged
        after = dataflow.trace(folded, foldable.is_leaf, flags) if changed else flow
        if not dataflow.equal(flow, after):
            reason = "a forward depends on the class or the attributes of a layer to replace"
            folds = FusionReport(kept={n: folds.kept.get(n, reason) for n in _norms(network)})
            folded, after, kernels = network, flow, exact
        report.fused.extend(folds.fused)
        report.merged.extend(folds.merged)
        report.costlier.clear()
        report.costlier.update(folds.costlier)
        report.kept.clear()
        report.kept.update(folds.kept)
        network, exact = folded, kernels
        report.unmerged.clear()
        merged = _rewrite_all(Sums, network, after, exact, report, values, flags)
        if merged is not None:
            network, flow = merged
        elif folds.fused or folds.merged:  # which may have made others possible
            flow = after
        else:
            break
    _guard(network, flow)
    return network, report


def _rewrite_all(
    rewriter: type[Sums | Functions],
    network: nn.Module,
    flow: dataflow.Dataflow,
    exact: dict[str, Affine],
    report: FusionReport,
    values: bool,
    flags: dict[str, list[Values]],
    spared: Collection[str] = (),
) -> tuple[nn.Module, dataflow.Dataflow] | None:
    """Rewrite every forward: merge its sums of branches. Returns None if nothing was merged."""
    merged = dataflow.shared_copy(network)
    kernels = dict(exact)
    owners_of = functions.owners if rewriter is Functions else sums.owners
    merged_sums = [
        (owner, names)
        for owner in owners_of(flow, network)
        if owner not in spared
        for names in rewrite(
            rewriter, merged, owner, flow, kernels, report, check_values=values, flags=flags
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
        report.unmerged.update(dict.fromkeys(owners, "another forward depends on its class"))
        return None
    for _, names in merged_sums:
        if rewriter is Functions:
            report.layers.extend(names)
            continue
        if names:
            report.merged.append(names)
        for name in names[1:]:
            if report.kept.pop(name, None) is not None:
                report.fused.append((names[0], name))
    exact.clear()
    exact.update(kernels)
    plain = dataflow.trace(merged, foldable.is_leaf)
    flags.clear()
    flags.update(_flags(merged, plain))  # those of a new forward are others
    return merged, dataflow.trace(merged, foldable.is_leaf, flags) if flags else plain


def _flags(network: nn.Module, flow: dataflow.Dataflow) -> dict[str, list[Values]]:
    """Flags of the modules between a layer and a normalization.

    They may determine whether the layer feeds the normalization.
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
    """Keep only the eval graph of GraphModules with one graph a mode (torchvision's)."""
    for module in list(network.modules()):
        if isinstance(module, fx.GraphModule) and "train_graph" in vars(module):
            plain = fx.GraphModule(module, module.graph, type(module).__name__).eval()
            if module is network:
                return plain
            put(network, module, plain)
    return network


def _guard(network: nn.Module, flow: dataflow.Dataflow) -> None:
    """Let the network raise on arguments for which its forward was not traced."""
    if flow.assumed:
        network.register_forward_pre_hook(ArgumentGuard(flow.assumed), with_kwargs=True)


def _norms(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if is_normalization(m)]
