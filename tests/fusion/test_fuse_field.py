"""Forwards of published networks: what is folded, what stays exact, and what raises."""

import contextlib
import copy
import functools
import io
import math
import pickle
import textwrap
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import repvgg
from repvgg import fuse_conv_bn
from repvgg.fusion import FusionReport
from repvgg.fusion.normalizations import is_normalization
from tests.support.networks import relative_error, settle
from tests.support.processes import Process


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


X = images(2, 3, 8, 8)


class Base(nn.Module):
    """Layers for forwards of any kind."""

    def __init__(self, **attributes):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.point, self.other = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.bns = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.by_name = nn.ModuleDict({"a": nn.BatchNorm2d(8), "b": nn.BatchNorm2d(8)})
        for name, value in attributes.items():
            setattr(self, name, value)


def network(forward, **attributes) -> nn.Module:
    cls = type("Network", (Base,), {"forward": forward, "__module__": __name__})
    return settle(cls(**attributes)).double()


def fused(model: nn.Module) -> tuple[nn.Module, FusionReport]:
    found, report = fuse_conv_bn(model)
    assert relative_error(model(X), found(X)) < 1e-12
    return found, report


# Flags


def returns_early(self, x):
    y = self.conv(x)
    return y if self.raw else self.bn(y)


def returns_early_by_getattr(self, x):
    y = self.conv(x)
    return y if getattr(self, "raw", False) else self.bn(y)


def compares_text(self, x):
    y = self.conv(x)
    if self.mode == "raw":
        return y
    return self.bn(y)


def looks_text_up(self, x):
    y = self.conv(x)
    return y if self.mode in ("raw", "bare") else self.bn(y)


def compares_number(self, x):
    y = self.conv(x)
    return y if self.stage >= 2 else self.bn(y)


def chooses_by_number(self, x):
    return self.bns[self.domain](self.conv(x))


def chooses_by_name(self, x):
    return self.by_name[self.domain](self.conv(x))


def chooses_by_flag(self, x):
    norm = self.bn if self.source else self.other
    return norm(self.conv(x))


def asks_settings(self, x):
    y = self.conv(x)
    return y if self.cfg.raw else self.bn(y)


def asks_dictionary(self, x):
    y = self.conv(x)
    return y if self.opts["raw"] else self.bn(y)


FLAGS = [
    (returns_early, {"raw": False}, lambda m: setattr(m, "raw", True)),
    (returns_early_by_getattr, {"raw": False}, lambda m: setattr(m, "raw", True)),
    (compares_text, {"mode": "norm"}, lambda m: setattr(m, "mode", "raw")),
    (looks_text_up, {"mode": "norm"}, lambda m: setattr(m, "mode", "bare")),
    (compares_number, {"stage": 1}, lambda m: setattr(m, "stage", 2)),
    (chooses_by_number, {"domain": 0}, lambda m: setattr(m, "domain", 2)),
    (chooses_by_name, {"domain": "a"}, lambda m: setattr(m, "domain", "b")),
    (chooses_by_flag, {"source": True}, lambda m: setattr(m, "source", False)),
    (
        asks_settings,
        {"cfg": types.SimpleNamespace(raw=False)},
        lambda m: setattr(m.cfg, "raw", True),
    ),
    (asks_dictionary, {"opts": {"raw": False}}, lambda m: m.opts.update(raw=True)),
]


@pytest.mark.parametrize(("forward", "attributes", "change"), FLAGS)
def test_a_flag_set_after_folding_has_the_same_effect(forward, attributes, change):
    model = network(forward, **copy.deepcopy(attributes))
    found, report = fused(model)

    change(model)
    change(found)

    assert report.fused == []
    assert relative_error(model(X), found(X)) < 1e-12


def scales(self, x):
    return (self.conv(x) + self.point(x)) * self.scale + self.shift


def exports(self, x):
    y = self.conv(x) + self.point(x)
    return y if self.export else y.sigmoid()


def exports_by_settings(self, x):
    y = self.conv(x) + self.point(x)
    return y if self.cfg.export else y.sigmoid()


