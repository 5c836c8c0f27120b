import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn

import repvgg
from repvgg import fuse_conv_bn
from repvgg.fusion import FusionReport
from tests.support.networks import relative_error, settle


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Sum(nn.Module):
    """A hand-written block: any branches, added, then a ReLU."""

    def __init__(self, *branches: nn.Module, identity: bool = False) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.identity = nn.Identity() if identity else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = sum(branch(x) for branch in self.branches)
        return self.relu(y if self.identity is None else y + self.identity(x))


def conv_bn(*args, dims: int = 2, **options) -> nn.Sequential:
    conv, bn = (
        (nn.Conv1d, nn.BatchNorm1d),
        (nn.Conv2d, nn.BatchNorm2d),
        (nn.Conv3d, nn.BatchNorm3d),
    )[dims - 1]
    return nn.Sequential(conv(*args, bias=False, **options), bn(args[1]))


def merged(network: nn.Module, x: torch.Tensor) -> tuple[nn.Module, FusionReport]:
    """Fuse a network and compare the outputs."""
    network = settle(network).double()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    expected = network(x.clone())
    found, report = fuse_conv_bn(network)
    assert relative_error(expected, found(x.clone())) < 1e-12
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    return found, report


def convolutions(network: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.conv._ConvNd) for module in network.modules())


class HandWritten(nn.Module):
    """A block like that of RepVGG, without switch_to_deploy."""

    def __init__(self, channels, groups=1):
        super().__init__()
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.bn0 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.bn3(self.conv3(x)) + self.bn1(self.conv1(x)) + self.bn0(x))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_hand_written_repvgg_block_becomes_one_convolution(groups):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), HandWritten(8, groups), HandWritten(8, groups))

    found, report = merged(network, images(2, 3, 9, 9))

    assert convolutions(found) == 3
    assert report.kept == {}
    assert len(report.fused) == 6
    assert report.merged[0] == ("1.conv3", "1.conv1", "1.bn0")


CASES = {
    "plain residual": ([nn.Conv2d(4, 4, 3, padding=1)], True, 1),
    "two of 3x3": ([nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)], False, 1),
    "1x1 and identity": ([nn.Conv2d(4, 4, 1)], True, 1),
    "3x3 and 1x1, stride 2": (
        [conv_bn(4, 6, 3, padding=1, stride=2), conv_bn(4, 6, 1, stride=2)],
        False,
        1,
    ),
    "5x5, 3x3, 1x1": ([conv_bn(4, 4, k, padding=k // 2) for k in (5, 3, 1)], True, 1),
    "1x3 and 3x1 need a 3x3": (
        [
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),
            nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),
        ],
        False,
        1,
    ),
    "dilated, with 1x1": ([conv_bn(4, 4, 3, padding=2, dilation=2), conv_bn(4, 4, 1)], True, 1),
    "grouped": ([conv_bn(4, 8, 3, padding=1, groups=2), conv_bn(4, 8, 1, groups=2)], False, 1),
    "depthwise": ([conv_bn(4, 4, 3, padding=1, groups=4), conv_bn(4, 4, 1, groups=4)], True, 1),
    "average pooling": (
        [nn.Conv2d(4, 4, 3, padding=1), nn.AvgPool2d(3, stride=1, padding=1)],
        True,
        1,
    ),
    "average pooling, groups": (
        [nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.AvgPool2d(3, stride=1, padding=1)],
        False,
        1,
    ),
    "average pooling without the border": (
        [
            nn.Conv2d(4, 4, 3, padding=1),
            nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
        ],
        False,
        0,
    ),
    "average pooling, ceil": (
        [
            nn.Conv2d(4, 4, 3, padding=1, stride=2),
            nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True),
        ],
        False,
        0,
    ),
    "other groups": ([nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1)], False, 0),
    "other dilation": (
        [nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=2, dilation=2)],
        False,
        0,
    ),
    "cropped 1x1 is another place": (
        [nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, stride=1)],
        False,
        1,
    ),
    "broadcast channels": ([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 1, 1)], False, 0),
    "max pooling": ([nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(3, 1, 1)], False, 0),
    "transposed": ([nn.ConvTranspose2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)], False, 0),
    "valid and 1x1 of another size": ([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)], False, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_branches_are_merged_where_that_is_exact(case):
    branches, identity, sums = copy.deepcopy(CASES[case])
    before = convolutions(nn.ModuleList(branches))

    found, report = merged(nn.Sequential(Sum(*branches, identity=identity)), images(2, 4, 9, 9))

    assert len(report.merged) == sums
    assert convolutions(found) == (1 if sums else before)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("size", [3, 5])
