"""The confusion matrix as a picture, readable from two to a thousand classes."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from repvgg.export.formats import require

MOST_NUMBERS = 30  # classes; above it no numbers stand in the cells
MOST_NAMES = 120  # classes; above it the axes show indices
LONGEST_NAME = 24  # letters
INCHES = 14.0  # of the largest figure: a thousand classes have a pixel each


def draw_confusion(counts: Tensor, names: Sequence[str], path: Path) -> None:
    """Draw the share of each class (row) that is predicted as each class (column).

    Args:
        counts: (K, K), int64.

    Raises:
        ImportError: matplotlib is missing.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    count = len(names)
    shares = counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
    inches = min(INCHES, 3.0 + 0.4 * count)
    figure = Figure(figsize=(inches + 1, inches), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    power = 1 / 2 if count <= MOST_NAMES else 1 / 4  # shows rare mistakes beside the diagonal
    image = axes.imshow(
        shares.pow(power).numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest"
    )
    bar = figure.colorbar(image, ax=axes, shrink=0.8, label="share of the class")
    ticks = [0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0]
    bar.set_ticks([tick**power for tick in ticks], labels=[f"{tick:g}" for tick in ticks])
    order = "" if count <= MOST_NAMES else f" ({count:,}, in the order of the network)"
    axes.set_xlabel(f"predicted{order}")
    axes.set_ylabel(f"class{order}")
    if count <= MOST_NAMES:
        short = [name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…" for name in names]
        size = max(5.0, min(10.0, 500 / count))
        # A name may hold $, which would open a formula.
        axes.set_xticks(range(count), short, rotation=90, fontsize=size, parse_math=False)
        axes.set_yticks(range(count), short, fontsize=size, parse_math=False)
    if count <= MOST_NUMBERS:
        for (row, column), held in zip(
            counts.nonzero().tolist(), counts[counts > 0].tolist(), strict=True
        ):
            color = "white" if shares[row, column] > 0.4 else "black"
            axes.text(column, row, f"{held:,}", ha="center", va="center", color=color, fontsize=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks
        figure.savefig(path, metadata={"Software": None})
