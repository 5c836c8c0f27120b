import subprocess
import sys

import pytest

from scripts.studies import code_metrics
from tests.support.commands import ROOT

MODULE = '''"""A module."""

from typing import Any


class Small:
    def first(self, value: Any, *rest: list[Any], key: int = 0) -> dict[str, Any]:
        import json

        def inner() -> None:
            from ast import walk

        if hasattr(value, "a") and getattr(value, "b"):
            return getattr(value, "c", {})  # type: ignore[no-any-return]
        return {}
'''
EXPECTED = {
    "lines: package": "15",
    "lines: entry points": "2",
    "lines: scripts": "3",
    "lines: tests": "4",
    "modules at the package's root": "1",
    "imports inside functions": "2",
    "`Any` in annotations of signatures (package)": "3",
    "`hasattr`": "1",
    "`getattr` with a default": "1",
    "`# type: ignore`": "1",
    "longest module": "repvgg/small.py, 15",
    "longest class": "Small, 10",
    "longest function": "first, 9",
}


@pytest.fixture
def tree(tmp_path):
    for name, text in {
        "repvgg/small.py": MODULE,
        "repvgg/__init__.py": "",
        "repvgg/folder/__init__.py": "",
        "train.py": "import repvgg\nx = 1\n",
        "scripts/studies/one.py": "\n" * 3,
        "tests/test_one.py": "\n" * 4,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_a_small_tree_is_counted(tree):
    assert code_metrics.measure(tree) == EXPECTED


def git(tree, *arguments: str) -> None:
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
    subprocess.run(["git", *who, *arguments], cwd=tree, check=True, capture_output=True)


def metrics(tree, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, ROOT / "scripts" / "studies" / "code_metrics.py", *arguments]
    return subprocess.run(program, cwd=tree, capture_output=True, text=True)


def test_two_revisions_stand_side_by_side(tree):
    git(tree, "init")
    git(tree, "add", ".")
    git(tree, "commit", "--message", "first")
    (tree / "deploy.py").write_text("\n" * 5)
    git(tree, "add", ".")
    git(tree, "commit", "--message", "second")

    done = metrics(tree, "revision=HEAD~1", "revision=HEAD")

    assert "| | HEAD~1 | HEAD |\n" in done.stdout
    assert "| lines: entry points | 2 | 7 |\n" in done.stdout


@pytest.mark.parametrize(
    ("argument", "message"),
    [("revision=nothing", "revision=nothing: "), ("HEAD", "HEAD: pass revision=REV")],
)
def test_a_wrong_argument_ends_in_one_line(argument, message, tree):
    git(tree, "init")

    done = metrics(tree, argument)

    assert done.returncode == 1
    assert done.stderr.startswith(f"code_metrics.py: {message}")
    assert len(done.stderr.splitlines()) == 1
