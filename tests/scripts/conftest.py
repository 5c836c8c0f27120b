import multiprocessing.dummy
import sys
from types import ModuleType, SimpleNamespace

import pytest

from repvgg import cli
from scripts.studies import timing


class _Thread(multiprocessing.dummy.Process):
    """A thread with the arguments of a process."""

    def __init__(self, *, daemon: bool, **options: object) -> None:
        super().__init__(**options)
        self.daemon = daemon


@pytest.fixture
def in_threads(monkeypatch):
    """Candidates of a benchmark run in threads, which saves the imports of processes."""
    context = SimpleNamespace(Pipe=multiprocessing.dummy.Pipe, Process=_Thread)
    monkeypatch.setattr(timing.multiprocessing, "get_context", lambda _: context)


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