def activates_by_name(self, x):
    y = self.conv(x) + self.point(x)
    if self.act == "relu":
        return y.relu()
    return y.sigmoid() if self.act == "sigmoid" else y


def drops(self, x):
    return F.dropout(self.conv(x) + self.point(x), 0.5, self.training)


MERGED_FLAGS = [
    (
        scales,
        {"scale": 2.0, "shift": 1},
        lambda m: (setattr(m, "scale", 3.0), setattr(m, "shift", 4)),
    ),
    (exports, {"export": False}, lambda m: setattr(m, "export", True)),
    (
        exports_by_settings,
        {"cfg": types.SimpleNamespace(export=False)},
        lambda m: setattr(m.cfg, "export", True),
    ),
    (activates_by_name, {"act": "none"}, lambda m: setattr(m, "act", "sigmoid")),
    (drops, {}, lambda m: setattr(m, "training", True)),
]


@pytest.mark.parametrize(("forward", "attributes", "change"), MERGED_FLAGS)
def test_a_merged_forward_keeps_its_flags(forward, attributes, change):
    model = network(forward, **copy.deepcopy(attributes))
    found, report = fused(model)

    change(model)
    change(found)

    assert report.merged == [("conv", "point")]
    torch.manual_seed(0)
    expected = model(X)
    torch.manual_seed(0)
    assert relative_error(expected, found(X)) < 1e-12


def repeats(self, x):
    y = self.conv(x) + self.point(x)
    for _ in range(self.times):
        y = y * 2
    return y


def activates(self, x):
    return self.act(self.conv(x) + self.point(x))


@pytest.mark.parametrize(
    ("forward", "name", "values"),
    [(repeats, "times", (1, 3)), (activates, "act", (torch.relu, torch.sigmoid))],
)
def test_a_changed_constant_of_a_merged_forward_is_an_error(forward, name, values):
    found, report = fused(network(forward, **{name: values[0]}))
    assert report.merged

    setattr(found, name, values[1])

    with pytest.raises(ValueError, match=f"{name} was changed after its branches were merged"):
        found(X)


def adds_by_flag(self, x):
    y = self.conv(x)
    return y + self.point(x) if self.both else y


SWITCH = False


def reads_global(self, x):
    y = self.conv(x) + self.point(x)
    return y if SWITCH else y.relu()


def queries_torch(self, x):
    y = self.conv(x) + self.point(x)
    return y.flatten(2) if torch.compiler.is_exporting() else y


@pytest.mark.parametrize(
    ("forward", "attributes", "reason"),
    [
        (adds_by_flag, {"both": True}, "depends on both"),
        (reads_global, {}, "reads SWITCH of its Python module"),
        (queries_torch, {}, "calls is_exporting()"),
    ],
)
def test_a_sum_that_depends_on_state_is_kept_with_the_reason(forward, attributes, reason):
    _, report = fused(network(forward, **attributes))

    assert report.merged == []
    assert reason in report.unmerged[""]


# Contexts


class Sum(Base):
    def body(self, x):
        return self.bn(self.conv(x)) + self.other(self.point(x))


def with_no_grad(self, x):
    with torch.no_grad():
        return self.body(x)


def with_inference(self, x):
    with torch.inference_mode():
        return self.body(x)


def switches_by_hand(self, x):
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    y = self.body(x)
    torch.set_grad_enabled(before)
    return y


CALLS = []


def counted(function):
    @functools.wraps(function)
    def wrapper(self, x):
        CALLS.append(1)
        return function(self, x)

    return wrapper


CONTEXTS = {
    "no_grad": torch.no_grad()(Sum.body),
    "inference_mode": torch.inference_mode()(Sum.body),
    "with no_grad": with_no_grad,
    "with inference_mode": with_inference,
    "by hand": switches_by_hand,
    "enable_grad": torch.enable_grad()(Sum.body),
    "counted": counted(Sum.body),
    "compiled": torch.compile(backend="eager")(Sum.body),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CONTEXTS)
