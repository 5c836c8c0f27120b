"""Files of the field: goldens of the reference implementations, every variant, layout and form."""

import argparse
import re
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import repvgg
from repvgg import checkpoint, create_model, list_models
from repvgg.checkpoint import locate, recognize
from repvgg.checkpoint.warm_start import are_imagenet_folders
from repvgg.checks import ArgumentError
from tests.support import foreign
from tests.support.networks import relative_error, settle

NAMINGS = {
    "the authors'": foreign.authors,
    "timm's": foreign.timm,
    "mmpretrain's": foreign.mmpretrain,
    "RepVGGplus's": foreign.plus,
    "QARepVGG's": foreign.qarepvgg,
    "our": foreign.ours,
}
EVERY_LAYOUT = ("repvgg_a0", "repvgg_b1g4", "repvgg_d2se", "repvggplus_l2pse", "qarepvgg_a0")
PLAIN = ("the authors'", "timm's", "mmpretrain's", "our")
NARROW = {"depths": [2, 3, 5, 1], "widths": [16, 16, 32, 64], "num_classes": 7}


def layouts_of(name: str) -> tuple[str, ...]:
    if name.startswith("qa"):
        return "QARepVGG's", "our"
    return ("RepVGGplus's", "our") if "plus" in name else PLAIN


def narrow(name: str, **overrides) -> repvgg.RepVGG:
    gates = {"repvgg_d2se": {"se_before_relu": 4}}.get(name, {})
    depths = {"repvggplus_l2pse": {"depths": [2, 2, 24, 1]}}.get(name, {})
    torch.manual_seed(0)
    return settle(create_model(name, **NARROW | gates | depths | overrides))


def goldens() -> list[Any]:
    """Every golden; the large networks take seconds each."""
    names = [name for name in foreign.GOLDENS.files if name != "input" and "_aux" not in name]
    small = ("official/RepVGG-A0", "timm/repvgg_a0")
    return [name if name in small else pytest.param(name, marks=pytest.mark.slow) for name in names]


