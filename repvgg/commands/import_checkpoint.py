"""Convert a third-party checkpoint into one that the other commands take.

Reads weights of a RepVGG in the layout of its authors, of RepVGGplus, timm, mmpretrain or QARepVGG,
multi-branch or folded, in any wrapper (.pth, .pt, .safetensors). The new file also holds the
classes and the preprocessing. What is not passed is taken from the file if `deploy` wrote it, else
from ImageNet.
"""

from dataclasses import dataclass
from typing import Any

from repvgg import cli
from repvgg.checks import check_integer, check_integers, check_number, wrong_value
from repvgg.signals import importing

DEFAULTS: cli.Config = {
    "path": None,
    "out": None,  # beside it, with the ending .ckpt
    "weights": None,  # which network, where the file holds several, e.g. state_dict_ema
    "classes": None,  # a file of names, one a line, in the order of the logits
    "image_size": cli.Unset(int, "224"),  # pixels
    "resize_size": cli.Unset(int, "256"),
    "interpolation": None,  # bilinear or bicubic
    "mean": cli.Unset(list, "[0.485,0.456,0.406]"),
    "std": cli.Unset(list, "[0.229,0.224,0.225]"),
    "bn_eps": cli.Unset(float, "1e-5"),
    "strides": cli.Unset(list, "[2,2,2,2,2]"),
    "overwrite": False,
}
INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Settings:
    """The keys above. None takes what the file says, else what is usual for ImageNet.

    Raises:
        ValueError: a value is out of range.
    """

    path: str | None
    out: str | None
    weights: str | None
    classes: str | None
    image_size: int | None
    resize_size: int | None
    interpolation: str | None
    mean: list[float] | None
    std: list[float] | None
    bn_eps: float | None
    strides: list[int] | None
    overwrite: bool

    def __post_init__(self) -> None:
        for key, least, example in (("image_size", 8, 224), ("resize_size", 8, 256)):
            if getattr(self, key) is not None:
                check_integer(key, getattr(self, key), minimum=least, example=example)
        if self.interpolation not in (None, *INTERPOLATIONS):
            allowed = f"must be one of {', '.join(INTERPOLATIONS)}"
            raise wrong_value("interpolation", self.interpolation, allowed, "bilinear")
        for key, minimum in (("mean", 0.0), ("std", 1e-6)):
            for value in getattr(self, key) or []:
                check_number(key, value, minimum=minimum, example=0.5)
        if self.bn_eps is not None:
            check_number("bn_eps", self.bn_eps, minimum=1e-12, example=1e-5)
        if self.strides is not None:
            check_integers("strides", self.strides, length=5, example="[2,2,2,2,2]")


def main() -> None:
    cli.script(convert, f"{__doc__}\n    {cli.command('import')} path=FILE", DEFAULTS)


def convert(settings: dict[str, Any]) -> None:
    path = cli.given_path(settings, "path", "FILE")
    checked = Settings(**settings)
    with importing():
        from repvgg.commands.importing import convert  # takes seconds

    convert(path, checked)
