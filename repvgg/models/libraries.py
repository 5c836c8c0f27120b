"""Networks that are not RepVGG: torchvision's, timm's, and the user's own.

Each is built from plain arguments, with fresh weights, so that a checkpoint can rebuild it.
"""

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import cast

from torch import nn

from repvgg.checks import (
    ArgumentError,
    check_boolean,
    check_integer,
    check_number,
    did_you_mean,
    unknown_name,
    wrong_value,
)
from repvgg.contract import Plain
from repvgg.models.branches import pair
from repvgg.models.over_parameterize import over_parameterize as expand
from repvgg.targets import accepts, call, check_arguments, signature_of

Factory = Callable[..., object]  # the user's; returns an nn.Module

# Arguments of timm that read files or the network: a checkpoint must not.
NOT_REBUILT = ("pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
# What libraries raise for an argument's wrong value, beside ValueError.
WRONG_ARGUMENT = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError)
# These return auxiliary outputs beside the logits, and warn of the default of init_weights.
WITH_AUXILIARY = ("googlenet", "inception_v3")


def build_torchvision(
    *,
    name: str,
    num_classes: int = 1000,
    in_channels: int = 3,
    over_parameterize: bool = False,
    branch_drop: float | None = None,
    strides: Sequence[int] | None = None,
    drop_path: float | None = None,
    **arguments: Plain,
) -> nn.Module:
    """Build a classifier of torchvision, with fresh weights.

    Args:
        name: as in `torchvision.models.list_models(torchvision.models)`.
        num_classes: K.
        in_channels: channels of the images. If not 3, the first convolution is replaced.
        over_parameterize: see `repvgg.over_parameterize`.
        branch_drop: of the RepVGG blocks that `over_parameterize` makes.
        strides, drop_path: must be None; only RepVGG's networks have them.
        arguments: of torchvision's builder; None leaves its default.

    Raises:
        ValueError: torchvision has no such classifier, the builder does not take an argument, or
            the network has no convolution that can be over-parameterized.
    """
    _check_none("torchvision", strides=strides, drop_path=drop_path)
    check_torchvision(name)
    given = given_of(arguments)
    if name in WITH_AUXILIARY:
        given = {"aux_logits": False, "init_weights": True} | given
    check_integer("num_classes", num_classes, minimum=1, example=10)
    network = make_torchvision(name, None, given | {"num_classes": num_classes})
    if check_integer("in_channels", in_channels, minimum=1, example=3) != 3:
        replace_stem(network, in_channels)
    return expanded(network, over_parameterize, branch_drop)


def build_timm(
    *,
    name: str,
    num_classes: int = 1000,
    in_channels: int = 3,
    dropout: float | None = None,
    drop_path: float | None = None,
    over_parameterize: bool = False,
    branch_drop: float | None = None,
    strides: Sequence[int] | None = None,
    **arguments: Plain,
) -> nn.Module:
    """Build a network of timm, with fresh weights.

    Args:
        name: as in `timm.list_models()`; a tag behind a dot, as in resnet50.a1_in1k, is of weights.
        num_classes: K.
        in_channels: channels of the images, timm's in_chans.
        dropout, drop_path: timm's drop_rate and drop_path_rate.
        over_parameterize, branch_drop: as for `build_torchvision`.
        strides: must be None; only RepVGG's networks have them.
        arguments: others of the network; None leaves its default.

    Raises:
        ValueError: timm is missing or has no such network, the network does not take an argument,
            or it has no convolution that can be over-parameterized.
    """
    _check_none("timm", strides=strides)
    for key in (*NOT_REBUILT, "pretrained"):
        if arguments.get(key):
            raise ArgumentError(f"{key}: is of the first weights, not of the network", key)
    check_integer("num_classes", num_classes, minimum=1, example=10)
    check_integer("in_channels", in_channels, minimum=1, example=3)
    network = make_timm(
        name,
        given_of({"drop_rate": dropout, "drop_path_rate": drop_path, **arguments})
        | {"num_classes": num_classes, "in_chans": in_channels},
    )
    return expanded(network, over_parameterize, branch_drop)


def build_custom(
    factory: Factory | None,
    *,
    _target_: str,
    name: str = "",
    num_classes: int,
    in_channels: int,
    over_parameterize: bool = False,
    branch_drop: float | None = None,
    **arguments: Plain,
) -> nn.Module:
    """Build the user's own network.

    Args:
        factory: the function or class.
        _target_: its dotted name, for messages.
        name: of the run; not passed on.
        num_classes, in_channels: passed on if the factory takes them; in_channels also as in_chans.
        over_parameterize, branch_drop: as for `build_torchvision`.
        arguments: of the factory; None leaves its default.

    Raises:
        ArgumentError: the factory is missing, does not take an argument, or does not return a
            network. Its own errors pass through.
    """
    given = custom_arguments(factory, _target_, num_classes, in_channels, arguments)
    if factory is None:  # the name comes from a file
        shown = ", ".join(f"{key}={value}" for key, value in given_of(arguments).items())
        raise ArgumentError(
            f"network is missing: this is the code {_target_}({shown}), which no file may run; if "
            f"you trust it, pass network={_target_}",
            "network",
        )
    passed = f"{factory.__module__}.{getattr(factory, '__qualname__', _target_)}"
    network = call(factory, "network", passed, **given)
    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise ArgumentError(f"network={passed}: returns a {kind}, not a torch.nn.Module", "network")
    return expanded(network, over_parameterize, branch_drop)