def test_the_context_of_a_forward_stays(case):
    model = settle(type("Model", (Sum,), {"forward": CONTEXTS[case]})()).double()
    found, report = fuse_conv_bn(model)
    CALLS.clear()

    expected, given = model(X), found(X)

    assert len(report.fused) == 2
    assert report.merged == []
    assert (given.requires_grad, given.is_inference()) == (
        expected.requires_grad,
        expected.is_inference(),
    )
    assert relative_error(expected, given) < 1e-12
    assert len(CALLS) in (0, 2)


# Checks and sizes


def checks(check):
    def forward(self, x):
        check(self, x)
        return self.bn(self.conv(x))

    return forward


def require_channels(self, x):
    if x.shape[1] != 3:
        raise ValueError(f"expected 3 channels, got {x.shape}")


def assert_tensor(self, x):
    assert isinstance(x, torch.Tensor)


def raise_if_odd(self, x):
    if x.size(2) % 2 or x.size(3) % 2:
        raise ValueError("even sizes only")


def take_length(self, x):
    n = len(x)
    return max(n, 1)


def take_integers(self, x):
    return int(x.shape[0]) * int(x.size(1))


def loop_over_batch(self, x):
    for _ in range(x.shape[0]):
        pass


def ask_for_nan(self, x):
    if torch.isnan(x).any():
        raise ValueError("NaN")


def ask_type(self, x):
    if type(x) is list:
        raise TypeError("no lists")


def ask_dtype(self, x):
    return x.float() if x.dtype == torch.half else x


@pytest.mark.parametrize(
    "check",
    [
        *(
            require_channels,
            assert_tensor,
            raise_if_odd,
            take_length,
            take_integers,
        ),
        *(loop_over_batch, ask_for_nan, ask_type, ask_dtype),
    ],
)
def test_ordinary_checks_do_not_stop_folding(check):
    _, report = fused(network(checks(check)))

    assert report.fused == [("conv", "bn")]


def test_a_check_still_raises_after_folding():
    found, _ = fused(network(checks(raise_if_odd)))

    with pytest.raises(ValueError, match="even sizes only"):
        found(images(1, 3, 7, 8))


def unbatched(self, x):
    if x.dim() == 3:
        x = x.unsqueeze(0)
    return self.bn(self.conv(x))


def of_list(self, x):
    if isinstance(x, list | tuple):
        x = x[0]
    return self.bn(self.conv(x))


@pytest.mark.parametrize(("forward", "given"), [(unbatched, X[0]), (of_list, [X]), (of_list, X)])
def test_both_kinds_of_input_run_after_folding(forward, given):
    model = network(forward)

    found, report = fuse_conv_bn(model)

    assert report.fused == [("conv", "bn")]
    assert relative_error(model(given), found(given)) < 1e-12


def skips_small(self, x):
    y = self.conv(x)
    return y if x.shape[-1] < 4 else self.bn(y)


def skips_lists(self, x):
    if isinstance(x, list):
        return self.conv(x[0])
    return self.bn(self.conv(x))


def skips_in_loop(self, x):
    y = self.conv(x)
    for i in range(x.shape[0]):
        if i == 1:
            return y
    return self.bn(y)


@pytest.mark.parametrize("forward", [skips_small, skips_lists, skips_in_loop])
def test_a_path_around_the_batchnorm_keeps_it(forward):
    _, report = fused(network(forward))

    assert report.fused == []
    assert "conv: its output is also used" in report.kept["bn"]


def cannot_be_followed(self, x):
    if isinstance(x, dict):
        return float(x["images"].sum()) * self.conv(x["images"])
    return self.bn(self.conv(x))


def test_an_argument_that_was_not_traced_is_an_error():
    found, report = fused(network(cannot_be_followed))

    assert report.fused == [("conv", "bn")]
    with pytest.raises(ValueError, match="was folded for a tensor as x, which is a dict"):
        found({"images": X})
    assert relative_error(found(X), copy.deepcopy(found)(X)) == 0


def takes_more(self, x, *args, **kwargs):
    y = self.conv(x)
    return y if kwargs.get("raw") else self.bn(y)


