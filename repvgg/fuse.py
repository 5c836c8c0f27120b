"""Whole networks: from the form that trains to the form that is deployed."""

import math
from collections.abc import Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from repvgg import branches, dataflow, linear, verify
from repvgg.block import QARepVGGBlock, RepVGGBlock
from repvgg.copying import copied, plain_weights, unwrapped
from repvgg.expand import RepVGGConv
from repvgg.flags import alternatives
from repvgg.folding import Folding, FusionReport
from repvgg.model import RepVGG
from repvgg.normalizations import is_normalization, read_once
from repvgg.reparam import Affine
from repvgg.rewriting import put
from repvgg.tracing import OnlyFollowed, in_a_line

Model = TypeVar("Model", bound=nn.Module)


SAME = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative, by the precision of a comparison


def switch_to_deploy(model: Model, images: Tensor | None = None) -> Model:
    """Copy a network and fold every re-parameterizable block of the copy.

    Every module that has a method `switch_to_deploy()` is switched, innermost first. Blocks that
    were made by `over_parameterize` give their place back to the layers that they replaced; then
    modules of other libraries are left alone. The copy computes what `model` computes in eval mode;
    `model` itself does not change, so its optimizer and EMA stay valid.

    The methods of other libraries, and of subclasses of the blocks here, are tested: the module is
    compared before and after, in float64 (in float32 where it cannot run so), on random inputs.

    Args:
        images: (N, C, H, W), as the network takes them. If they are given, the whole network is
            compared on them instead, and module by module.

    Returns:
        the copy, in eval mode, without `DistributedDataParallel` and `torch.compile` around it.

    Raises:
        ValueError: the network has nothing to switch; a block cannot be folded, or its own method
            fails, changes what it computes or cannot be tested; the block is named.
    """
    return cast(Model, _switched(model, images, check=True))


def _switched(model: nn.Module, images: Tensor | None, *, check: bool) -> nn.Module:
    model = copied(model).eval()
    plain_weights(model)
    if not _switches(model):
        raise ValueError(
            f"{type(model).__name__} has no block to switch: "
            "no module of it has a method switch_to_deploy(); repvgg.fuse_conv_bn folds the "
            "BatchNorms of other networks, traced ones too"
        )
    if images is not None:
        _compare_networks(model, images)
        check = False
    _switch(model, check=check)
    return model.eval()


def _switch(model: nn.Module, *, check: bool) -> None:
    """Switch every block of a network in place."""
    for name, module in reversed(_switches(model)):
        title = name or type(model).__name__
        if check and not _is_trusted(module):
            _compare_blocks(title, module)
        try:
            with torch.inference_mode(False), torch.no_grad():
                module.switch_to_deploy()
        except Exception as error:
            raise ValueError(f"{title}: {_in_words(error, module)}") from error
        if isinstance(module, RepVGGConv):
            for old, new in module.originals():
                put(model, old, new)


def _in_words(error: Exception, module: nn.Module) -> str:
    if isinstance(error, ValueError) and _is_trusted(module):
        return str(error)
    return (
        f"switch_to_deploy() of {type(module).__name__} failed ({in_a_line(error)}): "
        "fold the network with repvgg.fuse_conv_bn instead"
    )


def _is_trusted(module: nn.Module) -> bool:
    """Whether the method of a module is one of this library that nothing can have changed."""
    if isinstance(module, RepVGG):
        return type(module).switch_to_deploy is RepVGG.switch_to_deploy
    known = type(module) in (RepVGGBlock, QARepVGGBlock, RepVGGConv)
    return known and not {"forward", "switch_to_deploy"} & vars(module).keys()


@torch.no_grad()
def _compare_blocks(name: str, module: nn.Module) -> None:
    """Run a module's method on a copy and compare what the copy computes on random inputs."""
    kind = type(module).__name__
    otherwise = (
        "give images= to compare the whole network on, or fold it with repvgg.fuse_conv_bn instead"
    )
    failed: Exception | None = None
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        for dtype, tolerance in SAME.items():
            before = copied(module).to(dtype).eval()
            given = None
            for inputs in _random_inputs(before):
                try:
                    expected = verify.tensors(before(inputs))
                except Exception as error:
                    failed = error
                    continue
                given = given or []
                given.append((inputs, [tensor.clone() for tensor in expected]))
            if not given:
                continue
            try:
                after = copied(module).to(dtype).eval()
                cast(Any, after).switch_to_deploy()
                after.eval()
                outputs = [verify.tensors(after(inputs)) for inputs, _ in given]
            except Exception as error:
                failed = error
                continue
            for (_, expected), found in zip(given, outputs, strict=True):
                same = len(expected) == len(found) > 0
                pairs = zip(expected, found, strict=False)
                worst = max(verify.relative_error(*p) for p in pairs) if same else math.inf
                if not worst <= tolerance:
                    raise ValueError(
                        f"{name}: switch_to_deploy() of {kind} changes what it computes, by "
                        f"{worst:.1e} of the largest value: fold the network with "
                        "repvgg.fuse_conv_bn instead"
                    )
            return
    raise ValueError(
        f"{name}: switch_to_deploy() of {kind} could not be tested on random inputs "
        f"({'it has no convolution' if failed is None else in_a_line(failed)}): {otherwise}"
    )


