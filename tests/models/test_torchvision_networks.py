import pytest
import torch
import torchvision
from torch import nn

import repvgg
from repvgg.models.registry import build_model

TORCHVISION = {"library": "torchvision"}

# Millions of parameters, training / deployed. Published for A0 to B3g4 (RepVGG, tables 3 and 4,
# and the authors' model list) and for D2se; RepVGGplus-L2pse counts its auxiliary heads.
PARAMETERS = {
    "repvgg_a0": (9.11, 8.31),
    "repvgg_a1": (14.09, 12.79),
    "repvgg_a2": (28.21, 25.50),
    "repvgg_b0": (15.82, 14.34),
    "repvgg_b1": (57.42, 51.83),
    "repvgg_b1g2": (45.78, 41.36),
    "repvgg_b1g4": (39.97, 36.13),
    "repvgg_b2": (89.02, 80.32),
    "repvgg_b2g2": (70.85, 63.96),
    "repvgg_b2g4": (61.76, 55.78),
    "repvgg_b3": (123.09, 110.96),
    "repvgg_b3g2": (96.91, 87.40),
    "repvgg_b3g4": (83.83, 75.63),
    "repvgg_d2se": (133.33, 120.39),
}


def millions(model: torch.nn.Module) -> float:
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones_in_both_forms(name):
    with torch.device("meta"):
        model = repvgg.create_model(name)

    assert (millions(model), millions(repvgg.switch_to_deploy(model))) == PARAMETERS[name]


def test_parameter_counts_of_repvggplus_are_the_published_ones():
    with torch.device("meta"):
        model = repvgg.create_model("repvggplus_l2pse")
    whole = millions(model)
    del model.auxiliary

    assert (whole, millions(model)) == (146.06, 140.10)


def test_the_list_has_every_published_variant_and_repvgg_tiny():
    plain = {name for name in PARAMETERS if name != "repvgg_d2se"} | {"repvgg_tiny"}

    assert set(repvgg.list_models()) == {
        *plain,
        *(f"qa{name}" for name in plain),
        "repvgg_d2se",
        "repvggplus_l2pse",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PARAMETERS if name != "repvgg_d2se"])
def test_qarepvgg_deploys_to_the_shapes_of_repvgg(name):
    with torch.device("meta"):
        ours, theirs = (
            repvgg.switch_to_deploy(repvgg.create_model(prefix + name)).state_dict()
            for prefix in ("", "qa")
        )

    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.items()
    }


def test_overrides_replace_arguments_of_the_variant():
    model = repvgg.create_model(
        "repvgg_a0",
        num_classes=7,
        in_channels=1,
        dropout=0.5,
        depths=(1, 1, 1, 1),
        widths=(8, 8, 16, 16),
        strides=(1, 1, 1, 2, 2),
        groups=2,
        bn_eps=1e-3,
    ).eval()

    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 7)
    assert model.forward_features(torch.zeros(2, 1, 8, 8)).shape == (2, 16, 2, 2)
    assert [block.branch_3x3.conv.groups for block in model.blocks()] == [1, 2, 1, 2]
    assert model.stem.branch_3x3.bn.eps == 1e-3
    assert model.dropout.p == 0.5


