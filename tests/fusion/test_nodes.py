"""What single nodes of a graph do: the type of their value, and whether a fold may pass them."""

import math
import operator

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from repvgg.fusion.geometry import read_geometry, read_subsampling
from repvgg.fusion.kinds import either, is_finite_number, kind_of
from repvgg.fusion.pass_through import PassThrough, read_pass_through, source_of
from repvgg.reparam import Geometry, embedding


def last_node(function) -> fx.Node:
    """The node that a function of one value returns."""
    graph = fx.symbolic_trace(function).graph
    (output,) = (node for node in graph.nodes if node.op == "output")
    return output.args[0]


def of_tensor(_: fx.Node) -> type | None:
    return Tensor


DO_NOTHING_OR_SCALE = {
    "contiguous": (lambda x: x.contiguous(), PassThrough()),
    "detach": (lambda x: x.detach(), PassThrough()),
    "float": (lambda x: x.float(), PassThrough(dtype=torch.float32)),
    "double": (lambda x: x.double(), PassThrough(dtype=torch.float64)),
    "half": (lambda x: x.half(), PassThrough(dtype=torch.float16)),
    "bfloat16": (lambda x: x.bfloat16(), PassThrough(dtype=torch.bfloat16)),
    "to": (lambda x: x.to(torch.float64), PassThrough(dtype=torch.float64)),
    "dropout": (lambda x: F.dropout(x, 0.5, training=False), PassThrough()),
    "dropout2d": (lambda x: F.dropout2d(x, 0.5, False), PassThrough()),
    "flatten": (lambda x: x.flatten(1), PassThrough(ndim=2)),
    "flatten 2": (lambda x: torch.flatten(x, start_dim=2), PassThrough(ndim=3)),
    "flatten to the end": (lambda x: torch.flatten(x, 1, -1), PassThrough(ndim=2)),
    "view": (lambda x: x.view(x.size(0), -1), PassThrough(ndim=2)),
    "view of channels": (lambda x: x.view(x.size(0), 4), PassThrough(ndim=2)),
    "view of a list": (lambda x: x.view([x.shape[0], 4, 3]), PassThrough(ndim=3)),
    "reshape": (lambda x: x.reshape(x.shape[0], x.shape[1], 2, 2), PassThrough(ndim=4)),
    "reshape by size": (lambda x: x.reshape(x.size()[0], x.size(1), -1), PassThrough(ndim=3)),
    "mul": (lambda x: x.mul(3), PassThrough(scale=3)),
    "mul_": (lambda x: x.mul_(3), PassThrough(scale=3)),
    "div": (lambda x: x.div(4), PassThrough(scale=0.25)),
    "add": (lambda x: x.add(3), PassThrough(shift=3)),
    "sub_": (lambda x: x.sub_(3), PassThrough(shift=-3)),
    "-x": (lambda x: -x, PassThrough(scale=-1)),
    "x + x": (lambda x: x + x, PassThrough(scale=2)),
    "x + 3": (lambda x: x + 3, PassThrough(shift=3)),
    "3 + x": (lambda x: 3 + x, PassThrough(shift=3)),
    "x - 3": (lambda x: x - 3, PassThrough(shift=-3)),
    "3 - x": (lambda x: 3 - x, PassThrough(scale=-1, shift=3)),
    "x * 3": (lambda x: x * 3, PassThrough(scale=3)),
    "3 * x": (lambda x: torch.mul(3, x), PassThrough(scale=3)),
    "x / 4": (lambda x: x / 4, PassThrough(scale=0.25)),
    "torch.sub": (lambda x: torch.sub(x, 0.5), PassThrough(shift=-0.5)),
    "x -= 3": (lambda x: operator.isub(x, 3), PassThrough(shift=-3)),
}


@pytest.mark.parametrize("case", DO_NOTHING_OR_SCALE)
def test_a_node_that_scales_or_does_nothing_is_read(case):
    function, expected = DO_NOTHING_OR_SCALE[case]
    node = last_node(function)

    assert read_pass_through(node, 4, lambda _: None) == expected
    assert source_of(node).target == "x"


