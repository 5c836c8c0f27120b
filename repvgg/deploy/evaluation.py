"""The results of an evaluation, as text and as files."""

import csv
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from repvgg import figures
from repvgg.checks import escape
from repvgg.deploy.evaluate_settings import METRICS
from repvgg.deploy.tables import open_text

NUM_WORST = 5  # classes in the summary
QUANTILE = 1.959964  # of the normal distribution: 95 % lie within


@dataclass(frozen=True)
class ClassResult:
    """One class.

    Attributes:
        index: of its logit.
        images: of this class.
        recall: share of them that is recognized; also called the accuracy of the class.
        precision: share of this class among the images for which it is predicted; None if it
            never is.
        f1: harmonic mean of both.
    """

    index: int
    name: str
    images: int
    recall: float
    precision: float | None
    f1: float


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        metrics: see `repvgg.metrics.classification`.
        confusion: (K, K), int64: images by class and predicted class.
        classes: K names.
        known: outputs of the classes that the data has.
    """

    metrics: Mapping[str, float]
    confusion: Tensor
    classes: Sequence[str]
    known: Sequence[int]

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy (Wilson, 1927), as other images may give."""
        count, share = self.images, self.metrics["accuracy"]
        square = QUANTILE**2
        centre = (share + square / (2 * count)) / (1 + square / count)
        half = math.sqrt(share * (1 - share) / count + square / (4 * count**2))
        half *= QUANTILE / (1 + square / count)
        return max(0.0, centre - half), min(1.0, centre + half)

    def per_class(self) -> list[ClassResult]:
        """The classes that have images."""
        held, predicted = self.confusion.sum(1).tolist(), self.confusion.sum(0).tolist()
        right = self.confusion.diag().tolist()
        return [
            ClassResult(
                index=row,
                name=self.classes[row],
                images=held[row],
                recall=right[row] / held[row],
                precision=right[row] / predicted[row] if predicted[row] else None,
                f1=2 * right[row] / (held[row] + predicted[row]),
            )
            for row in sorted(self.known)
            if held[row]
        ]

    def summary(self) -> list[str]:
        """Lines for the reader, with the digits that training prints."""
        low, high = self.interval
        lines = [
            f"top-1     {self.metrics['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f})"
        ]
        if "accuracy_top5" in self.metrics:
            lines.append(f"top-5     {self.metrics['accuracy_top5']:.4f}")
        lines.append(f"loss      {self.metrics['loss']:.4f}")
        lines.append(f"ECE       {self.metrics['calibration_error']:.4f}")
        worst = [found for found in self.per_class() if found.recall < 1]
        worst = sorted(worst, key=lambda found: found.recall)[:NUM_WORST]
        shown = [f"{escape(one.name)}: {one.recall:.4f} of {one.images:,}" for one in worst]
        return [*lines, f"worst     {'; '.join(shown)}"] if shown else lines


def write(evaluation: Evaluation, folder: Path, about: Mapping[str, object]) -> list[str]:
    """Write every file but the predictions.

    Args:
        about: what was evaluated, for metrics.json.

    Returns:
        a line for each file that could not be made.
    """
    metrics = {
        key: value if math.isfinite(value) else None for key, value in evaluation.metrics.items()
    }
    results = evaluation.per_class()
    content = {
        **about,
        "images": evaluation.images,
        **metrics,
        "accuracy_interval": evaluation.interval,
        "per_class": [asdict(result) for result in results],
    }
    (folder / METRICS).write_text(json.dumps(content, indent=1) + "\n")
    with open_text(folder / "per_class.csv") as file:
        rows = csv.DictWriter(file, [*ClassResult.__dataclass_fields__], lineterminator="\n")
        rows.writeheader()
        rows.writerows(asdict(result) for result in results)
    known = sorted(evaluation.known)
    with open_text(folder / "confusion.csv") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["class", *evaluation.classes])
        for row in known:
            table.writerow([evaluation.classes[row], *evaluation.confusion[row].tolist()])
    occurring = evaluation.confusion.sum(0) + evaluation.confusion.sum(1)
    shown = sorted({*known} | {*occurring.nonzero().flatten().tolist()})
    names = [evaluation.classes[row] for row in shown]
    draw = functools.partial(
        figures.confusion, counts=evaluation.confusion[shown][:, shown], names=names
    )
    try:
        figures.save_png(draw, folder / "confusion.png")
    except ImportError as error:
        return [f"confusion.png was not drawn: {error}"]
    return []
