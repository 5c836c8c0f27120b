import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from repvgg.losses import cross_entropy, rdrop_loss, symmetric_kl


def logits(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(6, 5, generator=generator, dtype=torch.float64)).to(dtype)


TARGETS = torch.tensor([0, 1, 2, 3, 4, 0])


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 5.0])
def test_the_loss_is_the_papers_formula_written_out(alpha):
    a, b = logits(1), logits(2)
    p, q = softmax(a.numpy()), softmax(b.numpy())
    rows = np.arange(6)
    cross_entropy = (-np.log(p[rows, TARGETS]) - np.log(q[rows, TARGETS])).mean() / 2
    kl = ((p * np.log(p / q)).sum(1) + (q * np.log(q / p)).sum(1)).mean() / 2

    loss = rdrop_loss(a, b, TARGETS, alpha=alpha)

    np.testing.assert_allclose(loss.total.item(), cross_entropy + alpha * kl, rtol=1e-12)
    np.testing.assert_allclose(loss.cross_entropy.item(), cross_entropy, rtol=1e-12)
    np.testing.assert_allclose(loss.kl.item(), kl, rtol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_soft_targets_follow_the_formula_too(smoothing):
    a, b = logits(1), logits(2)
    p, q = softmax(a.numpy()), softmax(b.numpy())
    generator = np.random.default_rng(0)
    targets = generator.dirichlet(np.ones(5), size=6)
    smooth = (1 - smoothing) * targets + smoothing / 5
    cross_entropy = -(smooth * (np.log(p) + np.log(q))).sum(1) / 2
    kl = ((p - q) * np.log(p / q)).sum(1) / 2

    loss = rdrop_loss(a, b, torch.from_numpy(targets), alpha=0.7, label_smoothing=smoothing)

    np.testing.assert_allclose(loss.total.item(), (cross_entropy + 0.7 * kl).mean(), rtol=1e-12)


# The authors' scales, written out: (loss of the two logits, its alpha, of N images).
def paper(a: torch.Tensor, b: torch.Tensor, alpha: float) -> torch.Tensor:
    nll = -(a.log_softmax(1) + b.log_softmax(1))[range(6), TARGETS]
    return (nll + alpha * divergences(a, b)).mean()


def snippet(a: torch.Tensor, b: torch.Tensor, alpha: float) -> torch.Tensor:
    return (F.cross_entropy(a, TARGETS) + F.cross_entropy(b, TARGETS)) / 2 + alpha * divergences(
        a, b
    ).sum()


def vit(a: torch.Tensor, b: torch.Tensor, alpha: float) -> torch.Tensor:
    """Gradient accumulation over two micro-batches of 3."""
    parts = zip(a.split(3), b.split(3), TARGETS.split(3), strict=True)
    return torch.stack(
        [
            (F.cross_entropy(x, y) + F.cross_entropy(z, y)) / 2 + alpha * divergences(x, z).sum()
            for x, z, y in parts
        ]
    ).mean()


def divergences(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    p, q = a.softmax(1), b.softmax(1)
    return ((p * (p / q).log()).sum(1) + (q * (q / p).log()).sum(1)) / 2


@pytest.mark.parametrize(
    ("theirs", "alpha", "ours", "scale"),
    [(paper, 4.0, 4.0 / 2, 2.0), (snippet, 0.3, 0.3 * 6, 1.0), (vit, 0.3, 0.3 * 3, 1.0)],
    ids=["alpha / 2", "alpha * batch", "alpha * micro-batch"],
)
def test_the_alphas_of_the_authors_convert(
    theirs: Callable[..., torch.Tensor], alpha: float, ours: float, scale: float
):
    """At the converted weight the gradients are theirs, up to the scale of the whole loss."""
    a, b = logits(1).requires_grad_(), logits(2).requires_grad_()

    expected = torch.autograd.grad(theirs(a, b, alpha), (a, b))
    given = torch.autograd.grad(rdrop_loss(a, b, TARGETS, alpha=ours).total * scale, (a, b))

    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-14)


def test_equal_predictions_have_no_divergence():
    assert symmetric_kl(logits(1), logits(1)).item() == 0.0


def test_the_divergence_is_symmetric_and_positive():
    forward, backward = symmetric_kl(logits(1), logits(2)), symmetric_kl(logits(2), logits(1))

    torch.testing.assert_close(forward, backward, rtol=1e-14, atol=0)
    assert forward > 0


def test_both_predictions_carry_gradient():
    a, b = logits(1).requires_grad_(), logits(2).requires_grad_()

    assert torch.autograd.gradcheck(symmetric_kl, (a, b))


def test_the_strength_does_not_depend_on_the_batch_size():
    a, b = logits(1), logits(2)

    once = rdrop_loss(a, b, TARGETS, alpha=2.0).total
    twice = rdrop_loss(a.repeat(2, 1), b.repeat(2, 1), TARGETS.repeat(2), alpha=2.0).total

    torch.testing.assert_close(once, twice, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_stay_finite_when_probabilities_underflow(dtype):
    a = torch.tensor([[200.0, 0.0], [0.0, 200.0]], dtype=dtype, requires_grad=True)
    b = torch.tensor([[0.0, 200.0], [0.0, 200.0]], dtype=dtype, requires_grad=True)

    rdrop_loss(a, b, torch.tensor([0, 1]), alpha=1.0).total.backward()

    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()


def test_label_smoothing_applies_to_both_cross_entropies():
    a, b = logits(1), logits(2)
    expected = sum(F.cross_entropy(x, TARGETS, label_smoothing=0.1) for x in (a, b)) / 2

    loss = rdrop_loss(a, b, TARGETS, alpha=1.0, label_smoothing=0.1)

    torch.testing.assert_close(loss.cross_entropy, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("sizes", [[3, 3], [2, 2, 2], [1] * 6], ids=str)
def test_the_loss_of_a_batch_is_the_mean_over_its_equal_parts(sizes):
    a, b = logits(1), logits(2)

    whole = rdrop_loss(a, b, TARGETS, alpha=2.0).total
    parts = [
        rdrop_loss(x, y, t, alpha=2.0).total
        for x, y, t in zip(*(tensor.split(sizes) for tensor in (a, b, TARGETS)), strict=True)
    ]

    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 4, 5]), "class 5: 5 logits allow 0 to 4"),
        (torch.tensor([0, 1, 2, 3, 4, -1]), "class -1: 5 logits"),
        (torch.tensor([0, 1]), r"shape \(2,\) do not fit logits of shape \(6, 5\)"),
        (torch.full((6, 4), 0.25), r"shape \(6, 4\).*each of the 5 classes"),
        (torch.full((6, 5), math.nan), "hold NaN"),
        (torch.full((6, 5), -0.2), "negative numbers"),
        (torch.full((6, 5), 5.0), "a row whose sum is 25"),
        (torch.full((6,), math.nan), r"shape \(6,\)"),
    ],
)
@pytest.mark.parametrize(
    "loss", [cross_entropy, lambda x, targets: rdrop_loss(x, x, targets, alpha=1.0)]
)
def test_targets_that_do_not_fit_are_an_error(targets, message, loss):
    with pytest.raises(ValueError, match=message):
        loss(logits(1), targets)


