"""What validation, test and evaluation measure: one definition for training and deployed files.

All are means over images, whatever the batches and devices.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
)

TOP = 5  # accuracy_top5 is measured if there are more classes


def classification(num_classes: int) -> nn.ModuleDict:
    """Metrics by name: loss, accuracy, calibration_error (ECE, 15 bins) and accuracy_top5."""

    def accuracy(top_k: int) -> MulticlassAccuracy:
        return MulticlassAccuracy(num_classes, top_k, average="micro", validate_args=False)

    metrics = nn.ModuleDict(
        {
            "loss": MeanMetric(nan_strategy="disable"),
            "accuracy": accuracy(1),
            "calibration_error": MulticlassCalibrationError(num_classes, n_bins=15),
        }
    )
    if num_classes > TOP:
        metrics["accuracy_top5"] = accuracy(TOP)
    return metrics


def confusion(num_classes: int) -> Metric:
    """Counts (K, K) of images by their class and the predicted class."""
    return MulticlassConfusionMatrix(num_classes)


def named(metrics: nn.ModuleDict) -> dict[str, Metric]:
    """The metrics of `classification` by name."""
    return {name: metric for name, metric in metrics.items() if isinstance(metric, Metric)}


def wrong_where_nan(logits: Tensor, classes: Tensor) -> Tensor:
    """Logits whose rows with NaN are a wrong prediction; `argmax` would choose a class of them.

    Args:
        logits: (N, K).
        classes: (N,).
    """
    wrong = torch.zeros_like(logits).scatter(1, classes[:, None], -math.inf)
    return wrong.where(logits.isnan().any(1, keepdim=True), logits)


def update(metrics: Mapping[str, Metric], logits: Tensor, targets: Tensor) -> None:
    """Add a batch to the metrics of `classification`. NaN is a wrong prediction and a loss of NaN.

    Args:
        logits: (N, K).
        targets: classes (N,), or mixtures (N, K), whose class is the one with the largest share.
    """
    classes = targets.argmax(1) if targets.ndim == 2 else targets
    metrics["loss"].update(F.cross_entropy(logits, targets, reduction="none"))
    logits = wrong_where_nan(logits, classes)
    metrics["calibration_error"].update(logits.softmax(1), classes)
    for name in metrics.keys() & {"accuracy", "accuracy_top5"}:
        metrics[name].update(logits, classes)
