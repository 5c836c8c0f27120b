"""Folded networks, and the way back to branches."""

import copy

import pytest
import torch
from torch import nn

import repvgg
from repvgg import QARepVGGBlock, RepVGGBlock, create_model
from repvgg.models import deployed_form, is_deployed, is_reparameterizable
from tests.support.networks import relative_error, settle

NARROW = {"depths": [1, 2, 3, 1], "widths": [16, 32, 32, 64], "num_classes": 7}
VARIANTS = {
    "repvgg_a0": {},
    "repvgg_b1g4": {},
    "qarepvgg_a0": {},
    "repvgg_d2se": {"se_before_relu": 4},
    "repvggplus_l2pse": {},
}


def deployed(name: str) -> repvgg.RepVGG:
    torch.manual_seed(0)
    network = settle(create_model(name, **NARROW | VARIANTS[name]))
    network.switch_to_deploy()
    return network


def test_a_network_is_deployed_once_its_last_block_is():
    network = create_model("repvgg_tiny")
    *blocks, last = [module for module in network.modules() if isinstance(module, RepVGGBlock)]

    for block in blocks:
        block.switch_to_deploy()

    assert all(is_deployed(block) for block in blocks)
    assert not is_deployed(network)
    last.switch_to_deploy()
    assert is_deployed(network)


def test_a_network_without_blocks_has_nothing_to_switch():
    assert is_deployed(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("module", "switchable"),
    [(RepVGGBlock(1, 1), True), (create_model("repvgg_tiny"), True), (nn.Conv2d(1, 1, 3), False)],
)
def test_blocks_and_networks_of_blocks_are_reparameterizable(module, switchable):
    assert is_reparameterizable(module) == switchable


def test_an_attribute_that_is_no_method_does_not_make_a_block():
    network = nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1))
    network.switch_to_deploy = False

    _, report = deployed_form(settle(network))

    assert len(report.fused) == 1


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_the_function_stays_and_all_branches_are_back(name):
    network = deployed(name)
    images = torch.randn(8, 3, 48, 48)

    branched = repvgg.switch_to_train(network, images)

    assert branched.training
    assert relative_error(network(images), branched.eval()(images)) < 1e-5
    blocks = [module for module in branched.modules() if isinstance(module, RepVGGBlock)]
    fresh = create_model(name, **NARROW | VARIANTS[name])
    assert {block.reparam for block in blocks} == {None}
    assert [type(block) for block in blocks] == [
        type(module) for module in fresh.modules() if isinstance(module, RepVGGBlock)
    ]
    wanted = {key for key in fresh.state_dict() if not key.startswith("auxiliary.")}
    assert branched.state_dict().keys() == wanted


@pytest.mark.parametrize("name", ["repvgg_b1g4", "qarepvgg_a0"])
@torch.no_grad()
def test_in_float64_the_function_is_exact_and_folds_to_the_same_kernels(name):
    network = deployed(name).double()
    images = torch.randn(8, 3, 48, 48, dtype=torch.float64)

    branched = repvgg.switch_to_train(network, images)

    assert relative_error(network(images), branched.eval()(images)) < 1e-12
    again = repvgg.switch_to_deploy(branched)
    for key, tensor in network.state_dict().items():
        assert relative_error(tensor, again.state_dict()[key]) < 1e-12


@pytest.mark.parametrize("kind", [RepVGGBlock, QARepVGGBlock])
@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_training_mode_starts_close_to_eval_mode(kind, stride):
    block = settle(kind(8, 8, stride=stride))
    block.switch_to_deploy()
    network = nn.Sequential(block)
    images = torch.randn(32, 8, 10, 10)

    branched = repvgg.switch_to_train(network, images)

    assert relative_error(network(images), branched(images)) < 1e-3


@torch.no_grad()
def test_the_statistics_are_those_of_all_images_in_whatever_batches():
    block = settle(RepVGGBlock(4, 4))
    block.switch_to_deploy()
    images = torch.randn(150, 4, 6, 6) * torch.tensor([1.0, 2, 3, 4]).reshape(4, 1, 1) + 5

    branched = repvgg.switch_to_train(nn.Sequential(block), images)[0]

    bn = branched.branch_identity
    torch.testing.assert_close(bn.running_mean, images.mean((0, 2, 3)))
    torch.testing.assert_close(bn.running_var, images.var((0, 2, 3)))
    point = branched.branch_1x1
    torch.testing.assert_close(point.bn.running_var, point.conv(images).var((0, 2, 3)))


@torch.no_grad()
def test_every_branch_gets_a_share_and_learns():
    block = settle(RepVGGBlock(4, 4))
    block.switch_to_deploy()
    images = torch.randn(16, 4, 6, 6)

    branched = repvgg.switch_to_train(nn.Sequential(block), images)[0]

    for conv in (branched.branch_3x3.conv, branched.branch_1x1.conv):
        assert (conv.weight != 0).all()
    assert (branched.branch_identity.weight != 0).all()
    with torch.enable_grad():
        branched(images).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in branched.parameters())


@torch.no_grad()
def test_channels_that_never_vary_stay_finite():
    block = settle(QARepVGGBlock(4, 4))
    block.switch_to_deploy()
    network = nn.Sequential(block)
    images = torch.zeros(4, 4, 6, 6)

    branched = repvgg.switch_to_train(network, images)

    other = torch.randn(4, 4, 6, 6)
    assert branched(images).isfinite().all()
    branched = repvgg.switch_to_train(network, images).eval()
    assert relative_error(network(other), branched(other)) < 1e-5


def test_the_network_that_was_given_does_not_change():
    network = deployed("repvgg_a0")
    before = copy.deepcopy(network.state_dict())
    state = torch.get_rng_state()

    repvgg.switch_to_train(network, torch.zeros(2, 3, 48, 48))

    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in network.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("network", "count", "message"),
    [
        (nn.Conv2d(3, 3, 3), 4, "Conv2d has no RepVGG block"),
        (nn.Sequential(RepVGGBlock(3, 3)), 4, "0 is a multi-branch block already"),
        (deployed("repvgg_a0"), 1, "1 images: BatchNorm statistics need at least 2"),
    ],
)
def test_a_network_that_cannot_be_switched_is_an_error(network, count, message):
    with pytest.raises(ValueError, match=message):
        repvgg.switch_to_train(network, torch.zeros(count, 3, 48, 48))


def test_images_with_nan_are_an_error():
    with pytest.raises(ValueError, match="outputs on these images are NaN or inf"):
        repvgg.switch_to_train(deployed("repvgg_a0"), torch.full((2, 3, 48, 48), torch.nan))
