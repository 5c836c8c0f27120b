"""Worker processes that live as long as their data set, whatever starts them: fork, spawn, ...

A task goes to worker i modulo their number and its result comes back in the same order. A result
depends on the task alone, so that a worker can serve any epoch. Workers ignore the signals that
stop a run: the main process finishes its step and ends them, and they end when it is killed.
"""

import contextlib
import itertools
import multiprocessing
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker, util
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

import torch.multiprocessing  # tensors are sent through shared memory

from repvgg import signals
from repvgg.data.batches import WorkersDied

IGNORED = {getattr(signal, name) for name in signals.NAMES if hasattr(signal, name)}
AHEAD = 2  # tasks that a worker has at a time
PATIENCE = 1200  # seconds after which a worker that sends nothing counts as hung
GRACE = 2  # seconds that workers have to end what they do
HELP = "pass a smaller data.num_workers or data.batch_size, or data.num_workers=0"


class Workers:
    """Processes that do the tasks of one source; they start with their first task.

    Args:
        work: what a worker does with a task. Pickled where processes are not forked.
        count: of processes.
    """

    def __init__(self, work: Callable[[Any], Any], count: int) -> None:
        self._work = work
        self._count = count
        self._processes: list[tuple[Any, Connection]] = []
        self._tickets = itertools.count()
        self._wanted: set[int] = set()
        self._results: dict[int, Any] = {}  # that came while another reader waited for its own
        # Runs before multiprocessing ends its children with SIGTERM, which they ignore.
        self.close = util.Finalize(self, _end, args=(self._processes,), exitpriority=10)

    @property
    def closed(self) -> bool:
        return not self.close.still_active()

    def map(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """The results in the order of the tasks. Several readers can take turns.

        Raises:
            WorkersDied: a worker was killed, hangs or has no shared memory left.
        """
        remaining = iter(tasks)
        turns = itertools.cycle(range(self._count))
        waiting: deque[tuple[int, int]] = deque()  # worker, ticket

        def send(count: int) -> None:
            for task in itertools.islice(remaining, count):
                worker, ticket = next(turns), next(self._tickets)
                self._wanted.add(ticket)
                waiting.append((worker, ticket))
                self._send(worker, (ticket, task))

        try:
            send(AHEAD * self._count)
            while waiting:
                result = self._receive(*waiting[0])
                waiting.popleft()
                send(1)
                yield result
        except (Exception, KeyboardInterrupt):  # what is on its way would be taken for the next
            self.close()
            raise
        finally:
            for _, ticket in waiting:
                self._wanted.discard(ticket)
                self._results.pop(ticket, None)

    def _send(self, worker: int, message: Any) -> None:
        if worker == len(self._processes):
            self._processes.append(_start(self._work))
        process, connection = self._processes[worker]
        try:
            connection.send(message)
        except ConnectionError:
            self._fail(_describe(process))

    def _receive(self, worker: int, ticket: int) -> Any:
        if self.closed:
            raise RuntimeError("the worker processes were ended while their results were read")
        process, connection = self._processes[worker]
        while ticket not in self._results:
            ready = wait([connection, process.sentinel], timeout=PATIENCE)
            if not ready:
                self._fail(f"a worker process has sent no batch for {PATIENCE // 60} minutes")
            if connection not in ready:
                self._fail(_describe(process))
            try:
                given, result = connection.recv()
            except (EOFError, OSError, RuntimeError) as error:
                process.join(1)
                dead = not process.is_alive()
                self._fail(_describe(process) if dead else f"a batch cannot be received: {error}")
            if given in self._wanted:
                self._wanted.remove(given)
                self._results[given] = result
        result = self._results.pop(ticket)
        if isinstance(result, WorkersDied):
            self._fail(str(result))
        if isinstance(result, BaseException):
            raise result
        return result

    def _fail(self, what: str) -> NoReturn:
        raise WorkersDied(f"{what}; {HELP}")


def _start(work: Callable[[Any], Any]) -> tuple[Any, Connection]:
    """A process and the connection to it. Signals wait until the process ignores them."""
    context = multiprocessing.get_context()
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(work, theirs), daemon=True)
    if not hasattr(signal, "pthread_sigmask"):
        process.start()
    else:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        try:
            if context.get_start_method() != "fork":
                resource_tracker.ensure_running()  # unblocks what it ignores itself
                signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return process, ours


def _serve(work: Callable[[Any], Any], connection: Connection) -> None:
    """What a worker runs, until the main process ends it or is no more."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None
    with contextlib.suppress(ConnectionError, EOFError):
        while connection in wait([connection, parent.sentinel]):
            message = connection.recv()
            if message is None:
                return
            ticket, task = message
            try:
                result = work(task)
            except Exception as error:
                error.add_note(traceback.format_exc())
                result = error
            try:
                connection.send((ticket, result))
            except ConnectionError:
                return
            except Exception as error:  # nothing was sent
                reason = " ".join(str(error).split())
                message = (
                    f"a worker process cannot send a batch, as if /dev/shm were full: {reason}"
                )
                connection.send((ticket, WorkersDied(message)))


def _describe(process: Any) -> str:
    process.join(1)
    code = process.exitcode
    if code is None or code >= 0:
        return f"a worker process ended with status {code}"
    name = signal.Signals(-code).name
    reasons = {
        "SIGKILL": ", as the system does where memory runs out",
        "SIGBUS": ", as where shared memory (/dev/shm) is full",
    }
    return f"a worker process was killed by {name}{reasons.get(name, '')}"


def _end(processes: list[tuple[Any, Connection]]) -> None:
    for _, connection in processes:
        with contextlib.suppress(OSError):
            connection.send(None)
    deadline = time.monotonic() + GRACE
    for process, connection in processes:
        process.join(max(0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
        connection.close()
    processes.clear()
