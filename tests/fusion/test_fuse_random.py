"""Fusing random small graphs does not change their outputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repvgg import fuse_conv_bn
from tests.support.networks import relative_error, settle

CHANNELS = 4
STEPS = ("conv", "conv", "bn", "bn", "add", "add", "relu", "relu_", "iadd", "cat", "identity")


class RandomGraph(nn.Module):
    """Runs a list of operations on values by index; modules may be used several times."""

    def __init__(self, steps: list[tuple[str, int, int, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
                nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False),
                nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=2, bias=False),
                nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode="circular"),
                nn.Conv2d(CHANNELS, CHANNELS, 1),
            ]
        )
        self.bns = nn.ModuleList(nn.BatchNorm2d(CHANNELS, affine=i != 1) for i in range(4))
        self.mix = nn.Conv2d(2 * CHANNELS, CHANNELS, 1)
        self.relu_ = nn.ReLU(inplace=True)
        self.identity = nn.Identity()

    def forward(self, x):
        values = [x * 1.0]
        for kind, first, second, which in self.steps:
            a, b = values[first % len(values)], values[second % len(values)]
            if kind == "conv":
                y = self.convs[which % len(self.convs)](a)
            elif kind == "bn":
                y = self.bns[which % len(self.bns)](a)
            elif kind == "add":
                y = a + b
            elif kind == "iadd":
                a += b
                y = a
            elif kind == "cat":
                y = self.mix(torch.cat([a, b], 1))
            elif kind == "relu_":
                y = self.relu_(a)
            else:
                y = a.relu() if kind == "relu" else self.identity(a)
            values.append(y)
        return values[-1]


# The last few values are taken most often: chains make pairs that can be fused.
INDEX = st.one_of(st.just(-1), st.just(-1), st.integers(-3, 12))
GRAPH = st.lists(
    st.tuples(st.sampled_from(STEPS), INDEX, INDEX, st.integers(0, 4)), min_size=2, max_size=12
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(GRAPH)
def test_random_graphs_compute_the_same_after_fusing(steps):
    torch.manual_seed(0)
    network = settle(RandomGraph(steps)).double()
    images = torch.randn(1, CHANNELS, 6, 5, dtype=torch.float64)
    expected = network(images.clone())

    fused, _ = fuse_conv_bn(network)

    assert relative_error(expected, fused(images.clone())) < 1e-10


class Fixed(nn.Module):
    """The same as straight code that uses every module once, so that much can be fused."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        options = {"3": {"kernel_size": 3, "padding": 1}, "1": {"kernel_size": 1}}
        self.kinds = kinds
        self.parts = nn.ModuleList(
            nn.BatchNorm2d(CHANNELS)
            if kind == "b"
            else nn.Conv2d(CHANNELS, CHANNELS, **options[kind])
            for kinds in self.kinds
            for kind in kinds
            if kind != "x"
        )

    def forward(self, x):
        parts = iter(self.parts)
        total = 0
        for kinds in self.kinds:
            y = x
            for kind in kinds:
                y = y if kind == "x" else next(parts)(y)
            total = total + y
        return total.relu()


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(["x", "b", "3", "1", "3b", "1b", "b1", "1b3", "3bb"]),
        min_size=1,
        max_size=4,
    )
)
def test_random_sums_compute_the_same_after_merging(kinds):
    torch.manual_seed(0)
    network = settle(nn.Sequential(Fixed(kinds), Fixed(kinds))).double()
    images = torch.randn(1, CHANNELS, 6, 5, dtype=torch.float64)

    fused, report = fuse_conv_bn(network)

    assert relative_error(network(images), fused(images)) < 1e-10
    plain = [kind for kind in kinds if kind in ("x", "b", "3", "1", "3b", "1b", "b1", "3bb")]
    if len(plain) > 1 and any("3" in kind or "1" in kind for kind in plain):
        assert report.merged
