"""The user's own loss, in place of the cross-entropy."""

import functools
import inspect
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from repvgg.losses import Loss
from repvgg.models.modes import evaluating
from repvgg.targets import check_arguments, is_from_user_code
from repvgg.training.parts import Part


def build_loss(part: Part) -> Loss:
    """Make the loss that a configuration names: an instance of a class, or a function.

    A function takes the arguments of the configuration beside the logits and the targets.

    Raises:
        ValueError: it does not take these arguments, or it has parameters.
    """
    function = part.function()
    made: Callable[..., object]
    if inspect.isclass(function):
        instance = part.call()
        if not callable(instance):
            raise part.wrong_result(instance, "a function of logits and targets")
        made, arguments = instance, dict[str, object]()
    else:
        made, arguments = function, part.built_arguments()
    if isinstance(made, nn.Module) and any(p.requires_grad for p in made.parameters()):
        raise ValueError(
            f"{part.key}={part.name}: has parameters, which the optimizer does not train; make "
            "them buffers, or part of the network"
        )
    called = made.forward if isinstance(made, nn.Module) else made
    check_arguments(called, part.key, part.name, None, None, **arguments)
    return cast(Loss, functools.partial(made, **arguments) if arguments else made)


def check_loss(part: Part, loss: Loss, network: nn.Module, images: Tensor, targets: Tensor) -> None:
    """Check that a loss of the first predictions is a scalar with a gradient.

    No random number of the run is drawn.

    Args:
        images: (N, C, H, W).
        targets: class indices (N,), or mixtures (N, K).

    Raises:
        ValueError: it is something else, or a loss of a library raised an error. Errors of the
            user's own code pass through.
    """
    with torch.random.fork_rng(devices=[]):
        with torch.no_grad(), evaluating(network):
            logits = network(images)
        try:
            value: object = loss(logits.float().requires_grad_(), targets)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            if is_from_user_code(error):
                raise
            kind = "mixtures of mixup or cutmix" if targets.ndim == 2 else "class indices"
            raise ValueError(
                f"{part.key}={part.name}: does not take {kind}, targets of shape "
                f"{tuple(targets.shape)}, with logits of shape {tuple(logits.shape)} ({error})"
            ) from error
    if not isinstance(value, Tensor):
        got = "None" if value is None else type(value).__name__
    elif value.ndim > 0:
        got = f"a tensor of shape {tuple(value.shape)}"
    elif not value.requires_grad:
        got = "a tensor without gradient"
    else:
        return
    raise ValueError(
        f"{part.key}={part.name}: returns {got}, must return a scalar tensor with a gradient: the "
        "mean over the batch"
    )
