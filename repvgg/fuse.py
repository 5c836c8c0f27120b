"""Whole networks: from the form that trains to the form that is deployed."""

from collections.abc import Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from repvgg import branches, dataflow, linear
from repvgg.copying import copied, plain_weights
from repvgg.folding import Folding, FusionReport
from repvgg.normalizations import is_normalization
from repvgg.rewriting import put

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
    model = cast(Model, copied(model))
    plain_weights(model)
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
                put(model, old, new)
    return model.eval()


def deployed_form(model: nn.Module) -> tuple[nn.Module, FusionReport]:
    """Copy a network, switch its blocks and fold every other BatchNorm that allows it.

    Unlike `fuse_conv_bn` this folds statistics that were never updated, and on the meta device it
    gives the form alone: what a file of deployed weights is loaded into.

    Returns:
        the copy, in eval mode, and the report of `fuse_conv_bn`.

    Raises:
        ValueError: as `switch_to_deploy` and `fuse_conv_bn`.
    """
    if _switches(model):
        model = switch_to_deploy(model)
    else:
        model = copied(model).eval()
        plain_weights(model)
    if not any(is_normalization(module) for module in model.modules()):
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
        if module.training and is_normalization(module)
    }
    given.eval()
    flow = dataflow.trace(given, linear.is_step)
    for name in training:
        flow.reached[name] = "it is in training mode: call .eval()"

    report = FusionReport(untraced=flow.untraced)
    folded = dataflow.shared_copy(given)
    Folding(folded, flow, report, values).run()
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
    return [name for name, m in model.named_modules() if is_normalization(m)]


def _merge_sums(
    model: nn.Module, flow: dataflow.Dataflow, values: bool
) -> list[tuple[str, tuple[str, ...]]]:
    """Merge sums of branches in every forward that adds; the owners and names of each."""
    return [
        (owner, names)
        for owner in branches.owners(flow)
        for names in branches.merge_sums(model, owner, flow, values=values)
    ]
