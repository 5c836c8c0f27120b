"""Every block of the re-parameterization family becomes its deployed form in one call."""

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import repvgg
from repvgg import fuse_conv_bn
from tests.support import family
from tests.support.family import FAMILY
from tests.support.networks import relative_error, settle

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
BORDERS = ((15, 17), (16, 16), (9, 20))


def images(height: int, width: int, channels: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)


def counted(network: nn.Module, kinds: object) -> int:
    return sum(isinstance(module, kinds) for module in network.modules())


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", FAMILY)
def test_a_block_becomes_its_deployed_form(name, stride, groups):
    build, layers = FAMILY[name]
    block = settle(build(8, groups, stride)).double()
    before = copy.deepcopy(block.state_dict())

    fused, report = fuse_conv_bn(block)

    for size in BORDERS:
        assert relative_error(block(images(*size)), fused(images(*size))) < 1e-12
    assert counted(fused, LAYERS) == layers
    assert counted(fused, nn.modules.batchnorm._BatchNorm) == 0
    assert report.kept == report.unmerged == report.untraced == {}
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
    fused(images(15, 17)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in fused.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILY)
def test_a_block_is_folded_in_the_dtype_of_its_weights(name, dtype):
    build, layers = FAMILY[name]
    block = settle(build()).to(dtype)

    fused, _ = fuse_conv_bn(block)

    assert counted(fused, LAYERS) == layers
    assert {parameter.dtype for parameter in fused.parameters()} == {dtype}
    x = images(15, 17)
    exact = copy.deepcopy(block).double()(x)
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    assert relative_error(exact, copy.deepcopy(fused).double()(x)) < bound


@pytest.mark.parametrize("name", ["UniRepLKNet block", "RepMixer", "DBB", "RepNeXt M", "OREPA"])
def test_a_deployed_block_keeps_its_weights_and_exports(name, tmp_path):
    onnx = pytest.importorskip("onnx")
    build, layers = FAMILY[name]
    fused, _ = fuse_conv_bn(settle(build()))
    again, _ = fuse_conv_bn(settle(build(), seed=1))

    again.load_state_dict(fused.state_dict())

    x = images(15, 17).float()
    assert torch.equal(again(x), fused(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(fused, (x,), dynamo=True, verbose=False)
    kinds = [node.op_type for node in program.model_proto.graph.node]
    assert kinds.count("Conv") + kinds.count("Gemm") + kinds.count("MatMul") == layers
    assert onnx is not None


class Sequence(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def fused_and_equal(network: nn.Module, *sizes: tuple[int, int], channels: int = 8):
    network = settle(network).double()
    fused, report = fuse_conv_bn(network)
    for size in sizes or BORDERS:
        x = images(*size, channels=channels)
        assert relative_error(network(x), fused(x)) < 1e-12
    return fused, report


def test_layers_in_sequence_become_one_where_that_is_exact_at_the_border():
    exact = (nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1))
    wrong = (nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1))

    assert counted(fused_and_equal(Sequence(*exact))[0], nn.Conv2d) == 1
    assert counted(fused_and_equal(Sequence(*wrong))[0], nn.Conv2d) == 2


def test_layers_in_sequence_stay_where_one_would_cost_more():
    bottleneck = (nn.Conv2d(8, 2, 1, bias=False), nn.Conv2d(2, 8, 1))
    depthwise = (nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Conv2d(8, 8, 1))

    _, report = fused_and_equal(Sequence(*bottleneck))
    assert (
        "64 multiplications for each position of the output, in place of 32"
        in (report.costlier["layers.1"])
    )
    fused, report = fused_and_equal(Sequence(*depthwise))
    assert counted(fused, nn.Conv2d) == 2
    assert list(report.costlier) == ["layers.1"]


def test_a_check_of_axes_between_two_layers_keeps_them_apart():
    network = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    network = settle(network).double()

    fused, _ = fuse_conv_bn(network)

    x = torch.randn(5, 8, dtype=torch.float64)
    assert relative_error(network(x), fused(x)) < 1e-12
    with pytest.raises(ValueError, match="axes"):
        fused(torch.randn(2, 5, 8, dtype=torch.float64))


def test_a_layer_whose_output_is_used_twice_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            y = self.a(x)
            return self.b(y) + y.relu()

    assert counted(fused_and_equal(Twice())[0], nn.Conv2d) == 2


def test_low_rank_updates_of_linear_layers_are_merged():
    class Lora(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)
            self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)
            self.scaling = 0.5

        def forward(self, x):
            return self.layer(x) + self.up(self.down(x)) * self.scaling

    network = Lora().double().eval()
    fused, _ = fuse_conv_bn(network)
    x = torch.randn(2, 5, 16, dtype=torch.float64)

    assert relative_error(network(x), fused(x)) < 1e-12
    assert counted(fused, nn.Linear) == 1
    fused.scaling = 2.0
    with pytest.raises(ValueError, match=r"Lora\.scaling was changed"):
        fused(x)


