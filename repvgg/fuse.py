"""Whole networks: from the form that trains to the form that is deployed."""

import copy
from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def switch_to_deploy(model: Model) -> Model:
    """Copy a network and fold every re-parameterizable block of the copy.

    Every module that has a method `switch_to_deploy()` is switched, outermost first. The copy
    computes what `model` computes in eval mode; `model` itself does not change, so its optimizer
    and EMA stay valid.

    Returns:
        the copy, in eval mode.

    Raises:
        ValueError: the network has nothing to switch, or a BatchNorm without running statistics.
    """
    model = copy.deepcopy(model)
    switches = [module for module in model.modules() if hasattr(module, "switch_to_deploy")]
    if not switches:
        raise ValueError(
            f"{type(model).__name__} has no block to switch: "
            "no module of it has a method switch_to_deploy()"
        )
    for module in switches:
        module.switch_to_deploy()  # type: ignore[operator]
    return model.eval()
