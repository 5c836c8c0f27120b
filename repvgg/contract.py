"""What images a network takes, and what a file says of itself."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.checks import refusal

METADATA_KEY = "repvgg"
INPUTS = ("float32", "uint8")
OUTPUTS = ("logits", "probabilities")


@dataclass(frozen=True)
class DataContract:
    """What a network was trained to see, and what its logits mean.

    Attributes:
        classes: names, in the order of the logits.
        in_channels: of an image.
        image_size: height and width in pixels.
        mean, std: by channel, of images in [0, 1].
        interpolation: how images are resized to that size.
        resize_size: length in pixels that the shorter side is scaled to, before the centre is cut
            out; None scales as little as covers the size.
    """

    classes: Sequence[str]
    in_channels: int
    image_size: Sequence[int]
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str
    resize_size: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no network could have been trained on: a file may say anything."""
        wrong = [
            key
            for key, fits in (
                ("classes", _are(self.classes, str) and len(self.classes) > 0),
                ("image_size", _are(self.image_size, int, length=2, above=0)),
                ("mean", _are(self.mean, int | float, length=self.in_channels)),
                ("std", _are(self.std, int | float, length=self.in_channels, above=0)),
                ("interpolation", isinstance(self.interpolation, str)),
                ("resize_size", self.resize_size is None or _are([self.resize_size], int, above=0)),
            )
            if not fits
        ]
        if wrong:
            shown = ", ".join(f"{key}={str(getattr(self, key))[:60]}" for key in wrong)
            raise ValueError(
                f"{shown}: no description of images of {self.in_channels} channels; classes are "
                "names, image_size is height and width, mean and std are numbers by channel"
            )


def _are(values: object, kind: Any, *, length: int | None = None, above: float = -math.inf) -> bool:
    """Whether values are a sequence of a kind, of a length, each above a bound."""
    return (
        isinstance(values, Sequence)
        and not isinstance(values, str)
        and all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
        and (length is None or len(values) == length)
        and (above == -math.inf or all(value > above for value in values))
    )


def to_float(images: Tensor) -> Tensor:
    """Scale stored images to what predictors take: uint8 in 0..255 to float32 in [0, 1]."""
    return images.float() / 255


class Normalize(nn.Module):
    """(images - mean) / std by channel: the preprocessing in front of a network, as a module.

    It is never folded into the stem: the border is padded with zeros after it, not before.

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
    """What a file says of itself beside the weights.

    Attributes:
        config: the arguments of `repvgg.models.registry.build_model`.
        data: what the network expects and what its outputs mean.
        input: "float32", images (N, C, H, W) in [0, 1]; or "uint8", images (N, H, W, C) in 0..255.
        output: "logits", or "probabilities" behind a softmax; (N, K).

    Raises:
        ValueError: an input or output of another name.
    """

    config: Mapping[str, Any]
    data: DataContract
    input: str = "float32"
    output: str = "logits"

    def __post_init__(self) -> None:
        if self.input not in INPUTS:
            raise refusal("input", self.input, f"must be one of {', '.join(INPUTS)}", "uint8")
        if self.output not in OUTPUTS:
            raise refusal("output", self.output, f"must be one of {', '.join(OUTPUTS)}", "logits")

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
        """Turn images (N, C, H, W) in [0, 1] into what the file takes; contiguous.

        Images that were stored as uint8 come back as they were stored.
        """
        if self.input == "uint8":
            images = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        return images.contiguous()

    def example(self, count: int = 2) -> Tensor:
        """Black images as the file takes them."""
        return self.encode(torch.zeros(count, self.data.in_channels, *self.data.image_size))
