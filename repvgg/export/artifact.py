"""An exported file: what is exported, the description in it, and how it is run again.

A program is the preprocessing, the folded network and, if wanted, a softmax. The preprocessing is
never folded into the stem: the border is padded with zeros after it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from repvgg.checks import brief, wrong_value
from repvgg.contract import METADATA_KEY, Description, Normalize, to_float


class FromBytes(nn.Module):
    """Convert stored images: (N, H, W, C) uint8 -> (N, C, H, W) float in [0, 1]."""

    def forward(self, images: Tensor) -> Tensor:
        return to_float(images.permute(0, 3, 1, 2).contiguous())


def build_program(model: nn.Module, description: Description) -> nn.Sequential:
    """Put a folded network between its preprocessing and the output of its file."""
    program = nn.Sequential()
    if description.input == "uint8":
        program.append(FromBytes())
    program.append(Normalize(description.data.mean, description.data.std))
    program.append(model)
    if description.output == "probabilities":
        program.append(nn.Softmax(dim=1))
    return program.eval()


@dataclass(frozen=True)
class Artifact:
    """An opened file: a predictor.

    Attributes:
        description: the file's metadata.
        run: encoded images, see `Description.encode` -> outputs (N, K).
        layers: number of convolutions and BatchNorms; empty if the format does not show them.
    """

    description: Description
    run: Callable[[Tensor], Tensor]
    layers: dict[str, int] = field(default_factory=dict)

    def __call__(self, images: Tensor) -> Tensor:
        """Predict: images (N, C, H, W), float32 in [0, 1], of any memory layout -> (N, K)."""
        return self.run(self.description.encode(images))

    def guarded(self, path: Path) -> "Artifact":
        """The same, but errors of the engine and outputs that do not fit become one line."""

        def run(images: Tensor) -> Tensor:
            try:
                scores = self.run(images)
            except Exception as error:  # every engine has its own types
                raise ValueError(f"'{path}' fails on images: {brief(error)}") from error
            shape = (len(images), len(self.description.data.classes))
            if not scores.is_floating_point() or scores.shape != shape:
                raise ValueError(
                    f"'{path}' computes {scores.dtype} {brief(tuple(scores.shape))}, its "
                    f"description needs {self.description.output} {shape}"
                )
            return scores

        return replace(self, run=run)


def described(path: Path, text: str | None) -> Description:
    """Parse the metadata of a file.

    Raises:
        ValueError: there is none, it is damaged, or it contradicts itself.
    """
    if not text:
        raise ValueError(
            f"'{path}' has no entry '{METADATA_KEY}' in its metadata: this package did not write it"
        )
    try:
        found = Description.from_json(text)
        if not isinstance(found.config, Mapping) or not isinstance(found.config.get("name"), str):
            raise wrong_value(
                "model", found.config, "must be arguments, with the name of a network"
            )
        for key, count in (
            ("in_channels", found.data.in_channels),
            ("num_classes", len(found.data.classes)),
        ):
            if found.config.get(key, count) != count:
                raise ValueError(
                    f"{key} is {brief(found.config[key])} in one place, {count} in one"
                )
        return found
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"'{path}' has a damaged description: {brief(said)}") from error


def without_grad(program: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return program(images).clone()

    return run


def count_layers(network: nn.Module) -> dict[str, int]:
    """Number of convolutions and BatchNorms of a network, as in `Artifact.layers`."""
    modules = list(network.modules())
    return layer_counts(
        sum(isinstance(module, nn.Conv2d) for module in modules),
        sum(isinstance(module, nn.BatchNorm2d) for module in modules),
    )


def layer_counts(convolutions: int, norms: int) -> dict[str, int]:
    return {"convolutions": convolutions, "batchnorms": norms}
