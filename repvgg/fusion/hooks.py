"""Hooks on modules: which somebody set, and the one that guards a folded network."""

import inspect
from collections.abc import Collection

from torch import Tensor, fx, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class ArgumentGuard:
    """A hook in front of a forward that raises on arguments for which it was not followed.

    Args:
        assumed: an argument that must be a tensor, by its name; "*args" and "**kwargs" must be
            empty, or False and None.

    Raises:
        ValueError: an argument is something else.
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
                            f"arguments and was given {key}={type(value).__name__}: leave it "
                            "out, or use the network as it was before fuse_conv_bn"
                        )
            elif not isinstance(given, Tensor | fx.Proxy):
                raise ValueError(
                    f"{type(module).__name__} was folded for a tensor as {name} and was given a "
                    f"{type(given).__name__}: pass a tensor, or use the network as it was before "
                    "fuse_conv_bn"
                )


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to a module's calls, or changes what goes in or comes out."""
    return any(
        not isinstance(hook, ArgumentGuard)
        for key in HOOKS
        for hook in getattr(module, key).values()
    )
