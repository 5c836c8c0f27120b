"""The variants of the family, by name.

A0 to B3g4: RepVGG (Ding et al., 2021, arXiv:2101.03697), tables 2 and 3. D2se and RepVGGplus-L2pse:
the authors' later releases. `repvgg_tiny` is ours, for images of 8 to 32 pixels.
"""

import difflib
import inspect
from typing import Any

from repvgg.model import RepVGG

_A = (2, 4, 14, 1)
_B = (4, 6, 16, 1)
_DEEP = (8, 14, 24, 1)

# name: blocks by stage, width multipliers of (64, 128, 256, 512), what else differs
_VARIANTS: dict[str, tuple[tuple[int, ...], tuple[float, ...], dict[str, Any]]] = {
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


def list_models() -> list[str]:
    """The names `create_model` knows, small to large within each series."""
    return list(_VARIANTS)


def create_model(name: str, **overrides: Any) -> RepVGG:
    """Build a network of the family, in its training form and with fresh weights.

    Args:
        name: one of `list_models()`.
        overrides: any argument of `RepVGG`, in place of the variant's: num_classes, in_channels,
            dropout, strides, widths, depths, groups, bn_eps, ...

    Raises:
        ValueError: the name or an override is unknown, or a value is outside its range.
    """
    if name not in _VARIANTS:
        raise ValueError(_unknown("model", str(name), list_models()))
    depths, multipliers, extra = _VARIANTS[name]
    widths = [int(base * m) for base, m in zip((64, 128, 256, 512), multipliers, strict=True)]
    allowed = list(inspect.signature(RepVGG).parameters)
    for key in overrides:
        if key not in allowed:
            raise ValueError(_unknown("override", key, allowed))
    return RepVGG(**{"depths": depths, "widths": widths, **extra, **overrides})


def _unknown(what: str, given: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(given.lower(), allowed, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"unknown {what} '{given}': {hint}allowed are {', '.join(allowed)}"
