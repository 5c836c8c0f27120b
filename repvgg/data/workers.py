"""Worker processes that live as long as their data set, however they start: fork, spawn, ...

Tasks go to the workers in turn, and the results come back in the order of the tasks. A result
depends on the task alone, so a worker can serve any epoch. Workers ignore the signals that stop a
run: the main process finishes its step and ends them. They also end when it is killed.
"""

import contextlib
import itertools
import multiprocessing
import pickle
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker, util
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NoReturn, TypeVar, cast

import torch.multiprocessing  # tensors are sent through shared memory

from repvgg import signals
from repvgg.data.batches import WorkersDied
from repvgg.targets import FROM_USER_CODE, is_from_user_code

Task = TypeVar("Task")
Result = TypeVar("Result")
Worker = tuple[BaseProcess, "Connection[Any, Any]"]
IGNORED = {number for number in signal.Signals if number.name in signals.NAMES}
AHEAD = 2  # tasks sent to a worker at a time
PATIENCE = 1200  # seconds after which a silent worker counts as hung
GRACE = 2  # seconds for workers to end their tasks
HELP = "reduce num_workers or batch_size, or set num_workers to 0"


class Workers(Generic[Task, Result]):
    """Processes that do the tasks of one source; they start with their first task.

    Args:
        work: does a task. It is pickled unless processes are forked.
        count: number of processes.
    """

    def __init__(self, work: Callable[[Task], Result], count: int) -> None:
        self._work = work
        self._count = count
        self._processes: list[Worker] = []
        self._tickets = itertools.count()
        self._wanted: set[int] = set()
        self._results: dict[int, object] = {}  # received while another reader waited
        # Runs before multiprocessing ends its children with SIGTERM, which they ignore.
        self.close = util.Finalize(self, _end, args=(self._processes,), exitpriority=10)

    @property
    def closed(self) -> bool:
        return not self.close.still_active()

    def map(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """The results in the order of the tasks. Several readers can alternate.

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
        except (Exception, KeyboardInterrupt):  # late results would be mixed up with new ones
            self.close()
            raise
        finally:
            for _, ticket in waiting:
                self._wanted.discard(ticket)
                self._results.pop(ticket, None)

    def _send(self, worker: int, message: tuple[int, Task]) -> None:
        if worker == len(self._processes):
            self._processes.append(_start(self._work))
        process, connection = self._processes[worker]
        try:
            connection.send(message)
        except ConnectionError:
            self._fail(_describe(process))

    def _receive(self, worker: int, ticket: int) -> Result:
        if self.closed:
            raise RuntimeError("the worker processes were closed while their results were read")
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
        return cast(Result, result)

    def _fail(self, what: str) -> NoReturn:
        raise WorkersDied(f"{what}; {HELP}")


def _start(work: Callable[[Task], Result]) -> Worker:
    """A process and the connection to it. Signals are blocked until the process ignores them."""
    context = multiprocessing.get_context()
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(work, theirs), daemon=True)
    if sys.platform == "win32":  # has no masks of signals
        process.start()
    else:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        try:
            if context.get_start_method() != "fork":
                resource_tracker.ensure_running()  # unblocks the signals that it ignores
                signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return process, ours


def _serve(work: Callable[[Task], Result], connection: "Connection[Any, Any]") -> None:
    """The loop of a worker, until the main process closes it or dies."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform != "win32":
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
            result: object
            try:
                result = work(task)
            except Exception as error:
                result = _sendable(error)
            try:
                connection.send((ticket, result))
            except ConnectionError:
                return
            except Exception as error:  # nothing was sent
                reason = " ".join(str(error).split())
                cause = "as if /dev/shm were full"
                if "start new thread" in reason:
                    cause = "as if the limit of processes (ulimit -u) were reached"
                message = f"a worker process cannot send a batch, {cause}: {reason}"
                connection.send((ticket, WorkersDied(message)))


def _sendable(error: Exception) -> Exception:
    """An error with its traceback; another in its place if it does not survive pickling."""
    error.add_note(traceback.format_exc())
    own = is_from_user_code(error)  # the traceback is not sent
    try:
        setattr(error, FROM_USER_CODE, own)
        pickle.loads(pickle.dumps(error))
    except Exception:  # of any class of the user's
        replacement = RuntimeError(f"{type(error).__name__}: {error}")
        replacement.__notes__ = error.__notes__
        setattr(replacement, FROM_USER_CODE, own)
        return replacement
    return error


def _describe(process: BaseProcess) -> str:
    process.join(1)
    code = process.exitcode
    if code is None or code >= 0:
        return f"a worker process ended with status {code}"
    name = signal.Signals(-code).name
    reasons = {
        "SIGKILL": ", as the system does when memory runs out",
        "SIGBUS": ", as when shared memory (/dev/shm) is full",
    }
    return f"a worker process was killed by {name}{reasons.get(name, '')}"


def _end(processes: list[Worker]) -> None:
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
