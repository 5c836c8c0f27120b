"""Networks by name: the variants of RepVGG; those of other libraries are in `libraries`.

A0 to B3g4: RepVGG (Ding et al., 2021, arXiv:2101.03697), tables 2 and 3. D2se and RepVGGplus-L2pse:
the authors' later releases. `repvgg_tiny` is ours, for images of 8 to 32 pixels. `qarepvgg_*`:
QARepVGG (Chu et al., 2022, arXiv:2212.01593), with the depths and widths of RepVGG.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, overload

from torch import nn

from repvgg.checks import (
    ArgumentError,
    check_boolean,
    did_you_mean,
    listed,
    unknown_name,
    wrong_value,
)
from repvgg.contract import ModelConfig, Plain
from repvgg.models import libraries
from repvgg.models.features import RepVGGFeatures
from repvgg.models.libraries import Factory
from repvgg.models.network import RepVGG

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


@overload
def create_model(
    name: str,
    *,
    features_only: Literal[True],
    out_indices: int | Sequence[int] = ...,
    **overrides: Plain,
) -> RepVGGFeatures: ...


@overload
def create_model(
    name: str, *, features_only: Literal[False] = False, **overrides: Plain
) -> RepVGG: ...


def create_model(
    name: str,
    *,
    features_only: Plain = False,
    out_indices: Plain = None,
    **overrides: Plain,
) -> RepVGG | RepVGGFeatures:
    """Build a multi-branch network of the family, with fresh weights.

    Args:
        name: one of `list_models()`.
        features_only: build a backbone that returns a list of feature maps, as in timm: see
            `repvgg.models.RepVGGFeatures`. It has no classifiers, so num_classes has no effect.
        out_indices: of these maps; None is all five. 0 is the stem, 1 to 4 are the stages.
        overrides: any argument of `RepVGG`, in place of the variant's: num_classes, in_channels,
            dropout, strides, widths, depths, groups, bn_eps, ... With num_classes=0 the network has
            no classifier, as in timm, and returns pooled features. RepVGGplus then needs
            auxiliary_heads=False too.

    Raises:
        ValueError: the name or an override is unknown, or a value is outside its range.
    """
    if not isinstance(name, str) or name not in _VARIANTS:
        raise unknown_name("name", str(name), list_models(), what="model")
    depths, multipliers, extra = _VARIANTS[name]
    widths = _widths(multipliers)
    allowed = list(inspect.signature(RepVGG).parameters)
    for key in overrides:
        if key not in allowed:
            hints = [*allowed, "features_only", "out_indices"]
            hint = did_you_mean(key, hints)
            shown = listed(key, hints)
            raise ArgumentError(f"{key}: there is no such argument; {hint}allowed are {shown}", key)
    build: Callable[..., RepVGG] = RepVGG  # which checks its arguments
    arguments = {"depths": depths, "widths": widths, **extra, **overrides}
    if not check_boolean("features_only", features_only):
        if out_indices is not None:
            needed = "selects feature maps, so it needs features_only=true"
            raise wrong_value("out_indices", out_indices, needed)
        return build(**arguments)
    for key in ("dropout", "auxiliary_heads"):
        if overrides.get(key):
            unused = "is of the head, which a network of features_only=true does not have"
            raise wrong_value(key, overrides[key], unused)
    network = build(**arguments | {"auxiliary_heads": False})
    return RepVGGFeatures(network, (0, 1, 2, 3, 4) if out_indices is None else out_indices)


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


def build_model(config: ModelConfig, *, network: Factory | None = None) -> nn.Module:
    """Build the network of a config, multi-branch and with fresh weights.

    Args:
        config: "library" is "repvgg", with the arguments of `create_model`; or "torchvision",
            "timm" or "custom", with those of `repvgg.models.libraries`. repvgg by default.
        network: the user's function or class that builds a custom network. A config names one, and
            nothing imports that name: whoever calls this decides which code runs.

    Raises:
        ValueError: an argument is unknown, a value is outside its range, or `network` is missing or
            has no use.
    """
    builders: dict[str, Callable[..., nn.Module]] = {
        "repvgg": create_model,
        "torchvision": libraries.build_torchvision,
        "timm": libraries.build_timm,
        "custom": functools.partial(libraries.build_custom, network),
    }
    arguments = dict(config)
    library = arguments.pop("library", "repvgg")
    if not isinstance(library, str) or library not in builders:
        raise wrong_value("library", library, f"must be one of {', '.join(builders)}", "repvgg")
    if not isinstance(config.get("name", ""), str):
        raise wrong_value("name", config.get("name"), "must be the name of a model", "repvgg_a0")
    if network is not None and library != "custom":
        raise ArgumentError(
            f"network: {config.get('name')} of {library} needs no code of yours; leave network out",
            "network",
        )
    return builders[library](**arguments)


def _widths(multipliers: tuple[float, ...]) -> list[int]:
    return [int(base * m) for base, m in zip((64, 128, 256, 512), multipliers, strict=True)]
