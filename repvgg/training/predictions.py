"""What a network predicted in one validation, collected batch by batch, and its pictures.

Kept are the class, the prediction and the confidence of every image, and the pixels of the few most
confident mistakes alone.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from repvgg import figures, metrics
from repvgg.contract import DataContract
from repvgg.figures import Draw

SHOWN = 16  # images of a picture
SMALL = 96  # pixels of the longer side of an image in a picture
BINS = 15  # of confidence, as in `metrics.classification`
MOST_BARS = 20  # classes in the picture of the accuracies


class Batch(NamedTuple):
    """Images with what is known of them; all on the device of the images.

    Attributes:
        images: (N, C, H, W), as the network takes them.
        targets: classes (N,).
        predicted: classes (N,).
        confidence: (N,), the probability of the predicted class.
    """

    images: Tensor
    targets: Tensor
    predicted: Tensor
    confidence: Tensor


class Predictions:
    """Collects the predictions of one validation.

    Args:
        num_shown: mistakes whose images are kept, the most confident ones.
    """

    def __init__(self, num_shown: int = SHOWN) -> None:
        self.num_shown = num_shown
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._worst: Batch | None = None

    @torch.no_grad()
    def add(self, images: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            images: (N, C, H, W).
            logits: (N, K).
            targets: classes (N,), or mixtures (N, K), whose class is the one with the most weight.
        """
        classes = targets.argmax(1) if targets.ndim == 2 else targets
        logits = metrics.wrong_where_nan(logits.float(), classes)
        confidence, predicted = logits.softmax(1).max(1)
        self._parts.append((classes, predicted, confidence))
        # Without a transfer to the CPU, which would wait for the GPU in every batch.
        wrong = confidence.where(predicted != classes, -1)
        best = wrong.topk(min(self.num_shown, len(wrong))).indices
        found = Batch(images[best], classes[best], predicted[best], wrong[best])
        if self._worst is not None:
            pairs = zip(self._worst, found, strict=True)
            found = Batch(*(torch.cat(pair) for pair in pairs))
        best = found.confidence.topk(min(self.num_shown, len(found.confidence))).indices
        self._worst = Batch(*(part[best] for part in found))

    def __len__(self) -> int:
        return sum(len(classes) for classes, _, _ in self._parts)

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Classes, predictions and confidences, (N,), on the CPU."""
        classes, predicted, confidence = zip(*self._parts, strict=True)
        return tuple(torch.cat(part).cpu() for part in (classes, predicted, confidence))  # type: ignore[return-value]  # three parts

    def mistakes(self) -> Batch:
        """The most confident mistakes, the most confident first, on the CPU."""
        assert self._worst is not None
        is_wrong = self._worst.confidence >= 0
        return Batch(*(part[is_wrong].cpu() for part in self._worst))


class Bins(NamedTuple):
    """Images by confidence, in bins of equal width.

    Attributes:
        confidence, accuracy: means of each bin; 0 in empty ones.
        counts: images of each bin.
    """

    confidence: list[float]
    accuracy: list[float]
    counts: list[int]


def bin_by_confidence(confidence: Tensor, correct: Tensor, num_bins: int = BINS) -> Bins:
    """Sort images into bins, as torchmetrics does for the calibration error."""
    edges = torch.linspace(0, 1, num_bins + 1)
    places = (torch.bucketize(confidence, edges, right=True) - 1).clamp(0, num_bins - 1)
    counts = torch.bincount(places, minlength=num_bins)
    sums = [
        torch.zeros(num_bins, dtype=torch.float64).index_add_(0, places, values.double())
        for values in (confidence, correct)
    ]
    means = [(total / counts.clamp_min(1)).tolist() for total in sums]
    return Bins(means[0], means[1], counts.tolist())


def draw_predictions(
    predictions: Predictions, contract: DataContract
) -> Iterator[tuple[str, Draw]]:
    """Names and charts: mistakes, confusion matrix, reliability diagram, accuracy by class."""
    names, num_classes = _short(contract.classes), len(contract.classes)
    classes, predicted, confidence = predictions.all()
    correct = classes == predicted
    found = predictions.mistakes()
    pixels = shrink(denormalize(found.images, contract))
    captions = [
        f"{names[label]}\n{names[guess]} {share:.2f}"
        for label, guess, share in zip(*(part.tolist() for part in found[1:]), strict=True)
    ]
    count = int((~correct).sum())
    title = f"the most confident of {count:,} mistakes on {len(classes):,} images"

    yield (
        "mistakes",
        lambda theme: figures.images(
            theme, pixels, captions, wrong=[True] * len(captions), title=title
        ),
    )
    counts = torch.bincount(classes, minlength=num_classes)
    if num_classes <= figures.MOST_CLASSES:
        matrix = metrics.confusion(num_classes)(predicted, classes)
        yield "confusion_matrix", lambda theme: figures.confusion(theme, matrix, names)
    bins = bin_by_confidence(confidence, correct)
    yield "reliability", lambda theme: figures.reliability(theme, *bins)

    hits = torch.bincount(classes[correct], minlength=num_classes)
    present = counts.nonzero().flatten()
    shares = 100 * hits[present] / counts[present]
    order = shares.argsort(stable=True)[:MOST_BARS]
    bars = {
        f"{names[k]} ({int(counts[k]):,})": share
        for k, share in zip(present[order].tolist(), shares[order].tolist(), strict=True)
    }
    some = f", the lowest {MOST_BARS} of {len(present):,}" if len(present) > MOST_BARS else ""
    yield (
        "accuracy_by_class",
        lambda theme: figures.bars(
            theme, bars, unit="accuracy, %", title=f"class (images){some}", main=()
        ),
    )


def draw_batch(images: Tensor, targets: Tensor, contract: DataContract) -> Draw:
    """The first images of a training batch with their labels, as a chart.

    Args:
        images: (N, C, H, W), as the network takes them.
        targets: classes (N,), or mixtures (N, K), of which the two largest parts are shown.
    """
    pixels = shrink(denormalize(images[:SHOWN].cpu(), contract))
    names = _short(contract.classes)
    captions = [_caption(target, names) for target in targets[:SHOWN].cpu()]
    title = "a training batch, augmented"
    return lambda theme: figures.images(theme, pixels, captions, title=title)


def denormalize(images: Tensor, contract: DataContract) -> Tensor:
    """Images of a network as they look: times std plus mean, cut to [0, 1]."""
    mean, std = (torch.tensor(v).reshape(1, -1, 1, 1) for v in (contract.mean, contract.std))
    return (images.float() * std + mean).nan_to_num().clamp(0, 1)


def shrink(images: Tensor) -> Tensor:
    """Images (N, C, H, W) at no more than SMALL pixels, by averaging."""
    height, width = images.shape[2:]
    factor = SMALL / max(height, width)
    if factor >= 1 or not len(images):
        return images
    size = [max(1, round(height * factor)), max(1, round(width * factor))]
    return torch.nn.functional.interpolate(images, size, mode="area")


def _short(classes: Sequence[str]) -> list[str]:
    """Names for a picture: each on one line, cut, and different."""
    names = [figures.shorten(name) for name in classes]
    counts = Counter(names)
    return [f"{k}: {name}" if counts[name] > 1 else name for k, name in enumerate(names)]


def _caption(target: Tensor, names: Sequence[str]) -> str:
    if target.ndim == 0:
        return names[int(target)]
    shares, classes = target.topk(min(2, len(target)))
    return "\n".join(
        f"{names[k]} {share:.2f}" if share < 1 else names[k]
        for share, k in zip(shares.tolist(), classes.tolist(), strict=True)
        if share > 0
    )
