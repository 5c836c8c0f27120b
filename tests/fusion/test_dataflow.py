"""Untraceable networks are fused inside the parts that their code only calls."""

import copy
import functools
import types

import pytest
import torch
from torch import nn

from repvgg import fuse_conv_bn
from repvgg.fusion import dataflow, foldable
from tests.support.networks import relative_error, settle


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))


class Untraceable(nn.Module):
    """Its control flow depends on values, so only its code can be read."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.seq = layers()
        self.list = nn.ModuleList([Pair(), Pair()])
        self.dict = nn.ModuleDict({"a": Pair(), "b": Pair()})


class Calls(Untraceable):
    def forward(self, x):
        if float(x.sum()) > 1e9:
            return x
        return self.seq(self.pair(x))


class Loops(Untraceable):
    def forward(self, x):
        if float(x.sum()) > 1e9:
            return x
        for module in self.list:
            x = module(x)
        for i, module in enumerate(self.list):
            x = module(x) + i
        for a, b in zip(self.list, self.dict.values(), strict=True):
            x = a(x) + b(x)
        for name, module in self.dict.items():
            x = module(x) + len(name) + len(self.list)
        for i, (name, module) in enumerate(self.dict.items()):
            x = module(x) + i + len(name)
        return sum(f(x) for f in reversed(self.list)) + self.list[0](x)


class Helpers(Untraceable):
    scale = 2

    def forward(self, x):
        return self._inner(x) * self.scale if float(x.sum()) < 1e9 else x

    def _inner(self, x):
        return self.pair(x) if self.pair is not None else x


class Properties(Untraceable):
    @property
    def body(self):
        return self.pair(torch.ones(1, 4, 3, 3, dtype=torch.float64))

    def forward(self, x):
        return x + self.body.mean() if float(x.sum()) < 1e9 else x


@pytest.mark.parametrize(
    ("network", "fused"), [(Calls, 2), (Loops, 4), (Helpers, 1), (Properties, 1)]
)
def test_parts_that_are_only_called_are_fused(network, fused):
    network = settle(network()).double()

    found, report = fuse_conv_bn(network)

    used = [pair for pair in report.fused if not _is_unused(network, pair[0])]
    assert len(used) >= fused
    assert relative_error(network(images(2, 4, 8, 8)), found(images(2, 4, 8, 8))) < 1e-12
    assert report.untraced[""] == "it calls __float__ on a value"


def _is_unused(network: nn.Module, name: str) -> bool:
    called = []
    handle = network.get_submodule(name).register_forward_hook(lambda *_: called.append(name))
    network(images(2, 4, 8, 8))
    handle.remove()
    return not called


class ReachesInto(Untraceable):
    def forward(self, x):
        return self.pair.conv(x) + self.pair(x) if float(x.sum()) < 1e9 else x


class TapsSequence(Untraceable):
    def forward(self, x):
        taps = [x]
        if float(x.sum()) < 1e9:
            for layer in self.seq:
                taps.append(layer(taps[-1]))
        return taps[1] + taps[-1]


class Slices(Untraceable):
    def forward(self, x):
        return self.seq[:1](x) + self.seq(x) if float(x.sum()) < 1e9 else x


class Alias(Untraceable):
    def forward(self, x):
        pair = self.pair
        return pair.conv(x) + pair(x) if float(x.sum()) < 1e9 else x


class PassesOn(Untraceable):
    def forward(self, x):
        return helper(self.pair, x) if float(x.sum()) < 1e9 else x


def helper(pair, x):
    return pair.conv(x) + pair(x)


class PassesItself(Untraceable):
    def forward(self, x):
        return outside(self, x) if float(x.sum()) < 1e9 else x


def outside(network, x):
    return network.pair.conv(x) + network.pair(x)


class GetsByName(Untraceable):
    def forward(self, x):
        if float(x.sum()) > 1e9:
            return x
        return getattr(getattr(self, "pair"), "conv")(x) + self.pair(x)  # noqa: B009


class Registry(Untraceable):
    def forward(self, x):
        if float(x.sum()) > 1e9:
            return x
        convs = [m for m in self.modules() if isinstance(m, nn.Conv2d)]
        return convs[0](x) + self.pair(x)


class Hidden(Untraceable):
    def __init__(self) -> None:
        super().__init__()
        self.again = [self.pair.conv]

    def forward(self, x):
        return self.again[0](x) + self.pair(x) if float(x.sum()) < 1e9 else x


class Closure(Untraceable):
    def __init__(self) -> None:
        super().__init__()
        conv = self.pair.conv
        self.function = lambda x: conv(x)

    def forward(self, x):
        return self.function(x) + self.pair(x) if float(x.sum()) < 1e9 else x


class ReadsWeight(Untraceable):
    def forward(self, x):
        return self.pair(x) * self.pair.conv.weight.mean() if float(x.sum()) < 1e9 else x


class CallsOwn(Pair):
    def forward(self, x):
        return self.bn(self.conv(x)) if float(x.sum()) < 1e9 else self.conv(x)


class ChecksType(Pair):
    """Proxies of torch.fx are no tensors, so torch.fx would take the other branch."""

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y if isinstance(x, torch.Tensor) else self.bn(y)


class Flag(Pair):
    def forward(self, x, raw: bool = False):
        y = self.conv(x)
        return y if raw else self.bn(y)


class OptionalMask(Pair):
    def forward(self, x, mask=None):
        y = self.conv(x)
        return self.bn(y) if mask is not None else self.bn(y) + y


class Swallows(Pair):
    def forward(self, x):
        y = self.conv(x)
        try:
            return self.bn(y) + y if float(x.sum()) < 1e9 else self.bn(y)
        except Exception:
            return self.bn(y)


class ReplacedForward(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.forward = lambda x: self.bn(self.conv(x)) + self.conv(x)


class AugmentedElsewhere(Pair):
    def forward(self, x):
        y = self.conv(x)
        z = y.view(-1)
        z += 1
        return self.bn(y)


@pytest.mark.parametrize(
    "network",
    [
        ReachesInto,
        TapsSequence,
        Slices,
        Alias,
        PassesOn,
        PassesItself,
        GetsByName,
        Registry,
        Hidden,
        ReadsWeight,
        CallsOwn,
        ChecksType,
        Flag,
        OptionalMask,
        Swallows,
        ReplacedForward,
        AugmentedElsewhere,
    ],
)
def test_layers_that_the_code_may_use_otherwise_are_kept(network):
    network = settle(network()).double()
    x = images(2, 4, 8, 8)

    found, report = fuse_conv_bn(network)

    assert relative_error(network(x), found(x)) < 1e-12
    reached = {"pair.bn", "seq.1", "bn"} & set(report.kept)
    assert reached, report


def test_a_closure_over_the_original_network_still_works():
    network = settle(Closure()).double()

    found, _ = fuse_conv_bn(network)  # whose function still calls the convolution of `network`

    assert relative_error(network(images(2, 4, 8, 8)), found(images(2, 4, 8, 8))) < 1e-12


def test_both_paths_of_an_optional_argument_are_traced():
    network = settle(Flag()).double()
    found, _ = fuse_conv_bn(network)

    x = images(2, 4, 8, 8)
    assert relative_error(network(x, raw=True), found(x, raw=True)) < 1e-12


class Remembers(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.last = None

    def forward(self, x):
        self.count += 1
        self.last = self.conv(x)
        return self.bn(self.last)


def test_tracing_does_not_change_the_network():
    network = settle(Remembers())

    found, _ = fuse_conv_bn(network)

    assert (network.last, found.last) == (None, None)
    assert (network.count, found.count) == (0, 0)


def test_tracing_draws_no_random_numbers():
    network = settle(nn.Sequential(Pair(), nn.Dropout(0.5)))
    before = torch.random.get_rng_state()

    fuse_conv_bn(network)

    assert torch.equal(torch.random.get_rng_state(), before)


class Caches(Pair):
    """Stores a value of its first call, and is traced twice for its optional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = None
        self.seen = []

    def forward(self, x, mask=None):
        if self.scale is None:
            self.scale = x.mean()
        if mask is not None:
            x = x * mask
        self.seen.append(x)
        return self.bn(self.conv(x)) * self.scale


