"""The figures of a report: for report.html, and for the run's TensorBoard."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from repvgg import figures, verify
from repvgg.deploy.report import samples, summary
from repvgg.deploy.report.samples import Samples

if TYPE_CHECKING:
    from repvgg.deploy.report.content import Report

WIDTH = 9.6  # inches
MOST_LAYERS = 24  # of the figure of int8


class Chart(NamedTuple):
    """A figure to draw.

    Attributes:
        name: a word, for programs.
        title: what it shows.
        caption: how to read it.
    """

    name: str
    title: str
    draw: figures.Draw
    caption: str


def of_report(report: "Report") -> list[Chart]:
    """The charts of what a report holds."""
    found = (latency(report), blocks(report), int8(report))
    return [chart for chart in found if chart]


def latency(report: "Report") -> Chart | None:
    """Milliseconds of every predictor, with quartiles."""
    if not (latency := report.latency):
        return None
    times = {summary.in_words(name): timing for name, timing in latency.milliseconds.items()}
    most = max(timing.median for timing in times.values())
    bars = functools.partial(
        figures.bars,
        values={name: timing.median for name, timing in times.items()},
        intervals={name: (timing.lower, timing.upper) for name, timing in times.items()},
        unit="milliseconds for one image",
        main=[name for name in times if not name.startswith("multi-branch")],
        number="{:.1f}" if most > 20 else "{:.2f}",
        width=WIDTH,
    )
    rounds = next(iter(times.values())).rounds
    caption = (
        f"Bar: median of {rounds:,} calls. Line: from the lower to the upper quartile, so half of "
        "the calls lie within. The calls of all networks are interleaved. A/A control: the same "
        "network, timed twice; the two bars differ by the noise of the measurement."
    )
    return Chart("latency", "Latency", bars, caption)


def blocks(report: "Report") -> Chart | None:
    """The error of every folded block, by precision."""
    series = {precision: errors for precision, errors in report.blocks.items() if errors}
    if not series:
        return None
    limits = {
        "float64": verify.TOLERANCE[torch.float64],
        "float32": report.float32_bound,
    }
    label = "relative error" if len(series) > 1 else f"relative error, {next(iter(series))}"
    dots = functools.partial(
        figures.dots, series=series, ylabel=label, log=True, limits=limits, width=WIDTH
    )
    caption = (
        "Each folded block gets the same input as the multi-branch block, so errors do not add up "
        "and a wrong block is known by its name. Dashed: the error allowed at the output. An error "
        "of 0 is left out."
    )
    return Chart("error_by_block", "Error of every block", dots, caption)


def int8(report: "Report") -> Chart | None:
    """The change of the outputs if one layer alone is int8, for the most sensitive layers."""
    if not (report.int8 and report.int8.sensitivity):
        return None
    sensitivity = report.int8.sensitivity
    worst = sorted(sensitivity, key=lambda name: -sensitivity[name])[:MOST_LAYERS]
    bars = functools.partial(
        figures.bars,
        values={name: 100 * sensitivity[name] for name in worst},
        unit="% change of the outputs if that layer alone is int8",
        main=[name for name in worst if name not in report.int8.chosen.kept],
        number="{:.2f}",
        width=WIDTH,
    )
    shown = len(worst)
    first = (
        f"The {shown} most sensitive of {len(sensitivity)} layers. "
        if shown < len(sensitivity)
        else ""
    )
    kept = len(report.int8.chosen.kept)
    caption = (
        f"{first}Root mean square of the change, relative to that of the outputs, on "
        f"{report.int8.chosen_on} images. "
        + (f"Grey: stays in float32 ({kept})." if kept else "Every layer became int8.")
    )
    return Chart("int8_by_layer", "What int8 costs, by layer", bars, caption)


def confusion(given: Samples, classes: Sequence[str]) -> Chart | None:
    """Classes and predicted classes; None if there are too many classes."""
    if len(classes) > figures.MOST_CLASSES:
        return None
    matrix = functools.partial(
        figures.confusion, counts=samples.confusion(given), names=list(classes)
    )
    caption = (
        f"Of {given.source}, by the folded network. Row: the class of the image. Column: the "
        "predicted class. Colour: share of the row; it grows with the root, to show rare mistakes."
    )
    return Chart("confusion", "Confusion matrix", matrix, caption)
