"""Numbers in bad conditions: the result is right, or the error says what is wrong with them."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import repvgg
from repvgg import cli, losses, metrics, reparam, verify
from repvgg.checkpoint.native import record_probe
from repvgg.cli import keys
from repvgg.contract import DataContract
from repvgg.deploy.opening import Opened
from repvgg.deploy.predict import label
from repvgg.deploy.verification import accuracy
from repvgg.export.int8 import _change
from repvgg.reparam import Affine
from repvgg.training.predictions import Predictions
from tests.support.networks import settle

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ALLOWED = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
LARGEST = {dtype: torch.finfo(dtype).max for dtype in DTYPES}

# A value of the first channel of a BatchNorm -> whether any dtype can hold what it folds to.
CONDITIONS: dict[str, tuple[str, float, bool]] = {
    "variance 0": ("running_var", 0.0, True),
    "variance 1e-30": ("running_var", 1e-30, True),
    "variance below 0, within eps": ("running_var", -1e-6, True),
    "variance infinite": ("running_var", math.inf, True),
    "variance below 0": ("running_var", -1.0, False),
    "variance NaN": ("running_var", math.nan, False),
    "gamma 0": ("weight", 0.0, True),
    "gamma below 0": ("weight", -3.0, True),
    "gamma denormal": ("weight", 1e-7, True),
    "gamma NaN": ("weight", math.nan, False),
    "gamma infinite": ("weight", math.inf, False),
    "beta NaN": ("bias", math.nan, False),
    "beta infinite": ("bias", math.inf, False),
    "mean NaN": ("running_mean", math.nan, False),
    "mean infinite": ("running_mean", math.inf, False),
}


def check_channels(expected: Tensor, given: Tensor, allowed: float) -> None:
    """Compare by channel: a large one hides no error of another."""
    assert given.isfinite().all()
    for mine, theirs in zip(expected.unbind(1), given.unbind(1), strict=True):
        scale = mine.abs().max().clamp_min(1e-3)
        assert ((mine - theirs.double()).abs().max() / scale).item() < allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("branch", ["branch_3x3", "branch_1x1", "branch_identity"])
def test_a_block_folds_rightly_or_says_why_not(branch, kind, dtype):
    torch.manual_seed(0)
    block = settle(repvgg.RepVGGBlock(4, 4)).eval()
    part = getattr(block, branch)
    name, value, possible = CONDITIONS[kind]
    with torch.no_grad():
        getattr(getattr(part, "bn", part), name)[0] = value
    block = block.to(dtype)
    images = torch.rand(2, 4, 5, 5).to(dtype)
    expected = copy.deepcopy(block).double()(images.double())

    if possible:
        block.switch_to_deploy()
        check_channels(expected, block(images), ALLOWED[dtype])
    else:
        with pytest.raises(ValueError, match="folded weights are NaN or infinite"):
            block.switch_to_deploy()
        assert block.reparam is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_folded_weights_beyond_a_dtype_are_an_error(dtype):
    """Every weight is finite, and the network's outputs too, in that dtype."""
    torch.manual_seed(0)
    block = settle(repvgg.RepVGGBlock(4, 4)).eval().to(dtype)
    with torch.no_grad():
        block.branch_3x3.conv.weight[0] *= 1e-3
        block.branch_3x3.bn.weight[0] = LARGEST[dtype] / 2
        block.branch_3x3.bn.running_var[0] = 0
        block.branch_3x3.bn.eps = 1e-12
    assert all(tensor.isfinite().all() for tensor in block.state_dict().values())

    with pytest.raises(ValueError, match=f"weights are (too large for {dtype}|NaN or infinite)"):
        block.switch_to_deploy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", CONDITIONS)