DO_MORE = {
    "contiguous with a format": lambda x: x.contiguous(memory_format=torch.channels_last),
    "clone with a format": lambda x: x.clone(memory_format=torch.channels_last),
    "float with a format": lambda x: x.float(memory_format=torch.channels_last),
    "to a device": lambda x: x.to("cpu"),
    "to, by keyword": lambda x: x.to(torch.float64, copy=True),
    "to another tensor": lambda x: x.to(torch.float64, True),
    "active dropout": lambda x: F.dropout(x, 0.5, training=True),
    "dropout by default": lambda x: F.dropout(x),
    "flatten of all": lambda x: x.flatten(),
    "flatten of the middle": lambda x: x.flatten(1, 2),
    "flatten of the end": lambda x: x.flatten(3),
    "view of rows": lambda x: x.view(-1, 4),
    "view of one axis": lambda x: x.view(x.size(0)),
    "view of another axis": lambda x: x.view(x.size(1), -1),
    "view by other channels": lambda x: x.view(x.size(0), 5, -1),
    "view as a dtype": lambda x: x.view(torch.int32),
    "view of a sum": lambda x: x.view(x.size(0) + 0, -1),
    "view of another tensor's size": lambda x: x.relu().view(x.size(0), -1),
    "view of another tensor's shape": lambda x: x.relu().view(x.shape[0], -1),
    "view of strides": lambda x: x.view(x.stride(0), -1),
    "mul by 0": lambda x: x.mul(0),
    "mul by True": lambda x: x.mul(True),
    "mul by infinity": lambda x: x.mul(math.inf),
    "add with alpha": lambda x: x.add(3, alpha=2),
    "torch.add with alpha": lambda x: torch.add(x, 3, alpha=2),
    "divided": lambda x: 3 / x,
    "x * x": lambda x: x * x,
    "x - x": lambda x: x - x,
    "x + y": lambda x: x + x.relu(),
    "x + infinity": lambda x: x + math.inf,
    "power": lambda x: x**2,
    "relu": lambda x: x.relu(),
    "torch.relu": lambda x: torch.relu(x),
}


@pytest.mark.parametrize("case", DO_MORE)
def test_a_node_that_does_more_is_not_passed(case):
    assert read_pass_through(last_node(DO_MORE[case]), 4, lambda _: None) is None


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Flatten(), PassThrough(ndim=2)),
        (nn.Flatten(2), PassThrough(ndim=3)),
        (nn.Flatten(0), None),
        (nn.Flatten(1, 2), None),
        (nn.ReLU(), None),
    ],
)
def test_a_module_that_flattens_is_read(module, expected):
    node = last_node(nn.Sequential(module))

    assert read_pass_through(node, 4, lambda _: module) == expected


