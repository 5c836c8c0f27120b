"""One short run of train.py, which the tests of both commands look at."""

import os
import signal
import subprocess
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the processors; read when torch starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import absl.logging
import pytest

from tests.support.commands import SHORT, run

if hasattr(signal, "SIGHUP"):  # ignored under nohup, and then in every run that a test starts
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Hydra closes every handler there is, and absl's closes its stream unless it is the process's own:
# pytest's, where OpenVINO was the first to import absl, in a test.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def trained(home) -> subprocess.CompletedProcess[str]:
    done = run("train.py", *SHORT, cwd=home)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def folder(trained, home) -> Path:
    (folder,) = (home / "runs" / "digits-repvgg_tiny").iterdir()
    return folder
