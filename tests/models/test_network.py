"""The architecture, tested against logits of the reference implementations.

tests/support/goldens.npz holds an input and the logits that the authors' code ("official/...") and
timm 1.0.31 ("timm/...") give in float64 on weights that are a function of the parameter's name in
that implementation. Here the same weights are made under those names and loaded under ours.
"""

import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import repvgg
from repvgg.contract import DataContract
from tests.support.networks import relative_error, settle

GOLDENS = np.load(Path(__file__).parents[1] / "support" / "goldens.npz")


def weight_by_name(key: str, shape: torch.Size) -> torch.Tensor:
    """The value that the goldens' recipe gives a parameter of that name and shape."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    if len(shape) == 4:
        value = rng.standard_normal(shape, dtype=np.float32) * np.sqrt(1 / np.prod(shape[1:]))
    elif len(shape) == 2:
        value = rng.standard_normal(shape, dtype=np.float32) * 0.05
    elif key.endswith("running_var"):
        value = 0.5 + rng.random(shape, dtype=np.float32)
    elif key.endswith("running_mean"):
        value = rng.standard_normal(shape, dtype=np.float32) * 0.1
    elif key.endswith("weight"):
        value = 0.3 + 0.4 * rng.random(shape, dtype=np.float32)
    else:
        value = rng.standard_normal(shape, dtype=np.float32) * 0.1
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def rename(key: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def stage(shift: int, text: str):
    return lambda match: text.format(int(match[1]) + shift)


OFFICIAL = [
    (r"^stem\.", "stage0."),
    (r"^stages\.(\d)\.", stage(1, "stage{}.")),
    ("branch_3x3", "rbr_dense"),
    ("branch_1x1", "rbr_1x1"),
    ("branch_identity", "rbr_identity"),
    (r"se_before_relu\.squeeze", "se.down"),
    (r"se_before_relu\.excite", "se.up"),
]
PLUS = [
    *OFFICIAL,
    (r"^stage([124])\.", r"stage\1.blocks."),
    (r"^stage3\.(\d+)\.", lambda m: f"stage3_{halves(int(m[1]))}."),
    (r"se_after_relu\.squeeze", "post_se.down"),
    (r"se_after_relu\.excite", "post_se.up"),
    (r"^auxiliary\.stage3_half\.", "stage3_first_aux."),
    (r"^auxiliary\.(stage\d)\.", r"\1_aux."),
    (r"_aux\.(conv|bn)\.", r"_aux.0.\1."),
    (r"_aux\.linear\.", "_aux.3."),
]
TIMM = [
    ("branch_3x3", "conv_kxk"),
    ("branch_1x1", "conv_1x1"),
    ("branch_identity", "identity"),
    (r"se_before_relu\.squeeze", "attn.fc1"),
    (r"se_before_relu\.excite", "attn.fc2"),
    (r"^linear\.", "head.fc."),
]
CASES = {
    "official/RepVGG-A0": ("repvgg_a0", OFFICIAL),
    "official/RepVGG-A2": ("repvgg_a2", OFFICIAL),
    "official/RepVGG-B1g2": ("repvgg_b1g2", OFFICIAL),
    "official/RepVGG-B1g4": ("repvgg_b1g4", OFFICIAL),
    "official/RepVGG-D2se": ("repvgg_d2se", OFFICIAL),
    "official/RepVGGplus-L2pse/main": ("repvggplus_l2pse", PLUS),
    "timm/repvgg_a0": ("repvgg_a0", TIMM),
    "timm/repvgg_b1g4": ("repvgg_b1g4", TIMM),
    "timm/repvgg_d2se": ("repvgg_d2se", TIMM),
}


def halves(block: int) -> str:
    return f"first.blocks.{block}" if block < 12 else f"second.blocks.{block - 12}"


def golden(name: str, rules: list[tuple[str, str]]) -> repvgg.RepVGG:
    with torch.device("meta"):
        model = repvgg.create_model(name)
    weights = {
        key: torch.tensor(0)
        if key.endswith("num_batches_tracked")
        else weight_by_name(rename(key, rules), value.shape)
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(weights, assign=True)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_those_of_the_reference_implementation_in_both_forms(case):
    model = golden(*CASES[case])
    images, expected = torch.from_numpy(GOLDENS["input"]), torch.from_numpy(GOLDENS[case])

    trained = model(images)
    deployed = repvgg.switch_to_deploy(model)(images)

    assert relative_error(expected, trained) < 1e-5
    assert relative_error(expected, deployed) < 1e-5


@torch.no_grad()
def test_auxiliary_logits_are_those_of_the_reference_implementation():
    model = golden("repvggplus_l2pse", PLUS)
    images = torch.from_numpy(GOLDENS["input"])
    expected = torch.from_numpy(GOLDENS["official/RepVGGplus-L2pse/stage1_aux"])

    _, auxiliary = model.forward_auxiliary(images)

    assert relative_error(expected, auxiliary[0]) < 1e-5


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
