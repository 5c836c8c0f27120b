"""What the house keeps beside its floors, which import-linter holds (pyproject.toml)."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "repvgg"
MODULES = [
    path.relative_to(PACKAGE)
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
]
# Imported late, by what needs torchvision and hydra anyway.
ALLOWED = re.compile(
    r"data/|training/(run|setup|additions|compatibility|report|outcome|progress)\.py|cli/sweeps\.py"
)
PRINTS = re.compile(
    r"cli/|__main__\.py|commands/|(training|deploy)/run\.py|training/(report|outcome)\.py"
    r"|data/progress\.py|terminal\.py"
)
HEAVY = (
    "litdata",
    "matplotlib",
    "rich",
    "jinja2",
    "onnx",
    "onnxruntime",
    "safetensors",
    "hydra",
    "omegaconf",
    "torchvision",
)


def imports(path: Path) -> list[tuple[str, bool]]:
    """Dotted names that a file imports, and whether it does so at module scope."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found += [(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
    return found


def test_engines_are_imported_where_they_are_used():
    at_module_scope = [
        (module, name)
        for module in MODULES
        for name, top in imports(PACKAGE / module)
        if top and name.split(".")[0] in HEAVY and not ALLOWED.match(str(module))
    ]

    assert at_module_scope == []


@pytest.mark.parametrize("entry", ["train.py", "deploy.py"])
def test_entry_points_import_nothing_heavy_at_module_scope(entry):
    heavy = {"torch", "lightning", "torchvision", "onnx"}
    packages = {name.split(".")[0] for name, top in imports(ROOT / entry) if top}

    assert packages & heavy == set()


@pytest.mark.parametrize("module", MODULES)
def test_nobody_imports_the_entry_points(module):
    packages = {name.split(".")[0] for name, _ in imports(PACKAGE / module)}

    assert packages & {"train", "deploy", "scripts"} == set()


@pytest.mark.parametrize("module", [module for module in MODULES if not PRINTS.match(str(module))])
def test_library_code_does_not_print(module):
    tree = ast.parse((PACKAGE / module).read_text())
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }

    assert "print" not in called
