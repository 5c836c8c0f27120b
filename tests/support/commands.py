"""The two commands of the project as a user runs them, and what their tests share."""

import contextlib
import logging
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from unittest import mock

import hydra
import numpy as np
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image

from repvgg import cli, signals
from tests.support.processes import ROOT, SECONDS, Process

CONFIGS = ROOT / "configs"
SHORT = ("model=repvgg_tiny", "rdrop=true", "trainer.max_epochs=3", "data.batch_size=128")


class TooLong(BaseException):
    """A program in this process did not end; no `except Exception` of its own holds this back."""


def run(
    program: str, *arguments: str, cwd: Path, pictures: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run train.py, deploy.py or a script, or a command of `python -m repvgg`, in this process.

    That saves the 7 seconds of its imports. Whatever it does to the process is undone. Signals,
    several devices, the end of the interpreter and Lightning's log, which Hydra turns off where it
    was imported first, need `run_process`.

    Args:
        pictures: draw those for TensorBoard, which takes a second.
    """
    path, *words = _words(program)
    command = [path, *words, *arguments]
    status: object = 0
    trains = program in ("train.py", "train")
    drawing = _drawing(pictures) if trains else contextlib.nullcontext()
    with _undone(), drawing, _composing_once(arguments), _captured() as (out, err):
        os.chdir(cwd)
        os.environ.pop(cli.FULL_ERROR, None)
        sys.argv, sys.orig_argv = [*command], [sys.executable, *command]
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as stopped:
            status = stopped.code or 0
        except TooLong:
            raise
        except BaseException:
            traceback.print_exc()
            status = 1
    if isinstance(status, str):
        err, status = [*err, status], 1
    return subprocess.CompletedProcess(command, status, "".join(out), "".join(err))


def _words(program: str) -> list[str]:
    if program.endswith(".py"):
        return [str(ROOT / program)]
    return [str(ROOT / "repvgg" / "__main__.py"), program]


def run_process(
    program: str, *arguments: str, cwd: Path, forks: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, where every warning is an error."""
    command = (*_start(program), *arguments)
    return Process(*command, cwd=cwd, strict=True, forks=forks).completed()


def run_fresh(program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same in a process that is not forked: with its own imports and warnings of these."""
    return subprocess.run(
        [sys.executable, "-W", "error", *quiet(), *_start(program), *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def _start(program: str) -> list[str]:
    return [str(ROOT / program)] if program.endswith(".py") else ["-m", "repvgg", program]


def wait_for(path: Path, process: Process) -> None:
    """Wait until a running process has written a file."""
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def quiet() -> list[str]:
    """The one warning of the stack itself, which train.py silences too, but later."""
    return ["-W", "ignore:`isinstance(treespec, LeafSpec)`:FutureWarning"]


@contextlib.contextmanager
def _drawing(always: bool) -> Iterator[None]:
    from repvgg.training import pictures

    with mock.patch.object(pictures, "SHORTEST", 0 if always else math.inf):
        yield


@contextlib.contextmanager
def _composing_once(arguments: tuple[str, ...]) -> Iterator[None]:
    """Let Hydra not compose twice: for its mode alone, which of our configs a search sets."""
    if any(re.search("hydra.mode|hparams_search|--config", one) for one in arguments):
        yield
        return
    with mock.patch.object(Hydra, "get_mode", return_value=None):
        yield


@contextlib.contextmanager
def _undone() -> Iterator[None]:
    """Give back the folder, the arguments, the environment, the signals, logging and Hydra."""

    def stop(*_: object) -> None:
        raise TooLong(f"{SECONDS} seconds")

    folder, environment = Path.cwd(), dict(os.environ)
    paths = [*sys.path]
    given, original = sys.argv, sys.orig_argv
    handlers = {number: signal.getsignal(number) for number in signals.stopping()}
    root = logging.getLogger()
    logged = [*root.handlers], root.level
    handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        signal.alarm(0)
        added, sys.path[:] = [*{*sys.path} - {*paths}], paths
        for name, module in [*sys.modules.items()]:  # of the user, in the folder of a test
            if (getattr(module, "__file__", None) or "").startswith(tuple(added)):
                del sys.modules[name]
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv, sys.orig_argv = given, original
        for number, handler in handlers.items():
            signal.signal(number, handler)
        root.handlers[:], root.level = logged
        GlobalHydra.instance().clear()


@contextlib.contextmanager
def _captured() -> Iterator[tuple[list[str], list[str]]]:
    """The standard streams, those of libraries in C among them."""
    texts: tuple[list[str], list[str]] = [], []
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.ExitStack() as stack:
        files: list[IO[str]] = []
        for number in (1, 2):
            file = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))
            stack.callback(os.close, before := os.dup(number))
            stack.callback(os.dup2, before, number)
            os.dup2(file.fileno(), number)
            files.append(file)
        out, err = files
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            yield texts
        finally:
            for file, text in zip(files, texts, strict=True):
                file.flush()
                file.seek(0)
                text.append(file.read())


def compose(name: str, *overrides: str) -> dict:
    """The plain configuration that Hydra makes of a root configuration and overrides."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose(name, list(overrides)), resolve=True)


def tree(folder: Path) -> dict[str, int]:
    """Every file below a folder with the time of its last change."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file()
    }


def make(folder: Path, *, count: int = 6) -> Path:
    """A folder of images in two classes, which their upper halves tell apart."""
    noise = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = noise.integers(0, 256, (18, 20, 3), dtype=np.uint8)
            pixels[:9] = 255 * label
            Image.fromarray(pixels).save(folder / name / f"{i}.jpg")
    return folder
