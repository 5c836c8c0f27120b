"""Fold whole networks: from multi-branch to deployed."""

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from repvgg import verify
from repvgg.fusion.copying import copied, plain_weights, require_images
from repvgg.fusion.errors import in_a_line
from repvgg.fusion.fuse import fuse_any
from repvgg.fusion.normalizations import is_normalization
from repvgg.fusion.report import FusionReport
from repvgg.fusion.surgery import put
from repvgg.models.block import QARepVGGBlock, RepVGGBlock
from repvgg.models.features import Backbone
from repvgg.models.network import RepVGG
from repvgg.models.over_parameterize import RepVGGConv
from repvgg.reparam import Reparameterizable, is_reparameterizable
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

    Every module with a method `switch_to_deploy()` is switched, innermost first. Blocks that
    `over_parameterize` made are replaced by the original layers; modules of other libraries then
    stay as they are. The outputs in eval mode stay the same. `model` does not change, so its
    optimizer and EMA stay valid.

    Methods of other libraries, and of subclasses of RepVGG's blocks, are tested. The module is
    compared before and after on random inputs, in float64, or float32 if it cannot run in float64.

    Args:
        images: (N, C, H, W), preprocessed. The whole network is then compared on them, module by
            module, in place of the tests on random inputs.

    Returns:
        the copy, in eval mode, without `DistributedDataParallel` and `torch.compile` around it.

    Raises:
        ValueError: the network has nothing to switch; a block cannot be folded; or the method of
            another library fails, changes the outputs or cannot be tested. The block is named.
    """
    require_images(images)
    return cast(Model, _switched(model, images, check=True))


def _switched(model: nn.Module, images: Tensor | None, *, check: bool) -> nn.Module:
    model = copied(model).eval()
    plain_weights(model)
    if not _switches(model):
        raise ValueError(
            f"{type(model).__name__} has no block to switch: none of its modules has a method "
            "switch_to_deploy(); repvgg.fuse_conv_bn folds the BatchNorms of other networks, "
            "traced ones too"
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
    """Whether a module's `switch_to_deploy` and `forward` are those of this library."""
    if isinstance(module, Backbone):
        known = (Backbone.switch_to_deploy, RepVGG.switch_to_deploy)
        return type(module).switch_to_deploy in known
    ours = type(module) in (RepVGGBlock, QARepVGGBlock, RepVGGConv)
    return ours and not {"forward", "switch_to_deploy"} & vars(module).keys()


@torch.no_grad()
def _compare_blocks(name: str, module: nn.Module) -> None:
    """Switch a copy of a module and compare its outputs on random inputs.

    Raises:
        ValueError: the outputs differ, or the module cannot run on such inputs.
    """
    kind = type(module).__name__
    otherwise = (
        "pass images= to compare the whole network, or fold it with repvgg.fuse_conv_bn instead"
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
                        f"{name}: switch_to_deploy() of {kind} changes its outputs by {worst:.1e} "
                        "of the largest value: fold the network with repvgg.fuse_conv_bn instead"
                    )
            return
    raise ValueError(
        f"{name}: switch_to_deploy() of {kind} could not be tested on random inputs "
        f"({'it has no convolution' if failed is None else in_a_line(failed)}): {otherwise}"
    )


def _random_inputs(module: nn.Module) -> list[Tensor]:
    """Batches of two for the first convolution, of odd and even, small and large sizes."""
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
    """Switch a copy of a network and compare it on images, module by module.

    Raises:
        ValueError: the outputs of a block differ, or the network cannot run on the images.
    """
    failed: Exception | None = None
    # RepVGGConv is left out: after the switch its name is that of a convolution alone.
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
                f"{name or type(model).__name__}: switch_to_deploy() changes its outputs on these "
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
    """Copy a network, fold its blocks and then every other BatchNorm that can be folded.

    Unlike `fuse_conv_bn` this folds statistics that were never updated. It works on the meta device
    too: a file of folded weights is loaded into the result.

    Returns:
        the copy, in eval mode, and the report of `fuse_conv_bn`.

    Raises:
        ValueError: as `switch_to_deploy` and `fuse_conv_bn`.
    """
    if _switches(model):
        # On the meta device there is nothing to compare.
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
    found = [(name, module) for name, module in modules if is_reparameterizable(module)]
    if any(isinstance(module, RepVGGConv) for _, module in found):
        # The network gets its original layers back, so modules of other libraries stay as well.
        return [(name, one) for name, one in found if isinstance(one, RepVGGBlock | Backbone)]
    return found
