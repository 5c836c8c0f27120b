"""Cases in which a fold is easily wrong: what is fused, and what is kept and why."""

import copy
import functools
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune

from repvgg import fuse_conv_bn
from tests.support.networks import relative_error, settle


def check(
    network: nn.Module, *inputs: torch.Tensor, fused: int, kept: dict[str, str] | None = None
):
    """Check the outputs in float64, the number of fused pairs and the kept BatchNorms."""
    network = settle(network).double()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    expected = network(*(x.clone() for x in inputs))

    found, report = fuse_conv_bn(network)

    assert relative_error(expected, found(*(x.clone() for x in inputs))) < 1e-12
    assert len(report.fused) == fused, report
    for name, reason in (kept or {}).items():
        assert reason in report.kept[name]
    assert len(report.kept) == len(kept or {}), report.kept
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    return found, report


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Pair(nn.Module):
    """A convolution and a BatchNorm, which subclasses use differently."""

    def __init__(self, conv: nn.Module | None = None, bn: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv or nn.Conv2d(4, 4, 3, padding=1)
        self.bn = bn or nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))


class DeclaredInWrongOrder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3)
        self.bn2 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


def test_pairs_are_found_by_dataflow_not_by_the_order_of_children():
    _, report = check(DeclaredInWrongOrder(), images(2, 4, 9, 9), fused=2)

    assert set(report.fused) == {("conv1", "bn1"), ("conv2", "bn2")}


class CalledTwice(Pair):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.conv(x.flip(3))


class OutputAlsoUsed(Pair):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) * y


class OutputReturned(Pair):
    def forward(self, x):
        y = self.conv(x)
        return torch.cat([self.bn(y), y])


class ReluBetween(Pair):
    def forward(self, x):
        return self.bn(self.conv(x).relu())


class SEBetween(Pair):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y * y.mean((2, 3), keepdim=True).sigmoid())


class OverwrittenBetween(Pair):
    def forward(self, x):
        y = self.conv(x)
        y.mul_(2)
        return self.bn(y)


class WeightIsReadElsewhere(Pair):
    def forward(self, x):
        return self.bn(self.conv(x)) * self.conv.weight.mean()


class BatchNormIsReadElsewhere(Pair):
    def forward(self, x):
        return self.bn(self.conv(x)) * self.bn.weight.mean()


class BatchNormCalledElsewhereToo(Pair):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.bn(x)


class ConvTiedToFunctional(Pair):
    def forward(self, x):
        return self.bn(self.conv(x)) + nn.functional.conv2d(x, self.conv.weight, padding=1)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (CalledTwice, "its output is also used by add"),
        (OutputAlsoUsed, "its output is also used by mul"),
        (OutputReturned, "its output is also used by cat"),
        (ReluBetween, "it is fed by relu"),
        (SEBetween, "it is fed by mul"),
        (OverwrittenBetween, "its output is also used by mul_"),
        (WeightIsReadElsewhere, "its weight is read"),
        (BatchNormIsReadElsewhere, "its weight is read"),
        (BatchNormCalledElsewhereToo, "it is fed by the input x"),
        (ConvTiedToFunctional, "its weight is read"),
    ],
)
def test_a_batchnorm_that_cannot_be_fused_is_kept_with_the_reason(network, reason):
    check(network(), images(2, 4, 8, 8), fused=0, kept={"bn": reason})


class BlockCalledTwice(Pair):
    def forward(self, x):
        return self.bn(self.conv(self.bn(self.conv(x)).relu()))


class SharedByTwoConvolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.a(x)) * self.bn(self.b(x))


class SameModuleTwoNames(Pair):
    def __init__(self):
        super().__init__()
        self.again = self.conv
        self.bn_again = self.bn

    def forward(self, x):
        return self.bn(self.conv(x)) * self.bn_again(self.again(x.flip(2)))


class ReadsShapes(Pair):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y).reshape(y.shape[0], y.size(1), -1)


@pytest.mark.parametrize(
    ("network", "fused"),
    [
        (BlockCalledTwice, 1),
        (SharedByTwoConvolutions, 2),
        (SameModuleTwoNames, 1),
        (ReadsShapes, 1),
    ],
)
def test_several_calls_are_fused_where_all_of_them_allow_it(network, fused):
    check(network(), images(2, 4, 8, 8), fused=fused)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.5])
def test_bias_affine_and_eps_of_each_layer_count(bias, affine, eps):
    network = Pair(nn.Conv2d(4, 6, 3, bias=bias), nn.BatchNorm2d(6, affine=affine, eps=eps))

    check(network, images(2, 4, 8, 8), fused=1)