def test_any_network_is_fused_rightly_or_says_why_not(kind, dtype):
    torch.manual_seed(0)
    network = settle(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))).eval()
    name, value, possible = CONDITIONS[kind]
    with torch.no_grad():
        getattr(network[1], name)[0] = value
    network = network.to(dtype)
    images = torch.rand(2, 3, 6, 6).to(dtype)
    expected = copy.deepcopy(network).double()(images.double())

    fused, found = repvgg.fuse_conv_bn(network)

    if possible:
        check_channels(expected, fused(images), ALLOWED[dtype])
    else:
        assert list(found.kept.values()) == [
            f"0: the folded weights are NaN or too large for {dtype}"
        ]


def test_branches_that_cancel_are_measured_by_the_certificate():
    """One branch is 1e6 times the sum: float32 has no digits left, and the fold is as good."""
    torch.manual_seed(0)
    block = settle(repvgg.RepVGGBlock(4, 4)).eval()
    with torch.no_grad():
        center = torch.zeros_like(block.branch_3x3.conv.weight)
        center[..., 1, 1] = 1e6 * torch.eye(4)
        block.branch_3x3.conv.weight += center
        for norm in (block.branch_3x3.bn, block.branch_1x1.bn):
            norm.running_var.fill_(1 - norm.eps)
            norm.weight.fill_(1)
        block.branch_1x1.conv.weight[..., 0, 0] -= 1e6 * torch.eye(4)
    images = torch.rand(2, 4, 5, 5)
    double = copy.deepcopy(block).double()
    expected = double(images.double())
    own = verify.relative_error(expected, block(images))

    block.switch_to_deploy()

    assert own > 1e-4
    assert verify.relative_error(expected, block(images)) < 1e-6


def conv(weight: float, size: int) -> nn.Conv2d:
    made = nn.Conv2d(2, 2, size, padding=size // 2)
    nn.init.constant_(made.weight, weight)
    nn.init.zeros_(made.bias)
    return made


class Sum(nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.dense, self.point = conv(weight, 3), conv(weight, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x) + self.point(x)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_branches_of_any_network_whose_sum_is_beyond_a_dtype_stay(dtype):
    network = Sum(0.75 * LARGEST[dtype]).to(dtype).eval()
    images = torch.full((1, 2, 4, 4), 1e-3).to(dtype)
    expected = network(images)

    fused, found = repvgg.fuse_conv_bn(network)

    assert expected.isfinite().all()
    assert found.unmerged == {"": f"dense: the folded weights are NaN or too large for {dtype}"}
    assert torch.equal(fused(images), expected)


FOLDS: dict[str, Callable[[Tensor, Tensor], Affine]] = {
    "scale_output": lambda kernel, scale: reparam.scale_output(kernel, None, scale, 0 * scale),
    "scale_input": lambda kernel, scale: reparam.scale_input(kernel, None, scale, 0 * scale),
    "merge": lambda kernel, _: reparam.merge(*[reparam.bare_affine(kernel)] * 4),
}


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("fold", FOLDS)
def test_the_algebra_returns_no_number_beyond_its_dtype(fold, dtype):
    scale = torch.full((2,), 4.0, dtype=torch.float64)
    small, large = (torch.full((2, 2, 3, 3), share * LARGEST[dtype]) for share in (0.2, 0.4))

    assert all(part.isfinite().all() for part in FOLDS[fold](small.to(dtype), scale))
    with pytest.raises(ValueError, match=f"the folded weights are too large for {dtype}"):
        FOLDS[fold](large.to(dtype), scale)


NOT_EQUAL: dict[str, tuple[float, float]] = {
    "NaN and NaN": (math.nan, math.nan),
    "infinity and infinity": (math.inf, math.inf),
    "infinity and 1": (math.inf, 1.0),
    "NaN and 1": (math.nan, 1.0),
    "1 and NaN": (1.0, math.nan),
    "1 and infinity": (1.0, math.inf),
    "0 and a little": (0.0, 1e-9),
}


@pytest.mark.parametrize("kind", NOT_EQUAL)
def test_what_is_no_number_never_passes(kind):
    mine, theirs = NOT_EQUAL[kind]

    verdict = verify.compare(
        lambda _: torch.tensor([[mine, 0.0]]), lambda _: torch.tensor([[theirs, 0.0]]), IMAGES
    )

    assert not verdict.passed


IMAGES = torch.rand(1, 3, 8, 8)


def test_zeros_equal_zeros():
    assert verify.compare(lambda _: torch.zeros(1, 2), lambda _: torch.zeros(1, 2), IMAGES).passed


NOTHING: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "compare": lambda model, images: verify.compare(model, model, images),
    "compare_blocks": lambda model, images: verify.compare_blocks(model, model, images),
    "switch_to_deploy": repvgg.switch_to_deploy,
    "fuse_conv_bn": repvgg.fuse_conv_bn,
}


@pytest.mark.parametrize("way", NOTHING)
def test_no_images_prove_nothing(way):
    with pytest.raises(ValueError, match="there is nothing to compare"):
        NOTHING[way](network(), torch.rand(0, 3, 16, 16))


def test_images_without_a_tolerance_are_refused():
    with pytest.raises(ValueError, match="pass float32 or float64, or a tolerance"):
        verify.compare(lambda images: images, lambda images: images, torch.rand(1, 3).half())


def test_one_call_with_nan_is_not_hidden_by_a_right_one():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x) + 0 * self.part(x * math.nan).nan_to_num()

    errors = verify.compare_modules(Twice(), Twice(), [torch.rand(1, 3)])

    assert errors == {"part": math.inf, "": 0.0}


