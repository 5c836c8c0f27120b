"""Streams that are closed, full or without a reader; signals while modules are imported."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.support.processes import ROOT, Process

TRAIN = "train.py model=repvgg_tiny trainer.max_epochs=1 logger.tensorboard.pictures=false"


def shell(line: str, cwd, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash; `@` is the Python of the project, and `STATUS` its status."""
    line = line.replace("@ ", f"{shlex.quote(sys.executable)} ").replace(
        "train.py", f"{ROOT}/train.py"
    )
    return subprocess.run(
        ["bash", "-c", f"{line}\necho STATUS ${{PIPESTATUS[0]}}"],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "status", "error"),
    [
        ("@ -m repvgg --version | true", 141, ""),
        ("@ -m repvgg predict --help > /dev/full", 1, "No space left on device\n"),
        ("@ -m repvgg --help >&-", 0, ""),
        ("@ -m repvgg inspect path=none 2>&-", 1, ""),
        ("@ -m repvgg inspect path=none <&- >&-", 1, "pass the path of a best.ckpt or last.ckpt\n"),
    ],
)
def test_a_program_that_prints_ends_as_cat_does(line, status, error, tmp_path):
    done = shell(line, tmp_path)

    assert done.stdout.endswith(f"STATUS {status}\n")
    assert done.stderr.endswith(error)
    assert len(done.stderr.splitlines()) == len(error.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "status", "said"),
    [("| head -1", 0, "Broken pipe"), ("> /dev/full", 1, "No space left"), (">&- 2>&- <&-", 0, "")],
)
def test_a_training_goes_on_without_its_output(where, status, said, tmp_path):
    done = shell(f"@ {TRAIN} hydra.run.dir=run {where}", tmp_path)

    assert done.stdout.endswith(f"STATUS {status}\n")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == bool(said)
    assert (tmp_path / "run" / "results.json").is_file()


@pytest.mark.slow
def test_a_text_that_the_terminal_cannot_show_is_escaped(tmp_path):
    done = shell("@ -m repvgg inspect path=é", tmp_path, PYTHONIOENCODING="ascii", LC_ALL="C.UTF-8")

    assert "'\\xe9' does not exist" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_while_modules_are_imported_ends_the_program_at_once(number, tmp_path):
    """An import that holds back every exception, as some do."""
    (tmp_path / "torch.py").write_text(
        "import time\nprint('importing', flush=True)\n"
        "for _ in range(100):\n    try:\n        time.sleep(0.1)\n    except BaseException: pass\n"
    )
    program = subprocess.Popen(
        [sys.executable, ROOT / "train.py", "model=repvgg_tiny"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "importing" not in program.stdout.readline():
        pass
    start = time.monotonic()
    program.send_signal(number)
    _, error = program.communicate(timeout=60)

    assert program.returncode == 128 + number
    assert time.monotonic() - start < 5
    assert error == ("stopped by Ctrl-C\n" if number == signal.SIGINT else "")
    assert [path.name for path in tmp_path.iterdir()] == ["torch.py"]


SWALLOWS = """
import os, signal
from repvgg import cli
def job(*_):
    try:
        os.kill(os.getpid(), signal.{name})
    except BaseException:
        raise ValueError("another error") from None
{start}
"""
STARTS = {
    "composed": "cli.run(job, cli.CONFIGS / 'deploy.yaml')",
    "keys": "cli.script(job, 'text', {})",
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_what_a_signal_raised_may_become_another_error(number, start, tmp_path):
    """As Hydra makes one of everything that is raised while it composes."""
    code = SWALLOWS.format(name=number.name, start=STARTS[start])

    done = Process("-c", code, cwd=tmp_path).completed()

    assert done.returncode == 128 + number
    assert done.stderr.endswith("stopped by Ctrl-C\n" if number == signal.SIGINT else "")
    assert len(done.stderr.splitlines()) == (number == signal.SIGINT)