CONVOLUTIONS = [
    (nn.Conv1d, nn.BatchNorm1d, (9,)),
    (nn.Conv2d, nn.BatchNorm2d, (9, 7)),
    (nn.Conv3d, nn.BatchNorm3d, (5, 7, 6)),
    (nn.ConvTranspose1d, nn.BatchNorm1d, (9,)),
    (nn.ConvTranspose2d, nn.BatchNorm2d, (9, 7)),
    (nn.ConvTranspose3d, nn.BatchNorm3d, (5, 7, 6)),
]


@pytest.mark.parametrize(("conv", "bn", "size"), CONVOLUTIONS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 2, "bias": False}], ids=str)
def test_every_kind_of_convolution_is_fused(conv, bn, size, groups, options):
    network = Pair(conv(4, 8, 3, padding=1, groups=groups, **options), bn(8))

    check(network, images(2, 4, *size), fused=1)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_stay(mode):
    found, _ = check(
        Pair(nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)), images(2, 4, 8, 8), fused=1
    )

    assert found.conv.padding_mode == mode


@pytest.mark.parametrize("kernel", [(1, 3), (2, 2), (5, 2)])
@pytest.mark.parametrize("padding", ["same", "valid", 1])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_kernels_of_any_shape_are_fused(kernel, padding):
    check(Pair(nn.Conv2d(4, 4, kernel, padding=padding)), images(2, 4, 8, 8), fused=1)


def test_a_linear_layer_is_fused():
    check(Pair(nn.Linear(6, 4), nn.BatchNorm1d(4)), images(5, 6), fused=1)


def test_sequences_after_a_fused_linear_layer_are_an_error():
    network = settle(Pair(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    found, _ = fuse_conv_bn(network)
    sequences = torch.randn(
        5, 4, 6
    )  # here BatchNorm normalizes the axis of length, not of features
    network(sequences)

    with pytest.raises(ValueError, match=r"\[5, 4, 4\]\) reached a BatchNorm that was folded"):
        found(sequences)


def test_an_input_without_batch_axis_is_an_error_after_folding():
    network = settle(Pair(nn.Conv1d(6, 4, 3, padding=1), nn.BatchNorm1d(4)))
    found, _ = fuse_conv_bn(network)
    network(torch.randn(6, 4))

    with pytest.raises(ValueError, match="reached a BatchNorm that was folded"):
        found(torch.randn(6, 4))


def test_a_2d_normalization_of_sequences_is_not_fused_into_a_linear_layer():
    check(
        Pair(nn.Linear(4, 4), nn.BatchNorm2d(4)),
        images(2, 4, 4, 4),
        fused=0,
        kept={"bn": "other dim"},
    )


class Preceding(Pair):
    def forward(self, x):
        return self.conv(self.bn(x))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.Conv2d(4, 6, 3, padding="valid", groups=2),
        nn.Conv2d(4, 8, 3, stride=2, dilation=2, groups=4),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"),
        nn.Conv2d(4, 6, 1, padding="same"),
    ],
)
def test_a_batchnorm_before_a_convolution_without_zero_padding_is_fused(conv):
    check(Preceding(conv), images(2, 4, 8, 8), fused=1)


def test_a_batchnorm_before_a_linear_layer_is_fused():
    check(Preceding(nn.Linear(4, 6), nn.BatchNorm1d(4)), images(5, 4), fused=1)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.ConvTranspose2d(4, 6, 3),
    ],
)
def test_a_batchnorm_before_a_padded_convolution_stays(conv):
    check(Preceding(conv), images(2, 4, 8, 8), fused=0, kept={"bn": "fed by the input x"})


class NeverCalled(Pair):
    def forward(self, x):
        return self.conv(x)


class CalledByKeyword(Pair):
    def forward(self, x):
        return self.bn(input=self.conv(x))


class ScaledInTwoWays(Pair):
    def forward(self, x):
        return self.bn(self.conv(x) * 2) * self.bn(self.conv(x) * 3)


class Cast(Pair):
    def forward(self, x):
        return self.bn(self.conv(x).float().double())


class SharedByTwoDimensions(Pair):
    def __init__(self):
        super().__init__(bn=nn.SyncBatchNorm(4))
        self.line = nn.Conv1d(4, 4, 3)

    def forward(self, x):
        return self.bn(self.conv(x)).sum((2, 3)) + self.bn(self.line(x.flatten(2))).sum(2)


class FedByAFunction(Pair):
    def forward(self, x):
        return self.bn(nn.functional.conv2d(x, self.conv.weight * x.mean(), padding=1))


