import pytest
import torch
from torch import nn

import repvgg
from repvgg.export.equalize import can_equalize, equalize
from tests.support.networks import settle


def deployed(**config) -> nn.Module:
    torch.manual_seed(0)
    config = {"num_classes": 3, "strides": (1, 2, 2, 2, 1), **config}
    return repvgg.switch_to_deploy(settle(repvgg.create_model("repvgg_tiny", **config)))


@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_equalizing_changes_no_bit_of_what_is_computed(groups):
    model = deployed(groups=groups)
    images = torch.rand(4, 3, 32, 32)

    assert torch.equal(equalize(model)(images), model(images))


def test_equalizing_balances_the_channels_between_two_layers():
    model = deployed()
    with torch.no_grad():
        model.stem.reparam.weight *= torch.logspace(-3, 3, 16).reshape(-1, 1, 1, 1)

    def imbalance(network: nn.Module) -> torch.Tensor:
        first, second = network.stem.reparam.weight, network.stages[0][0].reparam.weight
        ratio = first.abs().amax((1, 2, 3)) / second.abs().amax((0, 2, 3))
        return ratio.log2().abs().max()

    assert imbalance(model) > 8
    assert imbalance(equalize(model)) <= 2  # powers of two


def test_equalizing_does_not_change_its_argument():
    model = deployed()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    equalize(model)

    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_network_with_squeeze_and_excite_is_not_equalized():
    model = deployed(se_after_relu=4)

    assert not can_equalize(model)
    with pytest.raises(ValueError, match="without squeeze-and-excite"):
        equalize(model)


def test_equalizing_needs_a_folded_network():
    with pytest.raises(ValueError, match="switch_to_deploy"):
        equalize(repvgg.create_model("repvgg_tiny"))
