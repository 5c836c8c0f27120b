"""The standard streams of a command: closed from the start, or by a reader that goes away.

A command that only prints ends as `cat` does. One that works goes on without its output. Nothing
here imports more than the standard library, since it comes before everything else.
"""

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import ClassVar, TextIO

BROKEN_PIPE = 141  # the status of a program that SIGPIPE ended: 128 + 13


class _Output(io.RawIOBase):
    """Writes to a file number; asks what to do when that fails."""

    def __init__(self, number: int, failed: Callable[[OSError], None]) -> None:
        super().__init__()
        self.number = number
        self.failed = failed

    def write(self, content: object) -> int:
        data = memoryview(content)  # type: ignore[arg-type]  # bytes, or a buffer of them
        try:
            return os.write(self.number, data)
        except BlockingIOError:
            raise
        except OSError as error:
            self.failed(error)
            return len(data)

    def fileno(self) -> int:
        return self.number

    def isatty(self) -> bool:
        return os.isatty(self.number)

    def writable(self) -> bool:
        return True


class Streams:
    """How the streams of this process are kept.

    Attributes:
        works: the command has work that goes on without its output.
        lost: why stdout takes no more.
        before: what Python wrote to.
    """

    works = False
    lost: OSError | None = None
    before: ClassVar[list[object]] = []


def open_closed() -> None:
    """Put nothing in the place of closed streams, whose numbers the next files would get.

    Output never fails for its encoding: what a stream cannot show becomes escapes.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
    if sys.stdin is None:
        sys.stdin = open(0)  # noqa: SIM115
    sys.stderr = _kept(sys.stderr, sys.__stderr__, 2, _drop)
    sys.stdout = _kept(sys.stdout, sys.__stdout__, 1, _lose)


def _kept(
    stream: TextIO | None, own: TextIO | None, number: int, failed: Callable[[OSError], None]
) -> TextIO:
    """A stream that asks what to do when it cannot be written; one of somebody else as it is."""
    if stream is not None and stream is not own:
        return stream
    encoding, lines = "utf-8", number == 2
    if isinstance(stream, io.TextIOWrapper):
        encoding, lines = stream.encoding, lines or stream.line_buffering
        stream.flush()
        Streams.before.append(stream.detach())  # which may close the number when it goes
    buffered = io.BufferedWriter(_Output(number, failed))
    return io.TextIOWrapper(buffered, encoding, "backslashreplace", line_buffering=lines)


def _drop(error: OSError) -> None:
    """There is nobody to tell that stderr takes no more."""


def _lose(error: OSError) -> None:
    """Stdout takes no more: end, or go on without it and say so once."""
    if Streams.lost is not None:
        return
    Streams.lost = error
    quiet = error.errno == errno.EPIPE
    if not Streams.works:
        if not quiet:
            _say(f"stdout cannot be written: {error.strerror}")
        os._exit(BROKEN_PIPE if quiet else 1)
    _say(f"stdout cannot be written ({error.strerror}); the work goes on without its output")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # for libraries that write to it themselves
    os.close(nowhere)


def _say(text: str) -> None:
    from repvgg.cli.names import program

    sys.stderr.write(f"{program()}: {text}\n")
    sys.stderr.flush()


def end() -> None:
    """End with status 1 if output was lost for another reason than a reader that went away."""
    sys.stdout.flush()
    if Streams.lost is not None and Streams.lost.errno != errno.EPIPE:
        sys.exit(1)