def test_a_row_with_nan_is_never_right():
    rows = torch.tensor([[math.nan, 1.0], [1.0, 0.0], [math.nan, math.nan]])

    assert accuracy(rows, torch.tensor([0, 0, 0])) == pytest.approx(1 / 3)


def test_rows_of_nan_agree_with_none():
    rows = torch.tensor([[math.nan, 1.0], [0.0, 1.0]])

    assert verify.agreement(rows, rows) == 0.5
    assert verify.agreement(rows, torch.tensor([[0.0, 1.0], [0.0, 1.0]])) == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 3e4])
def test_losses_of_extreme_logits_and_their_gradients_are_finite(scale, dtype):
    first, second = (
        (scale * torch.tensor(values)).to(dtype).requires_grad_()
        for values in ([[1.0, -1.0, 0.5], [0.0, 0.0, 0.0]], [[-1.0, 1.0, 0.0], [1.0, -1.0, 1.0]])
    )
    targets = torch.tensor([1, 2])

    loss = losses.rdrop_loss(first, second, targets, alpha=1.0, label_smoothing=0.1)
    loss.total.backward()

    assert loss.total.isfinite()
    for logits in (first, second):
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_class_that_is_impossible_in_both_predictions_adds_nothing(dtype):
    """Logits of -inf: a masked class. The others are as without it."""
    rows = [[[-1.0, 2.0, 0.5]], [[0.5, -2.0, 1.0]]]
    plain = [torch.tensor(row).to(dtype).requires_grad_() for row in rows]
    masked = [torch.tensor([[*row[0], -math.inf]]).to(dtype).requires_grad_() for row in rows]

    wanted, found = losses.symmetric_kl(*plain), losses.symmetric_kl(*masked)
    wanted.backward()
    found.backward()

    torch.testing.assert_close(found, wanted)
    for with_mask, without in zip(masked, plain, strict=True):
        torch.testing.assert_close(with_mask.grad[:, :3], without.grad)
        assert with_mask.grad[0, 3] == 0


def test_a_class_that_is_impossible_in_one_prediction_is_no_number():
    first, second = torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.0, 0.0]])

    assert not losses.symmetric_kl(first, second).isfinite()  # it is infinite


@pytest.mark.parametrize("smoothing", [math.nan, math.inf, -0.1, 1.0])
def test_smoothing_that_is_no_share_is_refused(smoothing):
    with pytest.raises(ValueError, match=r"label_smoothing=.* must be at least 0 and below 1"):
        losses.cross_entropy(torch.rand(1, 2), torch.tensor([0]), label_smoothing=smoothing)