def of_golden(name: str) -> dict[str, torch.Tensor]:
    """The golden's state_dict, in the layout of its source."""
    source, variant = name.removesuffix("/main").split("/")
    naming = NAMINGS["timm's" if source == "timm" else "the authors'"]
    ours = variant.lower().replace("-", "_")
    if "plus" in ours:
        naming = foreign.plus
    with torch.device("meta"):
        network = create_model(ours)
    return foreign.golden_weights(
        {naming(key): tensor.shape for key, tensor in network.state_dict().items()}
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", goldens())
@torch.no_grad()
def test_the_logits_are_those_of_the_reference_before_and_after_folding(name):
    images = torch.from_numpy(foreign.GOLDENS["input"])
    expected = torch.from_numpy(foreign.GOLDENS[name])

    network = checkpoint.from_state_dict(of_golden(name))

    assert relative_error(expected, network(images)) < 1e-5
    if "plus" in name:
        _, (auxiliary, *_) = network.forward_auxiliary(images)
        head = torch.from_numpy(foreign.GOLDENS[name.replace("main", "stage1_aux")])
        assert relative_error(head, auxiliary) < 1e-5
    network.switch_to_deploy()
    assert relative_error(expected, network(images)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"),
    [
        (name, form)
        for name in list_models()
        for form in ("training", "deployed")
        # Folded, QARepVGG has the shapes of RepVGG, and its names are those of qarepvgg_a0.
        if form == "training" or name == "qarepvgg_a0" or not name.startswith("qa")
    ],
)
def test_every_variant_is_recognized_by_its_shapes(name, form):
    with torch.device("meta"):
        network = create_model(name, num_classes=21, in_channels=4)
    if form == "deployed":
        network.switch_to_deploy()
    for layout in layouts_of(name)[: None if name in EVERY_LAYOUT else 1]:
        found = recognize.choose(foreign.renamed(network, NAMINGS[layout]))
        config = recognize.plan(found)

        _, misfit = recognize.build(found, config)

        known = name.removeprefix("qa") if form == "deployed" else name  # they are then the same
        assert (found.deployed, config["name"]) == (form == "deployed", known)
        assert (config["num_classes"], config["in_channels"]) == (21, 4)
        assert not any(misfit[:3])  # their values, on the meta device, are none
        assert len(found.weights) == len(network.state_dict())
        if form == "training" and not name.startswith("repvggplus"):
            assert found.layout.name == layout


@pytest.mark.slow
@pytest.mark.parametrize("form", ["training", "deployed"])
@pytest.mark.parametrize(
    "name",
    ["repvgg_a0", "repvgg_b1g2", "repvgg_b1g4", "repvgg_d2se", "repvggplus_l2pse", "qarepvgg_a0"],
)
@torch.no_grad()
def test_a_round_trip_gives_equal_logits_for_any_depths_and_widths(name, form):
    network = narrow(name)
    if form == "deployed":
        network.switch_to_deploy()
    images = torch.randn(2, 3, 48, 48)
    expected = network(images)
    for layout in layouts_of(name):
        restored = checkpoint.from_state_dict(foreign.renamed(network, NAMINGS[layout]))

        assert torch.equal(restored(images), expected)


@torch.no_grad()
@pytest.mark.parametrize("reduction", [3, 16])
def test_the_squeeze_and_excite_reduction_fits_all_blocks(reduction):
    network = narrow("repvgg_d2se", widths=[64, 64, 64, 40], se_before_relu=reduction)
    images = torch.randn(2, 3, 48, 48)

    restored = checkpoint.from_state_dict(foreign.renamed(network, foreign.authors))

    assert torch.equal(restored(images), network(images))


def test_both_halves_of_the_third_stage_are_needed_and_equal():
    network = repvgg.switch_to_deploy(narrow("repvggplus_l2pse"))
    weights = foreign.renamed(network, foreign.plus)
    moved = {
        re.sub(
            r"stage3_second\.blocks\.(\d+)", lambda m: f"stage3_first.blocks.{12 + int(m[1])}", key
        )
        if re.match(r"stage3_second\.blocks\.[01]\.", key)
        else key: value
        for key, value in weights.items()
    }

    for unequal in ({k: v for k, v in weights.items() if "second" not in k}, moved):
        with pytest.raises(ValueError, match="so its first half has"):
            checkpoint.from_state_dict(unequal)


WRAPPERS = [
    lambda weights: {"state_dict": weights, "epoch": 3, "optimizer": {"state": {0: {}}}},
    lambda weights: {"model": {"module." + key: value for key, value in weights.items()}},
    lambda weights: {f"_orig_mod.net.{key}": value for key, value in weights.items()},
    lambda weights: {"repvgg": weights},
    lambda weights: {"models": [None, weights]},
    lambda weights: {"a": {"b": {f"student.{key}": value for key, value in weights.items()}}},
    lambda weights: {
        "state_dict": {**{f"net.{k}": v for k, v in weights.items()}, "loss.w": torch.ones(3)}
    },
]


@pytest.mark.parametrize(
    ("naming", "wrap"),
    [
        *((foreign.authors, wrap) for wrap in WRAPPERS),
        (foreign.timm, WRAPPERS[1]),
        (foreign.mmpretrain, WRAPPERS[2]),
    ],
)
def test_any_wrapper_and_any_prefix_are_recognized(naming, wrap):
    network = narrow("repvgg_a0")

    restored = checkpoint.from_state_dict(wrap(foreign.renamed(network, naming)))

    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(restored(images), network(images))


def test_keys_that_repeat_a_prefix_are_unknown():
    network = narrow("repvgg_a0")
    weights = {
        f"model.{key}": value for key, value in foreign.renamed(network, foreign.timm).items()
    }
    weights["model.head.model.fc"] = torch.ones(1)

    with pytest.raises(ValueError, match=r"1 unknown: model\.head\.model\.fc"):
        checkpoint.from_state_dict(weights)


def test_a_network_beside_another_has_to_be_chosen():
    network, average = narrow("repvgg_a0"), narrow("repvgg_a0")
    with torch.no_grad():
        average.linear.bias += 1
    content = {
        "state_dict": foreign.renamed(network, foreign.timm),
        "state_dict_ema": foreign.renamed(average, foreign.timm),
    }

    with pytest.raises(ValueError, match=r"2 networks in it, state_dict, state_dict_ema.*weights="):
        recognize.choose(content)
    with pytest.raises(ValueError, match=r"weights=ema: there is no RepVGG; allowed: state_dict"):
        recognize.choose(content, "ema")
    chosen = recognize.choose(content, "state_dict_ema")
    assert torch.equal(chosen.weights["linear.bias"], average.linear.bias)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_an_average_may_share_the_prefix_of_the_weights(prefix):
    network, average = narrow("repvgg_a0"), narrow("repvgg_a0")
    with torch.no_grad():
        average.linear.bias += 1
    content = {f"{prefix}{k}": v for k, v in foreign.renamed(network, foreign.authors).items()}
    content |= {f"{prefix}ema.{k}": v for k, v in foreign.renamed(average, foreign.authors).items()}

    for place, wanted in ((prefix.rstrip(".") or "top", network), (f"{prefix}ema", average)):
        restored = checkpoint.from_state_dict(content, weights=place)
        assert torch.equal(restored.linear.bias, wanted.linear.bias)


def test_a_wrapper_that_holds_itself_is_walked_once():
    content = {"state_dict": foreign.renamed(narrow("repvgg_a0"), foreign.authors)}
    content["itself"] = content

    content["again"] = content["state_dict"]

    assert [one.place for one in recognize.find(content)] == ["state_dict"]


def test_two_networks_at_one_place_are_an_error():
    weights = foreign.renamed(narrow("repvgg_a0"), foreign.authors)

    with pytest.raises(ValueError, match=r"two networks at 'a\.b': store one of them alone"):
        recognize.choose({"a.b": weights, "a": {"b": dict(weights)}})


def test_a_module_in_place_of_its_state_dict_is_an_error():
    with pytest.raises(ValueError, match="a RepVGG is not a state_dict"):
        checkpoint.from_state_dict(narrow("repvgg_a0"))


def test_other_strides_are_suggested_by_an_identity_branch():
    network = narrow("repvgg_a0", strides=[1, 1, 2, 2, 2])
    weights = foreign.renamed(network, foreign.authors)

    with pytest.raises(ValueError, match=r"stage1\.0\.rbr_identity.*strides=\[1,1,2,2,2\]"):
        checkpoint.from_state_dict(weights)
    restored = checkpoint.from_state_dict(weights, strides=[1, 1, 2, 2, 2])
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(restored(images), network(images))


def test_the_epsilon_of_the_import_is_kept():
    network = narrow("repvgg_a0", bn_eps=1e-3)

    restored = checkpoint.from_state_dict(foreign.renamed(network, foreign.authors), bn_eps=1e-3)

    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(restored(images), network(images))
    assert restored.stem.branch_3x3.bn.eps == 1e-3


def test_batch_counters_may_be_missing_and_half_becomes_float32():
    network = narrow("repvgg_a0").half()
    weights = {
        key: value
        for key, value in foreign.renamed(network, foreign.authors).items()
        if not key.endswith("num_batches_tracked")
    }

    restored = checkpoint.from_state_dict(weights)

    assert {parameter.dtype for parameter in restored.parameters()} == {torch.float32}
    assert restored.stem.branch_3x3.bn.num_batches_tracked == 0
    assert torch.equal(restored.linear.weight, network.linear.weight.float())


def test_the_weights_are_copies_and_no_random_number_is_drawn():
    weights = foreign.renamed(narrow("repvgg_a0"), foreign.authors)
    state = torch.get_rng_state()

    restored = checkpoint.from_state_dict(weights)

    assert torch.equal(torch.get_rng_state(), state)
    weights["linear.bias"].fill_(9)
    assert not (restored.linear.bias == 9).any()
    assert all(parameter.requires_grad for parameter in restored.parameters())


def spoil(weights: dict, how: str) -> dict:
    if how == "a missing tensor":
        del weights["stage3.2.rbr_1x1.bn.bias"]
    elif how == "a missing block":
        return {key: value for key, value in weights.items() if not key.startswith("stage3.2.")}
    elif how == "a missing stage":
        return {key: value for key, value in weights.items() if not key.startswith("stage2.")}
    elif how == "no stem":
        return {key: value for key, value in weights.items() if not key.startswith("stage0.")}
    elif how == "half a classifier":
        del weights["linear.bias"]
    elif how == "another classifier":
        weights["fc.weight"] = weights.pop("linear.weight")
        del weights["linear.bias"]
    elif how == "a wrong shape":
        weights["stage3.2.rbr_dense.conv.weight"] = torch.zeros(32, 31, 3, 3)
    elif how == "one too many":
        weights["stage3.2.rbr_dense.scale"] = torch.zeros(1)
    elif how == "another stem":
        for key in [key for key in weights if key.startswith("stage0.")]:
            weights[key] = torch.zeros(24, *weights[key].shape[1:])
    elif how == "a wrong kernel":
        weights["stage1.1.rbr_dense.conv.weight"] = torch.zeros(9, 16, 3, 3)
    elif how == "no kernel":
        del weights["stage4.0.rbr_dense.conv.weight"]
    elif how == "no axes":
        weights["linear.weight"] = torch.tensor(1.0)
    elif how == "no channels":
        weights["stage1.1.rbr_dense.conv.weight"] = torch.zeros(16, 0, 3, 3)
    elif how == "two forms":
        weights = {key: value for key, value in weights.items() if "stage2.1." not in key}
        weights["stage2.1.rbr_reparam.weight"] = torch.zeros(16, 16, 3, 3)
    elif how == "not finite":
        weights["stage2.1.rbr_1x1.bn.weight"][3] = torch.nan
    elif how == "a negative variance":
        weights["stage2.1.rbr_1x1.bn.running_var"][3] = -1
    elif how == "integers":
        weights["linear.weight"] = weights["linear.weight"].to(torch.int8)
    elif how == "without values":
        weights["linear.weight"] = weights["linear.weight"].to("meta")
    elif how == "sparse":
        weights["linear.weight"] = weights["linear.weight"].to_sparse()
    elif how == "a block far away":
        weights["stage1.3000.rbr_1x1.bn.bias"] = torch.zeros(16)
    return weights


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("a missing tensor", r"depths \[2, 3, 5, 1\].*1 missing: stage3\.2\.rbr_1x1\.bn\.bias$"),
        ("a missing block", r"14 missing: stage3\.2\.rbr_dense\.conv\.weight, .*, \.\.\.$"),
        ("a missing stage", r"multi-branch\) has no stage 2: it is not a whole RepVGG"),
        ("no stem", r"has no stem: it is not a whole RepVGG"),
        ("half a classifier", r"1 missing: linear\.bias$"),
        ("another classifier", r"has no linear, but beside it fc\.weight takes .* 64: rename it"),
        (
            "a wrong shape",
            r"1 of another shape: stage3\.2\.rbr_dense\.conv\.weight \(32, 31, 3, 3\)",
        ),
        ("one too many", r"1 unknown: stage3\.2\.rbr_dense\.scale"),
        ("another stem", r"a stem of 24 channels, where a RepVGG of widths .* has min\(64, 16\)"),
        (
            "a wrong kernel",
            r"1 of another shape: stage1\.1\.rbr_dense\.conv\.weight \(9, 16, 3, 3\)",
        ),
        ("no kernel", r"1 missing: stage4\.0\.rbr_dense\.conv\.weight$"),
        ("no axes", r"1 of another shape: linear\.weight \(\) for \(7, 64\)"),
        ("no channels", r"1 of another shape: stage1\.1\.rbr_dense\.conv\.weight \(16, 0, 3, 3\)"),
        (
            "two forms",
            r"mixes the forms: 1 blocks are folded \(stage2\.1\.rbr_reparam\.weight\), 11",
        ),
        ("not finite", r"1 of no use: stage2\.1\.rbr_1x1\.bn\.weight \(not finite\)"),
        ("a negative variance", r"1 of no use: stage2\.1\.rbr_1x1\.bn\.running_var \(negative\)"),
        ("integers", r"1 of no use: linear\.weight \(int8\)"),
        ("without values", r"1 of no use: linear\.weight \(without values\)"),
        ("sparse", r"1 of no use: linear\.weight \(sparse or quantized\)"),
        ("a block far away", r"depths \[2, 3, 5, 1\].*1 unknown: stage1\.3000\.rbr_1x1\.bn\.bias"),
    ],
)
def test_misfits_are_named_by_their_keys_in_the_file(how, message):
    weights = spoil(foreign.renamed(narrow("repvgg_a0"), foreign.authors), how)

    with pytest.raises(ValueError, match=message):
        checkpoint.from_state_dict(weights)


