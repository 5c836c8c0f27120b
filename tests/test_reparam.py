import contextlib
import random
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from repvgg.reparam import (
    Affine,
    Convolution,
    Geometry,
    bare_affine,
    bn_affine,
    border,
    compose,
    embed,
    fold_bn,
    identity_kernel,
    merge,
    pad_kernel,
    scale_input,
)
from tests.support.networks import relative_error, settle

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BN = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def images(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_folding_a_batchnorm_does_not_change_the_function(dims, groups, bias, affine):
    conv = CONV[dims](8, 16, 3, padding=1, groups=groups, bias=bias).double()
    bn = settle(BN[dims](16, affine=affine, eps=1e-3).double())
    x = images(2, 8, *[7] * dims)

    folded = CONV[dims](8, 16, 3, padding=1, groups=groups).double()
    folded.weight.data, folded.bias.data = fold_bn(conv.weight, conv.bias, bn)

    assert relative_error(bn(conv(x)), folded(x)) < 1e-12


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 8, 3, stride=2, padding=2, dilation=2),
        nn.Conv2d(6, 8, (1, 5), padding="same", padding_mode="reflect"),
        nn.Conv2d(6, 8, 4, padding=1, padding_mode="circular"),
    ],
    ids=["stride and dilation", "non-square, reflect", "even, circular"],
)
def test_folding_keeps_every_geometry_of_the_convolution(conv):
    conv, bn = conv.double(), settle(nn.BatchNorm2d(8).double())
    x = images(2, 6, 9, 8)
    expected = bn(conv(x))

    conv.weight.data, conv.bias.data = fold_bn(conv.weight, conv.bias, bn)

    assert relative_error(expected, conv(x)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_folding_answers_in_the_dtype_of_the_kernel(dtype):
    bn = settle(nn.BatchNorm2d(4))

    folded = fold_bn(torch.ones(4, 2, 3, 3, dtype=dtype), None, bn)

    assert (folded.kernel.dtype, folded.bias.dtype) == (dtype, dtype)


def test_folding_answers_on_the_device_of_the_kernel():
    bn = nn.BatchNorm2d(4, device="meta")

    folded = fold_bn(torch.ones(4, 2, 3, 3, device="meta"), None, bn)

    assert (folded.kernel.device.type, folded.bias.device.type) == ("meta", "meta")


def test_folding_in_float32_rounds_once():
    conv, bn = nn.Conv2d(8, 8, 3, bias=False), settle(nn.BatchNorm2d(8))

    kernel, bias = fold_bn(conv.weight, None, bn)
    exact_kernel, exact_bias = fold_bn(conv.weight.double(), None, bn)

    assert torch.equal(kernel, exact_kernel.float())
    assert torch.equal(bias, exact_bias.float())


def test_gradients_flow_through_a_fold_as_through_the_two_layers():
    conv, bn = nn.Conv2d(4, 4, 3, bias=False).double(), settle(nn.BatchNorm2d(4).double())
    x = images(2, 4, 6, 6)
    parameters = [conv.weight, bn.weight, bn.bias]

    separate = torch.autograd.grad(bn(conv(x)).square().sum(), parameters)
    folded = torch.autograd.grad(
        F.conv2d(x, *fold_bn(conv.weight, None, bn)).square().sum(), parameters
    )

    assert max(relative_error(a, b) for a, b in zip(separate, folded, strict=True)) < 1e-12


def test_a_batchnorm_without_running_statistics_is_an_error():
    bn = nn.BatchNorm2d(4, track_running_stats=False)

    with pytest.raises(ValueError, match="running statistics"):
        fold_bn(torch.ones(4, 2, 3, 3), None, bn)


def test_a_batchnorm_of_another_width_is_an_error():
    with pytest.raises(ValueError, match="5 channels"):
        fold_bn(torch.ones(4, 2, 3, 3), None, nn.BatchNorm2d(5))


def test_a_bare_convolution_without_bias_has_bias_zero():
    kernel = images(4, 2, 3, 3)

    assert torch.equal(bare_affine(kernel, None).bias, torch.zeros(4, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize(("size", "dilation"), [(3, 1), (4, 1), (5, 1), (3, 2), (5, 2)])
def test_a_padded_kernel_computes_the_same_function(dims, taps, size, dilation):
    kernel = images(4, 2, *[taps] * dims)
    x = images(2, 2, *[9] * dims)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]

    small = conv(x, kernel, padding="same", dilation=dilation)
    large = conv(x, pad_kernel(kernel, size), padding="same", dilation=dilation)

    assert relative_error(small, large) < 1e-12


@pytest.mark.parametrize("taps", [(2, 2), (5, 5), (1, 4)])
def test_a_kernel_without_center_or_too_large_is_an_error(taps):
    with pytest.raises(ValueError, match="must be odd"):
        pad_kernel(torch.ones(4, 2, *taps), 3)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_the_identity_kernel_returns_its_input(dims, groups):
    x = images(2, 8, *[5] * dims)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]

    assert torch.equal(conv(x, identity_kernel(8, groups, dims=dims), groups=groups), x)


def test_an_identity_whose_groups_do_not_divide_the_channels_is_an_error():
    with pytest.raises(ValueError, match="groups=3"):
        identity_kernel(8, 3)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_residual_sum_without_batchnorm_merges_into_one_convolution(padding_mode, stride, groups):
    dense = nn.Conv2d(4, 4, 3, stride, 1, groups=groups, padding_mode=padding_mode).double()
    point = nn.Conv2d(4, 4, 1, stride, groups=groups, bias=False).double()
    x = images(2, 4, 7, 8)
    expected = dense(x) + point(x) + x[..., ::stride, ::stride]

    eye = identity_kernel(4, groups)
    dense.weight.data, dense.bias.data = merge(
        bare_affine(dense.weight, dense.bias),
        bare_affine(pad_kernel(point.weight, 3), point.bias),
        bare_affine(pad_kernel(eye, 3)),
    )

    assert relative_error(expected, dense(x)) < 1e-12


def test_kernels_of_different_shapes_are_not_merged():
    one = Affine(torch.ones(4, 2, 1, 1), torch.ones(4))
    three = Affine(torch.ones(4, 2, 3, 3), torch.ones(4))

    with pytest.raises(ValueError, match="pad them"):
        merge(one, three)


@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_half_of_the_statistics_are_none(missing):
    bn = nn.BatchNorm2d(4)
    setattr(bn, missing, None)

    with pytest.raises(ValueError, match="without running statistics"):
        bn_affine(bn)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_sum_has_the_dtype_of_the_first_branch(dtype):
    parts = [Affine(torch.ones(2, 2, 3, 3, dtype=dtype), torch.ones(2, dtype=dtype))] * 2

    total = merge(*parts)

    assert (total.kernel.dtype, total.bias.dtype) == (dtype, dtype)
    assert torch.equal(total.kernel, 2 * parts[0].kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaled_inputs_keep_the_dtype_of_the_kernel(dtype):
    kernel = torch.ones(2, 3, 1, 1, dtype=dtype)
    scale, shift = torch.arange(1, 4).double(), torch.ones(3).double()

    scaled = scale_input(kernel, torch.zeros(2, dtype=dtype), scale, shift)

    assert (scaled.kernel.dtype, scaled.bias.dtype) == (dtype, dtype)
    assert scaled.kernel[0, :, 0, 0].tolist() == [1, 2, 3]
    assert scaled.bias.tolist() == [3, 3]


def test_a_kernel_is_made_where_the_weights_are():
    kernel = identity_kernel(4, 1, dtype=torch.float32, device=torch.device("meta"))

    assert kernel.is_meta


def test_an_identity_has_no_groups_unless_they_are_passed():
    assert identity_kernel(4).shape == (4, 4, 1, 1)


def convolution(conv: nn.Module) -> Convolution:
    """A layer of torch as a convolution of the algebra."""
    padding = conv.padding
    geometry = Geometry(
        conv.kernel_size, conv.stride, conv.dilation, padding, padding, conv.padding_mode
    )
    affine = bare_affine(conv.weight, conv.bias)
    return Convolution(affine, geometry, conv.groups, conv.bias is not None)


def run(whole: Convolution, x: torch.Tensor) -> torch.Tensor:
    """Run a convolution of the algebra as torch does."""
    affine, geometry, groups, _ = whole
    pads = zip(geometry.before[::-1], geometry.after[::-1], strict=True)
    mode = "constant" if geometry.mode == "zeros" else geometry.mode
    x = F.pad(x, [amount for pair in pads for amount in pair], mode=mode)
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.ndim]
    return function(x, *affine, geometry.stride, 0, geometry.dilation, groups)


def _pick(draw: random.Random, dims: int, *values: int) -> tuple[int, ...]:
    return tuple(draw.choice(values) for _ in range(dims))


def sequences() -> list[object]:
    """Pairs of random layers, of which many are one convolution."""
    draw, pairs = random.Random(0), []
    for number in range(150):
        dims = draw.choice([1, 2, 2, 2, 3])
        pick = partial(_pick, draw, dims)
        first, second = draw.choice([(1, 1), (2, 4), (4, 6), (12, 1), (3, 3), (1, 4), (12, 12)])
        layers = []
        for groups in (first, second):
            size = pick(1, 2, 3)
            layers.append(
                CONV[dims](
                    *(12, 12),
                    draw.choice([size, (1,) * dims, (3,) * dims]),
                    stride=pick(1, 1, 2, 3),
                    dilation=pick(1, 1, 2, 3),
                    padding=draw.choice([(0,) * dims, pick(0, 1, 2)]),
                    groups=groups,
                    bias=draw.random() < 0.5,
                ).double()
            )
        pairs.append(pytest.param(*layers, id=str(number)))
    return pairs


@pytest.mark.parametrize(("first", "second"), sequences())
def test_a_sequence_is_one_convolution_or_an_error(first, second):
    """Of sizes that strides divide and of those that they do not."""
    dims = first.weight.ndim - 2
    outputs = [(x, second(first(x))) for x in (images(2, 12, *[n] * dims) for n in (21, 22, 23))]
    if border(*(convolution(layer).geometry for layer in (first, second)), biased=_biased(first)):
        with pytest.raises(ValueError, match="no convolution at its border"):
            compose(convolution(first), convolution(second))
        return
    whole = compose(convolution(first), convolution(second))
    assert whole.geometry.kernel == whole.affine.kernel.shape[2:]
    for x, expected in outputs:
        assert relative_error(expected, run(whole, x)) < 1e-12


def _biased(layer: nn.Module) -> bool:
    return layer.bias is not None


def test_most_sequences_are_one_convolution():
    count = 0
    for case in sequences():
        with contextlib.suppress(ValueError):
            compose(*map(convolution, case.values))
            count += 1

    assert 60 < count < 140


BORDERS = {  # the second layer pads; the first is 1x1 unless said
    "zeros, no bias": ({"bias": False}, {"padding": 1}, True),
    "zeros, a bias": ({"bias": True}, {"padding": 1}, False),
    "no padding, a bias": ({"bias": True}, {"padding": 0}, True),
    "a padded 1x1": ({"bias": True, "padding": 1}, {"padding": 0}, True),
    "both padded": ({"bias": False, "padding": 1}, {"padding": 1}, False),
    "a 3x3 first": ({"bias": False, "kernel_size": 3}, {"padding": 1}, False),
    "1x3, then 3x1": (
        {"bias": False, "kernel_size": (1, 3), "padding": (0, 1)},
        {"kernel_size": (3, 1), "padding": (1, 0)},
        True,
    ),
    "1x3, then 3x1, a bias": (
        {"bias": True, "kernel_size": (1, 3), "padding": (0, 1)},
        {"kernel_size": (3, 1), "padding": (1, 0)},
        False,
    ),
    "reflect": ({"bias": True}, {"padding": 1, "padding_mode": "reflect"}, True),
    "circular": ({"bias": True}, {"padding": 1, "padding_mode": "circular"}, True),
    "reflect, strided": (
        {"bias": True, "stride": 2},
        {"padding": 1, "padding_mode": "reflect"},
        False,
    ),
    "reflect, a 2x2 first": (
        {"bias": True, "kernel_size": 2},
        {"padding": 1, "padding_mode": "reflect"},
        False,
    ),
    "reflect first": (
        {"bias": True, "kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 1, "padding": 0},
        True,
    ),
    "reflect, then zeros": (
        {"bias": False, "kernel_size": (1, 3), "padding": (0, 1), "padding_mode": "reflect"},
        {"kernel_size": (3, 1), "padding": (1, 0)},
        False,
    ),
}


@pytest.mark.parametrize("kind", BORDERS)
def test_the_border_decides_whether_a_sequence_is_a_convolution(kind):
    own, other, exact = BORDERS[kind]
    first = nn.Conv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 1} | own).double()
    second = nn.Conv2d(**{"in_channels": 6, "out_channels": 5, "kernel_size": 3} | other).double()
    x = images(2, 4, 9, 11)
    if not exact:
        with pytest.raises(ValueError, match="no convolution at its border"):
            compose(convolution(first), convolution(second))
        return

    whole = compose(convolution(first), convolution(second))

    assert relative_error(second(first(x)), run(whole, x)) < 1e-12


