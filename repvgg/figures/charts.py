"""Charts with axes: bars, curves and dots, drawn in a theme as figures of matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from repvgg.figures.names import MOST_NAMES, shorten
from repvgg.figures.style import Theme, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