def test_another_network_is_not_recognized_as_a_repvgg():
    from torchvision import models

    with pytest.raises(
        ValueError, match=r"no RepVGG in it.*first of its 62 tensors are conv1\.weight"
    ):
        checkpoint.from_state_dict(dict(models.resnet18().named_parameters()))
    with pytest.raises(ValueError, match="there are no tensors in it; its first keys: epoch"):
        checkpoint.from_state_dict({"epoch": 1})


@pytest.mark.slow
def test_timms_own_network_is_read_in_both_forms():
    timm = pytest.importorskip("timm")
    from timm.utils.model import reparameterize_model

    images = torch.randn(2, 3, 64, 64)
    theirs = settle(timm.create_model("repvgg_a0"))
    with torch.no_grad():
        expected = theirs(images)
        for network in (theirs, reparameterize_model(theirs)):
            ours = checkpoint.from_state_dict(network.state_dict())
            assert relative_error(expected, ours(images)) < 1e-5


def write(path, content):
    torch.save(content, path)
    return path


def test_a_file_is_opened_with_the_assumptions_of_imagenet(tmp_path):
    network = narrow("repvgg_a0", num_classes=1000)
    weights = foreign.renamed(network, foreign.timm)
    content = {"state_dict": weights, "args": argparse.Namespace(lr=0.1)}

    opened = checkpoint.load(write(tmp_path / "last.pth.tar", content))

    assert opened.data.classes[:2] == ["tench", "goldfish"]
    assert (opened.data.image_size, opened.data.resize_size) == ([224, 224], 256)
    assert (opened.probe.labels == checkpoint.UNKNOWN).all()
    assert "timm's layout, multi-branch" in opened.origin
    images = torch.rand(2, 3, 48, 48)
    torch.testing.assert_close(
        opened.predictor(images), network((images - MEAN) / STD), rtol=1e-5, atol=1e-6
    )


MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)


def test_safetensors_are_known_by_their_content(tmp_path):
    network = narrow("repvgg_a0")
    weights = foreign.renamed(network, foreign.mmpretrain)
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "weights.bin")

    opened = checkpoint.load(tmp_path / "weights.bin")

    assert "mmpretrain's layout" in opened.origin
    (tmp_path / "cut.bin").write_bytes((tmp_path / "weights.bin").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cut\.bin' cannot be read"):
        checkpoint.load(tmp_path / "cut.bin")


def test_an_opened_file_is_stored_as_a_checkpoint_of_ours_in_its_own_form(tmp_path):
    network = repvgg.switch_to_deploy(narrow("repvgg_a0"))
    opened = checkpoint.load(write(tmp_path / "a.pth", foreign.renamed(network, foreign.authors)))

    checkpoint.save(tmp_path / "a.ckpt", opened)

    again = checkpoint.load(tmp_path / "a.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "a.pth"]
    assert again.origin == opened.origin
    assert again.data.classes == opened.data.classes
    images = torch.rand(2, 3, 48, 48)
    assert torch.equal(again.model(images), network(images))


def test_a_file_that_needs_code_is_an_error_that_names_it(tmp_path):
    write(tmp_path / "module.pth", narrow("repvgg_a0"))

    with pytest.raises(
        ValueError, match=r"a repvgg\.models\.network\.RepVGG, and loading that could run code"
    ):
        checkpoint.load(tmp_path / "module.pth")


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.arange(2, dtype=np.longdouble), torch.float64),
        (np.arange(2, dtype=np.clongdouble), torch.complex128),
        (np.arange(2, dtype=np.float16), torch.float16),
        (np.arange(2, dtype=np.int64), torch.int64),
        (np.arange(2, dtype=">i2"), torch.int16),
        (np.arange(2, dtype=np.uint8), torch.uint8),
        (np.arange(2) > 0, torch.bool),
        (np.asfortranarray(np.arange(4.0).reshape(2, 2)), torch.float64),
    ],
)
def test_numeric_arrays_become_tensors_of_their_dtype(array, dtype):
    weights = foreign.renamed(narrow("repvgg_a0"), foreign.authors) | {"extra": array}

    found = recognize.choose(weights)

    assert found.outside == []
    assert found.unknown == ["extra"]
    converted = locate._as_tensor(array)
    assert (converted.dtype, converted.is_contiguous()) == (dtype, True)
    assert np.array_equal(converted.numpy(), array)


