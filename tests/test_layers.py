"""Imports point strictly down; hydra, lightning and torchvision stay behind their frontiers."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"arguments", "reparam", "losses", "rdrop", "verify", "benchmark", "memory", "copying"}
    | {"bytecode", "kinds", "standins", "batches", "signals", "processes", "schedule", "metrics"}
    | {"lock"},
    {"cli"},
    {"runs", "settings"},
    {"reading", "ranges", "layouts", "images", "files", "flags", "proxies", "passing"}
    | {"workers"},
    {"patching", "scan"},
    {"tracing", "rewriting"},
    {"dataflow", "folder"},
    {"normalizations"},
    {"linear"},
    {"geometry"},
    {"block", "folding"},
    {"model", "own_forward"},
    {"branches"},
    {"fuse"},
    {"equalize", "artifact", "expand", "unfold"},
    {"forms"},
    {"zoo", "augment", "datamodule"},
    {"recognize"},
    {"module", "data", "callbacks", "checkpoint", "export"},
    {"quantize", "certificate"},
]
FRONTIERS = {
    "hydra": {"cli", "runs"},
    "omegaconf": {"cli", "runs"},
    "lightning": {"module", "datamodule", "callbacks", "processes", "settings"},
    "torchvision": {"data", "datamodule", "augment", "zoo"},
    "torchmetrics": {"module", "metrics"},
    "onnx": {"export", "quantize"},
    "onnxruntime": {"export", "quantize"},
    "openvino": {"export"},
    "safetensors": {"export", "data", "certificate", "files"},
    "numpy": {"quantize", "images", "files", "recognize", "standins"},
    "PIL": {"images", "folder", "augment"},
    "filelock": {"data", "lock"},
    "fsspec": {"folder"},
    "litdata": {"folder"},
}
MODULES = sorted(path.stem for path in (ROOT / "repvgg").glob("*.py") if path.stem != "__init__")


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


def layer(module: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if module in names)


def test_every_module_has_a_layer():
    assert set().union(*LAYERS) == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_lower_layers_alone(module):
    ours = {
        name.split(".")[1]
        for name, _ in imports(ROOT / "repvgg" / f"{module}.py")
        if name.startswith("repvgg.")
    }

    assert {name for name in ours if layer(name) >= layer(module)} == set()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_stays_behind_the_frontiers(module):
    packages = {name.split(".")[0] for name, _ in imports(ROOT / "repvgg" / f"{module}.py")}
    allowed = {package for package, homes in FRONTIERS.items() if module in homes}

    assert packages <= {*sys.stdlib_module_names, "torch", "repvgg", *allowed}


def test_engines_are_imported_where_they_are_used():
    engines = ("litdata", "onnx", "onnxruntime", "safetensors", "hydra", "omegaconf", "torchvision")
    at_module_scope = [
        (module, name)
        for module in MODULES
        for name, top in imports(ROOT / "repvgg" / f"{module}.py")
        if top and name.split(".")[0] in engines and module not in ("data", "datamodule", "augment")
    ]

    assert at_module_scope == []


@pytest.mark.parametrize("entry", ["train.py", "deploy.py"])
def test_entry_points_import_nothing_heavy_at_module_scope(entry):
    heavy = {"torch", "lightning", "torchvision", "onnx"}
    packages = {name.split(".")[0] for name, top in imports(ROOT / entry) if top}

    assert packages & heavy == set()


@pytest.mark.parametrize("module", MODULES)
def test_nobody_imports_the_entry_points(module):
    packages = {name.split(".")[0] for name, _ in imports(ROOT / "repvgg" / f"{module}.py")}

    assert packages & {"train", "deploy", "scripts"} == set()


@pytest.mark.parametrize("module", [module for module in MODULES if module != "cli"])
def test_library_code_does_not_print(module):
    tree = ast.parse((ROOT / "repvgg" / f"{module}.py").read_text())
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }

    assert "print" not in called
