"""Every command of docs/train.md runs, shortened."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from tests.support.commands import ROOT, run

PAGE = (ROOT / "docs" / "train.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
FILES = dict(re.findall(r"# (\w+\.py)\n(.*?)(?=^```$)", PAGE, flags=re.MULTILINE | re.DOTALL))
SHORT = ("model=repvgg_tiny", "trainer.max_epochs=1", "+trainer.limit_train_batches=2")


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:mlflow", "ignore::DeprecationWarning:sqlalchemy"
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_runs(command, tmp_path):
    for package in ("wandb", "mlflow"):
        if package in command and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    _, program, *arguments = shlex.split(command)
    folder = "hydra.sweep.dir=runs" if "-m" in arguments else "hydra.run.dir=runs/one"

    done = run(program, *arguments, *SHORT, folder, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "runs").rglob("metrics.csv"))
    assert list((tmp_path / "runs").rglob("best.ckpt"))


def test_the_page_has_its_commands():
    assert len(COMMANDS) >= 18
    assert Path(*FILES) == Path("mylosses.py")
