"""What a command shows: panels, bars and steps on a terminal, plain lines in a pipe or a file.

rich draws on the terminal. It is imported late, since --help needs none of it. Text of the user is
never read as markup. Paths and commands stand outside of boxes, in one line each, to be copied.
"""

import contextlib
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from repvgg.checks import escape

if TYPE_CHECKING:
    from rich.console import Console

NAME_WIDTH = 14  # of the first column
REDRAW_EVERY = 0.5  # seconds; drawing takes 1.6 ms

Facts = Sequence[tuple[str, str]]  # names and values, one a line


def is_interactive(stream: TextIO | None = None) -> bool:
    """Whether a stream, stdout by default, is a terminal that can redraw a line."""
    return (stream or sys.stdout).isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def console(stream: TextIO | None = None) -> "Console":
    """The console of rich that takes text as it is. It honours NO_COLOR."""
    from rich.console import Console

    return Console(stderr=stream is sys.stderr, highlight=False, markup=False, emoji=False)


def print_facts(title: str, facts: Facts, commands: Facts = ()) -> None:
    """Print a name and a value on each line; on a terminal the facts are in a panel.

    Args:
        commands: lines to be copied, which hold paths or commands. They are never in the panel.
    """
    facts = [(name, escape(value)) for name, value in facts]
    if is_interactive():
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in facts:
            table.add_row(Text(name), Text(value))
        console().print(Panel(table, title=Text(title), title_align="left", expand=False))
        facts = []
    for name, value in (*facts, *commands):
        print(f"{name:<{NAME_WIDTH}}{escape(value)}", flush=True)


def width() -> int | None:
    """The columns of the terminal; None for a pipe or a file."""
    return shutil.get_terminal_size().columns if is_interactive() else None


def wrapped(text: str) -> str:
    """A line broken between words for a terminal; as it is for a pipe or a file."""
    columns = width()
    if columns is None or len(text) <= columns:
        return text
    return textwrap.fill(text, columns, break_long_words=False, break_on_hyphens=False)


@contextlib.contextmanager
def bar(
    verb: str, total: int, stream: TextIO | None = None, *, hidden: bool = False
) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal, which disappears at the end; gives a function that advances it.

    It has no thread, so that processes can be forked below it.

    Args:
        verb: what happens, such as "decoding".
        stream: stdout by default. Nothing is shown if it is no terminal.
        hidden: show nothing in any case.
    """
    if hidden or not is_interactive(stream):
        yield lambda _: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    shown = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        console=console(stream),
        auto_refresh=False,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # what goes into a file stays there
        redirect_stderr=sys.stderr.isatty(),
    )
    task = shown.add_task(verb, total=total)
    drawn = time.monotonic()

    def advance(count: int) -> None:
        nonlocal drawn
        shown.advance(task, min(count, total - int(shown.tasks[0].completed)))
        if time.monotonic() - drawn >= REDRAW_EVERY:
            shown.refresh()
            drawn = time.monotonic()

    with shown:
        yield advance


class Step:
    """One step of a command.

    Attributes:
        result: one line, which is shown when the step ends.
    """

    def __init__(self) -> None:
        self.result = "done"


@contextlib.contextmanager
def step(name: str, *, still: bool = False) -> Iterator[Step]:
    """Show a step: a spinner while it runs on a terminal, and a line with its result at the end.

    A step that raises shows no line: the error has its own.

    Args:
        still: the spinner does not move, so that it does not disturb a measurement.
    """
    one = Step()
    if not is_interactive():
        yield one
        print(f"{name:<{NAME_WIDTH}}{escape(one.result)}", flush=True)
        return
    from rich.text import Text

    shown = console()
    with shown.status(Text(name), refresh_per_second=0.01 if still else 8):
        yield one
    line = Text.assemble((f"{name:<{NAME_WIDTH}}", "bold green"), escape(one.result))
    shown.print(line, soft_wrap=True)
