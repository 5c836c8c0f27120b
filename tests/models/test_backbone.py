"""RepVGG as a backbone: feature maps, timm's methods, and torchvision's extractors."""

import re
from collections import OrderedDict

import onnxruntime
import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.feature_extraction import create_feature_extractor

import repvgg
from repvgg.checks import ArgumentError
from repvgg.models import RepVGGFeatures
from tests.support.networks import relative_error, settle
from tests.support.pages import page, run_examples

BLOCKS = {"stem": "first", "stages.1": "second", "stages.2.0": "third"}
EXPORTER = (  # what torch's TorchScript exporter and torchvision raise while they are traced
    "ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning",
    "ignore:The feature will be removed:DeprecationWarning",
    "ignore:.*torch.jit.script. is deprecated:FutureWarning",
    "ignore:To copy construct from a tensor:UserWarning",
    "ignore::torch.jit.TracerWarning",
)
SMALL = {"depths": (1, 2, 2, 1), "widths": (8, 16, 16, 24)}


def features(name: str = "repvgg_tiny", **options) -> RepVGGFeatures:
    torch.manual_seed(0)
    return settle(repvgg.create_model(name, features_only=True, **options))


def outputs_of(network: nn.Module, images: torch.Tensor, names) -> list[torch.Tensor]:
    """What modules of a network return, by hooks."""
    found = {}

    def keep(name):
        return lambda module, inputs, output: found.update({name: output})

    handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    network(images)
    for handle in handles:
        handle.remove()
    return [found[name] for name in names]


@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b1g4"])
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3, 4), (1, 3), (-1,), (-3, 4), 2])
def test_channels_and_reductions_are_those_of_timm(name, out_indices):
    with torch.device("meta"):
        ours, theirs = (
            library.create_model(name, features_only=True, out_indices=out_indices).feature_info
            for library in (repvgg, timm)
        )

    assert ours.channels() == theirs.channels()
    assert ours.reduction() == theirs.reduction()