@pytest.mark.parametrize(
    "array",
    [np.array(["a"]), np.array([None]), np.ma.masked_array([1.0], [True]), [1.0], np.float64(1)],
)
def test_other_values_beside_the_weights_are_not_tensors(array):
    weights = foreign.renamed(narrow("repvgg_a0"), foreign.authors) | {"extra": array}

    assert recognize.choose(weights).unknown == []


def test_errors_name_the_argument_that_decides(tmp_path):
    weights = foreign.renamed(narrow("repvgg_a0"), foreign.authors)
    write(tmp_path / "a.pth", {"a": weights, "b": dict(weights)})

    with pytest.raises(ArgumentError, match=rf"^'{tmp_path}/a\.pth': there are 2") as several:
        checkpoint.load(tmp_path / "a.pth")
    with pytest.raises(ArgumentError, match="leave network out") as own:
        checkpoint.load(tmp_path / "a.pth", network=narrow)

    assert (several.value.names, own.value.names) == (("weights",), ("network",))
    chosen = checkpoint.open_network(tmp_path / "a.pth", weights="b")
    assert chosen.origin.endswith("multi-branch, 7 classes, at 'b'")


def test_the_number_of_networks_in_a_file_is_limited(monkeypatch):
    weights = foreign.renamed(narrow("repvgg_a0"), foreign.authors)
    several = weights | {f"ema.{key}": value for key, value in weights.items()}
    monkeypatch.setattr(locate, "MOST_NETWORKS", 2)

    assert len(recognize.find(several)) == 2
    with pytest.raises(ValueError, match="it holds 3 networks; store one of them alone"):
        recognize.find(several | {f"old.{key}": value for key, value in weights.items()})