def test_further_arguments_that_were_not_traced_are_an_error():
    found, report = fused(network(takes_more))

    assert report.fused == [("conv", "bn")]
    assert found(X, raw=False).shape == (2, 8, 8, 8)
    with pytest.raises(ValueError, match="was folded for calls without further arguments"):
        found(X, raw=True)


def sets_a_default(forward):
    """A decorator as in transformers, which changes keyword arguments before the forward."""

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        kwargs.setdefault("raw", False)
        return forward(self, *args, **kwargs)

    return wrapper


@sets_a_default
def takes_named(self, x, *, raw, twice=False, **kwargs):
    y = self.bn(self.conv(x))
    return y if raw else self.other(self.point(x)) + y


def test_a_decorated_forward_with_keyword_arguments_is_folded():
    model = network(takes_named)
    found, report = fused(model)

    assert report.fused == [("conv", "bn"), ("point", "other")]
    for raw in (False, True):
        assert relative_error(model(X, raw=raw), found(X, raw=raw)) < 1e-12
    with pytest.raises(ValueError, match="was folded for calls without further arguments"):
        found(X, more=1)


SIZES = {
    "avg_pool2d": lambda y: F.avg_pool2d(y, y.size(2)),
    "avg_pool2d, shape": lambda y: F.avg_pool2d(y, y.shape[2:]),
    "avg_pool2d, pair": lambda y: F.avg_pool2d(y, (y.size(2), y.size(3))),
    "adaptive": lambda y: F.adaptive_avg_pool2d(y, y.shape[-2:]),
    "view": lambda y: y.view(y.size(0), -1),
    "star": lambda y: y.reshape(*y.shape[:2], -1),
    "torch.reshape": lambda y: torch.reshape(y, (y.size(0), -1)),
    "interpolate": lambda y: F.interpolate(y, size=(2 * y.size(2), 2 * y.size(3))),
    "pad": lambda y: F.pad(y, [0, y.size(3) % 2]),
    "zeros": lambda y: torch.zeros(y.size(0), 1, 1, 1) + y,
    "zeros, shape": lambda y: torch.zeros(y.shape) + y,
    "full": lambda y: torch.full((y.size(0), 1, 1, 1), 2.0) + y,
    "arange": lambda y: torch.arange(y.size(1)).view(1, -1, 1, 1) + y,
    "expand": lambda y: torch.zeros(1, 1, 1, 1).expand(y.size(0), -1, -1, -1) + y,
    "repeat": lambda y: torch.eye(2).view(1, 4).repeat(y.size(0), 1).sum() + y,
    "tensor": lambda y: y + torch.tensor(y.size(0)),
    "sqrt": lambda y: y / math.sqrt(y.size(1)),
    "int": lambda y: y[:, : int(y.size(1) * 0.5)],
    "max": lambda y: y / max(y.size(2), y.size(3)),
    "groups": lambda y: F.conv2d(y, torch.ones(8, 1, 3, 3).double(), groups=y.size(1)),
    "setitem": lambda y: (y.clone().__setitem__((slice(None), 0), 0.0), y)[1],
    "shapes": lambda y: y if y.shape == y.shape else -y,
    "is_cuda": lambda y: y.cuda() if y.is_cuda else y,
    "one_hot": lambda y: y * F.one_hot(torch.arange(8), 8).double()[0].view(1, 8, 1, 1),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_as_arguments_do_not_stop_folding(case):
    def forward(self, x):
        return SIZES[case](torch.relu(self.bn(self.conv(x))))

    _, report = fused(network(forward))

    assert report.fused == [("conv", "bn")]


# Nodes in between


BETWEEN = {
    "dropout": lambda y: F.dropout(y, 0.5, False),
    "contiguous": lambda y: y.contiguous(),
    "clone": lambda y: y.clone(),
    "double": lambda y: y.double(),
    "plus 0": lambda y: y + 0,
    "times 0.5": lambda y: y * 0.5,
    "minus": lambda y: 1 - y,
    "divided": lambda y: (y / 4 + 3) * 2,
    "twice": lambda y: y + y,
    "negative": lambda y: -y,
    "mul_": lambda y: y.mul_(0.5),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_nodes_that_scale_do_not_prevent_a_fold(case):
    def forward(self, x):
        return self.bn(BETWEEN[case](self.conv(x)))

    _, report = fused(network(forward))

    assert report.fused == [("conv", "bn")]


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y * 0,
        lambda y: y.half(),
        lambda y: F.dropout(y, 0.5, True) * 0 + y.relu(),
        lambda y: y * y.mean(),
        lambda y: y.flip(1),
        lambda y: y.transpose(0, 1).transpose(0, 1) * 1j.real + y.abs(),
    ],
)
def test_nodes_that_do_more_prevent_a_fold(function):
    def forward(self, x):
        return self.bn(function(self.conv(x)).to(x.dtype))

    model = network(forward)
    found, report = fuse_conv_bn(model)

    assert "bn" in report.kept
    torch.manual_seed(0)
    expected = model(X)
    torch.manual_seed(0)
    assert torch.equal(expected, found(X))


