"""Rows of predictions, for a terminal and for tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from torch import Tensor


class Prediction(NamedTuple):
    """A class and its probability."""

    name: str
    probability: float


def open_text(path: Path) -> TextIO:
    """Open a file for the csv or json module, to be written; what is not UTF-8 becomes escapes."""
    return path.open("w", encoding="utf-8", errors="backslashreplace", newline="")


def most_likely(probabilities: Tensor, names: Sequence[str], count: int) -> list[list[Prediction]]:
    """The most likely classes of each image, the best first; fewer if there are fewer classes.

    Args:
        probabilities: (N, K).
        names: K classes.
    """
    values, indices = probabilities.topk(min(count, len(names)), dim=1)
    return [
        [Prediction(names[i], value) for i, value in zip(places, row, strict=True)]
        for places, row in zip(indices.tolist(), values.tolist(), strict=True)
    ]


def header(first: Sequence[str], count: int) -> list[str]:
    """The columns of a table of predictions: class_1, probability_1, class_2, ..."""
    ranks = range(1, count + 1)
    return [*first, *(f"{what}_{rank}" for rank in ranks for what in ("class", "probability"))]


def cells(predictions: Sequence[Prediction]) -> list[str]:
    """The columns of one image behind the first ones."""
    return [cell for name, share in predictions for cell in (name, f"{share:.6f}")]