class ReshapedAfterALinearLayer(Pair):
    def __init__(self):
        super().__init__(nn.Linear(8, 4), nn.BatchNorm1d(4))

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y.view(y.size(0), 4, -1))


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (NeverCalled, "nothing calls it"),
        (CalledByKeyword, "it is called with keyword arguments"),
        (ScaledInTwoWays, "conv: its outputs are scaled or reshaped in several ways"),
        (Cast, "it is fed by double(), which is no convolution or linear layer"),
        (SharedByTwoDimensions, "it is fed by convolutions of different dimensions"),
        (FedByAFunction, "it is fed by conv2d(), called as a function: only the weights"),
    ],
)
def test_a_batchnorm_that_other_code_uses_is_kept(network, reason):
    check(network(), images(2, 4, 8, 8), fused=0, kept={"bn": reason})


def test_a_reshaped_linear_layer_keeps_its_batchnorm():
    reason = "conv: its output is reshaped, but its number of axes is unknown"

    check(ReshapedAfterALinearLayer(), images(2, 8), fused=0, kept={"bn": reason})


class PrecedingByKeyword(Preceding):
    def forward(self, x):
        return self.conv(self.bn(input=x))


class PrecedingTwo(Preceding):
    def __init__(self):
        super().__init__(nn.Conv2d(4, 4, 1))
        self.other = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(self.bn(x)) + self.other(self.bn(x + 1))


class PrecedingBoth(Preceding):
    def __init__(self):
        super().__init__(nn.Conv2d(4, 4, 1))
        self.other = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.bn(x)
        return self.conv(y) * self.other(y)


class PrecedingAndMore(Preceding):
    def forward(self, x):
        return self.conv(self.bn(x)) * self.conv(x)


class PrecedingReadElsewhere(Preceding):
    def forward(self, x):
        return self.conv(self.bn(x)) * self.conv.weight.mean()


class PrecedingReturned(Preceding):
    def forward(self, x):
        y = self.bn(x)
        return self.conv(y), y


@pytest.mark.parametrize(
    "network",
    [
        lambda: PrecedingByKeyword(nn.Conv2d(4, 4, 1)),
        PrecedingTwo,
        PrecedingBoth,
        lambda: PrecedingAndMore(nn.Conv2d(4, 4, 1)),
        lambda: PrecedingReadElsewhere(nn.Conv2d(4, 4, 1)),
    ],
)
def test_a_batchnorm_whose_output_goes_elsewhere_stays(network):
    _, report = check(network(), images(2, 4, 8, 8), fused=0, kept={"bn": ""})

    assert list(report.kept) == ["bn"]


def test_a_convolution_called_twice_after_its_batchnorm_is_fused():
    class Twice(Preceding):
        def forward(self, x):
            return self.conv(self.bn(x)) + self.conv(self.bn(x.flip(3)))

    check(Twice(nn.Conv2d(4, 4, 1)), images(2, 4, 8, 8), fused=1)


class InputOverwrittenBetween(Pair):
    def forward(self, x):
        x = x * 1
        y = self.bn(x)
        x.zero_()
        return self.conv(y)


def test_a_batchnorm_before_an_in_place_node_stays():
    network = InputOverwrittenBetween(nn.Conv2d(4, 6, 1))

    check(network, images(2, 4, 8, 8), fused=0, kept={"bn": "fed by mul"})


def test_batchnorms_on_both_sides_and_in_a_row_are_fused():
    network = nn.Sequential(
        nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.Identity(), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
    )

    check(network, images(2, 4, 8, 8), fused=3)


class Renamed(nn.Conv2d):
    pass


