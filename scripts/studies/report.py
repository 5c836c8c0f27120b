"""What tables and figures of studies share: the machine, the command, a paired test, a chart."""

import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from repvgg.figures.style import Theme, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Interval(NamedTuple):
    """A value with the ends of its interval."""

    value: float
    lower: float
    upper: float


class Comparison(NamedTuple):
    """Difference of paired runs: mean, half-width of its 95 % interval, p of the paired t-test.

    Interval and p are NaN if the differences do not vary: no test is possible.
    """

    mean: float
    half_width: float
    p: float

    @property
    def interval(self) -> Interval:
        """The mean with the ends of its interval; only the mean if there is none."""
        half = 0.0 if math.isnan(self.half_width) else self.half_width
        return Interval(self.mean, self.mean - half, self.mean + half)


def compare(ours: dict[str, float], theirs: dict[str, float]) -> Comparison:
    """Test the difference of two methods over the seeds that both have."""
    from scipy import stats

    seeds = [seed for seed in ours if seed in theirs]
    first, second = (np.array([runs[seed] for seed in seeds]) for runs in (ours, theirs))
    mean = float((first - second).mean())
    if np.ptp(first - second) == 0:
        return Comparison(mean, math.nan, math.nan)
    test = stats.ttest_rel(first, second)
    return Comparison(mean, float(test.confidence_interval().high) - mean, float(test.pvalue))


@dataclass(frozen=True)
class Panel:
    """One part of the chart `intervals`.

    Attributes:
        title: above it.
        series: by name, then by row: a value with its lower and upper end.
    """

    title: str
    series: Mapping[str, Mapping[str, Interval]]


def intervals(
    theme: Theme,
    panels: Sequence[Panel],
    *,
    unit: str,
    title: str = "",
    number: str = "{:+.1f}",
    reference: float | None = None,
    width: float = 8.0,
) -> "Figure":
    """Values with intervals, a row for each name, in panels side by side.

    Args:
        panels: each with its own axis; rows stand in the order in which their names first appear.
        unit: of the values, at the axis.
        number: format of the numbers beside the dots.
        reference: the value to compare with, drawn as a line.
        width: inches.
    """
    with styled(theme):
        from matplotlib.figure import Figure

        names = list(dict.fromkeys(n for p in panels for one in p.series.values() for n in one))
        labels = list(dict.fromkeys(name for panel in panels for name in panel.series))
        colors = dict(zip(labels, theme.series, strict=False))
        height = 1.1 + len(names) * (0.16 + 0.16 * len(labels)) + 0.25 * bool(title)
        figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
        for column, panel in enumerate(panels, 1):
            axes = figure.add_subplot(1, len(panels), column)
            ends = [end for one in panel.series.values() for row in one.values() for end in row[1:]]
            reach = max(ends) - min(ends) or 1.0
            for label, rows in panel.series.items():
                shift = 0.62 * ((labels.index(label) + 0.5) / len(labels) - 0.5)
                for name, (value, low, high) in rows.items():
                    place = names.index(name) + shift
                    axes.plot([low, high], [place, place], color=colors[label], linewidth=1.4)
                    axes.text(
                        high + 0.03 * reach, place, number.format(value), va="center", fontsize=7
                    )
                places = [names.index(name) + shift for name in rows]
                values = [row[0] for row in rows.values()]
                axes.plot(values, places, "o", color=colors[label], markersize=4.5, label=label)
            if reference is not None:
                axes.axvline(reference, color=theme.muted, linewidth=1, linestyle="--", zorder=0)
            axes.set_yticks(range(len(names)), names if column == 1 else [""] * len(names))
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_xlim(min(ends) - 0.05 * reach, max(ends) + 0.25 * reach)
            axes.spines[["left", "bottom"]].set_visible(False)
            axes.tick_params(length=0)
            axes.xaxis.grid(True)
            axes.set_title(panel.title)
        figure.supxlabel(unit, fontsize=10, color=theme.muted)
        if title:
            figure.suptitle(title, fontsize=11, weight="bold", x=0.01, ha="left", color=theme.text)
        if len(labels) > 1:
            handles, shown = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, shown, loc="outside upper right", ncols=len(labels))
    return figure


def picture(stem: Path | str, alt: str) -> str:
    """The Markdown that shows a figure of `save_svgs` to light and dark readers.

    Args:
        stem: of the files, relative to the page.
        alt: says what the figure shows, for readers who do not see it.
    """
    return (
        "<picture>\n"
        f'  <source media="(prefers-color-scheme: dark)" srcset="{stem}-dark.svg">\n'
        f'  <img alt="{alt}" src="{stem}-light.svg">\n'
        "</picture>"
    )


def command(name: str, settings: Mapping[str, object], defaults: Mapping[str, object]) -> str:
    """The command that repeats a study, without what depends on the machine.

    Shows the settings that differ from their defaults, and `root=...` in place of a path.
    """
    shown = {key: value for key, value in settings.items() if value != defaults[key]}
    if "root" in shown:
        shown["root"] = "..."
    changed = [
        f" {key}={str(value).replace(' ', '')}"
        for key, value in shown.items()
        if key not in ("out", "page", "work", "workers")
    ]
    return f"python -m scripts.studies.{name}{''.join(changed)}"


def machine() -> str:
    """CPU and versions, for the text beside a table."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor()}, {os.cpu_count()} CPUs, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def versions(*packages: str) -> str:
    """Versions of those packages that are installed."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
