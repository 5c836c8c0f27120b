"""Whole networks: from the form that trains to the form that is deployed."""

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Model = TypeVar("Model", bound=nn.Module)


def switch_to_deploy(model: Model) -> Model:
    """Copy a network and fold every re-parameterizable block of the copy.

    Every module that has a method `switch_to_deploy()` is switched, innermost first. The copy
    computes what `model` computes in eval mode; `model` itself does not change, so its optimizer
    and EMA stay valid.

    Returns:
        the copy, in eval mode.

    Raises:
        ValueError: the network has nothing to switch, or a BatchNorm without running statistics;
            the block is named.
    """
    model = copy.deepcopy(model)
    switches = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "switch_to_deploy")
    ]
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
    return model.eval()


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
