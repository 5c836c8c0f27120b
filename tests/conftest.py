"""One short run of train.py, which the tests of both commands look at."""

import os
import subprocess
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the processors; read when torch starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from commands import SHORT, run


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
