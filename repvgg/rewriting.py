"""Changes of a network in place: other modules under the old names, another forward."""

import importlib
from types import ModuleType
from typing import Any

from torch import fx, nn


def put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module under every name that it has."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


def give_forward(owner: nn.Module, graph: fx.Graph) -> None:
    """Make a module run a graph; all else of it, its class's methods too, stays."""
    code = graph.python_code("self")
    names = {
        key: (value.__name__ if isinstance(value, ModuleType) else value)
        for key, value in code.globals.items()
    }
    owner.__class__ = _specialized(type(owner), code.src, names)


def _specialized(base: type[nn.Module], source: str, names: dict[str, Any]) -> type[nn.Module]:
    """A subclass with another forward, whose instances can be pickled."""
    namespace = {
        key: importlib.import_module(value) if isinstance(value, str) else value
        for key, value in names.items()
    }
    exec(source, namespace)

    def reduce(self: nn.Module, _: Any) -> tuple[Any, ...]:
        return _restore, (base, source, names), vars(self)

    members = {"forward": namespace["forward"], "__reduce_ex__": reduce}
    return type(base.__name__, (base,), members | {"__module__": base.__module__})


def _restore(base: type[nn.Module], source: str, names: dict[str, Any]) -> nn.Module:
    cls = _specialized(base, source, names)
    return cls.__new__(cls)
