"""A terminal that a test looks at: what is written to stdout, with its escape sequences."""

import contextlib
import os
import pty
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

SEQUENCES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOURS = re.compile(r"\x1b\[(?:\d+;)*[34]\d(?:;\d+)*m")


class Terminal:
    """Reads what is written, from a thread: a pseudo terminal holds few bytes."""

    def __init__(self, end: int) -> None:
        self.end = end
        self.held = b""
        self.marks = 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the other end was closed
            while part := os.read(self.end, 1 << 16):
                self.held += part

    def text(self) -> str:
        """Everything that was written so far."""
        sys.stdout.write("\0")
        sys.stdout.flush()
        self.marks += 1
        while self.held.count(b"\0") < self.marks:
            time.sleep(0.001)
        return self.held.replace(b"\0", b"").decode()

    def plain(self) -> str:
        """The same without escape sequences, in lines."""
        return SEQUENCES.sub("", self.text()).replace("\r\n", "\n").replace("\r", "\n")


@contextlib.contextmanager
def terminal(monkeypatch: Any, *, columns: int = 80, kind: str = "xterm") -> Iterator[Terminal]:
    """Put a terminal in the place of stdout."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setenv("COLUMNS", str(columns))
    end, stdout = pty.openpty()
    with os.fdopen(stdout, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        yield Terminal(end)
    os.close(end)
