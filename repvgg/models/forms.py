"""Whole networks of blocks: from the form that trains to the form that is deployed."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from repvgg import verify
from repvgg.fusion.batchnorms import FusionReport
from repvgg.fusion.copying import copied, plain_weights, require_images
from repvgg.fusion.errors import in_a_line
from repvgg.fusion.fuse import fuse_any
from repvgg.fusion.normalizations import is_normalization
from repvgg.fusion.surgery import put
from repvgg.models.block import QARepVGGBlock, RepVGGBlock
from repvgg.models.network import RepVGG
from repvgg.models.over_parameterize import RepVGGConv
from repvgg.reparam import Reparameterizable
from repvgg.verify import SAME

Model = TypeVar("Model", bound=nn.Module)


def is_deployed(model: nn.Module) -> bool:
    """Whether no RepVGG block of a network, or of a single block, has branches.

    True for a network without RepVGG blocks: there is nothing to switch.
    """
    blocks = (module for module in model.modules() if isinstance(module, RepVGGBlock))
    return all(block.reparam is not None for block in blocks)


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
    require_images(images)
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
                cast(Reparameterizable, module).switch_to_deploy()
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
                cast(Reparameterizable, after).switch_to_deploy()
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
    return fuse_any(model, values=False)


def _switches(model: nn.Module) -> Sequence[tuple[str, nn.Module]]:
    """The `Reparameterizable` modules that are to be switched, by name."""
    modules: Iterable[tuple[str, nn.Module]] = model.named_modules()
    found = [(name, module) for name, module in modules if isinstance(module, Reparameterizable)]
    if any(isinstance(module, RepVGGConv) for _, module in found):
        # The network gets its own layers back; what others made of theirs is not to be changed.
        return [(name, one) for name, one in found if isinstance(one, RepVGGBlock | RepVGG)]
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