def test_two_normalized_heads_of_one_input_are_merged_and_still_check_its_axes():
    class Heads(nn.Module):  # as RepViT's, distilled
        def __init__(self):
            super().__init__()
            self.first, self.second = (
                nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4)) for _ in range(2)
            )

        def forward(self, x):
            return (self.first(x) + self.second(x)) / 2

    network = settle(Heads()).double()
    fused, _ = fuse_conv_bn(network)
    x = torch.randn(5, 8, dtype=torch.float64)

    assert relative_error(network(x), fused(x)) < 1e-12
    assert counted(fused, nn.Linear) == 1
    with pytest.raises(ValueError, match="axes"):
        fused(torch.randn(5, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("options", [{"count_include_pad": False}, {"ceil_mode": True}])
def test_pools_that_are_no_convolution_stay(options):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.pool = nn.AvgPool2d(3, 1, 1, **options)

        def forward(self, x):
            return self.conv(x) + self.pool(x)

    fused, _ = fused_and_equal(Pooled())
    assert counted(fused, nn.AvgPool2d) == 1


def test_a_slope_that_is_not_1_yet_stays():
    block = family.Vanilla()
    block.slope = 0.9

    fused, _ = fused_and_equal(block)

    assert counted(fused, nn.Conv2d) == 3  # with the series activation
    straight, _ = fuse_conv_bn(settle(family.Vanilla()))
    straight.slope = 0.9
    with pytest.raises(ValueError, match="slope"):
        straight(images(15, 17).float())


class WrongBorder(family.NormAndPad):
    """Pads by something that is not the value for zeros."""

    def __init__(self, channels: int, padding: int, kind: str) -> None:
        super().__init__(channels, padding)
        self.kind = kind

    def forward(self, x):
        bn = self.bn
        scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        border = (bn.bias - bn.running_mean * scale).view(1, -1, 1, 1)
        y = bn(x)
        if self.kind == "of the bias":
            border = bn.bias.view(1, -1, 1, 1)
        if self.kind == "of the image":
            border = y.mean((2, 3), keepdim=True)
        y = F.pad(y, [1] * 4)
        y[:, :, 0:1, :] = border
        y[:, :, -1:, :] = border
        if self.kind != "of three sides":
            y[:, :, :, 0:1] = border
        y[:, :, :, -1:] = border
        if self.kind == "set again":
            y[:, :, :, -1:] = 0
        return y


@pytest.mark.parametrize("kind", ["of the bias", "of the image", "of three sides", "set again"])
def test_a_border_of_other_values_stays(kind):
    network = Sequence(WrongBorder(8, 1, kind), nn.Conv2d(8, 8, 3))

    fused, _ = fused_and_equal(network)

    assert counted(fused, nn.BatchNorm2d) == 1


def test_a_convolution_with_weights_of_an_activation_stays():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))
            self.bn = nn.BatchNorm2d(8)

        def forward(self, x):
            return self.bn(F.conv2d(x, self.weight * x.mean()))

    fused, report = fused_and_equal(Dynamic())

    assert "called as a function" in report.kept["bn"]
    assert isinstance(fused.weight, nn.Parameter)


def test_a_function_with_the_weights_of_a_layer_that_is_not_called_is_folded():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.bn(F.conv2d(x, self.conv.weight * 2, padding=1))

    fused, report = fused_and_equal(Doubled())

    assert report.layers == ["folded"]
    assert counted(fused, nn.BatchNorm2d) == 0


