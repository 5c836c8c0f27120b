"""Call a function in a process of its own, with its seconds and its memory measured."""

import importlib
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

from tests.support.processes import CONTEXT

SECONDS = 20  # of CPU, after which a call is ended
WAITED = 15 * SECONDS  # the same for a call that sleeps; a busy machine does not reach it


class Call(NamedTuple):
    """What came of a call.

    Attributes:
        seconds: of CPU.
        memory: bytes that the process grew by, at its largest.
        error: the exception's type and message; empty if the call returned.
    """

    seconds: float
    memory: int
    error: str


def measure(function: Callable[..., object], *arguments: object) -> Call:
    """Call a picklable function in a process that has imported torch already."""
    reader, writer = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(
        target=_call, args=(writer, function.__module__, function, arguments), daemon=True
    )
    process.start()
    writer.close()
    try:
        if not reader.poll(WAITED):
            return Call(float(WAITED), 0, "TimeoutError: it did not end")
        return Call(*reader.recv())
    except EOFError:
        process.join(1)
        if process.exitcode == -signal.SIGXCPU:
            return Call(float(SECONDS), 0, "TimeoutError: it did not end")
        return Call(0, 0, f"SystemError: the process died, status {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _call(
    writer: Connection, module: str, function: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    importlib.import_module(module)
    used = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, used + SECONDS + 10))
    before = _peak()
    start = time.process_time()
    error = ""
    try:
        function(*arguments)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    writer.send((time.process_time() - start, _peak() - before, error))


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
