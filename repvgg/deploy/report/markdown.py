"""report.md: the verdict, the table of files and the model card, short."""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from repvgg.checks import escape
from repvgg.deploy.folder import HTML, REPORT
from repvgg.deploy.report import summary
from repvgg.deploy.report.card import card

if TYPE_CHECKING:
    from repvgg.deploy.report.content import Report

COLUMNS = {
    "file": "file",
    "engine": "engine",
    "size": "size",
    "error": "error",
    "allowed": "allowed",
    "same top-1": "agreement",
    "accuracy": "accuracy",
    "ms": "milliseconds",
    "times as fast": "speedup",
}
# What Markdown or HTML gives a meaning; an underscore within a word has none.
SPECIAL = re.compile(r"[\\`*\[\]<>|~#&!]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\.")


def page(report: "Report") -> str:
    """The text of report.md."""
    files = summary.rows(report)
    cells = ([getattr(row, column) for column in COLUMNS.values()] for row in files)
    sections = [
        [f"# {plain(summary.network(report))}: {report.verdict}"],
        [plain(summary.verdict(report))],
        table([*COLUMNS], cells) if files else [],
        [
            f"[{HTML}]({HTML}) has figures, three lines of code for each file, and all "
            f"measurements; [{REPORT}]({REPORT}) has the numbers."
        ],
        table(("", "model card"), [entry for entry in card(report) if entry[0] != "command"]),
        [code(report.command)],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def plain(text: object) -> str:
    """Text on one line, in which nothing is Markdown or HTML."""
    return SPECIAL.sub(r"\\\g<0>", escape(text))


def code(text: str) -> str:
    """Text on one line as code, whatever it holds."""
    text = escape(text)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{text}{space}{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A table whose cells are plain text."""
    lines = [f"| {' | '.join(map(plain, row))} |" for row in (header, *rows)]
    return [lines[0], "|---" * len(header) + "|", *lines[1:]]
