"""report.html: one file with figures, images and every table, for light and dark pages."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from repvgg import figures
from repvgg.checks import escape
from repvgg.deploy.report import appendix, charts, samples, summary
from repvgg.deploy.report.card import card
from repvgg.deploy.report.samples import Samples, Shown
from repvgg.deploy.report.snippets import snippet
from repvgg.deploy.verification import TRAINED

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

    from repvgg.deploy.report.content import Report

TEMPLATES = Path(__file__).parent / "templates"
SMALL = 100  # pixels of a side, below which an image is shown with sharp pixels


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
    from markupsafe import Markup

    found = charts.of_report(report)
    if given and given.measured and (matrix := charts.confusion(given, report.data.classes)):
        found.append(matrix)
    return [
        Figure(chart.title, Markup(figures.inline_svg(chart.draw, chart.title)), chart.caption)
        for chart in found
    ]


def render(template: str, **values: object) -> str:
    """Fill a template; every value is escaped, except drawings."""
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
    import jinja2
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
