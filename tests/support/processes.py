"""Programs in processes of their own, without the seconds in which each imports torch.

A server imports everything once, and every program is forked from it. A program has its own process
id, folder, environment, arguments, streams, signals and status. What an import prints, needs or
breaks does not show, and nothing is destroyed at the end: those take `commands.run_fresh`.
"""

import atexit
import functools
import importlib
import logging.config
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import types
import warnings
from multiprocessing import process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import numpy as np

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
        forks_rank: bool = False,
    ) -> None:
        """Start `python COMMAND` in a session of its own.

        Args:
            strict: every warning is an error.
            terminal: the place of its streams, and what ends it when it is closed.
            forks_rank: the process that Lightning starts for a second device is forked too.
        """
        self.args = [*map(str, command)]
        self._files = [] if terminal else [_file(), _file()]
        self._said: list[str] = []
        streams = [terminal] * 3 if terminal else [os.devnull, *map(str, self._files)]
        self._process = CONTEXT.Process(
            target=_run,
            args=(
                self.args,
                str(cwd),
                {**os.environ, "PYTHONPATH": str(ROOT)},
                streams,
                strict,
                forks_rank,
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
        for file in self._files:
            self._said.append(file.read_text(encoding="utf-8"))
            file.unlink()
        self._files = []
        out, err = self._said
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


def _file() -> Path:
    number, path = tempfile.mkstemp(prefix="repvgg-tests-")
    os.close(number)
    return Path(path)


def _run(
    command: list[str],
    folder: str,
    environment: dict[str, str],
    streams: list[str],
    strict: bool,
    forks_rank: bool,
) -> NoReturn:
    """Be `python COMMAND` from here on."""
    importlib.import_module("tests.support.preloaded")  # the server ignores an ImportError
    os.setsid()
    for number, path in enumerate(streams):
        opened = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout = sys.__stdin__, sys.__stdout__ = open(0), open(1, "w")  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if forks_rank:
        command = _fork_rank(command)
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


def _fork_rank(command: list[str]) -> list[str]:
    """Fork a process which waits until Lightning starts one; what this one is to run."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    if pid := os.fork():
        reader.close()
        launcher = importlib.import_module(
            "lightning.pytorch.strategies.launchers.subprocess_script"
        )
        start = functools.partial(_Rank, pid, writer)
        launcher.subprocess = types.SimpleNamespace(Popen=start)
        return command
    writer.close()
    try:
        (_, *command), environment, folder = reader.recv()
    except EOFError:
        os._exit(0)  # on one device
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder or ".")
    return command


class _Rank:
    """What Lightning needs of `subprocess.Popen`."""

    returncode: int | None = None

    def __init__(
        self,
        pid: int,
        pipe: Connection,
        command: list[str],
        *,
        env: dict[str, str],
        cwd: str | None,
    ) -> None:
        self.pid = pid
        pipe.send((command, env, cwd))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


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
