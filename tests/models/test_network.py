"""The whole network: its head, its auxiliary classifiers and its stochastic layers.

tests/checkpoint/test_recognize.py compares its logits with those of the reference implementations.
"""

import pytest
import torch

import repvgg
from repvgg.contract import DataContract
from tests.support.networks import settle


def small(name: str = "repvgg_a0", **overrides) -> repvgg.RepVGG:
    torch.manual_seed(0)
    sizes = {"depths": (1, 2, 2, 1), "widths": (8, 16, 16, 24), "num_classes": 5}
    return settle(repvgg.create_model(name, **{**sizes, **overrides}))


def test_features_and_head_compose_to_the_forward():
    model, images = small(), torch.randn(2, 3, 32, 32)

    assert torch.equal(model.forward_head(model.forward_features(images)), model(images))


def test_with_dropout_the_head_is_random_and_the_backbone_is_not():
    model, images = small(dropout=0.5).train(), torch.randn(8, 3, 32, 32)

    features = model.forward_features(images)

    assert torch.equal(features, model.forward_features(images))
    assert not torch.equal(model.forward_head(features), model.forward_head(features))


def test_auxiliary_classifiers_keep_the_features_and_vanish_in_the_switch():
    model, images = small("repvggplus_l2pse"), torch.randn(2, 3, 64, 64)

    features, auxiliary = model.forward_auxiliary(images)
    deployed = repvgg.switch_to_deploy(model)

    assert torch.equal(features, model.forward_features(images))
    assert [logits.shape for logits in auxiliary] == [(2, 5)] * 3
    assert deployed.forward_auxiliary(images)[1] == []
    assert not [key for key in deployed.state_dict() if "auxiliary" in key]


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (8, 8)])
def test_any_image_size_gives_logits(size):
    assert small()(torch.randn(2, 3, *size)).shape == (2, 5)


def test_drop_path_grows_linearly_over_blocks_with_an_identity_branch():
    network = repvgg.create_model("repvgg_a0", drop_path=0.22)  # 22 blocks

    blocks = [network.stem, *network.blocks()]
    found = {
        number: round(block.drop_path.p, 12)
        for number, block in enumerate(blocks, start=1)
        if block.branch_identity is not None
    }
    assert found == {number: round(number / 100, 12) for number in found}
    assert len(found) == 17


def test_branch_drop_is_the_same_in_every_block():
    network = repvgg.create_model("repvgg_a0", branch_drop=0.1)

    assert [block.branch_drop.p for block in (network.stem, *network.blocks())] == [0.1] * 22


def test_stochastic_layers_add_no_weights():
    plain, stochastic = (
        repvgg.create_model("repvgg_tiny", **options)
        for options in ({}, {"dropout": 0.1, "branch_drop": 0.1, "drop_path": 0.1})
    )

    assert plain.state_dict().keys() == stochastic.state_dict().keys()


def test_drop_path_without_an_identity_branch_is_an_error():
    with pytest.raises(ValueError, match=r"drop_path=0.1: .*no block with an identity"):
        repvgg.create_model("repvgg_a0", depths=[1, 1, 1, 1], drop_path=0.1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classes", []),
        ("classes", 5),
        ("image_size", [32]),
        ("image_size", [32, 0]),
        ("mean", [0.5]),
        ("mean", "abc"),
        ("std", [0.2, 0.2, 0.0]),
        ("std", [0.2, 0.2, float("nan")]),
        ("interpolation", 3),
        ("resize_size", -1),
    ],
)
def test_an_impossible_description_of_images_is_an_error(key, value):
    contract = {
        "classes": ["a", "b"],
        "in_channels": 3,
        "image_size": [32, 32],
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "interpolation": "bilinear",
    }
    DataContract(**contract)

    with pytest.raises(ValueError, match=f"{key}=.*: not a description of images of 3 channels"):
        DataContract(**contract | {key: value})