def network() -> nn.Module:
    torch.manual_seed(0)
    return settle(repvgg.create_model("repvgg_tiny", num_classes=3)).eval()


@pytest.mark.parametrize(
    "shape", [(0, 3, 16, 16), (1, 3, 1, 1), (1, 3, 1, 40), (2, 3, 33, 7)], ids=str
)
def test_images_of_any_size_are_folded_rightly(shape):
    model, images = network(), torch.rand(shape)
    expected = copy.deepcopy(model).double()(images.double())

    given = repvgg.switch_to_deploy(model)(images)

    assert given.shape == expected.shape == (shape[0], 3)
    assert verify.relative_error(expected, given) < 1e-5


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda images: images.contiguous(memory_format=torch.channels_last),
    "expanded": lambda images: images[:1, :, :1, :1].expand(2, 3, 16, 16),
    "reversed": lambda images: images.flip(3)[..., ::2],
    "requires gradients": lambda images: images.clone().requires_grad_(),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_images_of_any_layout_are_folded_rightly(kind):
    model, images = network(), LAYOUTS[kind](torch.rand(2, 3, 16, 16))

    assert verify.compare(
        copy.deepcopy(model).double(), repvgg.switch_to_deploy(model), images
    ).passed


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_statistics_of_images_that_are_no_numbers_are_refused(value):
    model = network()
    before = copy.deepcopy(model.state_dict())
    images = torch.rand(4, 3, 16, 16)
    images[0, 0, 0, 0] = value

    with pytest.raises(ValueError, match="statistics are NaN or infinite"):
        repvgg.reestimate_bn(model, [images])
    with pytest.raises(ValueError, match="NaN or inf"):
        repvgg.switch_to_train(repvgg.switch_to_deploy(model), images)

    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("scale", [1e15, 1e19, 1e25])
def test_branches_come_back_rightly_or_not_at_all(scale):
    """The outputs are finite in float32, their variance is not."""
    folded, images = repvgg.switch_to_deploy(network()), torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        folded.stages[0][0].reparam.weight.mul_(scale)
    assert folded(images).isfinite().all()

    if scale < 1e20:
        branches = repvgg.switch_to_train(folded, images).eval()
        assert verify.compare(copy.deepcopy(folded).double(), branches, images).passed
    else:
        with pytest.raises(ValueError, match="their variance overflows"):
            repvgg.switch_to_train(folded, images)


@pytest.mark.parametrize("kind", CONDITIONS)
def test_over_parameterized_layers_are_right_or_not_restored(kind):
    torch.manual_seed(0)
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))).eval()
    name, value, possible = CONDITIONS[kind]
    with torch.no_grad():
        getattr(model[1], name)[0] = value
    images = torch.rand(2, 3, 6, 6)
    expected = copy.deepcopy(model).double()(images.double())
    blocks = repvgg.over_parameterize(model).eval()

    if possible:
        check_channels(expected, blocks(images), 1e-5)
        check_channels(expected, repvgg.switch_to_deploy(blocks)(images), 1e-5)
    else:
        with pytest.raises(ValueError, match="0: the folded weights are NaN or infinite"):
            repvgg.switch_to_deploy(blocks)


@pytest.mark.parametrize("values", [0.0, -1.0, 1e-40, 1e-310, 1e39, math.inf, math.nan])
def test_images_are_not_divided_by_what_float32_cannot_hold(values):
    with pytest.raises(ValueError, match="not a description of images"):
        DataContract(["a"], 1, [8, 8], [0.5], [values], "bilinear")


@pytest.mark.parametrize("values", [1e39, -1e39, math.inf, math.nan])
def test_means_that_float32_cannot_hold_are_refused(values):
    with pytest.raises(ValueError, match="not a description of images"):
        DataContract(["a"], 1, [8, 8], [values], [0.5], "bilinear")