def test_a_kernel_that_is_composed_by_a_convolution_of_kernels_is_folded():
    class Composed(nn.Module):  # as OREPA's stem
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(8, 8, 3, 3)) for _ in range(2))
            self.first.requires_grad_(False)
            self.bn = nn.BatchNorm2d(8)

        def forward(self, x):
            kernel = F.conv2d(self.first, self.second.flip(2, 3).permute(1, 0, 2, 3), padding=2)
            return self.bn(F.conv2d(x, kernel, padding=2))

    fused, report = fused_and_equal(Composed())

    assert report.layers == ["folded"]
    assert list(fused.state_dict()) == ["folded.weight", "folded.bias"]
    assert fused.folded.weight.requires_grad


def test_a_function_into_which_nothing_is_folded_stays():
    class Blur(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("filter", torch.ones(8, 1, 3, 3) / 9)

        def forward(self, x):
            return F.conv2d(x, self.filter, stride=2, padding=1, groups=8)

    fused, report = fused_and_equal(Sequence(nn.Conv2d(8, 8, 3), nn.ReLU(), Blur(), nn.ReLU()))

    assert report.layers == []
    assert type(fused.layers[2]) is Blur
    assert list(fused.layers[2].state_dict()) == ["filter"]


def test_frozen_weights_of_a_function_stay_frozen():
    block = family.OREPAPoint().requires_grad_(False)

    fused, _ = fused_and_equal(block)

    assert not any(parameter.requires_grad for parameter in fused.parameters())


def test_a_tensor_that_another_forward_reads_stays():
    class Reader(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return x * self.weight.mean()

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = family.OREPAPoint()
            self.reader = Reader(self.block.origin)

        def forward(self, x):
            return self.reader(self.block(x))

    fused, _ = fused_and_equal(Shared())

    assert fused.reader.weight is not None


class LayerScale(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.inplace = False
        self.gamma = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


class Scaled(nn.Module):
    def __init__(self, scale: nn.Module) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(8, 8, 3, padding=1, groups=8), scale

    def forward(self, x):
        return x + self.scale(self.conv(x) - x)


@pytest.mark.parametrize(("shape", "layers"), [((8, 1, 1), 0), ((1, 8, 1, 1), 0), ((20,), 1)])
def test_a_layer_scale_of_channels_is_folded_and_leaves_nothing(shape, layers):
    fused, _ = fused_and_equal(Scaled(LayerScale(*shape)), (9, 20), (20, 20))

    assert counted(fused, LayerScale) == layers
    assert list(fused.state_dict()) == ["conv.weight", "conv.bias"] + ["scale.gamma"] * layers


def combined(expression: str) -> nn.Module:
    """Two convolutions, a number and an expression of them as the forward."""
    names: dict[str, object] = {}
    exec(
        f"import torch\ndef forward(self, x):\n    a, b = self.a, self.b\n    return {expression}",
        names,
    )
    base = type("Combined", (nn.Module,), {"forward": names["forward"]})
    network = base()
    network.a, network.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
    network.one = nn.Parameter(torch.full((1, 1, 1), 0.7))
    return network


@pytest.mark.parametrize(
    "expression",
    [
        "a(x) / 4 + b(x)",
        "3 * a(x) + b(x)",
        "a(x) + torch.mul(b(x), -0.5)",
        "a(x) + -b(x)",
        "a(x).mul(0.5).sub(b(x).neg())",
        "(a(x) - b(x)) / 2 - x",
        "a(x) * self.one + b(x)",
        "torch.sub(x, self.one * a(x)) + b(x)",
    ],
)
def test_a_sum_may_scale_and_subtract_its_terms(expression):
    fused, _ = fused_and_equal(combined(expression))

    assert counted(fused, nn.Conv2d) == 1


@pytest.mark.parametrize(
    "expression",
    [
        "a(x) / x.abs().add(1) + b(x)",
        "2 / a(x).abs().add(1) + b(x)",
        "torch.div(a(x), 2, rounding_mode='floor') + b(x)",
        "torch.add(a(x), b(x), alpha=2)",
        "a(x) * x + b(x)",
        "a(x).relu() * 2 + b(x)",
        "1 - a(x) + b(x).relu()",
    ],
)
def test_a_sum_of_other_terms_stays(expression):
    fused, _ = fused_and_equal(combined(expression))

    assert counted(fused, nn.Conv2d) == 2


def test_a_normalization_with_an_activation_is_no_branch():
    timm = pytest.importorskip("timm")

    class Activated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), timm.layers.BatchNormAct2d(8)

        def forward(self, x):
            return self.conv(x) + self.norm(x)

    fused, _ = fused_and_equal(Activated())

    assert counted(fused, timm.layers.BatchNormAct2d) == 1


def test_a_normalization_beside_a_linear_layer_keeps_its_axis():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.bn = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x):
            return self.linear(x) + self.bn(x)

    network = settle(Rows()).double()
    fused, _ = fuse_conv_bn(network)

    for shape in ((4, 8), (4, 8, 8)):
        x = torch.randn(shape, dtype=torch.float64)
        assert relative_error(network(x), fused(x)) < 1e-12


def test_a_forward_that_overwrites_its_input_still_does():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            y = self.a(x) + self.b(x)
            x += y
            return y

    network = settle(Overwriting()).double()
    fused, _ = fuse_conv_bn(network)
    first, second = images(9, 9), images(9, 9)

    assert relative_error(network(first), fused(second)) < 1e-12
    assert relative_error(first, second) < 1e-12


def test_a_frozen_bias_stays_frozen():
    network = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    network[0].bias.requires_grad_(False)

    fused, _ = fuse_conv_bn(settle(network))

    assert not fused[0].bias.requires_grad
    assert fused[0].weight.requires_grad


def test_a_layer_scale_that_overwrites_its_input_stays():
    network = Scaled(LayerScale(8, 1, 1))
    network.scale.inplace = True

    fused, _ = fused_and_equal(network)

    assert counted(fused, LayerScale) == 1


class MissingBranches(nn.Module):
    """Sums that start at 0, as MobileOne's and GhostNetV3's do."""

    def __init__(self, *branches: nn.Module, then: nn.Module) -> None:
        super().__init__()
        self.branches, self.then = nn.ModuleList(branches), then

    def forward(self, x):
        y = 0
        for branch in self.branches:
            y += branch(x)
        return self.then(y + 0)


@pytest.mark.parametrize("count", [1, 3])
def test_sums_that_start_at_0_are_merged(count):
    branches = [family.conv_bn(8, 8, 3, padding=1) for _ in range(count)]
    network = MissingBranches(*branches, then=nn.ReLU(inplace=True))

    fused, report = fused_and_equal(network)

    assert counted(fused, nn.Conv2d) == 1
    assert report.unmerged == {}
    assert "+" not in str(inspect.getsource(type(fused).forward))


def test_a_sum_with_0_of_a_value_that_is_used_again_stays():
    class Kept(nn.Module):
        def forward(self, x):
            y = x + 0
            y.relu_()
            return x * y

    fused_and_equal(Sequence(nn.Conv2d(8, 8, 1), Kept()))


def test_a_normalization_of_flattened_rows_is_folded_into_the_linear_layer():
    class Rows(nn.Module):  # as LeViT's
        def __init__(self):
            super().__init__()
            self.linear, self.bn = nn.Linear(8, 6), nn.BatchNorm1d(6)

        def forward(self, x):
            x = self.linear(x)
            return self.bn(x.flatten(0, 1)).reshape_as(x)

    network = settle(Rows()).double()
    fused, report = fuse_conv_bn(network)
    x = torch.randn(2, 5, 8, dtype=torch.float64)

    assert relative_error(network(x), fused(x)) < 1e-12
    assert report.kept == {}
    with pytest.raises(ValueError, match="axes"):
        fused(x[None])


def test_a_factor_that_a_flag_changes_is_not_taken_for_another():
    class Flagged(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.strong = False

        def forward(self, x):
            if self.strong:
                return self.a(x) + self.b(x) * 3
            return self.a(x) + self.b(x) * 2

    network = settle(Flagged()).double()
    fused, _ = fuse_conv_bn(network)
    network.strong = fused.strong = True
    x = images(9, 9)

    assert relative_error(network(x), fused(x)) < 1e-12


def test_repvgg_blocks_are_folded_by_their_own_method_or_by_this():
    model = settle(repvgg.create_model("repvgg_tiny", num_classes=4)).double()
    fused, _ = fuse_conv_bn(model)
    switched = repvgg.switch_to_deploy(model)
    x = images(32, 32, channels=3)

    assert relative_error(switched(x), fused(x)) < 1e-12