def test_every_second_block_of_a_grouped_variant_is_grouped():
    with torch.device("meta"):
        model = repvgg.create_model("repvgg_b1g4")

    groups = [block.branch_3x3.conv.groups for block in model.blocks()]

    assert groups == [1, 4] * 13 + [1]
    assert [block.branch_1x1.conv.groups for block in model.blocks()] == groups


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("repvgg_a9", {}, "name=repvgg_a9: there is no such model; did you mean repvgg_a"),
        ("resnet", {}, "allowed are repvgg_tiny, repvgg_a0"),
        (
            "repvgg_a0",
            {"classes": 3},
            "classes: there is no such argument; did you mean num_",
        ),
        (
            "repvgg_a0",
            {"num_classes": -1},
            "num_classes=-1: must be an integer of at",
        ),
        ("repvgg_a0", {"num_classes": True}, "num_classes=True"),
        ("repvgg_a0", {"dropout": 1.0}, "dropout=1.0: must be a number of at least 0 and"),
        ("repvgg_a0", {"dropout": "x"}, "dropout='x'"),
        ("repvgg_a0", {"dropout": float("nan")}, "dropout=nan"),
        ("repvgg_a0", {"strides": (2, 2)}, "strides=.*must be 5 integers"),
        ("repvgg_a0", {"widths": "abcd"}, "widths='abcd'"),
        ("repvgg_a0", {"groups": 5}, "groups=5: must divide"),
        ("repvgg_a0", {"block": "qa"}, "block='qa': must be one of repvgg, qarepvgg"),
    ],
)
def test_a_bad_name_or_value_is_an_error_that_names_it(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        repvgg.create_model(name, **overrides)


def test_a_config_builds_ours_by_default():
    assert isinstance(build_model({"name": "repvgg_tiny", "num_classes": 10}), repvgg.RepVGG)


def test_a_config_builds_a_network_of_torchvision():
    network = build_model(TORCHVISION | {"name": "resnet18", "num_classes": 7, "in_channels": 1})

    assert type(network) is torchvision.models.ResNet
    assert network(torch.randn(2, 1, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_outputs_are_left_out(name):
    with torch.device("meta"):
        network = build_model(TORCHVISION | {"name": name, "num_classes": 7, "init_weights": False})
        logits = network.train()(torch.randn(2, 3, 96, 96))

    assert isinstance(logits, torch.Tensor)


@pytest.mark.slow
def test_a_config_over_parameterizes():
    config = TORCHVISION | {"name": "resnet18", "over_parameterize": True, "branch_drop": 0.1}
    network = build_model(config)

    assert network.layer1[0].conv1.branch_1x1 is not None
    assert network.layer1[0].conv1.branch_drop.p == 0.1


def test_none_keeps_the_default_of_the_builder():
    network = build_model(TORCHVISION | {"name": "mobilenet_v2", "dropout": None})

    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == [0.2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "resnet19"}, "name=resnet19: there is no such model; did you mean resnet18"),
        ({"name": "resnet18", "strides": [1] * 5}, "strides=.*must be None"),
        ({"name": "resnet18", "drop_path": 0.1}, "drop_path=0.1: must be None"),
        ({"name": "resnet18", "dropout": 0.1}, "dropout=0.1: .*resnet18 does not take this"),
        ({"name": "vit_b_16", "image_size": 15}, r"image_size=15: .*\(Input shape indivisible"),
        (
            {"name": "resnet18", "over_parameterize": True, "branch_drop": 1.5},
            "branch_drop=1.5",
        ),
        ({"name": "resnet18", "branch_drop": 0.1}, "needs over_parameterize=true"),
        ({"name": "resnet18", "over_parameterize": 1}, "must be true or false"),
        ({"name": "resnet18", "num_classes": 0}, "num_classes=0"),
        ({"name": "vit_b_32", "over_parameterize": True}, "no convolution to over-parameterize"),
    ],
)
def test_a_bad_config_is_an_error_that_names_it(config, message):
    with pytest.raises(ValueError, match=message):
        build_model(TORCHVISION | config)


def test_an_unknown_library_is_an_error():
    with pytest.raises(ValueError, match=r"library='keras': must be one of repvgg, torch"):
        build_model({"library": "keras", "name": "resnet18"})


def test_without_classes_a_network_gives_pooled_features():
    network = repvgg.create_model("repvgg_tiny", num_classes=0).eval()
    images = torch.rand(2, 3, 32, 32)

    assert isinstance(network.linear, nn.Identity)
    assert torch.equal(network(images), network.forward_features(images).mean((2, 3)))