def check_custom(
    factory: Factory,
    *,
    _target_: str,
    num_classes: int,
    in_channels: int,
    library: str = "",
    name: str = "",
    over_parameterize: bool = False,
    branch_drop: float | None = None,
    **arguments: Plain,
) -> None:
    """Check the arguments of the user's own network without running its code.

    Raises:
        ArgumentError: the factory does not take them.
    """
    signature = signature_of(factory)
    if name not in ("", "custom") and signature is not None and "name" in signature.parameters:
        raise ArgumentError(
            f"name={name}: names the run and is not passed on to {_target_}; let it take another "
            "argument, or write a function that does",
            "name",
        )
    given = custom_arguments(factory, _target_, num_classes, in_channels, arguments)
    check_arguments(factory, "model", _target_, **given)


def custom_arguments(
    factory: Factory | None,
    target: str,
    num_classes: int,
    in_channels: int,
    arguments: Mapping[str, Plain],
) -> dict[str, Plain]:
    """What a factory is called with.

    Raises:
        ArgumentError: an argument names code of its own.
    """
    for key, value in arguments.items():
        if "_target_" in repr(value):
            raise ArgumentError(
                f"{key}={value}: must be a plain value, so that a checkpoint can record it; build "
                f"it inside of {target}",
                key,
            )
    known: dict[str, Plain] = {
        "num_classes": num_classes,
        "in_channels": in_channels,
        "in_chans": in_channels,
    }
    held = {} if factory is None else {k: v for k, v in known.items() if _names(factory, k)}
    return held | given_of(arguments)


def check_torchvision(name: object) -> None:
    from torchvision import models

    names = models.list_models(models)
    if name not in names:
        raise unknown_name("name", str(name), names, what="model")


def make_torchvision(name: str, weights: object, given: Mapping[str, Plain]) -> nn.Module:
    from torchvision import models

    try:
        return cast(nn.Module, models.get_model(name, weights=weights, **given))
    except WRONG_ARGUMENT as error:
        shown = ", ".join(f"{key}={value}" for key, value in given.items() if key != "num_classes")
        raise ValueError(
            f"{shown}: torchvision's {name} does not take this ({_detail(error)})"
        ) from error


def make_timm(name: object, given: Mapping[str, Plain]) -> nn.Module:
    timm = _timm()
    names = timm.list_models()
    if str(name).partition(".")[0] not in names:
        close = did_you_mean(str(name).lower(), names)
        raise ArgumentError(
            f"name={name}: there is no such model; {close}timm has {len(names):,} networks, "
            "timm.list_models() lists them",
            "name",
        )
    try:
        return cast(nn.Module, timm.create_model(str(name), **given))
    except WRONG_ARGUMENT as error:
        shown = ", ".join(f"{key}={value}" for key, value in given.items() if key != "num_classes")
        raise ValueError(f"{shown}: timm's {name} does not take this ({_detail(error)})") from error


def _detail(error: Exception) -> str:
    return repr(error) if isinstance(error, LookupError) or not str(error) else str(error)


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ValueError("library=timm: timm is missing: run pip install timm") from error
    return timm


def expanded(network: nn.Module, over_parameterize: bool, branch_drop: float | None) -> nn.Module:
    """The network with RepVGG blocks in place of its 3x3 convolutions, if that is wanted."""
    check_boolean("over_parameterize", over_parameterize)
    check_number("branch_drop", branch_drop or 0.0, below=1, example=0.1)
    if branch_drop and not over_parameterize:
        allowed = "drops branches of RepVGG blocks, so it needs over_parameterize=true"
        raise wrong_value("branch_drop", branch_drop, allowed, 0)
    if not over_parameterize:
        return network
    try:
        return expand(network, branch_drop=branch_drop or 0.0)
    except ValueError as error:
        raise ValueError(f"over_parameterize=true: {error}") from error


def first_convolution(network: nn.Module) -> tuple[str, nn.Conv2d]:
    """The convolution that was declared first, and its name."""
    for path, conv in network.named_modules():
        if type(conv) is nn.Conv2d:
            return path, conv
    raise ArgumentError("in_channels: this network has no convolution to change", "in_channels")


def replace_stem(network: nn.Module, in_channels: int) -> nn.Conv2d:
    """Replace the convolution that was declared first, with fresh weights."""
    path, conv = first_convolution(network)
    stem = nn.Conv2d(
        in_channels,
        conv.out_channels,
        pair(conv.kernel_size),
        stride=pair(conv.stride),
        padding=conv.padding if isinstance(conv.padding, str) else pair(conv.padding),
        bias=conv.bias is not None,
    )
    parent, _, leaf = path.rpartition(".")
    setattr(network.get_submodule(parent), leaf, stem)
    return stem


def _names(factory: Factory, argument: str) -> bool:
    """Whether a factory takes an argument by name; one that takes all takes in_channels."""
    if argument == "in_chans" and accepts(factory, "in_channels"):
        return False
    return accepts(factory, argument)


def _check_none(library: str, **values: object) -> None:
    for key, value in values.items():
        if value:
            raise wrong_value(key, value, f"must be None: {library}'s networks have none")


def given_of(arguments: Mapping[str, Plain]) -> dict[str, Plain]:
    return {key: value for key, value in arguments.items() if value is not None}
