"""Programs in processes of their own, without the seconds in which each imports torch.

A server imports everything once, and every program is forked from it. A program has its own process
id, folder, environment, arguments, streams, signals and status. What an import prints, needs or
breaks does not show, and nothing is destroyed at the end: those take `commands.run_fresh`.
"""

import atexit
import contextlib
import functools
import importlib
import logging.config
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
SECONDS = 300  # after which a program is stopped
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.preloaded"])


class Process:
    """A program that runs, as `subprocess.Popen` shows one."""

    def __init__(
        self,
        *command: str | Path,
        cwd: Path,
        strict: bool = False,
        terminal: str | None = None,
        forks: int = 0,
    ) -> None:
        """Start `python COMMAND` in a session of its own.

        Args:
            strict: every warning is an error.
            terminal: the place of its streams, and what ends it when it is closed.
            forks: the number of processes of Lightning or torchrun that are forked too.
        """
        self.args = [*map(str, command)]
        self._files = [] if terminal else [_file(self), _file(self)]
        streams = [terminal] * 3 if terminal else [os.devnull, *map(_path, self._files)]
        self._process = CONTEXT.Process(
            target=_run,
            args=(
                self.args,
                str(cwd),
                {**os.environ, "PYTHONPATH": str(ROOT)},
                streams,
                strict,
                forks,
            ),
            daemon=True,  # ends with the tests
        )
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float = SECONDS) -> int:
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        return status

    def communicate(self) -> tuple[str, str]:
        """Wait for the end; return what was written to the two streams."""
        self.wait()
        out, err = (Path(_path(file)).read_text(encoding="utf-8") for file in self._files)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def completed(self) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(self.args, self.wait(), *self.communicate())


def _file(owner: object) -> int:
    """A file without a name, which nothing else can remove, as long as its owner lives."""
    file = os.memfd_create("stream")
    weakref.finalize(owner, os.close, file)
    return file


def _path(file: int, process_id: int | None = None) -> str:
    """Where a process of ours opens what another one has open."""
    return f"/proc/{process_id or os.getpid()}/fd/{file}"


def _run(
    command: list[str],
    folder: str,
    environment: dict[str, str],
    streams: list[str],
    strict: bool,
    forks: int,
) -> NoReturn:
    """Be `python COMMAND` from here on."""
    importlib.import_module("tests.support.preloaded")  # the server ignores an ImportError
    os.setsid()
    for number, path in enumerate(streams):
        opened = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(  # noqa: SIM115
        2, "w", buffering=1, errors="backslashreplace", closefd=False
    )
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if forks:
        command = _fork_ranks(command, forks)
    np.random.seed()
    multiprocessing.set_start_method(None, force=True)
    process.ORIGINAL_DIR = os.getcwd()
    process.current_process().daemon = False
    _keep_loggers()
    if strict:
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.`", FutureWarning)
    sys.orig_argv = [sys.executable, *command]
    status = _program(command)
    atexit._run_exitfuncs()
    sys.exit(status)


def _fork_ranks(command: list[str], count: int) -> list[str]:
    """Fork processes that wait until they are started; what this one is to run."""
    waiting: list[tuple[int, Connection]] = []
    for _ in range(count):
        reader, writer = multiprocessing.Pipe(duplex=False)
        if pid := os.fork():
            reader.close()
            waiting.append((pid, writer))
            continue
        writer.close()
        try:
            (_, *command), environment, folder, has_session = reader.recv()
        except EOFError:
            os._exit(0)  # nothing started it
        if has_session:
            os.setsid()
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder or ".")
        return [word for word in command if word != "-u"]
    start = functools.partial(_Rank, waiting)
    launcher = importlib.import_module("lightning.pytorch.strategies.launchers.subprocess_script")
    launcher.subprocess = types.SimpleNamespace(Popen=start)
    if command[:2] == ["-m", "torch.distributed.run"]:
        handler = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
        importlib.import_module(handler).Popen = start
    return command


class _Rank:
    """What Lightning and torchrun need of `subprocess.Popen`."""

    returncode: int | None = None

    def __init__(
        self,
        waiting: list[tuple[int, Connection]],
        args: Sequence[str],
        *,
        env: dict[str, str],
        cwd: str | None = None,
        stdout: None = None,
        stderr: None = None,
        start_new_session: bool = False,
    ) -> None:
        self.args = args
        self.pid, pipe = waiting.pop()
        pipe.send((args, env, cwd, start_new_session))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = SECONDS) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


@contextlib.contextmanager
def spawning_from_server() -> Iterator[None]:
    """Let the server fork what torch spawns in this process.

    All that it gets is pickled, as for a new process, whose imports it saves.
    """
    start = torch.multiprocessing.start_processes

    def forked(
        function: Callable[..., None], *, start_method: str, **options: object
    ) -> torch.multiprocessing.ProcessContext | None:
        assert start_method == "spawn"
        spawned = functools.partial(_spawned, os.getpid(), dict(os.environ), function)
        return start(spawned, start_method="forkserver", **options)

    with mock.patch.object(torch.multiprocessing, "start_processes", forked):
        yield


def _spawned(
    parent: int, environment: dict[str, str], function: Callable[..., None], *args: object
) -> None:
    """Call a function with the streams and the environment of another process."""
    for number in (1, 2):
        opened = os.open(_path(number, parent), os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    function(*args)


def _program(command: list[str]) -> int:
    try:
        if command[0] == "-c":
            sys.argv, sys.path[:0] = ["-c", *command[2:]], [""]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(command[1], main.__dict__)
        elif command[0] == "-m":
            sys.argv, sys.path[:0] = command[1:], [os.getcwd()]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:0] = command, [os.path.dirname(command[0])]
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stopped:
        if isinstance(stopped.code, int):
            return stopped.code
        if stopped.code is not None:
            print(stopped.code, file=sys.stderr)
        return int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _keep_loggers() -> None:
    """Hydra disables the loggers that exist: in a new process, none of what is imported later."""
    configure = logging.config.DictConfigurator.configure

    def keep(self: logging.config.DictConfigurator) -> None:
        self.config["disable_existing_loggers"] = False
        configure(self)

    logging.config.DictConfigurator.configure = keep
