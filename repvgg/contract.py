"""The preprocessing of a network's images, and the description that a file carries."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import UnionType

import torch
from torch import Tensor, nn

from repvgg.checks import brief, wrong_value

Plain = None | bool | int | float | str | Sequence["Plain"] | Mapping[str, "Plain"]
ModelConfig = Mapping[str, Plain]  # the arguments of `repvgg.models.registry.build_model`

METADATA_KEY = "repvgg"
FLOAT32 = torch.finfo(torch.float32)
INPUTS = ("float32", "uint8")
OUTPUTS = ("logits", "probabilities")
MOST_PIXELS = 2**27  # of an image; 11,585 x 11,585
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")  # Pillow's


@dataclass(frozen=True)
class DataContract:
    """The preprocessing of a network's images, and the names of its classes.

    Attributes:
        classes: names, in the order of the logits.
        in_channels: of an image.
        image_size: height and width in pixels.
        mean: by channel, of images in [0, 1].
        std: by channel, of images in [0, 1].
        interpolation: how images are resized.
        resize_size: the shorter side in pixels before the center crop; None is the smallest size
            that covers `image_size`.

    Raises:
        ValueError: a value does not describe images; every such argument is named.
    """

    classes: Sequence[str]
    in_channels: int
    image_size: Sequence[int]
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str
    resize_size: int | None = None

    def __post_init__(self) -> None:
        wrong = [
            key
            for key, fits in (
                ("classes", _are(self.classes, str) and len(self.classes) > 0),
                ("image_size", _are(self.image_size, int, length=2, above=0, pixels=True)),
                ("mean", _are(self.mean, int | float, length=self.in_channels)),
                ("std", _are(self.std, int | float, length=self.in_channels, above=FLOAT32.tiny)),
                ("interpolation", self.interpolation in INTERPOLATIONS),
                (
                    "resize_size",
                    self.resize_size is None
                    or _are([self.resize_size] * 2, int, above=0, pixels=True),
                ),
            )
            if not fits
        ]
        if wrong:
            shown = ", ".join(f"{key}={brief(getattr(self, key))}" for key in wrong)
            raise ValueError(
                f"{shown}: not a description of images of {brief(self.in_channels)} channels; "
                "classes are names, image_size is height and width, mean and std have a finite "
                f"number a channel, an image has at most {MOST_PIXELS:,} pixels"
            )


def _are(
    values: object,
    kind: type | UnionType,
    *,
    length: int | None = None,
    above: float = FLOAT32.min,
    pixels: bool = False,
) -> bool:
    """Whether values are a sequence of a kind, of a length, above a bound and finite in float32.

    Args:
        pixels: their product is of at most MOST_PIXELS.
    """
    return (
        isinstance(values, Sequence)
        and not isinstance(values, str)
        and all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
        and (length is None or len(values) == length)
        and (kind is str or all(above < value < FLOAT32.max for value in values))
        and (not pixels or math.prod(values) <= MOST_PIXELS)
    )


def to_float(images: Tensor) -> Tensor:
    """Scale stored images, uint8 in 0..255, to float32 in [0, 1], which predictors take."""
    return images.float() / 255


class Normalize(nn.Module):
    """(images - mean) / std by channel, as a module in front of a network.

    It cannot be folded into the stem, which pads with zeros after the normalization.

    Shapes: (..., C, H, W) -> (..., C, H, W); images in [0, 1].

    Args:
        mean, std: C numbers each.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


@dataclass(frozen=True)
class Description:
    """What a file records beside the weights.

    Attributes:
        config: the arguments of `repvgg.models.registry.build_model`.
        data: the preprocessing and the classes.
        input: "float32", images (N, C, H, W) in [0, 1]; or "uint8", images (N, H, W, C) in 0..255.
        output: "logits", or "probabilities" behind a softmax; (N, K).

    Raises:
        ArgumentError: an input or output of another name.
    """

    config: ModelConfig
    data: DataContract
    input: str = "float32"
    output: str = "logits"

    def __post_init__(self) -> None:
        if self.input not in INPUTS:
            allowed = f"must be one of {', '.join(INPUTS)}"
            raise wrong_value("input", self.input, allowed, "uint8")
        if self.output not in OUTPUTS:
            allowed = f"must be one of {', '.join(OUTPUTS)}"
            raise wrong_value("output", self.output, allowed, "logits")

    def to_json(self) -> str:
        return json.dumps(
            {
                "model": dict(self.config),
                "data": asdict(self.data),
                "input": self.input,
                "output": self.output,
            },
            sort_keys=True,
        )

    @classmethod
    def from_json(cls, text: str) -> "Description":
        content = json.loads(text)
        return cls(
            content["model"],
            DataContract(**content["data"]),
            content.get("input", "float32"),
            content.get("output", "logits"),
        )

    def encode(self, images: Tensor) -> Tensor:
        """Convert images (N, C, H, W) in [0, 1] to the file's input format; contiguous.

        Images that were stored as uint8 get their stored values back.
        """
        if self.input == "uint8":
            images = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        return images.contiguous()

    def example(self, count: int = 2) -> Tensor:
        """Black images in the file's input format."""
        return self.encode(torch.zeros(count, self.data.in_channels, *self.data.image_size))