KINDS = {
    Tensor: {
        "relu": lambda x: x.relu(),
        "torch.relu": lambda x: torch.relu(x),
        "F.pad": lambda x: F.pad(x, (1, 1)),
        "max": lambda x: x.max(),
        "torch.max": lambda x: torch.max(x),
        "max_pool": lambda x: F.max_pool2d(x, 2),
        "item": lambda x: x[0],
        "items": lambda x: x[1:],
        "chunk": lambda x: x.chunk(2)[0],
        "torch.split": lambda x: torch.split(x, 2)[1],
        "any": lambda x: x.any(),
        "all": lambda x: x.all(),
        "compared": lambda x: x > 1,
        "with a number": lambda x: 1 + x,
        "T": lambda x: x.T,
        "times a size": lambda x: x * x.shape[0],
    },
    torch.Size: {
        "shape": lambda x: x.shape,
        "size": lambda x: x.size(),
        "part": lambda x: x.shape[2:],
        "sum": lambda x: x.shape[:2] + x.shape[2:],
    },
    int: {
        "ndim": lambda x: x.ndim,
        "dim": lambda x: x.dim(),
        "numel": lambda x: x.numel(),
        "element_size": lambda x: x.element_size(),
        "size": lambda x: x.size(1),
        "shape": lambda x: x.shape[0],
        "sum": lambda x: x.shape[0] + 1,
        "floor": lambda x: x.shape[0] // 2,
        "negative": lambda x: -x.shape[0],
    },
    float: {
        "quotient": lambda x: x.shape[0] / 2,
        "product": lambda x: x.shape[0] * 0.5,
        "product in place": lambda x: operator.itruediv(x.shape[0], 2),
    },
    bool: {
        "equal": lambda x: x.shape[0] == 3,
        "less": lambda x: x.shape[0] < x.shape[1],
        "is_cuda": lambda x: x.is_cuda,
        "is_contiguous": lambda x: x.is_contiguous(),
        "is_floating_point": lambda x: x.is_floating_point(),
        "torch.is_floating_point": lambda x: torch.is_floating_point(x),
    },
    torch.dtype: {"dtype": lambda x: x.dtype},
    torch.device: {"device": lambda x: x.device},
    type(None): {
        "max along an axis": lambda x: x.max(1),
        "torch.max along an axis": lambda x: torch.max(x, 1),
        "max by keyword": lambda x: torch.max(x, dim=1),
        "max_pool with indices": lambda x: F.max_pool2d(x, 2, return_indices=True),
        "chunk": lambda x: x.chunk(2),
        "sort": lambda x: x.sort(),
        "part of a sort": lambda x: x.sort()[0],
        "parts of a chunk": lambda x: x.chunk(2)[0:1],
        "tolist": lambda x: x.tolist(),
        "method of a size": lambda x: x.size().count(1),
        "size times": lambda x: x.shape * 2,
        "of an attribute": lambda x: x.grad,
    },
}


@pytest.mark.parametrize(
    ("kind", "case"), [(kind, case) for kind, cases in KINDS.items() for case in cases]
)
def test_the_type_of_a_value_follows_from_its_node(kind, case):
    expected = None if kind is type(None) else kind

    assert kind_of(last_node(KINDS[kind][case]), of_tensor) is expected


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (lambda x: x.relu(), None),
        (lambda x: x.shape, torch.Size),
        (lambda x: x.ndim, int),
        (lambda x: x.dtype, None),
        (lambda x: x.dim(), int),
        (lambda x: x.numel(), int),
        (lambda x: x.element_size(), None),
        (lambda x: x.size(), torch.Size),
        (lambda x: x + 1, None),
        (lambda x: x == 1, None),
        (lambda x: x[0], None),
        (lambda x: torch.relu(x), Tensor),
        (lambda x: operator.add(x, x.sum()), None),
    ],
)
def test_of_an_unknown_value_only_some_results_are_known(case, expected):
    assert kind_of(last_node(case), lambda _: None) is expected


