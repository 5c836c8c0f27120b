"""What the code of a network can reach outside of it: names of Python modules, class attributes."""

import copy
import sys
import types
from collections.abc import Collection, Sequence

from repvgg.fusion.errors import OWN

MAX_FUNCTIONS = 2000  # whose names are looked at
MAX_HELD = 10_000  # items of a list or dictionary in a Python module


def globals_of(classes: Collection[type]) -> list[dict[str, object]]:
    """The global names that classes and the functions they call can see, without those of torch."""
    found: dict[int, dict[str, object]] = {}
    todo: list[object] = []
    for base in {base for cls in classes for base in cls.__mro__}:
        todo += vars(base).values()
    seen: set[int] = set()
    while todo and len(seen) < MAX_FUNCTIONS:
        function = _function_in(todo.pop())
        if not isinstance(function, types.FunctionType):
            continue
        if hasattr(function, "__wrapped__"):  # a decorator returned it
            todo.append(function.__wrapped__)
        names = function.__globals__
        if id(function) in seen or not _is_of_user(names):
            continue
        seen.add(id(function))
        found[id(names)] = names
        mentioned = function.__code__.co_names
        for name in mentioned:
            value = names.get(name)
            if isinstance(value, types.ModuleType):  # helpers.is_list(x)
                todo += [vars(value).get(other) for other in mentioned]
            elif isinstance(value, types.FunctionType):
                todo.append(value)
    return list(found.values())


def _function_in(value: object) -> object:
    """The function of a property or method; anything else as it is."""
    if isinstance(value, property):
        return value.fget
    if isinstance(value, staticmethod | classmethod | types.MethodType):
        return value.__func__
    return value


def _is_of_user(names: dict[str, object]) -> bool:
    """Whether the globals are those of code that does not know of proxies."""
    name = str(names.get("__name__", ""))
    home = name.split(".")[0]
    known = home in ("torch", "numpy") or home in sys.stdlib_module_names
    return not known and name not in OWN


class Outside:
    """Attributes of classes, globals of Python modules, and the containers in both.

    A traced forward may leave proxies there, which mean nothing afterwards.
    """

    def __init__(self, homes: Sequence[dict[str, object]], classes: Collection[type]) -> None:
        own = {base for cls in classes for base in cls.__mro__ if not _is_of_torch(base)}
        self.classes = {cls: dict(vars(cls)) for cls in own}
        self.homes = [(names, dict(names)) for names in homes]
        held = [v for _, names in self.homes for v in names.values()]
        held += [v for names in self.classes.values() for v in names.values()]
        self.containers: list[tuple[_Container, _Container]] = [
            (value, copy.copy(value))
            for value in {id(v): v for v in held if type(v) in (list, dict, set)}.values()
            if isinstance(value, list | dict | set) and len(value) < MAX_HELD
        ]

    def restore(self) -> bool:
        """Undo all changes; whether there were any."""
        changed = [self._restore_classes(), self._restore_globals(), self._restore_containers()]
        return any(changed)

    def _restore_classes(self) -> bool:
        changed = False
        for cls, before in self.classes.items():
            for name, value in dict(vars(cls)).items():
                if before.get(name, self) is not value and not name.startswith("__"):
                    changed = True
                    if name in before:
                        setattr(cls, name, before[name])
                    else:
                        delattr(cls, name)
        return changed

    def _restore_globals(self) -> bool:
        changed = False
        for names, before in self.homes:
            for name, value in dict(names).items():
                if before.get(name, self) is not value:
                    changed = True
                    if name in before:
                        names[name] = before[name]
                    else:
                        del names[name]
        return changed

    def _restore_containers(self) -> bool:
        changed = False
        for value, before in self.containers:
            now, then = _items(value), _items(before)
            if len(now) != len(then) or not all(map(_is_same, now, then)):
                changed = True
                value.clear()
                if isinstance(value, list):
                    value += before
                elif isinstance(value, dict):
                    assert isinstance(before, dict)
                    value |= before
                else:
                    value |= set(before)
        return changed


_Container = list[object] | dict[object, object] | set[object]


def _items(container: _Container) -> list[object]:
    return [*container.items()] if isinstance(container, dict) else [*container]


def _is_same(first: object, second: object) -> bool:
    if type(first) is tuple and type(second) is tuple and len(first) == len(second) == 2:
        return first[0] is second[0] and first[1] is second[1]
    return first is second


def _is_of_torch(cls: type) -> bool:
    return cls.__module__.split(".")[0] in ("torch", "builtins", "typing", "abc")