def test_a_stored_value_does_not_enter_the_next_graph():
    network = settle(Caches())

    flow = dataflow.trace(network, foldable.is_leaf)

    for graph in flow.graphs:
        graph.lint()
        assert all(node in flow.callers for node in graph.nodes)
    assert len(flow.graphs) == 2


class Auxiliary(nn.Module):
    """A head that only runs while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Pair()
        self.head = Pair()

    def forward(self, x):
        x = self.body(x)
        return (x, self.head(x)) if self.training else x


def test_parts_that_do_not_run_are_fused_separately():
    network = settle(Auxiliary()).double()

    found, report = fuse_conv_bn(network)

    assert len(report.fused) == 2
    x = images(2, 4, 8, 8)
    assert relative_error(network.head(x), found.head(x)) < 1e-12


def test_the_dataflow_names_the_calls_and_the_reasons():
    network = settle(nn.Sequential(Calls(), Pair()))

    flow = dataflow.trace(copy.deepcopy(network), foldable.is_leaf)

    assert {"0.pair.conv", "0.seq.1", "1.bn"} <= set(flow.calls)
    assert flow.untraced == {"0": "it calls __float__ on a value"}


@pytest.mark.parametrize("container", [nn.ModuleList([Pair()]), nn.ModuleDict({"a": Pair()})])
def test_a_network_without_forward_is_fused_in_its_parts(container):
    network = settle(container).double()

    found, report = fuse_conv_bn(network)

    assert len(report.fused) == 1
    (old,), (new,) = network.children(), found.children()
    assert relative_error(old(images(2, 4, 8, 8)), new(images(2, 4, 8, 8))) < 1e-12


@pytest.mark.parametrize(
    "network", [nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Identity(), nn.ReLU()]
)
def test_a_single_layer_is_returned_unchanged(network):
    network = settle(network).double()

    found, _ = fuse_conv_bn(network)

    assert torch.equal(network(images(2, 4, 8, 8)), found(images(2, 4, 8, 8)))


class ListOfLayers(Pair):
    """Also stores its layers in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [self.conv, self.bn]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class ChecksClass(Pair):
    def forward(self, x):
        for layer in self.children():
            x = layer(x)
            if isinstance(layer, nn.BatchNorm2d):
                x = x.relu()
        return x


