"""One short run of train.py, which tests in all workers look at and none changes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the processors; read when torch starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import absl.logging
import pytest
from filelock import FileLock

from repvgg import targets
from tests.support.commands import SHORT, run

if hasattr(signal, "SIGHUP"):  # ignored under nohup, and then in every run that a test starts
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Hydra closes every handler there is, and absl's closes its stream unless it is the process's own:
# pytest's, where OpenVINO was the first to import absl, in a test.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

# What a test puts in the place of our code counts as ours; the user's own is in tmp_path.
targets.NOT_THE_USERS.append(Path(__file__).parent)

Done = subprocess.CompletedProcess[str]


@pytest.hookimpl(tryfirst=True)  # before the option -m is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the trained network as slow: whoever comes first trains it."""
    for item in items:
        if "train_once" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], Done]], tuple[Path, Done]]:
    """Runs a command in a folder of that name, in the first worker that asks for it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def look(name: str, command: Callable[[Path], Done]) -> tuple[Path, Done]:
        folder, record = shared / name, shared / f"{name}.json"
        with FileLock(shared / f"{name}.lock"):
            if not record.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                done = command(folder)
                assert done.returncode == 0, done.stderr
                record.write_text(json.dumps([0, done.stdout, done.stderr]))
        return folder, subprocess.CompletedProcess([], *json.loads(record.read_text()))

    return look


@pytest.fixture(scope="session")
def train_once(once) -> tuple[Path, Done]:
    return once("home", lambda folder: run("train.py", *SHORT, cwd=folder))


@pytest.fixture(scope="session")
def home(train_once) -> Path:
    """The folder in which train.py was typed."""
    return train_once[0]


@pytest.fixture(scope="session")
def trained(train_once) -> Done:
    return train_once[1]


@pytest.fixture(scope="session")
def folder(home) -> Path:
    """The folder of the run."""
    (folder,) = (home / "runs" / "digits-repvgg_tiny").iterdir()
    return folder