def test_the_dilation_of_one_tap_does_not_widen_a_sequence():
    point, dense = nn.Conv2d(4, 4, 1, dilation=2, bias=False), nn.Conv2d(4, 4, 3, dilation=3)

    for pair in ((point, dense), (dense, point)):
        geometry = compose(*map(convolution, pair)).geometry
        assert (geometry.kernel, geometry.dilation) == ((3, 3), (3, 3))


def test_linear_layers_compose_as_convolutions_without_dimensions():
    none = Geometry((), (), (), (), ())
    first, second = nn.Linear(5, 7).double(), nn.Linear(7, 3).double()
    whole = compose(*(Convolution(Affine(m.weight, m.bias), none, 1) for m in (first, second)))
    x = images(4, 5)

    assert relative_error(second(first(x)), F.linear(x, *whole.affine)) < 1e-12


def test_gradients_reach_both_layers_of_a_sequence():
    first = nn.Conv2d(4, 6, 1, groups=2, bias=False).double()
    second = nn.Conv2d(6, 4, 3, groups=2, padding=1).double()
    x = images(2, 4, 6, 6)
    direct = torch.autograd.grad(
        second(first(x)).square().sum(), [first.weight, second.weight, second.bias]
    )

    whole = compose(convolution(first), convolution(second))
    folded = torch.autograd.grad(
        run(whole, x).square().sum(), [first.weight, second.weight, second.bias]
    )

    assert all(relative_error(a, b) < 1e-12 for a, b in zip(direct, folded, strict=True))