class Flat(nn.Module):
    def __init__(self, view):
        super().__init__()
        self.conv, self.bn, self.view = nn.Conv2d(3, 4, 8), nn.BatchNorm1d(4), view

    def forward(self, x):
        return self.bn(VIEWS[self.view](self.conv(x)))


VIEWS = {
    "flatten(1)": (lambda y: y.flatten(1)),
    "flatten(2)": (lambda y: y.flatten(2)),
    "torch.flatten": (lambda y: torch.flatten(y, 1)),
    "view": (lambda y: y.view(y.size(0), -1)),
    "reshape": (lambda y: y.reshape(y.shape[0], 4, -1)),
    "rows": (lambda y: y.view(-1, 4)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_keep_the_channels_or_the_batchnorm(view):
    model = settle(Flat(view)).double()

    found, report = fuse_conv_bn(model)

    assert bool(report.fused) == (view != "rows")
    assert relative_error(model(X), found(X)) < 1e-12


# What a forward changes


def sets_eps(self, x):
    y = self.conv(x)
    self.bn.eps = 0.5
    return self.bn(y)


def sets_momentum_of_all(self, x):
    for part in self.children():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 0.1
    return self.bn(self.conv(x))


def zeroes_statistics(self, x):
    self.bn.running_mean.zero_()
    return self.bn(self.conv(x))


@pytest.mark.parametrize("forward", [sets_eps, sets_momentum_of_all, zeroes_statistics])
def test_a_batchnorm_that_a_forward_changes_stays(forward):
    model = network(forward)

    found, report = fuse_conv_bn(model)

    assert "bn" in report.kept
    assert torch.equal(model(X), found(X))


# Wrappers and graphs


def small() -> nn.Module:
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    return settle(nn.Sequential(*layers, nn.BatchNorm2d(8)))


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "GraphModule": torch.fx.symbolic_trace,
    "inside": lambda m: nn.Sequential(nn.DataParallel(m), nn.Identity()),
    "graph inside": lambda m: nn.Sequential(torch.fx.symbolic_trace(m), nn.Identity()),
    "both": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_network_is_folded_inside_its_wrapper(wrapper):
    model = WRAPPERS[wrapper](small()).double().eval()

    found, report = fuse_conv_bn(model)

    assert len(report.fused) == 2
    assert relative_error(model(X), found(X)) < 1e-12


@pytest.mark.slow
def test_a_network_is_folded_inside_ddp(tmp_path):
    code = """
        import os, torch, repvgg
        from torch import nn
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        net(torch.randn(8, 3, 8, 8))
        model = nn.parallel.DistributedDataParallel(net).eval()
        found, report = repvgg.fuse_conv_bn(model)
        x = torch.randn(2, 3, 8, 8)
        assert torch.allclose(model(x), found(x), atol=1e-5) and len(report.fused) == 1
    """
    done = Process("-c", textwrap.dedent(code), cwd=tmp_path).completed()
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_feature_extractor_is_folded_in_eval_mode():
    from torchvision.models.feature_extraction import create_feature_extractor

    model = settle(repvgg.create_model("repvgg_tiny", num_classes=5)).double()
    extractor = create_feature_extractor(model, {"stages.0": "c2", "stages.3": "c5"})

    found, report = fuse_conv_bn(extractor)

    assert not any(module.training for module in found.modules())
    assert len(report.merged) == 7
    x = images(1, 3, 32, 32)
    for expected, given in zip(extractor(x).values(), found(x).values(), strict=True):
        assert relative_error(expected, given) < 1e-12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, x: torch.export.export(m, (x,)).module(), "a program of torch.export"),
        (lambda m, x: torch.jit.script(m), "a program of TorchScript"),
        (lambda m, x: torch.jit.trace(m, x), "a program of TorchScript"),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning"
)
def test_the_error_for_a_program_does_not_mention_eval(make, message):
    program = make(small(), X.float())

    with pytest.raises(ValueError, match=f"{message}.*call fuse_conv_bn on the network first"):
        fuse_conv_bn(program)