@pytest.mark.parametrize("classes", [2, 10])
def test_an_image_with_nan_is_a_mistake_of_every_metric(classes):
    """Nothing else is known of it; `argmax` would choose the class of the first NaN."""
    logits = torch.eye(classes)[[0, 0, 0, 0]]
    logits[:3] = math.nan
    logits[1, 1:] = 0.0  # the NaN is one of several numbers
    targets = torch.tensor([0, 0, classes - 1, 0])
    measured = metrics.named(metrics.classification(classes))

    metrics.update(measured, logits, targets)
    found = {name: metric.compute().item() for name, metric in measured.items()}

    assert found["accuracy"] == 0.25
    assert found.get("accuracy_top5", 0.25) == 0.25
    assert math.isnan(found["loss"])
    assert math.isfinite(found["calibration_error"])


def test_an_image_with_nan_hides_no_mistake_from_the_pictures():
    collected = Predictions(num_shown=1)
    logits = torch.tensor([[math.nan, math.nan, math.nan], [0.0, 9.0, 0.0], [9.0, 0.0, 0.0]])

    collected.add(torch.arange(3.0).reshape(3, 1, 1, 1), logits, torch.tensor([0, 0, 0]))

    classes, predicted, confidence = collected.all()
    assert (classes == predicted).tolist() == [False, False, True]
    assert confidence.isfinite().all()
    assert collected.mistakes().images.item() == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_image_without_finite_logits_gets_no_label(bad, tmp_path):
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    for path in paths:
        Image.new("RGB", (8, 8)).save(path)
    data = DataContract(["x", "y"], 3, [8, 8], [0.5] * 3, [0.5] * 3, "bilinear")
    logits = torch.tensor([[0.0, 1.0], [0.0, bad]])
    opened = Opened(lambda _: logits, data, "", False, "cpu")

    good, wrong = label(paths, opened, batch_size=2)

    assert (good.error, good.predictions[0].name) == ("", "y")
    assert wrong.error == f"{paths[1]}: its logits are NaN or infinite"


def test_a_probe_batch_without_finite_logits_is_not_recorded():
    """No checkpoint that holds one could be loaded."""
    model = network()
    with torch.no_grad():
        model.linear.weight.fill_(3e38)
    data = DataContract(["x", "y", "z"], 3, [8, 8], [0.5] * 3, [0.5] * 3, "bilinear")
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)

    with pytest.raises(ValueError, match="logits on the probe batch are NaN or infinite"):
        record_probe(model, data, images, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("given", [0.0, 1e-30, 1.0])
def test_the_change_of_int8_is_a_number(given):
    outputs = torch.full((2, 3), given)

    assert _change(outputs, outputs) == 0.0
    assert _change(outputs, outputs + 1) >= 1.0


def raise_on_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")


TOO_LARGE: dict[str, tuple[Callable[[], object], str]] = {
    "torch": (lambda: torch.empty(2**50, dtype=torch.uint8), " for 1125899906842624 bytes"),
    "numpy": (lambda: np.empty(2**50, np.uint8), " for 1.00 PiB"),
    "python": (lambda: bytearray(2**50), ""),
    "a GPU": (raise_on_a_gpu, " for 2.00 GiB"),
}


@pytest.mark.parametrize("kind", TOO_LARGE)
def test_memory_that_is_not_there_is_one_line(kind, monkeypatch, capsys):
    allocate, size = TOO_LARGE[kind]
    line = f"there is not enough memory{size}: pass a smaller batch_size, or smaller images"
    monkeypatch.setattr("sys.argv", ["x"])
    monkeypatch.setattr(keys, "end_on_signals", lambda: None)
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        allocate()

    with pytest.raises(SystemExit):
        keys.script(lambda _: allocate(), "", {})

    assert cli.explain(caught.value, Path("train.yaml"), {}) == line
    assert capsys.readouterr().err.rstrip().endswith(line)