def test_the_usual_epsilon_is_not_recorded():
    found = recognize.choose(foreign.renamed(narrow("repvgg_a0"), foreign.authors))

    assert "bn_eps" not in recognize.plan(found)
    assert recognize.plan(found, bn_eps=1e-3)["bn_eps"] == 1e-3


def test_an_odd_squeeze_and_excite_layer_does_not_change_the_reduction():
    weights = foreign.renamed(narrow("repvgg_d2se"), foreign.authors)
    weights["stage1.0.se.down.weight"] = torch.zeros(9, 16, 1, 1)

    planned = recognize.plan(recognize.choose(weights))

    assert (planned["se_before_relu"], type(planned["se_before_relu"])) == (4, int)


def test_the_published_networks_of_320_pixels_are_resized_to_them():
    sizes = {
        name: checkpoint.imagenet({"name": name, "in_channels": 3, "num_classes": 10})
        for name in ("repvgg_a0", "repvgg_d2se", "repvggplus_l2pse")
    }

    assert sizes["repvgg_a0"].classes == [*"0123456789"]
    assert {name: (data.image_size, data.resize_size) for name, data in sizes.items()} == {
        "repvgg_a0": ([224, 224], 256),
        "repvgg_d2se": ([320, 320], 320),
        "repvggplus_l2pse": ([320, 320], 320),
    }


@pytest.mark.parametrize(
    ("folders", "names", "expected"),
    [(1000, 1000, True), (999, 1000, False), (1000, 999, False), (999, 999, False)],
)
def test_a_thousand_folders_of_imagenet_are_known(folders, names, expected):
    synsets = [f"n{number:08}" for number in range(1000)]

    found = are_imagenet_folders(synsets[:folders], [f"name {n}" for n in range(names)])

    assert found is expected
    assert not are_imagenet_folders(synsets, synsets)
    assert not are_imagenet_folders([*synsets[:-1], "other"], ["name"] * 1000)