def test_padding_modes_stay_exact(mode, size):
    def conv(k):
        return nn.Conv2d(4, 4, k, padding=k // 2, padding_mode=mode)

    found, _report = merged(
        nn.Sequential(Sum(conv(size), conv(3), conv(1), identity=True)), images(2, 4, 9, 8)
    )

    assert convolutions(found) == 1


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_an_even_kernel_with_padding_same_has_its_center_first(size):
    branches = [nn.Conv2d(4, 4, size, padding="same"), nn.Conv2d(4, 4, 1)]

    found, _ = merged(nn.Sequential(Sum(*branches, identity=True)), images(2, 4, 9, 8))

    assert convolutions(found) == 1


def test_a_symmetrically_padded_even_kernel_does_not_fit_the_identity():
    class Cropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 2, padding=1)
            self.point = nn.Conv2d(4, 4, 1, padding=0)

        def forward(self, x):
            return self.conv(x)[..., 1:, 1:] + self.point(x)

    _, report = merged(nn.Sequential(Cropped()), images(2, 4, 9, 8))

    assert report.merged == []


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_blocks_of_any_dimension_are_merged(dims):
    branches = [conv_bn(4, 4, k, padding=k // 2, dims=dims) for k in (3, 1)]

    found, _ = merged(nn.Sequential(Sum(*branches, identity=True)), images(2, 4, *(7, 6, 5)[:dims]))

    assert convolutions(found) == 1


class OtherInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 1)
        self.c = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = x.relu()
        return self.a(x) + self.b(x) + self.c(y) + y


def test_terms_of_other_inputs_stay():
    _, report = merged(nn.Sequential(OtherInput()), images(2, 4, 9, 8))

    assert sorted(report.merged) == [("0.a", "0.b"), ("0.c",)]


class Overwritten(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 1)


class InputOverwritten(Overwritten):
    def forward(self, x):
        x = x + 0.5
        y = self.a(x)
        x.relu_()
        return y + self.b(x)


class ViewOverwritten(Overwritten):
    def forward(self, x):
        x = x + 0.5
        y = self.a(x)
        x.view(-1).mul_(0.5)
        return y + x


class AccumulatedOntoInput(Overwritten):
    def forward(self, x):
        x = x + 0.5
        z = x
        x += self.a(x)
        return x + self.b(z)


class AccumulatedElsewhere(Overwritten):
    def forward(self, x):
        z = x.flip(2)
        w = z.view(-1)
        z += self.a(x)
        z += self.b(x)
        return w


class BranchReturned(Overwritten):
    def forward(self, x):
        y = self.b(x)
        return (self.a(x) + y) * y


class CalledTwice(Overwritten):
    def forward(self, x):
        return self.a(x) + self.b(x) + self.b(x.flip(2))


class Scaled(Overwritten):
    def forward(self, x):
        return torch.add(self.a(x), self.b(x), alpha=2)


@pytest.mark.parametrize(
    "block",
    [
        InputOverwritten,
        ViewOverwritten,
        AccumulatedOntoInput,
        AccumulatedElsewhere,
        BranchReturned,
        CalledTwice,
        Scaled,
    ],
)
def test_sums_that_are_not_parallel_are_not_merged(block):
    _, report = merged(nn.Sequential(block()), images(2, 4, 9, 8))

    assert report.merged == []


class Accumulating(Overwritten):
    def forward(self, x):
        y = self.a(x)
        y += self.b(x)
        y.add_(x)
        return y


def test_a_sum_that_accumulates_in_place_is_merged():
    found, _ = merged(nn.Sequential(Accumulating()), images(2, 4, 9, 8))

    assert convolutions(found) == 1


class Shared(nn.Module):
    """A block whose parent calls its 1x1 convolution too."""

    def __init__(self):
        super().__init__()
        self.block = HandWritten(4)

    def forward(self, x):
        return self.block(x) + self.block.conv1(x).relu()


def test_a_branch_that_another_module_calls_stays():
    _, report = merged(Shared(), images(2, 4, 9, 8))

    assert report.merged == [("block.conv3", "block.bn0")]


class WithMethods(HandWritten):
    def branch(self, x):
        return self.conv1(x)


class CallsMethod(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = WithMethods(4)

    def forward(self, x):
        return self.block(x) * self.block.branch(x)


def test_a_branch_that_a_method_uses_stays():
    found, report = merged(CallsMethod(), images(2, 4, 9, 8))

    assert report.merged == [("block.conv3", "block.bn0")]
    assert isinstance(found.block, WithMethods)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b1g4", "repvgg_d2se", "repvggplus_l2pse"])
def test_our_blocks_are_merged_like_those_of_others(name):
    network = repvgg.create_model(name, depths=(1, 2, 2, 1), widths=(8, 16, 16, 24), num_classes=5)

    _found, report = merged(network, images(2, 3, 64, 64))

    assert len(report.merged) == 7
    assert report.kept == {}


def test_a_merged_network_keeps_the_attributes_of_its_modules():
    block = HandWritten(4)
    block.label = "stage 1"
    block.unused = nn.Linear(2, 2)

    found, _ = merged(nn.Sequential(block), images(2, 4, 9, 8))

    assert found[0].label == "stage 1"
    assert isinstance(found[0].unused, nn.Linear)
    assert isinstance(found[0], HandWritten)
    assert dict(found[0].named_children()).keys() == dict(block.named_children()).keys()


@pytest.mark.parametrize("transfer", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_a_merged_network_can_be_copied_and_pickled(transfer):
    found, _ = merged(nn.Sequential(HandWritten(4)), images(2, 4, 9, 8))
    x = images(1, 4, 9, 9)

    assert torch.equal(transfer(found)(x), found(x))


@pytest.mark.slow
def test_a_merged_network_is_exported_to_onnx():
    import onnx

    found, _ = merged(nn.Sequential(nn.Conv2d(3, 4, 3), HandWritten(4)), images(2, 3, 9, 8))
    file = io.BytesIO()
    program = torch.onnx.export(
        found.float(), (torch.randn(1, 3, 9, 9),), dynamo=True, verbose=False
    )
    program.save(file)

    nodes = onnx.load_from_string(file.getvalue()).graph.node
    assert sorted(node.op_type for node in nodes) == ["Conv", "Conv", "Relu"]


def test_the_order_of_terms_does_not_matter():
    class Ordered(HandWritten):
        order = (0, 1, 2)

        def forward(self, x):
            terms = [self.bn3(self.conv3(x)), self.bn1(self.conv1(x)), self.bn0(x)]
            a, b, c = (terms[i] for i in self.order)
            return a + (b + c)

    for order in itertools.permutations(range(3)):
        block = Ordered(4)
        block.order = order
        found, _ = merged(nn.Sequential(block), images(2, 4, 9, 8))
        assert convolutions(found) == 1


class MayBeNone(Overwritten):
    def forward(self, x, skip):
        y = self.a(x) + self.b(x)
        return y.sigmoid() if skip is not None else y.relu()


class PassesNone(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = MayBeNone()

    def forward(self, x):
        return self.block(x, None)


class Flagged(Overwritten):
    flag = False

    def forward(self, x):
        y = self.a(x) + self.b(x)
        return y.relu() if self.flag else y


class SetsFlag(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Flagged()

    def forward(self, x):
        self.block.flag = True
        y = self.block(x)
        self.block.flag = False
        return self.block(y)


class Keeps(Overwritten):
    def forward(self, x):
        self.last = self.a(x) + self.b(x)
        return self.last.relu()


class ReadsWhatWasKept(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Keeps()

    def forward(self, x):
        return self.block(x) + self.block.last


class OwnCall(Overwritten):
    def __call__(self, x):
        return super().__call__(x).relu()

    def forward(self, x):
        return self.a(x) + self.b(x)


class HookedIdentity(Overwritten):
    def __init__(self):
        super().__init__()
        self.identity = nn.Identity()
        self.identity.register_forward_hook(lambda module, inputs, output: 2 * output)

    def forward(self, x):
        return self.identity(self.a(x) + self.b(x))


class AddsInPlaceBefore(Overwritten):
    def forward(self, x):
        h = x * 1
        skip = h
        h += x.flip(2)
        return (h + self.a(x) + self.b(x)) * skip


class Autocast(Overwritten):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.a(x) + self.b(x)


@pytest.mark.parametrize(
    ("network", "merges"),
    [
        (PassesNone, False),
        (SetsFlag, False),
        (ReadsWhatWasKept, False),
        (lambda: nn.Sequential(OwnCall()), False),
        (lambda: nn.Sequential(HookedIdentity()), True),
        (lambda: nn.Sequential(AddsInPlaceBefore()), False),
        (lambda: nn.Sequential(Autocast()), False),
    ],
)
def test_forwards_that_do_more_than_their_graph_shows_stay(network, merges):
    _, report = merged(network(), images(2, 4, 9, 8))

    assert bool(report.merged) == merges


class Described(HandWritten):
    """A block with a method, a property and a child that its parent reads."""

    expansion = 2

    @property
    def width(self):
        return 3

    def gain(self):
        return 0.5


class Asks(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Described(4)

    def forward(self, x):
        y = self.block(x) * self.block.expansion + self.block.width
        return y * self.block.gain() if isinstance(self.block, Described) else y


@pytest.mark.parametrize("transfer", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_a_merged_module_keeps_its_class_and_methods(transfer):
    network = settle(Asks()).double()

    found, report = fuse_conv_bn(network)

    assert report.merged
    x = images(2, 4, 9, 8)
    assert relative_error(network(x), transfer(found)(x)) < 1e-12


def test_the_weights_of_a_merged_network_load_into_another_one():
    first, _ = merged(nn.Sequential(HandWritten(4)), images(2, 4, 9, 8))
    second, _ = merged(nn.Sequential(HandWritten(4)), images(2, 4, 9, 8))

    second.load_state_dict(first.state_dict())

    assert torch.equal(first(images(1, 4, 9, 8)), second(images(1, 4, 9, 8)))
