"""Count what makes code hard to read: python -m scripts.studies.code_metrics [revision=REV ...]

Prints a table for the working tree, or for each git revision that is passed, side by side. Lines
include blank ones and comments. Imports, calls and comments are counted in the package and the
entry points (*.py at the root). `git archive` unpacks a revision elsewhere; nothing is checked out.
"""

import argparse
import ast
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

PACKAGE = "repvgg"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revisions", nargs="*", metavar="revision=REV")
    arguments = parser.parse_args().revisions
    try:
        columns = {name: measure_revision(name) for name in map(parse_revision, arguments)}
        print(table(columns or {"working tree": measure(Path.cwd())}))
    except ValueError as error:
        sys.exit(f"code_metrics.py: {error}")


def parse_revision(argument: str) -> str:
    key, _, value = argument.partition("=")
    if key != "revision" or not value:
        raise ValueError(f"{argument}: pass revision=REV")
    return value


def measure_revision(name: str) -> dict[str, str]:
    """The metrics of a git revision, unpacked into a temporary folder."""
    found = subprocess.run(["git", "archive", "--end-of-options", name], capture_output=True)
    if found.returncode:
        reason = found.stderr.decode(errors="replace").strip()
        raise ValueError(f"revision={name}: {reason.splitlines()[-1]}")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
            archive.extractall(folder, filter="data")
        return measure(Path(folder))


def measure(root: Path) -> dict[str, str]:
    """The metrics of a source tree, by name.

    Raises:
        ValueError: the tree has no package.
    """
    if not (root / PACKAGE).is_dir():
        raise ValueError(f"there is no folder {PACKAGE}; run this at the root of the repository")
    package, entry_points = read(root.glob(f"{PACKAGE}/**/*.py")), read(root.glob("*.py"))
    sources = package | entry_points
    package_nodes = walk(package.values())
    nodes = package_nodes + walk(entry_points.values())
    calls = [
        (node.func.id, len(node.args))
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    flat = [path for path in (root / PACKAGE).glob("*.py") if path.name != "__init__.py"]
    numbers = {
        "lines: package": count_lines(package.values()),
        "lines: entry points": count_lines(entry_points.values()),
        "lines: scripts": count_lines(read(root.glob("scripts/**/*.py")).values()),
        "lines: tests": count_lines(read(root.glob("tests/**/*.py")).values()),
        "modules at the package's root": len(flat),
        "imports inside functions": count_late_imports(nodes),
        "`Any` in annotations of signatures (package)": sum(map(count_any, package_nodes)),
        "`hasattr`": sum(name == "hasattr" for name, _ in calls),
        "`getattr` with a default": calls.count(("getattr", 3)),
        "`# type: ignore`": sum(text.count("# type: ignore") for text in sources.values()),
    }
    modules = [(len(text.splitlines()), str(path)) for path, text in sources.items()]
    lines, path = max(modules, default=(0, root))
    return {name: f"{number:,}" for name, number in numbers.items()} | {
        "longest module": f"{Path(path).relative_to(root)}, {lines}",
        "longest class": longest(node for node in nodes if isinstance(node, ast.ClassDef)),
        "longest function": longest(node for node in nodes if isinstance(node, Function)),
    }


def read(paths: Iterable[Path]) -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8") for path in sorted(paths)}


def walk(texts: Iterable[str]) -> list[ast.AST]:
    return [node for text in texts for node in ast.walk(ast.parse(text))]


def count_lines(texts: Iterable[str]) -> int:
    return sum(len(text.splitlines()) for text in texts)


def count_late_imports(nodes: list[ast.AST]) -> int:
    """Import statements inside functions; one in a nested function counts once."""
    functions = [node for node in nodes if isinstance(node, Function)]
    inside = {node for function in functions for node in ast.walk(function)}
    return sum(isinstance(node, ast.Import | ast.ImportFrom) for node in inside)


def count_any(node: ast.AST) -> int:
    """Annotations of a function's parameters and result in which the name Any occurs."""
    if not isinstance(node, Function):
        return 0
    given = node.args
    parameters = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    annotations = [parameter.annotation for parameter in parameters if parameter is not None]
    return sum(
        any(isinstance(part, ast.Name) and part.id == "Any" for part in ast.walk(annotation))
        for annotation in [*annotations, node.returns]
        if annotation is not None
    )


def longest(definitions: Iterable[ast.ClassDef | Function]) -> str:
    """Name and lines of the longest class or function."""
    sizes = [((node.end_lineno or 0) - node.lineno + 1, node.name) for node in definitions]
    lines, name = max(sizes, default=(0, "-"))
    return f"{name}, {lines}"


def table(columns: dict[str, dict[str, str]]) -> str:
    """A Markdown table with a column per tree."""
    head = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    rows = [
        f"| {name} | {' | '.join(column[name] for column in columns.values())} |"
        for name in next(iter(columns.values()))
    ]
    return "\n".join(head + rows)


if __name__ == "__main__":
    main()
