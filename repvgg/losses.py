"""The training losses.

R-Drop (Liang et al., 2021, arXiv:2106.14448) adds the KL divergence between two predictions of one
image with different dropout masks. `repvgg.rdrop` makes the two predictions.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]  # logits (N, K), targets -> scalar


class RDropLoss(NamedTuple):
    """The result of `rdrop_loss`: scalars, each a mean over the batch.

    Attributes:
        total: cross_entropy + alpha * kl.
        cross_entropy: of both predictions; with another loss, the mean of that.
        kl: as `symmetric_kl` computes it.
    """

    total: Tensor
    cross_entropy: Tensor
    kl: Tensor


def cross_entropy(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Average the cross-entropy over the batch, in float32 at least.

    Args:
        logits: (N, K).
        targets: (N,) class indices, or (N, K) probabilities (mixup, cutmix, distillation).
        label_smoothing: in [0, 1).

    Returns:
        a scalar, in nats.

    Raises:
        ValueError: `label_smoothing` is out of range, or the targets are not classes or
            probabilities of these logits. Values are only checked on the CPU, as on a GPU that
            would stall each step. There a wrong index is an error of the GPU, and NaN gives a loss
            of NaN.
    """
    if not 0 <= label_smoothing < 1:  # torch takes NaN for 0
        raise ValueError(f"label_smoothing={label_smoothing}: must be at least 0 and below 1")
    _check_targets(logits, targets)
    return F.cross_entropy(at_least_float32(logits), targets, label_smoothing=label_smoothing)


def symmetric_kl(logits1: Tensor, logits2: Tensor) -> Tensor:
    """Average the two directed Kullback-Leibler divergences of two predictions (R-Drop, eq. 2).

    1/2 (KL(p1 || p2) + KL(p2 || p1)), averaged over the batch. Both directions carry gradient. All
    is computed from log-probabilities, in float32 at least. So neither probabilities that underflow
    nor half-precision autocast give NaN. Nor do classes whose logits are -inf in both predictions.

    Args:
        logits1: (N, K).
        logits2: (N, K).

    Returns:
        a scalar, in nats; 0 exactly when the logits are equal.

    Raises:
        ValueError: the two predictions differ in shape.
    """
    if logits1.shape != logits2.shape:
        raise ValueError(
            f"logits1 and logits2 differ in shape: {tuple(logits1.shape)}, {tuple(logits2.shape)}"
        )
    log_p = F.log_softmax(at_least_float32(logits1), dim=1)
    log_q = F.log_softmax(at_least_float32(logits2), dim=1)
    impossible = log_p.detach().maximum(log_q.detach()) == -math.inf  # 0 log 0 is 0, not NaN
    log_p, log_q = (values.masked_fill(impossible, 0.0) for values in (log_p, log_q))
    forward = F.kl_div(log_q, log_p, reduction="none", log_target=True)  # KL(p || q), by class
    backward = F.kl_div(log_p, log_q, reduction="none", log_target=True)  # KL(q || p)
    return ((forward + backward).sum(1) / 2).mean()


def rdrop_loss(
    logits1: Tensor,
    logits2: Tensor,
    targets: Tensor,
    *,
    alpha: float,
    label_smoothing: float = 0.0,
    loss: Loss | None = None,
) -> RDropLoss:
    """Add the KL divergence of two predictions to their mean cross-entropy (R-Drop, eq. 3 and 4).

    L = 1/2 (CE1 + CE2) + alpha * 1/2 (KL(p1 || p2) + KL(p2 || p1)). Every term is a mean over the
    batch, so alpha does not depend on batch size, accumulation or the number of devices. The paper
    and its authors' programs scale the terms differently. The same strength here is alpha =

        the paper's (sums the two cross-entropies)    its alpha / 2
        their README's (sums the KL over the batch)   its alpha * batch size
        their ViT program's (over a micro-batch)      its alpha * micro-batch; 0.3 * 32 = 9.6

    Args:
        logits1: (N, K).
        logits2: (N, K), of the same images, with other dropout masks.
        targets: (N,) class indices, or (N, K) probabilities.
        alpha: weight of the divergence, 0 or more.
        label_smoothing: of both cross-entropies, in [0, 1).
        loss: in place of the cross-entropy; a mean over the batch. It gets logits in float32 at
            least, and the same targets.

    Raises:
        ValueError: `alpha` is negative or not finite, `label_smoothing` is given with
            `loss`, the two predictions differ in shape, or the targets do not fit them.
    """
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha={alpha}: the weight of the KL term must be a number of at least 0")
    if loss is not None and label_smoothing:
        raise ValueError(f"label_smoothing={label_smoothing}: is of the cross-entropy, not of loss")
    smoothed = functools.partial(cross_entropy, label_smoothing=label_smoothing)
    kl = symmetric_kl(logits1, logits2)
    first, second = (
        smoothed(logits, targets) if loss is None else loss(at_least_float32(logits), targets)
        for logits in (logits1, logits2)
    )
    mean = (first + second) / 2
    return RDropLoss(mean + alpha * kl, mean, kl)


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits of half precision in float32, all others as they are."""
    return logits.float() if logits.dtype.itemsize < 4 else logits


def _check_targets(logits: Tensor, targets: Tensor) -> None:
    """Raise ValueError on targets that torch accepts silently or rejects without a reason."""
    num_classes = logits.shape[1]
    if targets.is_floating_point():
        if targets.shape != logits.shape:
            raise ValueError(
                f"targets of shape {tuple(targets.shape)} do not fit logits of shape "
                f"{tuple(logits.shape)}: probabilities need a column for each of the {num_classes} "
                "classes"
            )
        if targets.device.type == "cpu":
            if not ((targets >= 0) & (targets < math.inf)).all():
                raise ValueError("targets hold NaN, inf or negative numbers, not probabilities")
            sums = targets.sum(1)
            if ((sums - 1).abs() > 0.01).any():
                raise ValueError(
                    f"targets hold a row whose sum is {sums[(sums - 1).abs().argmax()]:g}: "
                    "probabilities of the classes sum to 1"
                )
        return
    if targets.shape != logits.shape[:1]:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} do not fit logits of shape "
            f"{tuple(logits.shape)}: there must be one class index for each image"
        )
    if targets.device.type == "cpu" and len(targets):
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"targets hold class {low if low < 0 else high}: {num_classes} logits allow 0 to "
                f"{num_classes - 1}"
            )
