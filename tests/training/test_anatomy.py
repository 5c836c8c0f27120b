"""What is measured of the branches of a network while it trains."""

import pytest
import torch
from torch import nn

from repvgg.models.block import RepVGGBlock
from repvgg.models.forms import switch_to_deploy
from repvgg.models.registry import create_model
from repvgg.training import anatomy
from tests.support.networks import settle


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return settle(create_model("repvgg_tiny", num_classes=10, in_channels=1)).train()


@pytest.mark.parametrize("name", ["repvgg_tiny", "qarepvgg_a0"])
def test_the_shares_of_the_branches_add_up_to_one(name):
    blocks = anatomy.dissect(settle(create_model(name, num_classes=10)))

    assert len(blocks) == {"repvgg_tiny": 7, "qarepvgg_a0": 22}[name]
    for block in blocks.values():
        assert sum(block.shares.values()) == pytest.approx(1)
        assert min(block.shares.values()) >= 0
        assert 1 <= block.outliers <= block.largest_outlier


def test_a_branch_of_zeros_has_no_share():
    block = settle(RepVGGBlock(4, 4))
    nn.init.zeros_(block.branch_1x1.bn.weight)

    (found,) = anatomy.dissect(nn.Sequential(block)).values()

    assert found.shares["1x1"] == 0
    assert found.shares["identity"] > 0


def test_the_share_of_the_identity_is_that_of_its_squared_weights():
    block = RepVGGBlock(2, 2, bn=False)
    nn.init.constant_(block.branch_3x3.conv.weight, 0.5)  # 36 weights: 9
    nn.init.constant_(block.branch_1x1.conv.weight, 1.0)  # 4 weights: 4; the identity has 2

    (found,) = anatomy.dissect(nn.Sequential(block)).values()

    assert found.shares == pytest.approx({"3x3": 9 / 15, "1x1": 4 / 15, "identity": 2 / 15})


def test_the_outlier_ratio_is_the_largest_weight_over_the_root_mean_square():
    kernel = torch.zeros(3, 1, 2, 2)
    kernel[0], kernel[1, 0, 0, 0] = -3, 5

    assert anatomy.outlier_ratios(kernel).tolist() == [1, 2, 0]


def test_means_of_stages_keep_their_order():
    def block(share: float) -> anatomy.BlockAnatomy:
        return anatomy.BlockAnatomy({"3x3": share, "1x1": 1 - share, "identity": 0.0}, share, share)

    means = anatomy.stage_means({"stem": block(1), "stages.0.0": block(0), "stages.0.1": block(1)})

    assert [*means] == ["stem", "stages.0"]
    assert means["stages.0"] == ({"3x3": 0.5, "1x1": 0.5, "identity": 0}, 0.5, 1)


def test_the_kernels_of_the_branches_add_up_to_the_folded_one(network):
    found = anatomy.pick_kernels(network)

    assert found.parts == ["3x3", "1x1", "identity", "sum"]
    assert found.rows[0] == "stages.1.1, channel 0"
    kernel, _ = network.stages[1][1].equivalent_kernel_bias()
    for channel in range(4):  # at the channel that the identity adds
        expected = kernel[channel, channel].double()
        torch.testing.assert_close(found.maps[channel, 3], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.maps[channel, :3].sum(0), found.maps[channel, 3])
        assert found.maps[channel, 2].count_nonzero() == 1


def test_a_folded_network_has_no_branches(network):
    folded = switch_to_deploy(network)

    assert anatomy.dissect(folded) == {}
    assert anatomy.pick_kernels(folded) is None


def test_the_error_of_the_fold_is_that_of_rounding_its_weights(network):
    images = torch.randn(2, 1, 8, 8)
    double = settle(create_model("repvgg_tiny", num_classes=10, in_channels=1)).double()

    assert 1e-9 < anatomy.fold_error(network, images) < 1e-5
    assert anatomy.fold_error(double, images) < 1e-13


def test_nothing_changes_the_network_or_a_random_state(network):
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state = torch.get_rng_state()

    anatomy.dissect(network)
    anatomy.pick_kernels(network)
    anatomy.fold_error(network, torch.zeros(1, 1, 8, 8))
    anatomy.draw_graph({"multi-branch": network}, torch.zeros(1, 1, 8, 8))

    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_the_graph_shows_both_forms_with_their_layers_and_sizes(network):
    forms = {"multi-branch": network, "folded": switch_to_deploy(network)}

    graph = anatomy.draw_graph(forms, torch.zeros(1, 1, 8, 8))

    names = [node.name for node in graph.node]
    kinds = {form: [n.op for n in graph.node if n.name.startswith(f"{form}/")] for form in forms}
    assert len(names) == len({*names})
    assert {source for node in graph.node for source in node.input} <= {*names}
    assert kinds["folded"].count("Conv2d") == 7
    assert kinds["multi-branch"].count("Conv2d") == 14
    assert "BatchNorm2d" not in kinds["folded"]
    (stem,) = (node for node in graph.node if node.name == "folded/stem/reparam")
    sizes = stem.attr["_output_shapes"].list.shape[0].dim
    assert [one.size for one in sizes][2:] == [4, 4]


def test_a_network_that_cannot_be_traced_has_no_graph():
    class Own(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images if images.sum() > 0 else -images

    assert anatomy.draw_graph({"own": Own()}, torch.zeros(1, 3, 8, 8)) is None