class Doubling(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Standardized(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class ClampedNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


class ActivatedNorm(nn.BatchNorm2d):
    """A normalization like timm's BatchNormAct2d."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = nn.functional.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            0.1,
            self.eps,
        )
        return self.act(self.drop(x))


class ShiftedNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x + 1)


def test_a_subclass_that_overrides_nothing_is_fused():
    check(Pair(Renamed(4, 4, 3)), images(2, 4, 8, 8), fused=1)


@pytest.mark.parametrize("conv", [Doubling, Standardized])
def test_a_convolution_that_overrides_code_stays(conv):
    check(Pair(conv(4, 4, 3)), images(2, 4, 8, 8), fused=0, kept={"bn": "it is fed by"})


def test_a_convolution_whose_forward_was_replaced_stays():
    network = Pair()
    network.conv.forward = functools.partial(lambda f, x: 2 * f(x), network.conv.forward)

    _, report = fuse_conv_bn(settle(network))

    assert report.fused == []


def test_a_normalization_with_an_activation_keeps_it():
    found, _ = check(Pair(bn=ActivatedNorm(4)), images(2, 4, 8, 8), fused=1)

    assert [name for name, _ in found.bn.named_children()] == ["act"]


@pytest.mark.parametrize("bn", [ClampedNorm, ShiftedNorm])
def test_a_normalization_that_does_something_else_stays(bn):
    check(Pair(bn=bn(4)), images(2, 4, 8, 8), fused=0, kept={"bn": "has its own forward"})


def test_a_frozen_batchnorm_is_fused():
    network = Pair(bn=torchvision.ops.FrozenBatchNorm2d(4))
    network.bn.running_mean.normal_()
    network.bn.running_var.uniform_(0.5, 2)
    network.bn.weight.uniform_(0.5, 2)
    network.bn.bias.normal_()

    check(network, images(2, 4, 8, 8), fused=1)


def test_a_synchronized_batchnorm_is_fused():
    check(Pair(bn=nn.SyncBatchNorm(4)), images(2, 4, 8, 8), fused=1)


def test_a_network_in_training_mode_is_an_error():
    with pytest.raises(ValueError, match=r"Pair is in training mode.*eval\(\)"):
        fuse_conv_bn(Pair())


def untracked():
    return Pair(bn=nn.BatchNorm2d(4, track_running_stats=False)).eval()


def training():
    network = settle(Pair())
    network.bn.train()
    return network


def hooked_conv():
    network = settle(Pair())
    network.conv.register_forward_hook(lambda module, inputs, output: output + 1)
    return network


def hooked_bn():
    network = settle(Pair())
    network.bn.register_forward_pre_hook(lambda module, inputs: None)
    return network


def weight_norm():
    network = settle(Pair())
    parametrizations.weight_norm(network.conv)
    return network


def spectral_norm():
    network = settle(Pair())
    nn.utils.spectral_norm(network.conv)
    return network.eval()


def pruned():
    network = settle(Pair())
    prune.random_unstructured(network.conv, "weight", 0.5)
    return network


def half():
    network = settle(Pair()).half()
    network.bn.running_var.fill_(1e-7)
    network.bn.eps = 1e-12
    network.bn.weight.data.fill_(100.0)
    return network


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (untracked, "no running statistics"),
        (training, "in training mode"),
        (lambda: Pair().eval(), "never updated"),
        (hooked_conv, "conv: it has hooks"),
        (hooked_bn, "it has hooks"),
        (lambda: settle(Pair()).to("meta"), "meta device"),
        (half, "too large for torch.float16"),
    ],
)
def test_bad_input_is_kept_by_name(network, reason):
    _, report = fuse_conv_bn(network())

    assert report.fused == []
    assert reason in report.kept["bn"]


def test_a_network_that_never_ran_is_an_error():
    with pytest.raises(ValueError, match="conv, a LazyConv2d, has weights that are not init"):
        fuse_conv_bn(Pair(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()).eval())


@pytest.mark.parametrize("network", [weight_norm, spectral_norm, pruned])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_computed_weights_are_folded_with_their_present_value(network):
    network = network().double()
    weights = [p for p in network.conv.parameters() if p.ndim == 4]
    with torch.no_grad():
        weights[-1].mul_(1.5)  # as an optimizer does; the attribute is not updated

    found, report = fuse_conv_bn(network)

    assert report.fused == [("conv", "bn")]
    assert relative_error(network(images(2, 4, 8, 8)), found(images(2, 4, 8, 8))) < 1e-12


def test_a_materialized_weight_norm_is_fused():
    network = weight_norm()
    nn.utils.parametrize.remove_parametrizations(network.conv, "weight")

    check(network, images(2, 4, 8, 8), fused=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_precision_stays(dtype):
    found, _ = fuse_conv_bn(settle(Pair()).to(dtype))

    assert {parameter.dtype for parameter in found.parameters()} == {dtype}


def test_requires_grad_of_parameters_stays():
    network = settle(Pair()).requires_grad_(False)

    found, _ = fuse_conv_bn(network)

    assert not any(parameter.requires_grad for parameter in found.parameters())


def test_the_result_is_of_the_same_class_with_the_same_names():
    found, _ = fuse_conv_bn(settle(torchvision.models.resnet18()))

    assert type(found) is torchvision.models.ResNet
    assert {name for name, _ in found.named_modules()} == {
        name for name, _ in torchvision.models.resnet18().named_modules()
    }


@pytest.mark.parametrize("transfer", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_the_result_can_be_copied_and_pickled(transfer):
    found, _ = fuse_conv_bn(settle(torchvision.models.resnet18()))
    x = torch.randn(1, 3, 64, 64)

    assert torch.equal(transfer(found)(x), found(x))


def test_the_result_moves_between_devices_and_precisions():
    found, _ = fuse_conv_bn(settle(nn.Sequential(Pair(), Pair(bn=ActivatedNorm(4)))))

    assert found.bfloat16()(torch.randn(1, 4, 8, 8).bfloat16()).dtype == torch.bfloat16
    assert found.to("meta")(torch.empty(1, 4, 8, 8, device="meta").bfloat16()).is_meta
