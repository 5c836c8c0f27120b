"""Forwards that depend on counts, on texts or on global state are fused exactly or kept."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from repvgg import fuse_conv_bn
from tests.support.networks import relative_error, settle

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Pair(nn.Module):
    def __init__(self, conv=None, bn=None):
        super().__init__()
        self.conv = conv or nn.Conv2d(4, 4, 3, padding=1)
        self.bn = bn or nn.BatchNorm2d(4)


def flat(output) -> torch.Tensor:
    parts = output if isinstance(output, list | tuple) else [output]
    return torch.cat([part.flatten() for part in parts])


class Levels(Pair):
    def forward(self, xs):
        return [self.bn(self.conv(x)) if i < 2 else self.conv(x) for i, x in enumerate(xs)]


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
        self.bn = nn.BatchNorm2d(4)

    def forward(self, xs):
        return [self.bn(conv(x)) for conv, x in zip(self.convs, xs, strict=True)]


class Window(Pair):
    def forward(self, x):
        seen, total = [], 0
        for t in range(x.shape[1]):
            seen.append(self.conv(x[:, t]))
            total = total + self.bn(seen[-1])
            if len(seen) == 3:
                total = total + seen[0]
        return total


class NoIterations(Pair):
    def forward(self, x, extra):
        y = out = self.conv(x)
        for _ in extra:
            out = self.bn(y)
        return out


class CountsIterations(Pair):
    def forward(self, x):
        y, n = self.conv(x), 0
        for _ in range(x.shape[1]):
            n += 1
        return y if n == 4 else self.bn(y)


class LongList(Pair):
    def forward(self, xs):
        y = self.conv(xs[0])
        return y if len(list(xs)) > 2 else self.bn(y)


class Unbinds(Pair):
    def forward(self, x):
        ys = [self.conv(frame) for frame in x.unbind(1)]
        return self.bn(ys[0]) if len(ys) < 3 else ys[2]


class ListOfSizes(Pair):
    def forward(self, x):
        y = self.conv(x)
        return y if list(x.shape) == [2, 4, 8, 8] else self.bn(y)


class Matches(Pair):
    def forward(self, x):
        match x.shape:
            case (2, _, _, _):
                return self.conv(x)
        return self.bn(self.conv(x))


class Rest(Pair):
    def forward(self, x):
        _, *rest = x.shape
        return self.conv(x) if len(rest) == 3 else self.bn(self.conv(x))


class TextOfDevice(Pair):
    def forward(self, x):
        y = self.conv(x)
        return y if str(x.device).startswith("cpu") else self.bn(y)


class TextOfSizes(Pair):
    def forward(self, x):
        y = self.conv(x)
        return y if f"{x.shape[2]}x{x.shape[3]}" == "8x8" else self.bn(y)


class ChecksTwice(Pair):
    def forward(self, x):
        x, y = x.clone(), self.conv(x)
        if x[0, 0, 0, 0] > -9:
            x[0, 0, 0, 0] = -10.0
        return y if x[0, 0, 0, 0] < -9 else self.bn(y)


class ThreeFlags(Pair):
    def forward(self, x, a=False, b=False, c=False):
        y = self.conv(x)
        if a:
            return self.bn(y) * 2
        if b:
            return self.bn(y) * 3
        return y if c else self.bn(y)


class ThreeOptions(Pair):
    def forward(self, x, m=None, k=None, q=None):
        y = self.conv(x)
        return y if m is not None and k is not None and q is None else self.bn(y)


class Tokens(Pair):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y.view(y.size(0), 4, -1))


class FlatTokens(Pair):
    def forward(self, x):
        return self.bn(self.conv(x).flatten(2))


class ChecksGradients(Pair):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if torch.is_grad_enabled() else y


def frames(n: int) -> torch.Tensor:
    return X[:, None].expand(-1, n, -1, -1, -1)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


LINEAR = (lambda: nn.Linear(6, 4), lambda: nn.BatchNorm1d(4))


@pytest.mark.parametrize(
    ("network", "args", "kwargs"),
    [
        (Levels, ([X, X, X],), {}),
        (Heads, ([X, X, X],), {}),
        (Window, (frames(3),), {}),
        (NoIterations, (X, []), {}),
        (CountsIterations, (X,), {}),
        (LongList, ([X, X, X],), {}),
        (Unbinds, (frames(3),), {}),
        (ListOfSizes, (X,), {}),
        (Matches, (X,), {}),
        (Rest, (X,), {}),
        (TextOfDevice, (X,), {}),
        (TextOfSizes, (X,), {}),
        (ChecksTwice, (X,), {}),
        (ThreeFlags, (X,), {"c": True}),
        (ThreeOptions, (X, X, X), {}),
        (lambda: Tokens(*(make() for make in LINEAR)), (tokens(5, 3, 6),), {}),
        (lambda: FlatTokens(*(make() for make in LINEAR)), (tokens(5, 4, 6),), {}),
    ],
)
def test_forwards_with_unknown_counts_are_fused_exactly_or_kept(network, args, kwargs):
    model = settle(network()).double()

    found, report = fuse_conv_bn(model)

    expected, given = flat(model(*args, **kwargs)), flat(found(*args, **kwargs))
    assert relative_error(expected, given) < 1e-12
    assert report.fused == []


def test_both_paths_of_is_grad_enabled_are_traced():
    model = settle(ChecksGradients()).double()

    found, report = fuse_conv_bn(model)

    assert report.fused == []
    with torch.no_grad():
        assert torch.equal(model(X), found(X))


CACHE: dict[str, torch.Tensor] = {}
LOG: list[object] = []


class Caches(Pair):
    grid: ClassVar[dict[str, object]] = {}
    last = None

    def forward(self, x):
        if "ones" not in CACHE:
            CACHE["ones"] = torch.ones_like(x)
        self.grid["x"] = x
        type(self).last = x
        LOG.append(x.shape)
        return self.bn(self.conv(x)) * CACHE["ones"]


def test_tracing_leaves_nothing_in_caches():
    model = settle(Caches()).double()

    found, report = fuse_conv_bn(model)

    assert (CACHE, LOG, Caches.grid, Caches.last) == ({}, [], {}, None)
    assert report.fused == [("conv", "bn")]
    assert relative_error(model(X), found(X)) < 1e-12


class SharedStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.m, self.n = nn.BatchNorm2d(4), nn.BatchNorm2d(4, eps=0.1)

    def forward(self, x):
        return self.m(self.a(x)) * self.n(self.b(x))


def test_batchnorms_that_share_statistics_keep_their_own_weights():
    model = settle(SharedStatistics()).double()
    model.n.running_mean, model.n.running_var = model.m.running_mean, model.m.running_var

    found, report = fuse_conv_bn(model)

    assert len(report.fused) == 2
    assert relative_error(model(X), found(X)) < 1e-12


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.a(x) + self.b(x)


class CallsForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.two = Two()

    def forward(self, x):
        return self.two(x) + self.two.forward(x)


def test_a_child_whose_forward_is_called_directly_stays():
    model = settle(CallsForward()).double()

    found, report = fuse_conv_bn(model)

    assert report.merged == []
    assert relative_error(model(X), found(X)) < 1e-12


@pytest.mark.parametrize("model", [None, nn.Conv2d, [nn.Conv2d(1, 1, 1)], torch.zeros(1)])
def test_another_object_than_a_network_is_an_error(model):
    with pytest.raises(ValueError, match=r"which is no network: pass an instance of nn\.Module"):
        fuse_conv_bn(model)


@pytest.mark.parametrize(
    ("images", "message"),
    [("x", "images is a str"), ([X], "images is a list"), (X * torch.nan, "contains NaN or inf")],
)
def test_other_objects_than_images_are_an_error(images, message):
    model = settle(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))

    with pytest.raises(ValueError, match=message):
        fuse_conv_bn(model, images)