def _random_inputs(module: nn.Module) -> list[Tensor]:
    """Two images each, of odd and even sizes, small and large, by the first convolution."""
    convs = [part for part in module.modules() if isinstance(part, _ConvNd)]
    if not convs:
        return []
    reach = max(
        int(size) * int(step) if isinstance(step, int) else int(size) * max(step)
        for conv in convs
        for size, step in [(max(conv.weight.shape[2:]), conv.dilation)]
    )
    first = convs[0]
    dims = first.weight.ndim - 2
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, first.in_channels, *size[:dims], generator=generator).to(first.weight)
        for size in (
            (reach + 8, reach + 5, reach + 6),
            (reach + 5, reach + 12, reach + 4),
            (67, 52, 33),
        )
    ]


@torch.no_grad()
def _compare_networks(model: nn.Module, images: Tensor) -> None:
    """Switch a copy of a network and compare it on images."""
    failed: Exception | None = None
    # Where layers of its own come back, a name stands for less.
    blocks = {name for name, module in _switches(model) if not isinstance(module, RepVGGConv)}
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        for dtype, tolerance in SAME.items():
            before = copied(model).to(dtype).eval()
            after = copied(before)
            try:
                _switch(after, check=False)
                found = verify.first_difference(
                    before,
                    after.eval(),
                    images.to(dtype),
                    tolerance=tolerance,
                    among=blocks,
                )
            except Exception as error:
                failed = failed or error
                continue
            if found is None:
                return
            name, worst = found
            raise ValueError(
                f"{name or type(model).__name__}: after switch_to_deploy() it differs on these "
                f"images by {worst:.1e} of the largest value: fold the network with "
                "repvgg.fuse_conv_bn instead"
            )
    assert failed is not None
    if isinstance(failed, ValueError):
        raise failed
    raise ValueError(
        f"{type(model).__name__} cannot run on images of shape {tuple(images.shape)}: "
        f"{in_a_line(failed)}"
    ) from failed


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
        # On the meta device there are no numbers to compare.
        model = _switched(model, None, check=not any(p.is_meta for p in model.parameters()))
    else:
        model = copied(model).eval()
        plain_weights(model)
    if not any(is_normalization(module) for module in model.modules()):
        return model, FusionReport()
    return _fuse(model, values=False)


def _switches(model: nn.Module) -> list[tuple[str, Any]]:
    found = [
        (name, module)
        for name, module in model.named_modules()
        if callable(getattr(module, "switch_to_deploy", None))
    ]
    if any(isinstance(module, RepVGGConv) for _, module in found):
        # The network gets its own layers back; what others made of theirs is not to be changed.
        return [(n, m) for n, m in found if isinstance(m, RepVGGBlock | RepVGG)]
    return found


