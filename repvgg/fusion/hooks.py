"""Hooks on modules: those of the user, and the one that checks arguments of a folded network."""

import inspect
from collections.abc import Collection

from torch import Tensor, fx, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class ArgumentGuard:
    """A forward pre-hook that raises on arguments for which the forward was not traced.

    Args:
        assumed: names of arguments that must be tensors. "*args" and "**kwargs" may only contain
            False and None.

    Raises:
        ValueError: an argument has another type.
    """

    def __init__(self, assumed: Collection[str]) -> None:
        self.assumed = frozenset(assumed)

    def __call__(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        signature = inspect.signature(module.forward)
        bound = signature.bind_partial(*args, **kwargs).arguments
        for name in self.assumed:
            given = bound.get(name.lstrip("*"))
            if name.startswith("*"):
                extras = given if isinstance(given, dict) else dict(enumerate(given or ()))
                for key, value in extras.items():
                    if value is not None and value is not False:
                        raise ValueError(
                            f"{type(module).__name__} was folded for calls without further "
                            f"arguments, but {key} is a {type(value).__name__}: omit it, or "
                            "use the network that was passed to fuse_conv_bn"
                        )
            elif not isinstance(given, Tensor | fx.Proxy):
                raise ValueError(
                    f"{type(module).__name__} was folded for a tensor as {name}, which is a "
                    f"{type(given).__name__}: pass a tensor, or use the network that was passed "
                    "to fuse_conv_bn"
                )


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks, which may change its inputs or outputs."""
    return any(
        not isinstance(hook, ArgumentGuard)
        for key in HOOKS
        for hook in getattr(module, key).values()
    )