def test_information_on_maps_has_the_keys_and_access_of_timm():
    with torch.device("meta"):
        ours, theirs = (
            library.create_model("repvgg_a0", features_only=True, out_indices=(1, 4)).feature_info
            for library in (repvgg, timm)
        )

    keys = ["num_chs", "reduction", "stage", "index"]
    assert len(ours) == len(theirs)
    assert ours[3] == theirs[3]
    assert ours.get_dicts(keys) == theirs.get_dicts(keys)
    assert ours.get_dicts(keys, (0, 2)) == theirs.get_dicts(keys, (0, 2))
    assert ours.channels(2) == theirs.channels(2)
    assert ours.module_name([0, 1]) == theirs.module_name([0, 1])
    assert ours.out_indices == theirs.out_indices


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3, 4), (0,), (1, 3), 2])
@pytest.mark.parametrize("strides", [(2, 2, 2, 2, 2), (1, 1, 2, 1, 3)])
def test_maps_have_the_stated_shapes_and_are_the_outputs_of_the_stages(out_indices, strides):
    backbone, images = features(out_indices=out_indices, strides=strides), torch.randn(2, 3, 33, 48)
    names = backbone.feature_info.module_name()

    maps = backbone(images)

    assert [tuple(one.shape) for one in maps] == [
        (2, channels, -(-33 // step), -(-48 // step))
        for channels, step in zip(
            backbone.feature_info.channels(), backbone.feature_info.reduction(), strict=True
        )
    ]
    expected = outputs_of(backbone, images, names)
    assert all(torch.equal(*pair) for pair in zip(maps, expected, strict=True))


def test_reductions_follow_a_stride_that_was_changed():
    backbone = features()
    block = backbone.stages[2][0]
    block.stride = block.branch_3x3.conv.stride = 1

    deployed = repvgg.switch_to_deploy(backbone)

    assert (
        backbone.feature_info.reduction() == deployed.feature_info.reduction() == [2, 4, 8, 8, 16]
    )


def test_reductions_are_those_of_the_layers_not_of_the_subsampling():
    backbone = features()
    block = backbone.stages[2][0]
    block.stride, block.branch_1x1.conv.stride = 1, (2, 2)  # the 1x1 subsamples now

    maps = backbone(torch.randn(1, 3, 64, 64))

    assert backbone.feature_info.reduction() == [64 // one.shape[2] for one in maps]


def test_a_stage_of_other_modules_has_no_known_channels():
    backbone = features()
    backbone.stages[1][0] = nn.Conv2d(16, 32, 3)

    with pytest.raises(ValueError, match=r"stages.1 has a Conv2d, which is no RepVGG block"):
        backbone.feature_info.channels()


@pytest.mark.parametrize(
    "given", [(), (5,), (-6,), (3, 1), (1, 1), (1, -4), 0, 6, True, "1", (True,), (1.0,), 2.5]
)
def test_wrong_indices_are_one_error(given):
    with pytest.raises(ArgumentError, match=r"out_indices=.*increasing integers from -5") as caught:
        repvgg.create_model("repvgg_tiny", features_only=True, out_indices=given)

    assert caught.value.names == ("out_indices",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features_only": 1}, "features_only=1: must be true or false"),
        ({"out_indices": (1,)}, r"out_indices=\(1,\): .*needs features_only=true"),
        ({"features_only": True, "dropout": 0.1}, "dropout=0.1: is of the head"),
        ({"features_only": True, "auxiliary_heads": True}, "auxiliary_heads=True: is of the head"),
        (
            {"feature_only": True},
            "feature_only: there is no such argument; did you mean feat",
        ),
    ],
)
def test_options_without_effect_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        repvgg.create_model("repvgg_tiny", **options)


def test_unused_stages_head_and_auxiliary_classifiers_are_left_out():
    backbone = features("repvggplus_l2pse", **SMALL, out_indices=(1, 2))

    assert [name for name, _ in backbone.named_children()] == ["stem", "stages"]
    assert len(backbone.stages) == 2


def test_a_backbone_has_the_weights_of_the_whole_network_by_name():
    torch.manual_seed(0)
    whole = repvgg.create_model("repvgg_tiny")
    torch.manual_seed(0)
    backbone = repvgg.create_model("repvgg_tiny", features_only=True)
    theirs = whole.state_dict()

    assert all(torch.equal(tensor, theirs[key]) for key, tensor in backbone.state_dict().items())
    assert theirs.keys() - backbone.state_dict().keys() == {"linear.weight", "linear.bias"}


def test_weights_of_a_whole_network_load_into_a_backbone():
    whole, backbone = settle(repvgg.create_model("repvgg_tiny")), features(out_indices=(1, 2))
    images = torch.randn(2, 3, 64, 64)

    missing, unexpected = backbone.load_state_dict(whole.state_dict(), strict=False)

    assert missing == []
    assert all(key.startswith(("stages.2", "stages.3", "linear")) for key in unexpected)
    expected = outputs_of(whole, images, ["stages.0", "stages.1"])
    assert all(torch.equal(*p) for p in zip(backbone.eval()(images), expected, strict=True))


@pytest.mark.parametrize("mode", [True, False])
def test_a_backbone_of_a_network_shares_its_layers_and_its_mode(mode):
    network = repvgg.create_model("repvgg_tiny").train(mode)

    backbone = RepVGGFeatures(network, out_indices=(1, 2))

    assert {module.training for module in backbone.modules()} == {mode}
    assert backbone.stages[1] is network.stages[1]
    assert len(network.stages) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repvgg_tiny", "qarepvgg_tiny", "repvggplus_l2pse"])
def test_both_folds_keep_every_map(name):
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    backbone = features(name, **SMALL, out_indices=(0, 2, 4)).double()
    maps = backbone(images)

    switched = repvgg.switch_to_deploy(backbone)
    fused, report = repvgg.fuse_conv_bn(backbone)

    for folded in (switched, fused):
        assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
        errors = [relative_error(*pair) for pair in zip(maps, folded(images), strict=True)]
        assert max(errors) < 1e-10
        assert folded.feature_info.reduction() == [2, 8, 32]
    assert report.kept == report.unmerged == {}
    backbone.switch_to_deploy()
    assert not backbone.training
    assert all(torch.equal(*pair) for pair in zip(backbone(images), switched(images), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_a_backbone_is_scripted_traced_compiled_and_exported(deployed):
    backbone, images = features(out_indices=(0, 3)), torch.randn(2, 3, 64, 64)
    backbone = repvgg.switch_to_deploy(backbone) if deployed else backbone
    maps = backbone(images)

    for program in (
        torch.jit.script(backbone),
        torch.fx.symbolic_trace(backbone),
        torch.compile(backbone, backend="eager", fullgraph=True),
        torch.export.export(backbone, (images,)).module(),
    ):
        assert all(torch.equal(*pair) for pair in zip(maps, program(images), strict=True))


@pytest.mark.parametrize("network", ["RepVGG", "RepVGGFeatures"])
def test_gradient_checkpointing_keeps_gradients_and_statistics(network):
    found = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = repvgg.create_model("repvgg_tiny", features_only=network == "RepVGGFeatures")
        model.set_grad_checkpointing(enable)
        maps = model(torch.randn(4, 3, 32, 32))
        sum(one.square().mean() for one in maps).backward()
        found.append([parameter.grad for parameter in model.parameters()] + list(model.buffers()))
        assert {block.recompute for block in model.blocks()} == {enable}

    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("coarse", [False, True])
def test_layers_of_layer_wise_decay_are_stem_blocks_and_classifiers(coarse):
    network = repvgg.create_model("repvggplus_l2pse", **SMALL)

    layers = group_parameters(network, network.group_matcher(coarse=coarse), reverse=True)

    blocks = [re.match(r"stages\.(\d+)" if coarse else r"stages\.\d+\.\d+", key) for key in layers]
    order = [*dict.fromkeys(found[0] for found in blocks if found)]
    for key, layer in layers.items():
        if key.startswith("stem"):
            assert layer == 0
        elif key.startswith("stages"):
            (block,) = (one for one in order if key.startswith(f"{one}."))
            assert layer == 1 + order.index(block)
        else:
            assert layer == 1 + len(order)


def test_layer_wise_decay_of_timm_gives_every_block_its_rate():
    network = repvgg.create_model("repvgg_tiny")  # 6 blocks

    groups = param_groups_layer_decay(network, layer_decay=0.5)

    assert {group["lr_scale"] for group in groups} == {0.5**k for k in range(8)}


@pytest.mark.slow
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("deployed", [True, False])
def test_extractors_of_torchvision_return_the_maps_and_fold(mode, deployed):
    network = settle(repvgg.create_model("repvgg_tiny")).double()
    network = repvgg.switch_to_deploy(network) if deployed else network
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = outputs_of(network, images, BLOCKS)

    extractor = create_feature_extractor(network.train(mode), BLOCKS).eval()
    fused, report = repvgg.fuse_conv_bn(extractor, images)

    assert not fused.training
    assert report.kept == report.unmerged == {}
    assert sum(isinstance(module, nn.Conv2d) for module in fused.modules()) == 5
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    for name, output in zip(BLOCKS.values(), expected, strict=True):
        assert torch.equal(output, extractor(images)[name])
        assert relative_error(output, fused(images)[name]) < 1e-10


def test_an_extractor_trains_the_branches():
    network = repvgg.create_model("repvgg_tiny")
    extractor = create_feature_extractor(network, BLOCKS).train()

    maps = extractor(torch.randn(2, 3, 64, 64))
    sum(one.mean() for one in maps.values()).backward()

    assert network.stem.branch_1x1.bn.num_batches_tracked == 1
    assert network.stages[1][1].branch_identity.weight.grad.abs().max() > 0


def layers_of(backbone: RepVGGFeatures) -> nn.Sequential:
    """Stem and stages in one sequence, as torchvision's getter of children needs them."""
    named = [("stem", backbone.stem)]
    named += [(f"stage{name}", stage) for name, stage in backbone.stages.named_children()]
    return nn.Sequential(OrderedDict(named))


@pytest.mark.slow
def test_getters_and_pyramids_of_torchvision_fold():
    backbone, images = features().double(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    names = {"stage1": "0", "stage2": "1", "stage3": "2"}
    channels = backbone.feature_info.channels((2, 3, 4))
    getter = IntermediateLayerGetter(layers_of(backbone), names).eval()
    pyramid = BackboneWithFPN(layers_of(backbone), names, channels, 8).double().eval()

    for network in (getter, pyramid):
        folded = repvgg.switch_to_deploy(network)
        fused, _ = repvgg.fuse_conv_bn(network)
        for name, output in network(images).items():
            assert relative_error(output, folded(images)[name]) < 1e-10
            assert relative_error(output, fused(images)[name]) < 1e-10
    assert all(
        torch.equal(*pair)
        for pair in zip(getter(images).values(), backbone(images)[2:], strict=True)
    )


@pytest.mark.slow
@pytest.mark.filterwarnings(*EXPORTER)
def test_the_examples_of_the_docs_train_fold_and_export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(settle(repvgg.create_model("repvgg_tiny")).state_dict(), "best.ckpt")
    losses = []

    for names in run_examples(page("docs/backbone.md")):
        losses.append(names.get("loss", torch.tensor(0.0)).item())

    weights, by_name, segmentation, detection = losses
    assert weights == by_name == 0
    assert segmentation < 0.35  # log(2) at first
    assert detection < 1
    assert names["error"] < 1e-5
    for trained, folded in (("segmenter", "folded"), ("detector", "folded_detector")):
        norms = [m for m in names[trained].modules() if isinstance(m, nn.BatchNorm2d)]
        assert {norm.num_batches_tracked.item() for norm in norms} == {40}
        assert not any(isinstance(m, nn.BatchNorm2d) for m in names[folded].modules())
    image = names["images"][0]
    with torch.no_grad():
        expected = names["detector"].eval()([image])[0]
    session = onnxruntime.InferenceSession("detector.onnx", providers=["CPUExecutionProvider"])
    boxes, scores, labels = map(torch.from_numpy, session.run(None, {"image": image.numpy()}))
    assert len(boxes) > 0
    assert torch.equal(labels, expected["labels"])
    torch.testing.assert_close(boxes, expected["boxes"], atol=1e-3, rtol=0)
    torch.testing.assert_close(scores, expected["scores"], atol=1e-5, rtol=0)
