"""Whole networks: from the form that trains to the form that is deployed."""

import copy
from typing import TypeVar

from torch import nn

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
