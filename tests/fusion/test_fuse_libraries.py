"""Networks of torchvision and timm; scripts/studies/fusion.py has all of them."""

import dataclasses

import pytest
import timm
import torch
import torchvision
from timm.models import byobnet
from torch import nn

from repvgg import fuse_conv_bn, verify
from repvgg.fusion.normalizations import is_normalization
from tests.support.networks import relative_error, settle

pytestmark = pytest.mark.slow  # seconds a network


def count(network: nn.Module) -> int:
    return sum(is_normalization(module) for module in network.modules())


# With random weights: the number of BatchNorms that are kept.
TORCHVISION = {
    "googlenet": 0,
    "mobilenet_v3_small": 0,
    "shufflenet_v2_x0_5": 0,
}
TIMM = {
    "convnext_atto": 0,
    "dpn68": 27,  # after a concatenation
    "ghostnet_100": 0,
    "hrnet_w18_small": 0,
    "regnety_002": 0,
    "resnest14d": 0,
    "tf_efficientnet_b0": 5,  # convolutions that pad by the size of their input
}


def check(network: nn.Module, left: int, *inputs: torch.Tensor) -> None:
    network = settle(network).double()
    wide = [x.double() for x in inputs]

    fused, report = fuse_conv_bn(network)

    assert count(fused) == len(report.kept) == left, report.kept
    with torch.no_grad():
        expected, found = (verify.tensors(net(*wide)) for net in (network, fused))
    errors = [relative_error(a, b) for a, b in zip(expected, found, strict=True)]
    assert max(errors) < 1e-10
    modules = verify.compare_modules(network, fused, wide, moved=report.moved)
    assert max(modules.values()) < 1e-10, max(modules, key=modules.__getitem__)


@pytest.mark.parametrize("name", TORCHVISION)
def test_classifiers_of_torchvision(name):
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}

    network = torchvision.models.get_model(name, **options)

    check(network, TORCHVISION[name], torch.randn(1, 3, 64, 64))


def test_dense_blocks_which_normalize_concatenations():
    torch.manual_seed(0)
    network = torchvision.models.DenseNet(8, (2, 3), 16, num_classes=5)

    check(network, 5 + 2, torch.randn(1, 3, 64, 64))  # one a layer, one after each block


def test_attention_over_partitions_beside_convolutions():
    torch.manual_seed(0)
    network = torchvision.models.MaxVit((64, 64), 16, 4, [16, 32], [1, 2], 8, 0.1, num_classes=5)

    check(network, 0, torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm(name):
    torch.manual_seed(0)

    check(timm.create_model(name), TIMM[name], torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [("one", {"num_conv_branches": 4}, {"num_conv_branches": 1}), ("rep", {}, {})],
)
def test_branches_of_timm_that_are_to_be_merged(kind, first, second):
    torch.manual_seed(0)
    block = byobnet.ByoBlockCfg(kind, 2, 16, 2, 0, block_kwargs=first)
    wider = dataclasses.replace(block, c=24, block_kwargs=second)
    config = byobnet.ByoModelCfg((block, wider), stem_type=kind, stem_chs=16, num_features=0)

    check(byobnet.ByobNet(config, num_classes=5), 0, torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("name", ["deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"])
def test_segmentation(name):
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights_backbone=None)

    check(network, 0, torch.randn(1, 3, 64, 72))


def test_video_with_subclasses_of_convolutions():
    torch.manual_seed(0)

    check(torchvision.models.get_model("r3d_18"), 0, torch.randn(1, 3, 4, 32, 32))


def test_optical_flow_which_cannot_be_traced():
    torch.manual_seed(0)
    network = settle(torchvision.models.get_model("raft_large"))
    frames = [torch.rand(1, 3, 128, 128) for _ in range(2)]

    fused, report = fuse_conv_bn(network)

    assert report.kept == {}
    assert "" in report.untraced
    # In float32, because the network casts to it.
    assert relative_error(network(*frames)[-1], fused(*frames)[-1]) < 1e-4
    check(network.context_encoder, 0, torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("fasterrcnn_mobilenet_v3_large_320_fpn", ("backbone", "rpn.head")),
        ("ssdlite320_mobilenet_v3_large", ("backbone", "head")),
        ("retinanet_resnet50_fpn_v2", ("backbone", "head")),
    ],
)
def test_detectors_which_cannot_be_traced(name, parts):
    torch.manual_seed(0)
    options = {"min_size": 64, "max_size": 96} if "_fpn" in name else {}
    network = torchvision.models.get_model(name, weights_backbone=None, **options)
    network = settle(network).double()
    images = [torch.rand(3, 64, 72).double()]

    fused, report = fuse_conv_bn(network)

    assert report.kept == {}
    assert "" in report.untraced
    with torch.no_grad():
        errors = verify.compare_modules(network, fused, [images], moved=report.moved)
    before_boxes = {key: error for key, error in errors.items() if key.startswith(parts)}
    assert set(parts) <= set(before_boxes)
    assert max(before_boxes.values()) < 1e-10
