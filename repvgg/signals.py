"""Signals that stop a run: Ctrl-C, SIGTERM, a closed terminal (SIGHUP) and SLURM's SIGUSR1."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # Windows has the first two
Handler = Callable[[int, FrameType | None], object]
Previous = Handler | int | None  # as signal.signal returns it


class Interrupted(Exception):  # noqa: N818 - not an error
    """A run stopped because of a signal.

    Attributes:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return type(self), (self.signum,)  # exceptions pickle their message by default


def stopping() -> list[signal.Signals]:
    """The signals that stop a run on this system; under nohup SIGHUP does not."""
    found = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    return [
        number
        for number in found
        if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN
    ]


def install(handler: Handler) -> dict[int, Previous]:
    """Handle the stopping signals; return the previous handlers, for `restore`.

    On SIGHUP the terminal is closed and writing to it fails, so its streams are then discarded.
    Outside the main thread, where Python handles no signals, nothing is installed.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    terminals = [number for number in (0, 1, 2) if os.isatty(number)]

    def handle(signum: int, frame: FrameType | None) -> None:
        if signal.Signals(signum).name == "SIGHUP":
            for terminal in terminals:
                with open(os.devnull, "r+b") as nowhere:
                    os.dup2(nowhere.fileno(), terminal)
        handler(signum, frame)

    return {number: signal.signal(number, handle) for number in stopping()}


def restore(handlers: dict[int, Previous]) -> None:
    """Install the previous handlers again."""
    for number, handler in handlers.items():
        if handler is not None:  # not installed by Python
            signal.signal(number, handler)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` on a signal, before Lightning handles it."""

    arrived: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        arrived.append(signum)
        raise Interrupted(signum)

    previous = install(stop)
    try:
        yield
    except Exception as error:
        if arrived and not isinstance(error, Interrupted):  # as C code makes of it
            raise Interrupted(arrived[0]) from error
        raise
    finally:
        restore(previous)


def end_on_signals() -> list[int]:
    """Clean up and exit with status 128 + number on a signal; Ctrl-C is a KeyboardInterrupt.

    Returns:
        the signals that arrive, for `end_if_stopped`.
    """
    arrived: list[int] = []

    def end(signum: int, frame: FrameType | None) -> None:
        arrived.append(signum)
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + signum)

    for number in stopping():
        signal.signal(number, end)
    return arrived


def end_at_once(clean: Callable[[], object] = lambda: None) -> dict[int, Previous]:
    """End the process on a signal, without an exception, which some imports swallow.

    Args:
        clean: called before the end.

    Returns:
        the previous handlers, for `restore`.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            clean()
            if signum == signal.SIGINT:
                over = "\r" if os.isatty(2) else ""  # the ^C that a terminal echoes
                os.write(2, f"{over}stopped by Ctrl-C\n".encode())
        os._exit(128 + signum)

    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, end) for number in stopping()}


@contextlib.contextmanager
def importing(clean: Callable[[], object] = lambda: None) -> Iterator[None]:
    """End the process on a signal, while modules are imported; `clean` as in `end_at_once`."""
    previous = end_at_once(clean)
    try:
        yield
    finally:
        restore(previous)
