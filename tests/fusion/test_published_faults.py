"""Silent faults of published code, made in ours: each changes the outputs, so a test sees it."""

import pytest
import torch
from torch import nn

import repvgg
from repvgg import fuse_conv_bn, reparam
from repvgg.fusion import batchnorms, chains, foldable, functions, sums
from repvgg.models import branches
from repvgg.models.over_parameterize import RepVGGConv
from tests.support import family
from tests.support.networks import relative_error, settle


def images(channels: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, 9, 11, generator=generator, dtype=torch.float64)


def diagonal_of_the_first_rows(channels, groups=1, *, dims=2, dtype=torch.float64, device=None):
    """As `fill_diagonal_` on (C, C / groups) gives."""
    kernel = torch.zeros(channels, channels // groups, dtype=dtype)
    return kernel.fill_diagonal_(1.0).reshape(*kernel.shape, *[1] * dims)


def ones_for_every_input(kernel, groups, fewer):
    """As an identity kernel (C, 1, k, k) that is broadcast over the input channels."""
    width = groups * kernel.shape[1] // fewer
    return kernel[:, :1].expand(-1, width, *kernel.shape[2:]).clone()


def the_first_alone(*parts):
    return parts[0]


def without_groups(kernel, groups):
    return kernel.transpose(0, 1).reshape(kernel.shape[1] * groups, -1, *kernel.shape[2:])


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = repvgg.RepVGGBlock(8, 8, groups=2)

    def forward(self, x):
        return self.block(x)


class Transposed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.ConvTranspose2d(8, 8, 3, groups=2), nn.BatchNorm2d(8))


class Shared(nn.Module):
    """A convolution that is called twice, once without the BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(self.conv(x)) + self.conv(x.relu())


class Bent(family.Vanilla):
    def __init__(self) -> None:
        super().__init__()
        self.slope = 0.9


def switched(network: nn.Module) -> nn.Module:
    return repvgg.switch_to_deploy(network)


def fused(network: nn.Module) -> nn.Module:
    return fuse_conv_bn(network)[0]


FAULTS = {
    "YOLOv7: the identity of grouped channels": (
        *(Grouped, branches, "identity_kernel", diagonal_of_the_first_rows),
        switched,
    ),
    "PaddleSlim, RepViT: an identity for every input channel": (
        *(lambda: family.RepConv(8, 1), chains, "regroup", ones_for_every_input),
        fused,
    ),
    "PaddleSlim: the first of several kernels alone": (
        *(family.MobileOne, sums, "merge", the_first_alone),
        fused,
    ),
    "VanillaNet: a slope that is not 1 yet": (
        *(Bent, functions, "_is_straight", lambda node: "leaky_relu" in str(node.target)),
        fused,
    ),
    "torch, ultralytics: transposed kernels of groups": (
        *(Transposed, foldable, "transpose", without_groups),
        fused,
    ),
    "torch.fx: a convolution that is called twice": (
        *(Shared, batchnorms.Folding, "_output_obstacle", lambda *_: None),
        fused,
    ),
    "DBB: zeros in the place of its border": (
        *(lambda: Unset(family.DBB()), functions.Functions, "_pads_by", lambda *_: True),
        fused,
    ),
}


class Unset(nn.Module):
    """A normalization whose output is padded with zeros, as if it were DBB's."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.bn, self.conv = block.origin[1], nn.Conv2d(8, 8, 3).double()
        self.register_buffer("border", torch.zeros(1, 8, 1, 1, dtype=torch.float64))

    def forward(self, x):
        y = nn.functional.pad(self.bn(x), (1, 1, 1, 1))
        y[:, :, 0:1, :] = self.border
        y[:, :, -1:, :] = self.border
        y[:, :, :, 0:1] = self.border
        y[:, :, :, -1:] = self.border
        return self.conv(y)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_published_fault_changes_the_outputs(fault, monkeypatch):
    build, place, name, wrong, fold = FAULTS[fault]
    network = settle(build()).double().eval()
    assert relative_error(network(images()), fold(network)(images())) < 1e-12

    monkeypatch.setattr(place, name, wrong)

    assert relative_error(network(images()), fold(network)(images())) > 1e-3


def test_a_conversion_that_loses_the_weights_changes_the_outputs(monkeypatch):
    """As PaddleSlim's Reparameter.prepare, which puts new blocks in."""
    network = settle(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))).double()
    x = images()
    assert relative_error(network(x), repvgg.over_parameterize(network)(x)) < 1e-12

    monkeypatch.setattr(RepVGGConv, "_start", lambda *_: None)

    assert relative_error(network(x), repvgg.over_parameterize(network).eval()(x)) > 1e-3


def test_a_sequence_without_the_flip_changes_the_outputs():
    """As OREPA's stem, which composes kernels as if they were polynomials."""
    first, second = (nn.Conv2d(8, 8, 3, bias=False).double() for _ in range(2))
    geometry = reparam.Geometry((3, 3), (1, 1), (1, 1), (0, 0), (0, 0))
    a, b = (
        reparam.Convolution(reparam.bare_affine(layer.weight), geometry, 1, biased=False)
        for layer in (first, second)
    )
    flipped = b._replace(affine=reparam.bare_affine(second.weight.flip(2, 3)))
    x = images()

    def run(whole):
        return nn.functional.conv2d(x, whole.affine.kernel)

    assert relative_error(second(first(x)), run(reparam.compose(a, b))) < 1e-12
    assert relative_error(second(first(x)), run(reparam.compose(a, flipped))) > 1e-2
