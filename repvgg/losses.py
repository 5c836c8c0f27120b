"""The training losses.

R-Drop (Liang et al., 2021, arXiv:2106.14448): two predictions of one network for one image, made
under different dropout masks, are pulled together.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F


class RDropLoss(NamedTuple):
    """total = cross_entropy + alpha * kl; scalars, each a mean over the batch."""

    total: Tensor
    cross_entropy: Tensor
    kl: Tensor


def symmetric_kl(logits1: Tensor, logits2: Tensor) -> Tensor:
    """Average the two directed Kullback-Leibler divergences of two predictions (R-Drop, eq. 2).

    1/2 (KL(p1 || p2) + KL(p2 || p1)), averaged over the batch. Both directions carry gradient. It
    works on log-probabilities throughout, in float32 at least, so that neither an underflowing
    probability nor a half-precision autocast gives NaN.

    Args:
        logits1, logits2: (N, K).

    Returns:
        a scalar, in nats; 0 exactly when the logits are equal.
    """
    log_p = F.log_softmax(_at_least_float32(logits1), dim=1)
    log_q = F.log_softmax(_at_least_float32(logits2), dim=1)
    forward = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)  # KL(p || q)
    backward = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)  # KL(q || p)
    return (forward + backward) / 2


def rdrop_loss(
    logits1: Tensor,
    logits2: Tensor,
    targets: Tensor,
    *,
    alpha: float,
    label_smoothing: float = 0.0,
) -> RDropLoss:
    """Add the consistency of two predictions to their mean cross-entropy (R-Drop, eq. 3 and 4).

    L = 1/2 (CE1 + CE2) + alpha * 1/2 (KL(p1 || p2) + KL(p2 || p1)), every term a mean over the
    batch, so that alpha means the same for every batch size. The paper sums the two
    cross-entropies: its alpha is twice this one.

    Args:
        logits1, logits2: (N, K), of the same images under different noise.
        targets: (N,) class indices, or (N, K) probabilities.
        alpha: weight of the divergence, 0 or more.
        label_smoothing: of both cross-entropies, in [0, 1).

    Raises:
        ValueError: `alpha` is negative, or the two predictions differ in shape.
    """
    if not alpha >= 0:
        raise ValueError(f"alpha={alpha}: the weight of the KL term must be at least 0")
    if logits1.shape != logits2.shape:
        raise ValueError(
            f"the two predictions differ in shape: {tuple(logits1.shape)}, {tuple(logits2.shape)}"
        )
    cross_entropy = (
        F.cross_entropy(_at_least_float32(logits1), targets, label_smoothing=label_smoothing)
        + F.cross_entropy(_at_least_float32(logits2), targets, label_smoothing=label_smoothing)
    ) / 2
    kl = symmetric_kl(logits1, logits2)
    return RDropLoss(cross_entropy + alpha * kl, cross_entropy, kl)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype.itemsize < 4 else logits
