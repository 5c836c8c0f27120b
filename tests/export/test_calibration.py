import pytest
import torch

from repvgg.export.calibration import Histogram, least_squares, minmax, percentile

BINS = 2048


def histogram(values: torch.Tensor) -> Histogram:
    low, high = values.min().item(), values.max().item()
    return Histogram(values.histc(BINS, low, high).double(), low, high)


def test_a_percentile_clips_the_outermost_values():
    values = torch.linspace(0, 1, 100_001)

    low, high = percentile(histogram(values), share=0.99)

    assert (low, high) == (pytest.approx(0.01, abs=1e-3), pytest.approx(0.99, abs=1e-3))


def test_a_percentile_keeps_the_zeros_of_a_relu():
    values = torch.cat([torch.zeros(1000), torch.rand(1000)])

    assert percentile(histogram(values), share=0.999)[0] == 0


def test_least_squares_clips_an_outlier_that_minmax_includes():
    edges = torch.linspace(0, 20, BINS + 1).double()
    counts = 1e9 * (-((edges[1:] + edges[:-1]) ** 2) / 8).exp()  # half a normal distribution
    counts[-1] = 1
    histogram = Histogram(counts, 0.0, 20.0)

    low, high = least_squares(histogram)

    assert minmax(histogram) == (0, 20)
    assert (low, high) == (0, pytest.approx(5, abs=1.5))


def test_least_squares_keeps_a_uniform_distribution():
    values = torch.linspace(-1, 1, 10_000)

    low, high = least_squares(histogram(values))

    assert low == pytest.approx(-1, abs=0.03)
    assert high == pytest.approx(1, abs=0.03)
