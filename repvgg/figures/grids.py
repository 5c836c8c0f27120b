"""Matrices and images: what is drawn in cells, in a theme, as figures of matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repvgg.figures.names import MOST_NAMES, shorten
from repvgg.figures.style import Theme, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_CLASSES = 1000  # of a confusion matrix, which has a pixel for each pair of these
MOST_NUMBERS = 30  # rows; above it no numbers stand in the cells of a matrix
LARGEST = 12.0  # inches of a matrix
COLORMAP = "Blues"


def heat_map(
    theme: Theme,
    values: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    label: str,
    title: str = "",
    number: str = "{:.1f}",
    limits: tuple[float, float] | None = None,
    colormap: str = COLORMAP,
) -> Figure:
    """A matrix as colours, with a number in each cell.

    Args:
        values: (R, C), float; NaN is an empty cell.
        rows, columns: R and C names.
        label: of the colours, with their unit.
        number: format of the numbers.
        limits: values of the first and the last colour; the smallest and the largest by default.
    """
    with styled(theme):
        import matplotlib

        figure, axes = new_figure(2.6 + 0.75 * len(columns), 1.4 + 0.28 * len(rows))
        known = values[~values.isnan()]
        low, high = limits or (float(known.min()), float(known.max()))
        colors = matplotlib.colormaps[colormap]
        image = axes.imshow(
            values.numpy(), cmap=colors, vmin=low, vmax=high, aspect="auto", interpolation="nearest"
        )
        for row, column in (~values.isnan()).nonzero().tolist():
            value = float(values[row, column])
            share = (value - low) / ((high - low) or 1)
            axes.text(
                column,
                row,
                number.format(value),
                ha="center",
                va="center",
                fontsize=8,
                color=_on(colors(min(1.0, max(0.0, share)))),
            )
        axes.set_xticks(range(len(columns)), [shorten(name) for name in columns])
        axes.set_yticks(range(len(rows)), [shorten(name) for name in rows], fontsize=8)
        _frame(axes)
        bar = figure.colorbar(image, ax=axes, label=label, shrink=0.8)
        bar.outline.set_visible(False)
        axes.set_title(title, pad=10 if title else 0)
    return figure


def confusion(theme: Theme, counts: Tensor, names: Sequence[str]) -> Figure:
    """The share of each class (row) that is predicted as each class (column).

    Readable from two to a thousand classes: above 30 no numbers, above 120 no names.

    Args:
        counts: (K, K), int64.
        names: of the K classes.
    """
    with styled(theme):
        from matplotlib.colors import ListedColormap, to_rgb

        count = len(names)
        shares = counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
        short = [shorten(name) for name in names] if count <= MOST_NAMES else [""]
        size = max(5.0, min(10.0, 500 / count))  # points
        labels = 0.4 + max(map(len, short)) * 0.007 * size
        inches = min(LARGEST, 1.5 + 0.36 * count + labels)
        figure, axes = new_figure(inches + 1.2, inches)
        power = 1 / 2 if count <= MOST_NAMES else 1 / 4  # shows rare mistakes beside the diagonal
        red, green, blue = to_rgb(theme.main)
        steps = [(red, green, blue, step / 255) for step in range(256)]  # clear on any page
        image = axes.imshow(
            shares.pow(power).numpy(),
            cmap=ListedColormap(steps),
            vmin=0,
            vmax=1,
            interpolation="nearest" if count <= MOST_NAMES else "none",  # SVG would lose rows
        )
        bar = figure.colorbar(image, ax=axes, shrink=0.8, label="share of the class")
        bar.outline.set_visible(False)
        ticks = [0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0]
        bar.set_ticks([tick**power for tick in ticks], labels=[f"{tick:g}" for tick in ticks])
        order = "" if count <= MOST_NAMES else f" ({count:,}, in the order of the network)"
        axes.set_xlabel(f"predicted{order}")
        axes.set_ylabel(f"class{order}")
        _frame(axes)
        if count <= MOST_NAMES:
            axes.set_xticks(range(count), short, rotation=90, fontsize=size)
            axes.set_yticks(range(count), short, fontsize=size)
        if count <= MOST_NUMBERS:
            for row, column in counts.nonzero().tolist():
                color = theme.page if shares[row, column] ** power > 0.5 else theme.text
                text = f"{int(counts[row, column]):,}"
                axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    return figure


def images(
    theme: Theme,
    pixels: Tensor,
    captions: Sequence[str],
    *,
    wrong: Sequence[bool] = (),
    columns: int = 8,
    title: str = "",
) -> Figure:
    """A grid of images, each with its caption below.

    Args:
        pixels: (N, C, H, W), uint8 or float in [0, 1]; C is 1 or 3, of other channels the mean.
        captions: N texts, such as "7, predicted 1 (0.98)".
        wrong: for each image, whether its caption is in the colour of errors.
        columns: of the grid, at most.
    """
    with styled(theme):
        from matplotlib.figure import Figure

        count = len(pixels)
        columns = max(1, min(columns, count))
        rows = max(1, -(-count // columns))
        high = 1.15 * min(2.0, pixels.shape[2] / pixels.shape[3])  # inches of an image, as below
        top = 0.4 if title else 0.05
        below = 0.1 + 0.13 * max((text.count("\n") + 1 for text in captions), default=0)
        wide = max(1.25 * columns, 0.095 * len(title) + 0.2)
        tall = top + rows * (high + below)
        # Placed by hand: a layout that makes room for captions has none for long ones.
        figure = Figure(figsize=(wide, tall), dpi=100)
        for index in range(count):
            left = 1.25 * (index % columns) + 0.05
            bottom = tall - top - (index // columns) * (high + below) - high
            axes = figure.add_axes((left / wide, bottom / tall, 1.15 / wide, high / tall))
            axes.set_axis_off()
            axes.imshow(_displayable(pixels[index]), cmap="gray", vmin=0, vmax=1)
            color = theme.wrong if index < len(wrong) and wrong[index] else theme.text
            text = "\n".join(shorten(line, 18) for line in captions[index].split("\n"))
            axes.annotate(
                text,
                (0.5, 0),
                (0, -3),
                xycoords="axes fraction",
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=7,
                color=color,
            )
        if title:
            place = (0.05 / wide, 1 - 0.1 / tall)
            figure.text(*place, title, va="top", fontsize=11, weight="bold", color=theme.text)
    return figure


def kernels(
    theme: Theme, maps: Tensor, rows: Sequence[str], columns: Sequence[str], *, title: str = ""
) -> Figure:
    """Kernels as small maps in a table: red is positive, blue negative, relative to each row.

    Colours follow the root of the weight, or a large center would hide the others.

    Args:
        maps: (R, C, H, W).
        rows, columns: R and C names.
    """
    with styled(theme):
        count, parts, height, width = maps.shape
        largest = maps.abs().amax((1, 2, 3), keepdim=True)
        shown = maps / largest.clamp_min(torch.finfo(maps.dtype).tiny)
        shown = shown.sign() * shown.abs().sqrt()
        gap = 1  # weights between two maps, which stay empty
        table = torch.full((count, height + gap, parts, width + gap), torch.nan, dtype=maps.dtype)
        table[:, :height, :, :width] = shown.permute(0, 2, 1, 3)
        tall, wide = count * (height + gap), parts * (width + gap)
        figure, axes = new_figure(3.4 + 0.14 * wide, 0.9 + 0.14 * tall)
        image = axes.imshow(
            table.reshape(tall, wide).numpy(),
            cmap="RdBu_r",
            vmin=-1,
            vmax=1,
            interpolation="nearest",
        )
        middle = (height - 1) / 2
        axes.set_yticks(
            [row * (height + gap) + middle for row in range(count)],
            [shorten(r, 48) for r in rows],
            fontsize=8,
        )
        middle = (width - 1) / 2
        axes.set_xticks([part * (width + gap) + middle for part in range(parts)], columns)
        axes.xaxis.tick_top()
        _frame(axes)
        bar = figure.colorbar(image, ax=axes, shrink=0.6, label="weight / largest of the row")
        bar.outline.set_visible(False)
        ticks = [-1.0, -0.3, -0.03, 0.0, 0.03, 0.3, 1.0]
        roots = [abs(tick) ** 0.5 * (-1 if tick < 0 else 1) for tick in ticks]
        bar.set_ticks(roots, labels=[f"{tick:g}" for tick in ticks])
        axes.set_title(title, pad=10 if title else 0)
    return figure


def _displayable(image: Tensor) -> Any:
    """(H, W) or (H, W, 3) for matplotlib, in [0, 1]."""
    image = image.double() / 255 if image.dtype == torch.uint8 else image.double().clamp(0, 1)
    image = image if len(image) == 3 else image.mean(0, keepdim=True)
    return image.squeeze(0).numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()


def _on(color: tuple[float, float, float, float]) -> str:
    """Black or white, whichever is readable on a colour."""
    red, green, blue, _ = color
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "#fefefe"


def _frame(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
