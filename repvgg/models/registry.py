"""Networks by name: the variants of RepVGG, and torchvision's classifiers.

A0 to B3g4: RepVGG (Ding et al., 2021, arXiv:2101.03697), tables 2 and 3. D2se and RepVGGplus-L2pse:
the authors' later releases. `repvgg_tiny` is ours, for images of 8 to 32 pixels. `qarepvgg_*`:
QARepVGG (Chu et al., 2022, arXiv:2212.01593), with the depths and widths of RepVGG.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from repvgg.checks import check_boolean, check_integer, check_number, did_you_mean, wrong_value
from repvgg.contract import Plain
from repvgg.models.branches import pair
from repvgg.models.network import RepVGG
from repvgg.models.over_parameterize import over_parameterize as expand

_A = (2, 4, 14, 1)
_B = (4, 6, 16, 1)
_DEEP = (8, 14, 24, 1)

# name: blocks by stage, width multipliers of (64, 128, 256, 512), what else differs
_VARIANTS: dict[str, tuple[tuple[int, ...], tuple[float, ...], dict[str, Plain]]] = {
    "repvgg_tiny": ((1, 2, 2, 1), (0.25, 0.25, 0.25, 0.125), {}),
    "repvgg_a0": (_A, (0.75, 0.75, 0.75, 2.5), {}),
    "repvgg_a1": (_A, (1, 1, 1, 2.5), {}),
    "repvgg_a2": (_A, (1.5, 1.5, 1.5, 2.75), {}),
    "repvgg_b0": (_B, (1, 1, 1, 2.5), {}),
    "repvgg_b1": (_B, (2, 2, 2, 4), {}),
    "repvgg_b1g2": (_B, (2, 2, 2, 4), {"groups": 2}),
    "repvgg_b1g4": (_B, (2, 2, 2, 4), {"groups": 4}),
    "repvgg_b2": (_B, (2.5, 2.5, 2.5, 5), {}),
    "repvgg_b2g2": (_B, (2.5, 2.5, 2.5, 5), {"groups": 2}),
    "repvgg_b2g4": (_B, (2.5, 2.5, 2.5, 5), {"groups": 4}),
    "repvgg_b3": (_B, (3, 3, 3, 5), {}),
    "repvgg_b3g2": (_B, (3, 3, 3, 5), {"groups": 2}),
    "repvgg_b3g4": (_B, (3, 3, 3, 5), {"groups": 4}),
    "repvgg_d2se": (_DEEP, (2.5, 2.5, 2.5, 5), {"se_before_relu": 16}),
    "repvggplus_l2pse": (
        _DEEP,
        (2.5, 2.5, 2.5, 5),
        {"se_after_relu": 4, "auxiliary_heads": True},
    ),
}
_VARIANTS |= {
    f"qa{name}": (depths, multipliers, {**extra, "block": "qarepvgg"})
    for name, (depths, multipliers, extra) in _VARIANTS.items()
    if not any(key.startswith("se_") for key in extra)
}


def list_models() -> list[str]:
    """The names that `create_model` takes, from small to large within each series."""
    return list(_VARIANTS)


def create_model(name: str, **overrides: Plain) -> RepVGG:
    """Build a multi-branch network of the family, with fresh weights.

    Args:
        name: one of `list_models()`.
        overrides: any argument of `RepVGG`, in place of the variant's: num_classes, in_channels,
            dropout, strides, widths, depths, groups, bn_eps, ... With num_classes=0 the network has
            no classifier, as in timm, and returns pooled features. RepVGGplus then needs
            auxiliary_heads=False too.

    Raises:
        ValueError: the name or an override is unknown, or a value is outside its range.
    """
    if name not in _VARIANTS:
        raise ValueError(_unknown("model", str(name), list_models()))
    depths, multipliers, extra = _VARIANTS[name]
    widths = _widths(multipliers)
    allowed = list(inspect.signature(RepVGG).parameters)
    for key in overrides:
        if key not in allowed:
            raise ValueError(_unknown("override", key, allowed))
    build: Callable[..., RepVGG] = RepVGG  # which checks its arguments
    return build(**{"depths": depths, "widths": widths, **extra, **overrides})


def identify(shape: Mapping[str, Plain], *, deployed: bool = False) -> dict[str, Plain]:
    """Find the variant that has a shape, as arguments of `create_model`.

    Args:
        shape: depths, widths and every other argument that differs from RepVGG's defaults.
        deployed: the network is folded, so it has lost its auxiliary classifiers.

    Returns:
        the name of the variant; for a shape that no variant has, a name and overrides.
    """
    for name, (depths, multipliers, extra) in _VARIANTS.items():
        own: dict[str, Plain] = {
            "depths": [*depths],
            "widths": _widths(multipliers),
            "groups": 1,
            **extra,
        }
        if deployed:
            own.pop("auxiliary_heads", None)
        if own == {"groups": 1, **shape}:
            return {"name": name}
        if own == {"groups": 1, **shape, "auxiliary_heads": True}:
            return {"name": name, "auxiliary_heads": False}
    return {"name": "repvgg_a0", **shape}


def imagenet_classes() -> list[str]:
    """The names of ImageNet's 1000 classes, in the usual order of logits, from torchvision."""
    from torchvision.models import ResNet18_Weights

    return list(ResNet18_Weights.DEFAULT.meta["categories"])