class ChecksBias(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y if self.conv.bias is None else y.relu()


class ChecksChannels(Pair):
    def forward(self, x):
        return self.bn(self.conv(x)).reshape(-1, self.bn.num_features, 8, 8)


class SumsWeights(Pair):
    def forward(self, x):
        return self.bn(self.conv(x)) * sum(p.norm() for p in self.conv.parameters())


class ReadsState(Pair):
    def forward(self, x):
        return self.bn(self.conv(x)) * self.state_dict()["conv.weight"].mean()


class TiedWeight(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.aaa = nn.Conv2d(4, 4, 3)
        self.conv.weight = self.aaa.weight

    def forward(self, x):
        return self.bn(self.conv(x)) * self.conv.weight.mean()


class IsTensor(Pair):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) * y if torch.is_tensor(x) else self.bn(y)


class TypeOf(Pair):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) * y if type(x) is torch.Tensor else self.bn(y)


class HashesSize(Pair):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) * y if x.shape[-1] in {8, 16} else self.bn(y)


class ReadsText(Pair):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) * y if str(x.dtype) == "torch.float64" else self.bn(y)


class IdentityOfTuple(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.identity = nn.Identity()

    def forward(self, x):
        y = self.conv(x)
        first, second = self.identity((x, y))
        return first + second * self.bn(y)


class OwnCall(Pair):
    def __call__(self, x):
        return super().__call__(x) * self.conv(x)


class PassesNone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = MayBeNone()

    def forward(self, x):
        return self.part(x, None) if float(x.sum()) < 1e9 else x


class MayBeNone(Pair):
    def forward(self, x, skip):
        y = self.conv(x)
        return y if skip is None else self.bn(y) + skip


class ReturnsNone(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def forward(self, x):
        y = self.conv(x)
        gate = self.gate(x)
        return self.bn(y) * y if gate is None else self.bn(y)


class Gate(nn.Module):
    def forward(self, x):
        return None if float(x.sum()) < 1e9 else x


class Decorated(Untraceable):
    def forward(self, x):
        return self.pair(x) if float(x.sum()) < 1e9 else x


def adding_convolution(function):
    @functools.wraps(function)
    def wrapper(self, x):
        return function(self, x) + self.pair.conv(x)

    return wrapper


Decorated.forward = adding_convolution(Decorated.forward)


class Delegates(Untraceable):
    def __getattr__(self, name):
        return self.pair.conv if name == "inner" else super().__getattr__(name)

    def forward(self, x):
        return self.pair(x) + self.inner(x) if float(x.sum()) < 1e9 else x


class HoldsObject(Untraceable):
    def __init__(self) -> None:
        super().__init__()
        self.box = types.SimpleNamespace(conv=self.pair.conv)

    def forward(self, x):
        return self.pair(x) + self.box.conv(x) if float(x.sum()) < 1e9 else x


class ScaleOfWeights(Pair):
    @property
    def scale(self):
        return float(self.conv.weight.detach().norm())


class ReadsProperty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = ScaleOfWeights()

    def forward(self, x):
        return self.part(x) * self.part.scale if float(x.sum()) < 1e9 else x


def hooked() -> nn.Module:
    network = Pair()
    network.register_forward_hook(lambda module, inputs, output: output + module.conv(inputs[0]))
    return network


@pytest.mark.parametrize(
    "network",
    [
        ListOfLayers,
        ChecksClass,
        ChecksBias,
        ChecksChannels,
        SumsWeights,
        ReadsState,
        TiedWeight,
        IsTensor,
        TypeOf,
        HashesSize,
        ReadsText,
        IdentityOfTuple,
        OwnCall,
        PassesNone,
        ReturnsNone,
        Decorated,
        Delegates,
        HoldsObject,
        ReadsProperty,
        hooked,
    ],
)
def test_layers_that_a_forward_inspects_are_kept(network):
    network = settle(network()).double()
    x = images(2, 4, 8, 8)

    found, report = fuse_conv_bn(network)

    assert relative_error(network(x), found(x)) < 1e-12
    assert {"bn", "pair.bn", "part.bn"} & set(report.kept), report


class Unregistered(Pair):
    def forward(self, x):
        return nn.ReLU()(self.bn(self.conv(x)))


class LeftBehind(Pair):
    """Stores a value of an earlier forward, which copy.deepcopy cannot copy."""

    def __init__(self) -> None:
        super().__init__()
        self.last = self.conv(torch.zeros(1, 4, 3, 3))

    def forward(self, x):
        self.last = self.conv(x)
        return self.bn(self.last)


@pytest.mark.parametrize(
    "network",
    [Unregistered, LeftBehind, lambda: nn.Sequential(torch.jit.script(Pair().eval()), Pair())],
)
@pytest.mark.filterwarnings("ignore:.torch.jit.*")
def test_unusual_networks_are_fused_without_an_error(network):
    network = settle(network()).double()
    x = images(2, 4, 8, 8)

    found, report = fuse_conv_bn(network)

    assert relative_error(network(x), found(x)) < 1e-12
    assert len(report.fused) == 1 or report.kept
