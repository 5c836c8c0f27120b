"""Blocks whose layers were replaced or changed after they were built."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torchvision.ops import FrozenBatchNorm2d

import repvgg
from repvgg import QARepVGGBlock, RepVGGBlock
from tests.support.networks import relative_error, settle

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
KINDS = [RepVGGBlock, QARepVGGBlock]
IMAGES = torch.randn(2, 8, 11, 9, generator=torch.Generator().manual_seed(1)).double()


def build(kind=RepVGGBlock, **options):
    torch.manual_seed(0)
    return settle(kind(8, options.pop("out", 8), **options)).double()


def replace_norms(block, make):
    for parent in list(block.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, make(child))
    return block.double().eval()


def same(block, images=IMAGES):
    expected = block(images)
    switched = repvgg.switch_to_deploy(block)
    assert relative_error(expected, switched(images)) < 1e-12
    return switched


class InHouse(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, x):
        pass


class Doubling(nn.BatchNorm2d):
    def forward(self, x):
        statistics = self.running_mean, self.running_var
        return 2 * nn.functional.batch_norm(x, *statistics, self.weight, self.bias, eps=self.eps)


class WithRelu(nn.BatchNorm2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


def frozen(bn):
    new = FrozenBatchNorm2d(bn.num_features, eps=bn.eps)
    new.load_state_dict(bn.state_dict(), strict=False)
    return new


def loaded(cls):
    def make(bn):
        new = cls(bn.num_features, eps=bn.eps)
        new.load_state_dict(bn.state_dict(), strict=False)
        return new

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "make",
    [loaded(nn.SyncBatchNorm), frozen, loaded(InHouse), loaded(Doubling), loaded(nn.BatchNorm3d)],
    ids=["sync", "frozen", "in-house", "doubling", "3d"],
)
def test_other_batchnorms_are_folded_or_named(kind, make):
    block = replace_norms(build(kind), make)
    if any(isinstance(module, nn.BatchNorm3d) for module in block.modules()):
        with pytest.raises(ValueError, match="BatchNorm3d, does not normalize images"):
            block.switch_to_deploy()
    else:
        same(block)


NORMS = [
    (kind, name)
    for kind in KINDS
    for name in ("branch_3x3.bn", "branch_1x1.bn", "branch_identity", "post_bn")
    if name in dict(build(kind).named_modules())
]


@pytest.mark.parametrize(
    "make",
    [
        lambda bn: nn.GroupNorm(1, 8),
        lambda bn: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        lambda bn: nn.LocalResponseNorm(3),
        lambda bn: nn.BatchNorm2d(8, track_running_stats=False),
        WithRelu,
        lambda bn: nn.Sequential(copy.deepcopy(bn)),
        lambda bn: nn.ReLU(),
    ],
    ids=["group", "instance", "response", "batch", "tail", "sequential", "relu"],
)
@pytest.mark.parametrize(("kind", "name"), NORMS)
def test_other_norms_are_rejected_by_name(kind, make, name):
    block = build(kind)
    old = block.get_submodule(name)
    new = make(8 if make is WithRelu else old).double().eval()
    block.set_submodule(name, new)
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match=rf"^1: {name}.*{type(new).__name__}"):
        repvgg.switch_to_deploy(nn.Sequential(nn.Identity(), block))
    with pytest.raises(ValueError, match=f"^{name}"):
        block.switch_to_deploy()
    assert block.reparam is None
    assert before.keys() == block.state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {"dilation": (2, 2), "padding": (2, 2)}),
        ({}, {"dilation": 3, "padding": 3}),
        ({}, {"padding": "same"}),
        ({"stride": 2}, {"dilation": (2, 2), "padding": (2, 2)}),
        ({"groups": 4}, {"dilation": (1, 2), "padding": (1, 2)}),
        ({"padding_mode": "reflect"}, {"padding_mode": "zeros"}),
        ({}, {"padding_mode": "circular"}),
        ({"stride": 2}, {"padding_mode": "replicate"}),
    ],
)
def test_a_changed_geometry_is_folded(kind, options, changes):
    block = build(kind, **options)
    conv = block.branch_3x3.conv
    for key, value in changes.items():
        setattr(conv, key, value)
    if changes.get("padding_mode", "zeros") != "zeros":
        conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    switched = same(block)
    assert switched.padding_mode == conv.padding_mode
    again = repvgg.switch_to_train(switched, IMAGES).eval()
    assert relative_error(block(IMAGES), again(IMAGES)) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_whose_stride_was_removed_folds(kind):
    block = build(kind, stride=2)
    block.branch_3x3.conv.stride = (1, 1)
    block.stride = 1
    assert same(block).stride == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_stride_moved_into_the_1x1_folds(kind):
    block = build(kind, stride=2)
    block.branch_1x1.conv.stride = (2, 2)
    block.stride = 1
    switched = same(block)
    assert switched.stride == 2
    assert same(repvgg.switch_to_train(switched, IMAGES).eval()).stride == 2


def test_a_larger_kernel_folds_to_its_size():
    block = build()
    block.branch_3x3.conv = nn.Conv2d(8, 8, 5, padding=2, bias=False).double()
    switched = same(block)
    assert switched.reparam.kernel_size == (5, 5)
    same(repvgg.switch_to_train(switched, IMAGES).eval())


def test_a_1x1_that_became_3x3_folds():
    block = build()
    block.branch_1x1.conv = nn.Conv2d(8, 8, (3, 1), padding=(1, 0)).double()
    same(block)


@pytest.mark.parametrize("kind", KINDS)
def test_a_replaced_stem_has_its_new_channels(kind):
    block = build(kind, out=12)
    block.branch_3x3.conv = nn.Conv2d(1, 12, 3, padding=1, bias=False).double()
    block.branch_1x1.conv = nn.Conv2d(1, 12, 1, bias=False).double()
    switched = same(block, IMAGES[:, :1])
    assert (switched.in_channels, switched.reparam.in_channels) == (1, 1)
    assert (switched.out_channels, switched.reparam.out_channels) == (12, 12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: setattr(b.branch_3x3.conv, "padding", (0, 0)), "does not fit into branch_3x3"),
        (lambda b: setattr(b.branch_3x3.conv, "stride", (2, 2)), "branch_1x1 .*stride"),
        (
            lambda b: setattr(b.branch_1x1, "conv", nn.Conv2d(8, 8, 5, padding=2)),
            r"branch_1x1 .*kernel \(5, 5\)",
        ),
        (lambda b: setattr(b.branch_1x1, "conv", nn.Conv2d(4, 8, 1)), "4 input channels"),
        (lambda b: setattr(b.branch_1x1, "conv", nn.Conv2d(8, 8, 1, groups=2)), "2 groups"),
        (
            lambda b: setattr(b.branch_1x1, "conv", nn.Linear(8, 8)),
            "Linear, is not a torch.nn.Conv2d",
        ),
        (
            lambda b: setattr(b.branch_1x1, "conv", nn.ConvTranspose2d(8, 8, 1)),
            "ConvTranspose2d, is not a",
        ),
        (
            lambda b: setattr(b.branch_3x3, "conv", LowRank(8, 8, 3, padding=1)),
            "LowRank, has its own code",
        ),
        (lambda b: setattr(b, "branch_1x1", nn.Conv2d(8, 8, 1)), "branch_1x1 is a Conv2d"),
        (lambda b: setattr(b, "branch_drop", nn.Hardtanh()), "branch_drop is a Hardtanh"),
        (lambda b: b.branch_3x3.conv.register_forward_hook(listen), "3x3.conv has a hook, listen"),
        (lambda b: b.branch_1x1.bn.register_forward_pre_hook(listen), "1x1.bn has a hook"),
        (lambda b: b.branch_1x1.register_forward_hook(listen), "branch_1x1 has a hook"),
        (lambda b: b.branch_identity.register_forward_hook(listen), "identity has a hook"),
    ],
)
def test_what_does_not_fold_is_named(change, said):
    block = build()
    change(block)
    keys = list(block.state_dict())
    with pytest.raises(ValueError, match=said):
        block.switch_to_deploy()
    with pytest.raises(ValueError, match=f"^0: .*{said}"):
        repvgg.switch_to_deploy(nn.Sequential(block))
    assert list(block.state_dict()) == keys
    assert block.reparam is None


class LowRank(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + x


def listen(*_):
    return None


COMPUTED = {
    "pruned": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "weight_norm": lambda conv: nn.utils.weight_norm(conv),
    "spectral_norm": lambda conv: nn.utils.spectral_norm(conv),
    "new weight_norm": parametrizations.weight_norm,
    "new spectral_norm": parametrizations.spectral_norm,
}


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("name", ["branch_3x3.conv", "branch_1x1.conv", "branch_identity"])
@pytest.mark.parametrize("how", COMPUTED)
def test_computed_weights_have_their_present_value(how, name, in_place):
    block = build()
    layer = block.get_submodule(name)
    if name == "branch_identity" and how != "pruned":
        parametrize.register_parametrization(layer, "weight", nn.Softplus())
    else:
        COMPUTED[how](layer)
    block.train()(IMAGES)
    block.eval()
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            if key != "bias":
                parameter.mul_(1.5)
    expected = copy.deepcopy(repvgg.fusion.copying.copied(block))(IMAGES)
    if in_place:
        block.switch_to_deploy()
        given = block(IMAGES)
    else:
        given = repvgg.switch_to_deploy(block)(IMAGES)
    assert relative_error(expected, given) < 1e-12


def test_gradients_reach_pruned_weights():
    block = build()
    prune.l1_unstructured(block.branch_3x3.conv, "weight", 0.5)
    block.equivalent_kernel_bias().kernel.sum().backward()
    assert block.branch_3x3.conv.weight_orig.grad is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"groups": 8}, {"stride": 2, "out": 16}])
def test_the_memory_format_stays(kind, options):
    block = build(kind, **options).to(memory_format=torch.channels_last)
    switched = same(block)
    assert switched.reparam.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("trains", [True, False])
def test_the_folded_convolution_requires_gradients_like_its_kernel(trains):
    block = build().requires_grad_(trains)
    switched = repvgg.switch_to_deploy(block)
    assert [p.requires_grad for p in switched.parameters()] == [trains, trains]
    switched.train()(IMAGES.clone().requires_grad_()).sum().backward()
    assert (switched.reparam.weight.grad is not None) == trains


@pytest.mark.parametrize("in_place", [True, False])
def test_switching_under_inference_mode_gives_normal_tensors(in_place):
    block = build()
    expected = block(IMAGES)
    with torch.inference_mode():
        if in_place:
            block.switch_to_deploy()
        else:
            block = repvgg.switch_to_deploy(block)
    assert not any(p.is_inference() for p in block.parameters())
    y = block(IMAGES.clone().requires_grad_())
    y.sum().backward()
    assert relative_error(expected, y) < 1e-12


def test_shapes_of_a_block_cannot_be_set():
    with pytest.raises(AttributeError):
        build().dilation = 2


def test_a_changed_over_parameterized_convolution_folds():
    network = settle(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))).double()
    wide = settle(repvgg.over_parameterize(network))
    wide[0].branch_3x3.conv.dilation = wide[0].branch_3x3.conv.padding = (2, 2)
    expected = wide(IMAGES)
    assert relative_error(expected, repvgg.switch_to_deploy(wide)(IMAGES)) < 1e-12


def test_hooks_of_a_block_survive_the_way_back():
    block, seen = build(), []
    block.register_forward_hook(lambda *_: seen.append(1))
    repvgg.switch_to_train(repvgg.switch_to_deploy(block), IMAGES)(IMAGES)
    assert len(seen) > 1