@pytest.mark.parametrize(
    ("own", "target", "fits"),
    [
        ({"kernel_size": 3, "dilation": 2, "padding": 2}, {"kernel_size": 7, "padding": 3}, True),
        ({"kernel_size": 3, "dilation": 4, "padding": 4}, {"kernel_size": 9, "padding": 4}, True),
        (
            {"kernel_size": 3, "dilation": 4, "padding": 4},
            {"kernel_size": 5, "dilation": 2, "padding": 4},
            True,
        ),
        ({"kernel_size": 2, "dilation": 2, "padding": 1}, {"kernel_size": 3, "padding": 1}, True),
        (
            {"kernel_size": 3, "dilation": 3, "padding": 3},
            {"kernel_size": 5, "dilation": 2, "padding": 4},
            False,
        ),
        ({"kernel_size": 3, "dilation": 2, "padding": 1}, {"kernel_size": 5, "padding": 2}, False),
        ({"kernel_size": 3, "dilation": 3, "padding": 3}, {"kernel_size": 5, "padding": 2}, False),
        ({"kernel_size": 1}, {"kernel_size": 3, "padding": 1}, True),
        ({"kernel_size": 1}, {"kernel_size": 3}, False),
        ({"kernel_size": (1, 3), "padding": (0, 1)}, {"kernel_size": 3, "padding": 1}, True),
    ],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_kernel_is_embedded_in_a_larger_one_if_it_fits(own, target, fits, stride):
    small = nn.Conv2d(4, 6, stride=stride, groups=2, **own).double()
    large = nn.Conv2d(4, 6, stride=stride, groups=2, **target).double()
    inner, outer = convolution(small), convolution(large)

    kernel = embed(small.weight, inner.geometry, outer.geometry)

    assert (kernel is not None) is fits
    if kernel is not None:
        whole = outer._replace(affine=Affine(kernel, small.bias))
        for x in (images(2, 4, 9, 11), images(2, 4, 12, 10)):
            assert relative_error(small(x), run(whole, x)) < 1e-12
