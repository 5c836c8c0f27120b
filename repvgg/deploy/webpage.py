"""report.html: one file with figures, images and every table, for light and dark pages."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from repvgg import figures, verify
from repvgg.checks import escape, require
from repvgg.deploy import appendix, samples, summary
from repvgg.deploy.card import card
from repvgg.deploy.samples import Samples, Shown
from repvgg.deploy.snippets import snippet
from repvgg.deploy.verification import TRAINED

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

    from repvgg.deploy.report import Report

TEMPLATES = Path(__file__).parent / "templates"
SMALL = 100  # pixels of a side, below which an image is shown with sharp pixels
WIDTH = 9.6  # inches of a figure
MOST_LAYERS = 24  # of the figure of int8


class Figure(NamedTuple):
    """A figure on a page: what it shows, drawn, and how to read it."""

    title: str
    svg: "Markup"
    caption: str


def page(report: "Report", given: Samples | None, drawn: Sequence[Figure]) -> str:
    """The text of report.html; see `Report.to_html`."""
    classes = list(report.data.classes)
    return render(
        "report.html",
        report=report,
        name=summary.network(report),
        verdict=summary.verdict(report).replace(" %", "\u00a0%"),
        files=[(row, snippet(row.file, report)) for row in summary.rows(report)],
        legend=_legend(report),
        timed=report.latency is not None,
        scored=bool(report.accuracy_on_probe or report.accuracy_on_validation),
        figures=drawn,
        samples=_sections(given, classes) if given else [],
        small=max(report.data.image_size) <= SMALL,
        card=card(report),
        appendix=appendix.sections(report),
    )


def draw(report: "Report", given: Samples | None) -> list[Figure]:
    """The figures of a report.

    Raises:
        ImportError: matplotlib is missing.
    """
    found = [_latency(report), _blocks(report), _int8(report)]
    if given and given.measured:
        found.append(_confusion(report, given))
    return [figure for figure in found if figure]


def render(template: str, **values: object) -> str:
    """Fill a template; every value is escaped, except drawings.

    Raises:
        ImportError: jinja2 is missing.
    """
    return (
        _environment()
        .get_template(template)
        .render(
            light=figures.css_variables(figures.LIGHT),
            dark=figures.css_variables(figures.DARK),
            **values,
        )
    )


@functools.cache
def _environment() -> "Environment":
    jinja2 = require("jinja2")
    from markupsafe import Markup

    environment: Environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else _visible(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = figures.shorten
    return environment


def _visible(text: str) -> str:
    """Text whose control characters are escapes; lines stay lines."""
    return "\n".join(map(escape, text.split("\n")))


def inline(title: str, draw: figures.Draw, caption: str) -> Figure:
    """Draw a figure for a page."""
    from markupsafe import Markup

    return Figure(title, Markup(figures.inline_svg(draw, title)), caption)


def _legend(report: "Report") -> str:
    probe = "validation images" if report.accuracy_on_probe else "images of noise"
    parts = [
        f"Error: of the outputs against the multi-branch network in float64, on {report.images} "
        f"{probe}, relative to the largest output."
    ]
    if report.int8:
        parts.append("Error of int8: the accuracy lost.")
    if report.accuracy_on_validation:
        parts.append(f"Same top-1 and accuracy: on {summary.validation(report)}.")
    elif report.accuracy_on_probe:
        parts.append(f"Accuracy: on these {report.images} images, the only ones in the checkpoint.")
    if latency := report.latency:
        parts.append(
            f"Milliseconds: median and quartiles for one image, {summary.threads(latency)}."
        )
        if latency.noisy:
            parts.append("The machine was too busy for ratios.")
        elif TRAINED in latency.milliseconds:
            median = latency.milliseconds[TRAINED].median
            parts.append(f"Times as fast: as the multi-branch network in PyTorch, {median:.2f} ms.")
    return " ".join(parts)


def _latency(report: "Report") -> Figure | None:
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
    return inline("Latency", bars, caption)


def _blocks(report: "Report") -> Figure | None:
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
    return inline("Error of every block", dots, caption)


def _int8(report: "Report") -> Figure | None:
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
    return inline("What int8 costs, by layer", bars, caption)


def _confusion(report: "Report", given: Samples) -> Figure | None:
    classes = report.data.classes
    if len(classes) > samples.MOST_CLASSES:
        return None
    matrix = functools.partial(
        figures.confusion, counts=samples.confusion(given), names=list(classes)
    )
    caption = (
        f"Of {given.source}, by the folded network. Row: the class of the image. Column: the "
        "predicted class. Colour: share of the row; it grows with the root, to show rare mistakes."
    )
    return inline("Confusion matrix", matrix, caption)


def _sections(given: Samples, classes: list[str]) -> list[tuple[str, str, list[Shown]]]:
    wrong = samples.mistakes(given)
    total = int((given.probabilities.argmax(1) != given.labels).sum())
    found = [
        (
            "Sample images",
            f"Evenly spread over {given.source}, with the prediction and its probability.",
            samples.spread(given),
        ),
        (
            "Most confident mistakes",
            f"{len(wrong)} of {total} mistakes on {given.source}.",
            wrong,
        ),
    ]
    return [
        (title, caption, [samples.show(given, index, classes) for index in indices])
        for title, caption, indices in found
        if indices
    ]