# One call


class QuantizationFriendly(nn.Module):
    """A block like that of QARepVGG: a BatchNorm after a sum."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.point, self.post = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.post(self.bn(self.conv(x)) + self.point(x) + x).relu()


class Depthwise(nn.Module):
    """A block like that of RepViT."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8))
        self.point, self.bn = nn.Conv2d(8, 8, 1, groups=8), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn((self.conv(x) + self.point(x)) + x)


@pytest.mark.parametrize("block", [QuantizationFriendly, Depthwise])
def test_one_call_folds_all_and_a_second_nothing(block):
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 1), block(), block())).double()

    found, report = fused(model)
    _, again = fuse_conv_bn(found)

    assert sum(map(is_normalization, found.modules())) == 0
    assert len(report.merged) == 2
    assert (again.fused, again.merged) == ([], [])


def test_kernels_are_rounded_once():
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 1), QuantizationFriendly()))
    exact, _ = fuse_conv_bn(copy.deepcopy(model).double())

    found, _ = fuse_conv_bn(model)

    for wide, narrow in zip(exact.parameters(), found.parameters(), strict=True):
        assert torch.equal(wide.float(), narrow)


class SEOfAuthors(nn.Module):
    """Squeeze-and-excite as in the code of the RepVGG authors."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.input_channels = channels

    def forward(self, inputs):
        x = F.avg_pool2d(inputs, kernel_size=inputs.size(3))
        x = torch.sigmoid(self.up(F.relu(self.down(x))))
        return inputs * x.view(-1, self.input_channels, 1, 1)


class BlockOfAuthors(nn.Module):
    def __init__(self, se_after):
        super().__init__()
        self.deploy = False
        self.rbr_identity = nn.BatchNorm2d(8)
        self.rbr_dense = nn.Sequential()
        self.rbr_dense.add_module("conv", nn.Conv2d(8, 8, 3, padding=1, bias=False))
        self.rbr_dense.add_module("bn", nn.BatchNorm2d(8))
        self.rbr_1x1 = nn.Sequential()
        self.rbr_1x1.add_module("conv", nn.Conv2d(8, 8, 1, bias=False))
        self.rbr_1x1.add_module("bn", nn.BatchNorm2d(8))
        self.nonlinearity = nn.ReLU()
        self.se = nn.Identity() if se_after else SEOfAuthors(8, 2)
        self.post_se = SEOfAuthors(8, 2) if se_after else nn.Identity()

    def forward(self, inputs):
        if hasattr(self, "rbr_reparam"):
            return self.post_se(self.nonlinearity(self.se(self.rbr_reparam(inputs))))
        id_out = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        out = self.rbr_dense(inputs) + self.rbr_1x1(inputs) + id_out
        return self.post_se(self.nonlinearity(self.se(out)))


@pytest.mark.parametrize("se_after", [False, True])
def test_se_blocks_of_the_authors_are_merged(se_after):
    block = BlockOfAuthors(se_after)
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 1), block)).double()

    found, report = fused(model)

    assert report.merged == [("1.rbr_dense.conv", "1.rbr_1x1.conv", "1.rbr_identity")]
    assert type(found[1].se) is type(block.se)


# The result


def test_the_memory_format_stays():
    model = small().to(memory_format=torch.channels_last)

    found, _ = fuse_conv_bn(model)

    assert found[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert found(X.float()).is_contiguous(memory_format=torch.channels_last)


def test_the_memory_format_of_volumes_stays():
    model = settle(nn.Sequential(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8)))

    found, _ = fuse_conv_bn(model.to(memory_format=torch.channels_last_3d))

    assert found[0].weight.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("bias", [True, False])
def test_a_new_bias_trains_if_that_of_the_batchnorm_did(bias):
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8)))
    model[0].weight.requires_grad_(False)

    found, _ = fuse_conv_bn(model)

    assert not found[0].weight.requires_grad
    assert found[0].bias.requires_grad


def test_a_network_folded_in_inference_mode_trains():
    with torch.inference_mode():
        found, _ = fuse_conv_bn(small())

    found(X.float()).sum().backward()

    assert found[0].weight.grad is not None


FORMS = {
    "pair": lambda: (small(), X.float()),
    "audio": lambda: (
        settle(nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8))),
        torch.randn(2, 3, 9),
    ),
    "features": lambda: (
        settle(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))),
        torch.randn(5, 3),
    ),
    "merged": lambda: (
        settle(nn.Sequential(nn.Conv2d(3, 8, 1), QuantizationFriendly())),
        X.float(),
    ),
    "flag": lambda: (settle(Exports(export=False)), X.float()),
}


class Exports(Base):
    forward = exports


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["script", "trace", "fx", "export", "pickle"])
@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning"
)
def test_a_folded_network_supports_every_export_of_the_original(form, way):
    model, x = FORMS[form]()
    found, report = fuse_conv_bn(model)
    assert report.fused or report.merged

    if way == "script":
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(found), file)
        file.seek(0)
        other = torch.jit.load(file)
    elif way == "trace":
        other = torch.jit.trace(found, x)
    elif way == "fx":
        other = torch.fx.symbolic_trace(found)
    elif way == "export":
        other = torch.export.export(found, (x,)).module()
    else:
        other = pickle.loads(pickle.dumps(found))

    assert torch.allclose(other(x), found(x), atol=1e-6)


def test_string_annotations_do_not_matter():
    def forward(self, x: "torch.Tensor") -> "torch.Tensor":
        return self.conv(x) + self.point(x)

    _, report = fused(network(forward))

    assert report.merged == [("conv", "point")]


def test_nothing_stays_patched_after_an_error():
    before = {name: getattr(torch, name) for name in ("zeros", "full", "is_grad_enabled")}
    setter, names = nn.Module.__setattr__, set(globals())

    def forward(self, x):
        raise KeyError("no")

    with contextlib.suppress(ValueError):
        fuse_conv_bn(network(forward))

    assert all(getattr(torch, name) is function for name, function in before.items())
    assert nn.Module.__setattr__ is setter
    assert set(globals()) == names
    assert "view" not in vars(torch.Tensor)


# The check on images


def test_images_check_the_folded_network():
    model = small()

    found, report = fuse_conv_bn(model, X.float())

    assert len(report.fused) == 2
    assert not found.training


def test_images_of_a_wrong_shape_are_an_error():
    with pytest.raises(ValueError, match=r"could not be run on images of shape \(1, 4, 8, 8\)"):
        fuse_conv_bn(small(), torch.rand(1, 4, 8, 8))


def test_a_wrong_fold_is_named_on_images(monkeypatch):
    from repvgg.fusion import foldable

    absorb = foldable.fold_following

    def wrong(value, found):
        kernel, bias = absorb(value, found)
        return type(value)(kernel * 1.001, bias)

    monkeypatch.setattr(foldable, "fold_following", wrong)

    with pytest.raises(
        ValueError, match="the output of the folded network differs on these images"
    ):
        fuse_conv_bn(small(), X.float())
