"""The whole network: its head, its auxiliary classifiers and its stochastic layers.

tests/checkpoint/test_recognize.py compares its logits with those of the reference implementations.
"""

import pytest
import torch

import repvgg
from repvgg import checkpoint
from repvgg.checkpoint.native import Checkpoint, Probe
from repvgg.checks import ArgumentError
from repvgg.contract import DataContract
from repvgg.training.classifier import parameter_groups
from tests.support.networks import settle

# By variant: the sum of all absolute weights after seed 0, and the next random number. Recorded
# with version 0.2.0 before networks became backbones.
FRESH = {
    "repvgg_tiny": (989.0845162445512, 0.07859784364700317),
    "qarepvgg_tiny": (957.0845162445512, 0.07859784364700317),
    "repvggplus_l2pse": (1475.3800076260914, 0.007803499698638916),
}


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


@pytest.mark.parametrize("name", FRESH)
def test_fresh_weights_are_those_of_earlier_versions(name):
    torch.manual_seed(0)
    network = repvgg.create_model(name, depths=(1, 2, 2, 1), widths=(8, 16, 16, 24), num_classes=5)

    total = sum(parameter.double().abs().sum().item() for parameter in network.parameters())

    assert (total, torch.rand(1).item()) == pytest.approx(FRESH[name], rel=1e-9)


@pytest.mark.parametrize("name", ["repvgg_tiny", "qarepvgg_tiny", "repvggplus_l2pse"])
@pytest.mark.parametrize("deployed", [False, True])
def test_no_weight_decay_names_what_training_does_not_decay(name, deployed):
    network = small(name)
    network = repvgg.switch_to_deploy(network) if deployed else network

    _, no_decay = parameter_groups(network, 0.1)

    named = dict(network.named_parameters())
    found = {id(named[key]) for key in network.no_weight_decay()}
    assert found == {id(parameter) for parameter in no_decay["params"]}


def test_before_the_classifier_the_head_returns_what_a_headless_network_does():
    model, headless = small(), small(num_classes=0)
    images = torch.randn(2, 3, 32, 32)
    headless.load_state_dict(model.state_dict(), strict=False)

    pooled = model.forward_head(model.forward_features(images), pre_logits=True)

    assert pooled.shape == (2, model.num_features)
    assert torch.equal(pooled, headless(images))
    assert torch.equal(model.get_classifier()(pooled), model(images))
    assert type(headless.get_classifier()) is torch.nn.Identity


@pytest.mark.parametrize("name", ["repvgg_a0", "repvggplus_l2pse"])
def test_a_new_classifier_has_the_new_classes_and_keeps_the_backbone(name):
    model, images = small(name).to(torch.bfloat16), torch.randn(2, 3, 32, 32).to(torch.bfloat16)
    before = model.forward_features(images)

    model.reset_classifier(7)

    features, auxiliary = model.forward_auxiliary(images)
    assert torch.equal(features, before)
    assert model.num_classes == 7
    assert model(images).shape == (2, 7)
    assert all(logits.shape == (2, 7) for logits in auxiliary)
    assert len(auxiliary) == (3 if name == "repvggplus_l2pse" else 0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert repvgg.switch_to_deploy(model)(images).shape == (2, 7)


def test_a_classifier_of_no_classes_is_removed_and_comes_back():
    model, images = small("repvggplus_l2pse"), torch.randn(2, 3, 32, 32)

    model.reset_classifier(0, "avg")

    assert torch.equal(model(images), model.forward_features(images).mean((2, 3)))
    assert model.forward_auxiliary(images)[1] == []
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)


def test_a_new_classifier_is_on_the_device_of_the_backbone():
    with torch.device("meta"):
        model = repvgg.create_model("repvgg_tiny", num_classes=0)

    model.reset_classifier(7)

    assert model.linear.weight.is_meta


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), "num_classes=-1: must be an integer of at least 0"),
        (("ten",), "num_classes='ten'"),
        ((3, ""), "global_pool='': must be avg; for the feature maps call forward_features"),
        ((3, "max"), "global_pool='max'"),
    ],
)
def test_an_impossible_classifier_is_an_error(arguments, message):
    model = small()

    with pytest.raises(ArgumentError, match=message):
        model.reset_classifier(*arguments)

    assert model.num_classes == 5


def test_a_network_with_a_new_classifier_is_saved_and_opened(tmp_path):
    model = small("repvggplus_l2pse")
    model.reset_classifier(2)
    config = {
        "name": "repvggplus_l2pse",
        "depths": [1, 2, 2, 1],
        "widths": [8, 16, 16, 24],
        "num_classes": model.num_classes,
    }
    data = DataContract(["a", "b"], 3, (32, 32), [0.5] * 3, [0.2] * 3, "bilinear")
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    probe = Probe(images, torch.zeros(4, dtype=torch.int64), torch.empty(0))

    checkpoint.save(tmp_path / "new.ckpt", Checkpoint(model, config, data, probe))
    opened = checkpoint.open_network(tmp_path / "new.ckpt").model

    theirs = opened.state_dict()
    assert theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in model.state_dict().items())


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