def build_model(*, library: Plain = "repvgg", **config: Plain) -> nn.Module:
    """Build the network of a config, multi-branch and with fresh weights.

    Args:
        library: "repvgg", with the arguments of `create_model`, or "torchvision", with those of
            `build_torchvision`.

    Raises:
        ValueError: an argument is unknown, or a value is outside its range.
    """
    builders: dict[str, Callable[..., nn.Module]] = {
        "repvgg": create_model,
        "torchvision": build_torchvision,
    }
    if not isinstance(library, str) or library not in builders:
        raise wrong_value("library", library, f"must be one of {', '.join(builders)}", "repvgg")
    return builders[library](**config)


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
    from torchvision import models

    names = models.list_models(models)
    if name not in names:
        raise ValueError(_unknown("name", str(name), names))
    for key, value in (("strides", strides), ("drop_path", drop_path)):
        if value:
            raise wrong_value(key, value, "must be None: torchvision's networks have none")
    check_boolean("over_parameterize", over_parameterize)
    check_number("branch_drop", branch_drop or 0.0, below=1, example=0.1)
    if branch_drop and not over_parameterize:
        allowed = "drops branches of RepVGG blocks, so it needs over_parameterize=true"
        raise wrong_value("branch_drop", branch_drop, allowed, 0)
    given = {key: value for key, value in arguments.items() if value is not None}
    # Their auxiliary outputs are not logits alone, and they warn of the default of init_weights.
    if name in ("googlenet", "inception_v3"):
        given = {"aux_logits": False, "init_weights": True} | given
    check_integer("num_classes", num_classes, minimum=1, example=10)
    network: nn.Module
    try:
        network = models.get_model(name, weights=None, num_classes=num_classes, **given)
    except TypeError as error:
        shown = ", ".join(f"{key}={value}" for key, value in given.items())
        raise ValueError(f"{shown}: torchvision's {name} does not take this ({error})") from error
    if check_integer("in_channels", in_channels, minimum=1, example=3) != 3:
        _replace_stem(network, in_channels)
    if not over_parameterize:
        return network
    try:
        return expand(network, branch_drop=branch_drop or 0.0)
    except ValueError as error:
        raise ValueError(f"over_parameterize=true: {error}") from error


def _widths(multipliers: tuple[float, ...]) -> list[int]:
    return [int(base * m) for base, m in zip((64, 128, 256, 512), multipliers, strict=True)]


def _replace_stem(network: nn.Module, in_channels: int) -> None:
    """Replace the convolution that was declared first, with fresh weights."""
    for path, conv in network.named_modules():
        if type(conv) is nn.Conv2d:
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
            return
    raise wrong_value("in_channels", in_channels, "this network has no convolution to change", 3)


def _unknown(what: str, given: str, allowed: list[str]) -> str:
    hint = did_you_mean(given.lower(), allowed)
    return f"unknown {what} '{given}': {hint}allowed are {', '.join(allowed)}"
