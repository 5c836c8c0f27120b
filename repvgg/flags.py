"""Flags: attributes of a module that decide what its forward does, and that may be set later.

`head.export = True` after folding is common, so a fold must hold for every value of a flag. One is
named by a path: `export`, `cfg.export` inside an object, `opts[export]` inside a dictionary.
"""

import contextlib
import inspect
import re
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from repvgg.bytecode import code_of

MAX_TRIES = 10  # other values of the flags of one module
PLAIN = (bool, int, float, str)
_OF_MODULES = {"training", *vars(nn.Module())}


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Texts and numbers that a forward names, by their paths, and the values they have."""
    found: dict[str, Any] = {}
    names = code_of(type(module)).names - _OF_MODULES  # type: ignore[arg-type]
    for name in sorted(names):
        value = vars(module).get(name, inspect.getattr_static(type(module), name, None))
        if type(value) in PLAIN or _is_plain_tuple(value):
            found[name] = value
        elif type(value) is dict:
            inside = {f"{name}[{key}]": item for key, item in value.items() if key in names}
            found |= {path: item for path, item in inside.items() if type(item) in PLAIN}
        elif _holds_settings(value):
            for key in sorted(names):
                item = inspect.getattr_static(value, key, None)
                item = vars(value).get(key, item) if hasattr(value, "__dict__") else item
                if type(item) in PLAIN:
                    found[f"{name}.{key}"] = item
    return found


def other_callables(module: nn.Module) -> dict[str, Any]:
    """Functions that a module holds as plain attributes and that its forward names."""
    names = code_of(type(module)).names - _OF_MODULES  # type: ignore[arg-type]
    return {
        name: value
        for name, value in vars(module).items()
        if name in names and callable(value) and not isinstance(value, nn.Module | type)
    }


def alternatives(module: nn.Module) -> list[tuple[str, Any]]:
    """Flags of a module that its forward reads, and the other values that they may take.

    A flag is a truth value, a text or number that is compared, or what chooses among modules
    (`self.bns[self.domain]`). `training` is none: a fused network is for eval mode.
    """
    cls = type(module)
    if cls.__module__.startswith("torch."):
        return []
    code = code_of(cls)  # type: ignore[arg-type]
    keys: set[Any] = set()
    for part in module.children():
        if isinstance(part, nn.ModuleDict):
            keys |= set(part)
        elif isinstance(part, nn.ModuleList | nn.Sequential):
            keys |= set(range(len(part)))
    found: list[tuple[str, Any]] = []
    for path, value in plain_attributes(module).items():
        name = re.split(r"[.\[\]]", path.rstrip("]"))[-1]
        others: set[Any] = set()
        if isinstance(value, bool):
            others = {not value}
        elif isinstance(value, int | str):
            others = set(code.compared.get(name, ()))
        if not isinstance(value, bool) and name in code.indices:
            others |= keys
        same = [other for other in others if type(other) is type(value) and other != value]
        found += [(path, other) for other in sorted(same)]
    return found[:MAX_TRIES]


@contextlib.contextmanager
def setting(module: nn.Module, path: str, value: Any) -> Iterator[None]:
    """Meanwhile, let an attribute of a module have another value."""
    first, rest = (*re.split(r"[.\[]", path.rstrip("]"), maxsplit=1), "")[:2]
    held = vars(module)
    if rest:
        holder = held.get(first, inspect.getattr_static(type(module), first, None))
        held = holder if type(holder) is dict else vars(holder)
    key = rest or first
    own, old = key in held, held.get(key)
    held[key] = value
    try:
        yield
    finally:
        if own:
            held[key] = old
        else:
            held.pop(key, None)


def value_of(module: nn.Module, path: str) -> Any:
    """The value that an attribute has."""
    return module.training if path == "training" else plain_attributes(module)[path]


def expression(path: str) -> str:
    """How the code of a forward reads an attribute."""
    name, bracket, key = path.rstrip("]").partition("[")
    return f"self.{name}[{key!r}]" if bracket else f"self.{name}"


def global_flags(module: nn.Module) -> list[str]:
    """Truth values of its Python module that the code of a forward reads."""
    return sorted(code_of(type(module)).switches)  # type: ignore[arg-type]


def _is_plain_tuple(value: Any) -> bool:
    return type(value) is tuple and all(type(item) in PLAIN for item in value)


def _holds_settings(value: Any) -> bool:
    """Whether a value is an object that may hold settings of anybody's making."""
    if value is None or isinstance(value, nn.Module | Tensor | type | types.ModuleType):
        return False
    known = (str, bytes, int, float, list, tuple, set, frozenset, property, staticmethod)
    return not callable(value) and not isinstance(value, known) and hasattr(value, "__dict__")
