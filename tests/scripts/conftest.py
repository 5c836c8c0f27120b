import sys
from types import ModuleType

import pytest

from repvgg import cli


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    """Runs a script with arguments in an empty folder; returns what it printed."""

    def run_in_folder(script: ModuleType, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        name = script.__name__.rpartition(".")[2]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        cli.script(script.main, script.__doc__, script.DEFAULTS)
        return capfd.readouterr().out

    return run_in_folder
