"""Charts of the project: each draws numbers in a theme and returns a figure of matplotlib."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repvgg.checks import escape
from repvgg.figures.style import Theme, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NUMBERS = 30  # rows; above it no numbers stand in the cells of a matrix
MOST_NAMES = 120  # rows; above it the axes show indices
LONGEST_NAME = 24  # letters
LARGEST = 12.0  # inches of a matrix
COLORMAP = "Blues"


def bars(
    theme: Theme,
    values: Mapping[str, float],
    *,
    unit: str,
    title: str = "",
    intervals: Mapping[str, tuple[float, float]] | None = None,
    main: Sequence[str] = (),
    number: str = "{:.1f}",
    width: float = 7.0,
) -> Figure:
    """Horizontal bars with their numbers, the first on top.

    Args:
        values: by name.
        unit: of the values, at the axis.
        intervals: lower and upper end, such as the quartiles, drawn as a line over the bar.
        main: names of the bars in the main colour; empty colours all.
        number: format of the numbers.
        width: inches.
    """
    with styled(theme):
        figure, axes = new_figure(width, 0.75 + 0.36 * len(values) + 0.25 * bool(title))
        names, lengths = [*values], [*values.values()]
        colors = [theme.main if not main or name in main else theme.neutral for name in names]
        rows = range(len(names))
        axes.barh(rows, lengths, color=colors, height=0.62)
        ends = [max(0.0, length) for length in lengths]
        for row, name in enumerate(names):
            if intervals and name in intervals:
                low, high = intervals[name]
                axes.plot([low, high], [row, row], color=theme.text, linewidth=1.2, alpha=0.7)
                ends[row] = max(ends[row], high)
        reach = max(ends, default=1.0) or 1.0
        for row, length in zip(rows, lengths, strict=True):
            axes.text(ends[row] + reach * 0.012, row, number.format(length), va="center_baseline")
        axes.set_yticks(rows, [shorten(name, 48) for name in names])
        axes.set_xlim(min(0.0, *lengths) if lengths else 0.0, reach * 1.12)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.spines["left"].set_color(theme.muted)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0)
        axes.xaxis.grid(True)
        axes.set_xlabel(unit)
        axes.set_title(title, pad=10 if title else 0)
    return figure


def stacked_bars(
    theme: Theme,
    shares: Mapping[str, Sequence[float]],
    rows: Sequence[str],
    *,
    unit: str,
    title: str = "",
    width: float = 7.0,
) -> Figure:
    """Horizontal bars made of parts, such as the branches of every block.

    Args:
        shares: by part, a value for every row.
        rows: names.
        unit: of the values, at the axis.
        width: inches.
    """
    with styled(theme):
        figure, axes = new_figure(width, 1.2 + 0.24 * len(rows))
        left = torch.zeros(len(rows), dtype=torch.float64)
        for (name, values), color in zip(shares.items(), theme.series, strict=False):
            axes.barh(range(len(rows)), values, left=left, color=color, height=0.7, label=name)
            left += torch.tensor(values, dtype=torch.float64)
        axes.set_yticks(range(len(rows)), [shorten(row) for row in rows], fontsize=8)
        axes.set_xlim(0, float(left.max()) if len(left) else 1)
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)
        axes.set_xlabel(unit)
        axes.set_title(title, pad=24)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(shares), borderpad=0)
    return figure


def lines(
    theme: Theme,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    log: bool = False,
    width: float = 7.0,
    height: float = 3.2,
) -> Figure:
    """Curves with a dot at each point.

    Args:
        series: by name, x and y.
        log: the y axis is logarithmic; not if no value is above 0.
        width, height: inches.
    """
    with styled(theme):
        figure, axes = new_figure(width, height)
        for (name, (x, y)), color in zip(series.items(), theme.series, strict=False):
            axes.plot(x, y, color=color, label=name, marker="o", markersize=3.5, linewidth=1.6)
        log = log and any(value > 0 for _, y in series.values() for value in y)
        _finish(axes, xlabel, ylabel, title, log=log, legend=len(series) > 1)
    return figure


def dots(
    theme: Theme,
    series: Mapping[str, Mapping[str, float]],
    *,
    ylabel: str,
    title: str = "",
    log: bool = False,
    limits: Mapping[str, float] | None = None,
    width: float = 7.0,
    height: float = 3.4,
) -> Figure:
    """A dot for each name, such as the error of every block, in one or more series.

    Above 120 names the axis shows none.

    Args:
        series: by name, a value for each position; positions come in the order of the first.
        log: the y axis is logarithmic, and values of 0 are left out; not if all are 0.
        limits: of a series, by its name, drawn as a dashed line in its colour.
        width, height: inches.
    """
    with styled(theme):
        figure, axes = new_figure(width, height)
        names = [*dict.fromkeys(name for values in series.values() for name in values)]
        log = log and any(value > 0 for values in series.values() for value in values.values())
        place = {name: index for index, name in enumerate(names)}
        for (label, values), color in zip(series.items(), theme.series, strict=False):
            shown = {name: value for name, value in values.items() if value > 0 or not log}
            x = [place[name] for name in shown]
            axes.plot(x, [*shown.values()], "o", color=color, markersize=5, label=label)
            if limits and label in limits:
                axes.axhline(limits[label], color=color, linewidth=1, linestyle="--")
        size = 8 if len(names) <= 40 else 5
        labels = [shorten(name) for name in names]
        if len(names) <= MOST_NAMES:
            axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=size)
        else:
            axes.set_xticks([])
        _finish(axes, "", ylabel, title, log=log)
        if len(series) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(series), borderpad=0)
            axes.set_title(title, pad=24 if title else 0)
    return figure


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


def reliability(
    theme: Theme, confidence: Sequence[float], accuracy: Sequence[float], counts: Sequence[int]
) -> Figure:
    """Accuracy over confidence, in bins; a calibrated network lies on the diagonal.

    The figure of Guo et al., 2017, arXiv:1706.04599. Grey bars below show the images of each bin.

    Args:
        confidence, accuracy: means of each bin of equal width; those of empty bins are not read.
        counts: images of each bin.
    """
    with styled(theme):
        figure, axes = new_figure(4.6, 4.6)
        bins = len(counts)
        edges = [index / bins for index in range(bins)]
        held = [index for index in range(bins) if counts[index]]
        total = max(1, sum(counts))
        axes.bar(
            [edges[index] for index in held],
            [accuracy[index] for index in held],
            width=1 / bins,
            align="edge",
            color=theme.main,
            edgecolor=theme.page,
            linewidth=0.8,
            label="accuracy",
        )
        axes.plot([0, 1], [0, 1], color=theme.muted, linewidth=1, linestyle="--")
        axes.plot(
            [confidence[index] for index in held],
            [accuracy[index] for index in held],
            "o",
            color=theme.second,
            markersize=4,
            label="mean confidence",
        )
        error = sum(
            counts[index] * abs(accuracy[index] - confidence[index]) / total for index in held
        )
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.12, 1.02)
        for index in held:  # the images of a bin, as bars that hang below 0
            share = counts[index] / max(counts)
            axes.bar(edges[index], -0.1 * share, width=1 / bins, align="edge", color=theme.neutral)
        title = f"calibration error (ECE) {error:.3f}, {sum(counts):,} images"
        _finish(axes, "confidence", "accuracy", title, legend=True)
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


def shorten(name: str, letters: int = LONGEST_NAME) -> str:
    """A name on one line, without control characters, cut if it is long; wide letters are two."""
    name = escape(name)
    widths = [2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in name]
    if sum(widths) <= letters:
        return name
    while sum(widths) > letters - 1:
        widths.pop()
    return f"{name[: len(widths)]}…"


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


def _finish(
    axes: Axes, xlabel: str, ylabel: str, title: str, *, log: bool = False, legend: bool = False
) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, pad=10 if title else 0)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.grid(True)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    if legend:
        axes.legend()
