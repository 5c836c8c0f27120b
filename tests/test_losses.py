import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from repvgg.losses import rdrop_loss, symmetric_kl


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


@pytest.mark.parametrize("alpha", [-1.0, math.nan])
def test_a_weight_that_is_no_weight_is_refused(alpha):
    with pytest.raises(ValueError, match="must be at least 0"):
        rdrop_loss(logits(1), logits(2), TARGETS, alpha=alpha)


def test_predictions_of_different_shape_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        rdrop_loss(logits(1), logits(2)[:3], TARGETS, alpha=1.0)