@pytest.mark.parametrize("alpha", [-1.0, math.nan, math.inf])
def test_an_impossible_weight_of_the_kl_is_an_error(alpha):
    with pytest.raises(ValueError, match="must be a number of at least 0"):
        rdrop_loss(logits(1), logits(2), TARGETS, alpha=alpha)


def test_predictions_of_different_shape_are_an_error():
    with pytest.raises(ValueError, match="differ in shape"):
        rdrop_loss(logits(1), logits(2)[:3], TARGETS, alpha=1.0)


@pytest.mark.parametrize(
    ("dtype", "given"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_a_loss_of_the_user_gets_the_targets_and_logits_of_float32_at_least(dtype, given):
    seen = []

    def own(logits, targets):
        seen.append((logits, targets))
        return logits.sum()

    first, second = torch.ones(2, 3, dtype=dtype), torch.zeros(2, 3, dtype=dtype)
    targets = torch.tensor([0, 2])

    total = rdrop_loss(first, second, targets, alpha=0.0, loss=own)

    assert [logits.dtype for logits, _ in seen] == [given, given]
    assert all(passed is targets for _, passed in seen)
    assert total.total == 3  # the mean of 6 and 0


@pytest.mark.parametrize("row", [[0.0, 1.0], [0.005, 1.0], [1.0, 0.0]])
def test_probabilities_may_be_zero_and_sum_to_almost_one(row):
    cross_entropy(torch.zeros(1, 2), torch.tensor([row]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0.5, 0.6], r"sum is 1\.1"),
        ([0.5, 0.3], r"sum is 0\.8"),
        ([math.inf, 0.0], "hold NaN, inf or negative"),
        ([-0.1, 1.1], "hold NaN, inf or negative"),
    ],
)
def test_what_are_no_probabilities_is_refused(row, message):
    targets = torch.tensor([[0.5, 0.5], row])

    with pytest.raises(ValueError, match=message):
        cross_entropy(torch.zeros(2, 2), targets)


def test_losses_without_options_smooth_nothing():
    logits, targets = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    expected = F.cross_entropy(logits, targets)

    assert cross_entropy(logits, targets) == expected
    assert rdrop_loss(logits, logits, targets, alpha=1.0).total == expected


def test_a_batch_of_no_images_has_targets_that_fit():
    loss = cross_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))

    assert loss.isnan()  # the mean of nothing, as torch has it


def test_smoothing_beside_a_loss_of_the_user_is_an_error():
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1: is of the cross-entropy"):
        rdrop_loss(
            torch.zeros(1, 2),
            torch.zeros(1, 2),
            torch.tensor([0]),
            alpha=1.0,
            label_smoothing=0.1,
            loss=lambda logits, targets: logits.sum(),
        )
