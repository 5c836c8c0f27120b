"""Quantization ranges: which interval of a tensor's values int8 covers.

A wide range rounds coarsely, a narrow one clips values. Which is better depends on the network
(Nagel et al., 2021, arXiv:2106.08295, section 3.1), so there are several.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Range = tuple[float, float]
STEPS = 255  # between the 256 values of int8


class Histogram(NamedTuple):
    """The values of a tensor: counts of equal bins from the smallest value to the largest."""

    counts: Tensor
    low: float
    high: float

    @property
    def edges(self) -> Tensor:
        return torch.linspace(self.low, self.high, len(self.counts) + 1, dtype=torch.float64)


def minmax(histogram: Histogram) -> Range:
    """All values."""
    return histogram.low, histogram.high


def percentile(histogram: Histogram, *, share: float) -> Range:
    """All but the outermost: the share 1 - `share` of the values is clipped, at each end."""
    cumulated = histogram.counts.cumsum(0) / histogram.counts.sum()
    first, last = torch.searchsorted(cumulated, torch.tensor([1 - share, share])).tolist()
    edges = histogram.edges
    return edges[first].item(), edges[min(last + 1, len(edges) - 1)].item()


def least_squares(histogram: Histogram) -> Range:
    """The range, shrunk at both ends by one factor, with the least squared error.

    The error is that of rounding and clipping ("MSE" in Nagel et al., 2021, section 3.1).
    """
    edges, counts = histogram.edges, histogram.counts
    x = (edges[1:] + edges[:-1]) / 2
    widest = min(histogram.low, 0.0), max(histogram.high, 0.0)

    def loss(ends: Range) -> float:
        scale = max(ends[1] - ends[0], 1e-30) / STEPS
        kept = ((x / scale).round() * scale).clamp(*ends)
        return (counts * (kept - x) ** 2).sum().item()

    shares = torch.linspace(1.0, 0.02, 99).tolist()
    return min(((widest[0] * share, widest[1] * share) for share in shares), key=loss)


RANGES: dict[str, Callable[[Histogram], Range]] = {
    "minmax": minmax,
    "percentile 99.999": functools.partial(percentile, share=0.99999),
    "percentile 99.99": functools.partial(percentile, share=0.9999),
    "percentile 99.9": functools.partial(percentile, share=0.999),
    "mse": least_squares,
}