def call(target, *args: object, **kwargs: object) -> fx.Node:
    """A node that calls a function; the name `x` stands for a value."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    return graph.call_function(target, tuple(x if a == "x" else a for a in args), kwargs)


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (call(either, 1, 2), int),
        (call(either, 1, 2.0), None),
        (call(either, "x", "x"), Tensor),
        (call(either, "x", 2), None),
        (call(max, 1, 2), int),
        (call(min, 1, 2.0), None),
        (call(math.ceil, 1.5), int),
        (call(math.gcd, 4, 6), int),
        (call(math.sqrt, 4), float),
        (call(len, "x"), int),
        (call(int, "x"), int),
        (call(torch.is_tensor, "x"), bool),
        (call(torch.sort, "x"), None),
        (call(test_a_module_that_flattens_is_read, "x"), None),
        (call(operator.lt, 1, 2), bool),
        (call(operator.and_, True, False), int),
        (call(operator.add, (1,), (2,)), torch.Size),
        (call(operator.mul, (1,), 2), None),
        (call(operator.add, "x", None), Tensor),
        (call(operator.add, 1, None), None),
    ],
)
def test_the_type_of_a_call_follows_from_its_arguments(node, expected):
    assert kind_of(node, of_tensor) is expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, True), (0.5, True), (True, False), (math.nan, False), (-math.inf, False), ("1", False)],
)
def test_a_finite_number_is_no_bool(value, expected):
    assert is_finite_number(value) is expected


SUBSAMPLINGS = {
    "both": (lambda x: x[..., ::2, ::2], 2),
    "one": (lambda x: x[..., ::1, ::1], 1),
    "different": (lambda x: x[..., ::2, ::3], None),
    "from 1": (lambda x: x[..., 1::2, ::2], None),
    "to 8": (lambda x: x[..., ::2, :8:2], None),
    "one axis": (lambda x: x[..., ::2], None),
    "no ellipsis": (lambda x: x[:, ::2, ::2], None),
    "a number": (lambda x: x[..., 0, ::2], None),
    "no step": (lambda x: x[..., :, :], None),
    "an item": (lambda x: x[0], None),
    "a relu": (lambda x: x.relu(), None),
}


@pytest.mark.parametrize("case", SUBSAMPLINGS)
def test_a_subsampling_takes_every_nth_pixel_of_all_axes(case):
    function, step = SUBSAMPLINGS[case]

    found = read_subsampling(last_node(function), 2)

    assert (found and found[1]) == step


def geometry(kernel, stride=1, dilation=1, before=0, after=None, mode="zeros") -> Geometry:
    after = before if after is None else after
    return Geometry((kernel,), (stride,), (dilation,), (before,), (after,), mode)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv1d(2, 2, 3, 2, 1, 2), geometry(3, 2, 2, 1)),
        (nn.Conv1d(2, 2, 4, padding="same"), geometry(4, before=1, after=2)),
        (nn.Conv1d(2, 2, 3, dilation=2, padding="same"), geometry(3, 1, 2, 2, 2)),
        (nn.Conv1d(2, 2, 3, padding="valid"), geometry(3)),
        (
            nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"),
            geometry(3, 1, 1, 1, 1, "circular"),
        ),
        (nn.AvgPool1d(3, 2, 1), geometry(3, 2, 1, 1)),
        (nn.AvgPool1d(3, 2, 1, ceil_mode=True), None),
        (nn.AvgPool1d(3, 2, 1, count_include_pad=False), None),
        (nn.AvgPool2d(2, divisor_override=3), None),
        (nn.ConvTranspose1d(2, 2, 3), None),
        (nn.ReLU(), None),
    ],
)
def test_the_geometry_of_a_branch_is_read(module, expected):
    assert read_geometry(module) == expected


@pytest.mark.parametrize("size", [3, (3, 2)])
def test_the_geometry_of_a_pool_has_both_axes(size):
    found = read_geometry(nn.AvgPool2d(size, stride=2, padding=1))

    kernel = (3, 3) if size == 3 else size
    assert found == Geometry(kernel, (2, 2), (1, 1), (1, 1), (1, 1), "zeros")


@pytest.mark.parametrize(
    ("own", "target", "expected"),
    [
        (geometry(1), geometry(3, before=1), [(1, 1)]),
        (geometry(1), geometry(4, before=1, after=2), [(1, 1)]),
        (geometry(3, before=1), geometry(3, before=1), [(0, 1)]),
        (geometry(1), geometry(3, dilation=2, before=2), [(1, 1)]),
        (geometry(1, dilation=3), geometry(3, before=1), [(1, 1)]),
        (geometry(1), geometry(3, before=1, mode="circular"), [(1, 1)]),
        (geometry(3, dilation=2, before=2), geometry(5, before=2), [(0, 2)]),
        (geometry(1), geometry(3, dilation=2, before=1), None),
        (geometry(1), geometry(3), None),
        (geometry(1), geometry(3, before=2, after=0), [(2, 1)]),
        (geometry(1), geometry(3, before=1, after=2), None),
        (geometry(5, before=2), geometry(3, before=1), None),
        (geometry(1, before=1), geometry(3, before=0, after=4), None),
        (geometry(1, stride=2), geometry(3, before=1), None),
        (geometry(1, before=1, mode="reflect"), geometry(3, before=2, mode="zeros"), None),
        (geometry(1), Geometry((3, 3), (1, 1), (1, 1), (1, 1), (1, 1), "zeros"), None),
    ],
)
def test_a_kernel_is_embedded_where_its_position_and_border_stay(own, target, expected):
    assert embedding(own, target) == expected
