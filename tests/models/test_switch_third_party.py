"""Blocks of other libraries, and subclasses: their switch_to_deploy() is tested."""

import threading
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import repvgg
from tests.support.networks import relative_error, settle

IMAGES = torch.randn(2, 3, 17, 14, generator=torch.Generator().manual_seed(1)).double()


class Stranger(nn.Module):
    """A convolution and a BatchNorm with a method that may fold them wrongly."""

    eps = None

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4, eps=1e-3)

    def forward(self, x):
        x = self.conv(x)
        return x if self.bn is None else self.bn(x)

    def switch_to_deploy(self):
        bn, eps = self.bn, self.bn.eps if self.eps is None else self.eps
        scale = bn.weight / (bn.running_var + eps).sqrt()
        conv = nn.Conv2d(3, 4, 3, padding=1).to(scale)
        conv.weight.data = (self.conv.weight * scale[:, None, None, None]).detach()
        conv.bias.data = (bn.bias - bn.running_mean * scale).detach()
        self.conv, self.bn = conv, None


class WrongEps(Stranger):
    eps = 1e-5


class Raising(Stranger):
    def switch_to_deploy(self):
        raise AttributeError("no rbr_dense")


class InFloat32(Stranger):
    """As some published folds, which cannot run in float64."""

    def switch_to_deploy(self):
        self.bn.running_mean @ torch.eye(4)
        super().switch_to_deploy()


class TwoInputs(Stranger):
    def forward(self, x, y):
        return super().forward(x) + y


class NoConvolution(nn.Module):
    def forward(self, x):
        return x

    def switch_to_deploy(self):
        pass


class Gated(repvgg.RepVGGBlock):
    """Reads a branch that the switch removes."""

    def _sum_of_branches(self, x):
        return super()._sum_of_branches(x) + self.branch_identity(x)


class Harmless(repvgg.RepVGGBlock):
    note = "ours"


def build(kind):
    torch.manual_seed(0)
    block = kind(3, 3) if issubclass(kind, repvgg.RepVGGBlock) else kind()
    return settle(nn.Sequential(nn.Identity(), block))


@pytest.mark.parametrize("images", [None, IMAGES], ids=["alone", "images"])
@pytest.mark.parametrize("kind", [Stranger, Harmless, InFloat32])
def test_a_right_method_is_taken(kind, images):
    network = build(kind)
    given = repvgg.switch_to_deploy(network, images)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in given.modules()) == 0
    x = IMAGES.float()
    assert relative_error(network(x), given(x)) < 1e-5


@pytest.mark.parametrize("images", [None, IMAGES], ids=["alone", "images"])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (WrongEps, r"^1: .*[2-9]\.\de-0\d of the largest value.*fuse_conv_bn"),
        (Gated, r"^1: .*of the largest value.*fuse_conv_bn"),
        (Raising, r"^1: .*Raising.*AttributeError: no rbr_dense.*fuse_conv_bn"),
    ],
)
def test_a_wrong_method_is_named(kind, said, images):
    network = build(kind)
    keys = set(network.state_dict())
    with pytest.raises(ValueError, match=said):
        repvgg.switch_to_deploy(network, images)
    assert set(network.state_dict()) == keys


@pytest.mark.parametrize(("kind", "why"), [(TwoInputs, "missing"), (NoConvolution, "no conv")])
def test_what_cannot_be_tested_is_named(kind, why):
    with pytest.raises(ValueError, match=f"^1: .*{kind.__name__} could not .*{why}.*images="):
        repvgg.switch_to_deploy(build(kind))


def test_images_test_what_random_inputs_cannot():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = TwoInputs()

        def forward(self, x):
            return self.inner(x, 1)

    network = settle(Around())
    given = repvgg.switch_to_deploy(network, IMAGES.float())
    assert relative_error(network(IMAGES.float()), given(IMAGES.float())) < 1e-5


def test_images_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"cannot run on images of shape \(2, 5, 8, 8\)"):
        repvgg.switch_to_deploy(build(Stranger), torch.rand(2, 5, 8, 8))


def test_a_method_in_an_instance_is_tested():
    network = build(repvgg.RepVGGBlock)
    block = network[1]
    block.forward = types.MethodType(lambda self, x: F.relu(self.branch_3x3(x)), block)
    with pytest.raises(ValueError, match=r"^1: "):
        repvgg.switch_to_deploy(network)


def test_blocks_of_other_libraries_stay_beside_over_parameterized_layers():
    network = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), WrongEps())
    wide = settle(repvgg.over_parameterize(settle(network))).double()
    given = repvgg.switch_to_deploy(wide)
    assert isinstance(given[2].bn, nn.BatchNorm2d)
    assert relative_error(wide(IMAGES), given(IMAGES)) < 1e-12
    again = repvgg.switch_to_deploy(wide, IMAGES)
    assert torch.equal(again(IMAGES), given(IMAGES))


def test_testing_draws_no_random_numbers_for_others():
    network = build(Harmless)
    state = torch.get_rng_state()
    repvgg.switch_to_deploy(network)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("form", ["ours", "features", "lock", "channels_last", "compiled"])
def test_whole_networks_are_switched_whatever_they_contain(form):
    torch.manual_seed(0)
    small = {"depths": (1, 1, 1, 1), "widths": (4, 8, 8, 8), "num_classes": 3}
    network = settle(repvgg.create_model("repvgg_a0", **small)).double()
    images = torch.randn(2, 3, 64, 64).double()
    expected = network(images)
    if form == "features":
        network.features = [network.forward_features(images)]
    elif form == "lock":
        network.lock = threading.Lock()
    elif form == "channels_last":
        network = network.to(memory_format=torch.channels_last)
    elif form == "compiled":
        network = torch.compile(network, backend="eager")
    given = repvgg.switch_to_deploy(network)
    assert type(given) is repvgg.RepVGG
    assert relative_error(expected, given(images)) < 1e-12