@torch.no_grad()
def reestimate_bn(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace the running statistics of every BatchNorm by those of given images, in place.

    All but the BatchNorms is in eval mode meanwhile (torch's `update_bn` leaves dropout on), so the
    statistics are those of the network without its training noise: what is folded after training
    with `branch_drop` or `drop_path`.
    They are plain averages over the batches ("precise BN", Wu and Johnson, 2021, arXiv:2105.07576,
    section 3). Weights, modes and momenta stay, and the statistics of a BatchNorm that no image
    reaches.

    Args:
        batches: of images (N, C, H, W), as the network takes them; a few thousand images suffice.
            Of a batch that is a list or tuple, as a DataLoader of images and labels gives, the
            first item is taken, as torch's `update_bn` does. A network without BatchNorm needs
            none.

    Raises:
        ValueError: there is no batch, or one that is no floating-point tensor of the network's
            precision, or that the network cannot run on; every normalization is frozen. Whatever
            is raised, the statistics are then the old ones.
    """
    if isinstance(batches, Tensor):
        raise ValueError(
            f"batches is a tensor of shape {tuple(batches.shape)}: give a list of batches, [images]"
        )
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    kinds = {
        type(module).__name__
        for module in model.modules()
        if is_normalization(module) and module.running_mean is not None
    }
    if kinds and not norms:
        raise ValueError(
            f"{type(model).__name__} has no BatchNorm whose statistics can be estimated: "
            f"all of its normalizations are {', '.join(sorted(kinds))}"
        )
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
        for number, batch in enumerate(batches):
            images = _images_of(batch, model, number)
            try:
                model(images)
            except (RuntimeError, TypeError, ValueError) as error:
                shape = tuple(images.shape)
                few = "Expected more than 1 value per channel" in str(error)
                advice = "; statistics need more than one value: give a larger batch" if few else ""
                raise ValueError(
                    f"{type(model).__name__} cannot run on batch {number} of shape {shape} in "
                    f"training mode of its BatchNorms: {in_a_line(error)}{advice}"
                ) from error
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


def _images_of(batch: Any, model: nn.Module, number: int) -> Tensor:
    """The images of a batch, as `reestimate_bn` takes it."""
    given = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(given, Tensor):
        inside = " whose first item" if given is not batch else ", which"
        kind = type(given).__name__
        raise ValueError(
            f"batch {number} is a {type(batch).__name__}{inside} is no tensor of images"
            + (f" but a {kind}" if given is not batch else "")
            + ": give tensors (N, C, H, W), or lists or tuples that begin with one"
        )
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if dtypes and given.dtype not in dtypes and not torch.is_autocast_enabled(given.device.type):
        wanted = ", ".join(sorted(str(dtype) for dtype in dtypes))
        advice = (
            "scale them to what the network was trained on and "
            if given.dtype in (torch.uint8,)
            else ""
        )
        raise ValueError(
            f"batch {number} is of {given.dtype} and the network of {wanted}: {advice}"
            f"call .to({wanted.split(', ')[0]}) on the images"
        )
    return given


def fuse_conv_bn(model: nn.Module, images: Tensor | None = None) -> tuple[nn.Module, FusionReport]:
    """Copy a network and fold every BatchNorm of the copy that can be proven to allow it.

    BN(W*x + b) is one convolution (RepVGG, eq. 3), and so is W*BN(x) + b where no border is padded
    with zeros, and a sum of parallel convolutions of one x (section 3.3), x itself among them. What
    feeds what is read off the forward (`repvgg.dataflow`), never off the order of children: a
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
    fused, report = _fuse(model, values=True)
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
        after, report = _fuse(before, values=True)
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


def _fuse(model: nn.Module, *, values: bool) -> tuple[nn.Module, FusionReport]:
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
    flow = dataflow.trace(network, linear.is_step)
    flags = _flags(network, flow)
    if flags:
        flow = dataflow.trace(network, linear.is_step, flags)
    while True:
        report.untraced.clear()
        report.untraced.update(flow.untraced)
        for name, module in network.named_modules():
            if is_normalization(module) and modes.get(name):
                flow.reached[name] = "it is in training mode: call .eval()"
        folded = dataflow.shared_copy(network)
        step = FusionReport()
        kernels = dict(exact)
        Folding(folded, flow, step, kernels, of_values=values).run()
        after = dataflow.trace(folded, linear.is_step, flags) if step.fused else flow
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
    sums = [
        (owner, names)
        for owner in branches.owners(flow, network)
        for names in branches.merge_sums(
            merged, owner, flow, kernels, report, of_values=values, flags=flags
        )
    ]
    if not sums:
        return None
    owners = {owner for owner, _ in sums}

    def trace_around(network: nn.Module) -> dataflow.Dataflow:
        known = {network.get_submodule(owner) for owner in owners}
        return dataflow.trace(
            network, lambda module: module in known or linear.is_step(module), flags
        )

    if not dataflow.equal(trace_around(network), trace_around(merged), apart_from=owners):
        report.unmerged.update(dict.fromkeys(owners, "another forward depends on what it is"))
        return None
    for _, names in sums:
        report.merged.append(names)
        for name in names[1:]:
            if report.kept.pop(name, None) is not None:
                report.fused.append((names[0], name))
    exact.clear()
    exact.update(kernels)
    return merged, dataflow.trace(merged, linear.is_step, flags)


def _flags(network: nn.Module, flow: dataflow.Dataflow) -> dict[str, list[tuple[str, Any]]]:
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
    found = {name: alternatives(network.get_submodule(name)) for name in names}
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
        network.register_forward_pre_hook(OnlyFollowed(flow.assumed), with_kwargs=True)


def _norms(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if is_normalization(m)]
