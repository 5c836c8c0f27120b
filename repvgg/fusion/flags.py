"""Flags: attributes of a module that determine what its forward does, and that may change later.

Users set `head.export = True` after folding, so a fold must hold for every value of a flag. A flag
is identified by a path: `export`, `cfg.export` in an object, `opts[export]` in a dictionary.
"""

import contextlib
import copy
import itertools
import re
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from repvgg.fusion.attributes import MISSING, attributes_of, has_attribute, stored
from repvgg.fusion.bytecode import code_of

if TYPE_CHECKING:
    from repvgg.fusion.decisions import DecidingTracer

MAX_TRIES = 24  # settings of one module
MANY = 32  # more indices than a network has outputs
MAX_PAIRED = 5  # with more flags than this, no two are changed at a time
TRACKED = object()  # stands for a value whose comparisons are decisions
Values = tuple[tuple[str, object], ...]  # paths, and what they are set to
PLAIN = (bool, int, float, str)
_OF_MODULES = {"training", *vars(nn.Module())}


def held_values(module: nn.Module) -> dict[str, object]:
    """Other constants in the graph of a forward: None, lists, plain attributes of children."""
    code = code_of(module)
    found: dict[str, object] = {}
    for name in sorted(code.names - _OF_MODULES):
        try:
            value = getattr(module, name)
        except AttributeError:  # the forward reads this attribute of another object
            continue
        if value is None or (type(value) is list and _is_plain_tuple(tuple(value))):
            found[name] = copy.copy(value)
        elif isinstance(value, nn.Module):
            inside = {key: vars(value).get(key) for first, key in code.children if first == name}
            found |= {f"{name}.{k}": v for k, v in inside.items() if type(v) in PLAIN}
    return found


def plain_attributes(module: nn.Module) -> dict[str, object]:
    """Strings and numbers that a forward reads, by their paths."""
    found: dict[str, object] = {}
    names = code_of(module).names - _OF_MODULES
    for name in sorted(names):
        value = vars(module).get(name, stored(type(module), name))
        if type(value) in PLAIN or _is_plain_tuple(value):
            found[name] = value
        elif isinstance(value, dict) and type(value) is dict:
            inside = {f"{name}[{key}]": item for key, item in value.items() if key in names}
            found |= {path: item for path, item in inside.items() if type(item) in PLAIN}
        elif _holds_settings(value):
            for key in sorted(names):
                item = attributes_of(value).get(key, stored(value, key))
                if type(item) in PLAIN:
                    found[f"{name}.{key}"] = item
    return found


def other_callables(module: nn.Module) -> dict[str, object]:
    """Functions that a module stores as attributes and that its forward uses."""
    names = code_of(module).names - _OF_MODULES
    return {
        name: value
        for name, value in vars(module).items()
        if name in names and callable(value) and not isinstance(value, nn.Module | type)
    }


def alternatives(module: nn.Module) -> list[tuple[str, object]]:
    """Flags of a module that its forward reads, and other values of them.

    A flag is a boolean, a string that is compared, or an index of a module
    (`self.bns[self.domain]`). `training` is no flag: a fused network is for eval mode.
    """
    if type(module).__module__.startswith("torch."):
        return []
    code = code_of(module)
    keys: set[int | str] = set()
    for part in module.children():
        if isinstance(part, nn.ModuleDict):
            keys |= set(part)
        elif isinstance(part, nn.ModuleList | nn.Sequential):
            keys |= set(range(len(part)))
    found: list[tuple[str, object]] = [
        (name, True)
        for name in sorted(code.probed)
        if name.isidentifier() and not has_attribute(module, name)  # "0" is a child's, torch.fx's
    ]
    for path, value in plain_attributes(module).items():
        name = re.split(r"[.\[\]]", path.rstrip("]"))[-1]
        others: set[int | str] = set()
        if isinstance(value, bool):
            others = {not value}
        elif isinstance(value, str):
            others = set(code.compared.get(name, ()))
        if not isinstance(value, bool) and name in code.indices:
            others |= keys
        texts = sorted(other for other in others if isinstance(other, str))
        numbers = sorted(other for other in others if isinstance(other, int))
        found += [
            (path, other)
            for other in (*texts, *numbers)
            if type(other) is type(value) and other != value
        ]
    return found


def settings_to_try(module: nn.Module) -> list[Values]:
    """Values of its flags with which a forward is traced: one or two are changed at a time.

    In a last setting, strings and numbers are tracked: each comparison is a decision.
    """
    single = alternatives(module)
    found: list[Values] = [(one,) for one in single]
    if len(single) <= MAX_PAIRED:
        found += [(one, two) for one, two in itertools.combinations(single, 2) if one[0] != two[0]]
    for name, value in held_values(module).items():
        if value is None:
            others = code_of(module).compared.get(name, ())
            found += [((name, other),) for other in (True, *sorted(map(str, others)))]
        elif isinstance(value, list) and all(type(item) is int for item in value):
            found += [((name, []),), ((name, [*range(MANY)]),)]
    values = plain_attributes(module)
    for name, value in values.items():
        if isinstance(value, tuple) and all(type(item) is int for item in value):
            found += [((name, ()),), ((name, tuple(range(MANY))),)]
    compared = code_of(module).tests
    known = [path for path, value in values.items() if type(value) in (int, float, str)]
    if known and compared:
        found.append(tuple((path, TRACKED) for path in known))
    return [] if type(module).__module__.startswith("torch.") else found[:MAX_TRIES]


class _Tracked:
    """A string or number whose comparisons a tracer answers."""

    origin: "tuple[str, DecidingTracer]"

    def _decide(self, question: str, other: object, answer: object) -> object:
        path, tracer = self.origin
        if answer is NotImplemented or not tracer.frames:  # the trace has ended
            return answer
        key = ("flag", path, question, repr(other))
        return tracer.decide(key, f"it depends on {path}", first=bool(answer))


def _deciding(name: str) -> Callable[..., object]:
    def method(self: _Tracked, other: object, *rest: object) -> object:
        answer = getattr(type(self).__bases__[1], name)(self, other, *rest)
        return self._decide(name, (other, *rest), answer)

    return method


def tracked(value: object, path: str, tracer: "DecidingTracer") -> object:
    """A string or number whose comparisons are decisions of a tracer."""
    base = type(value)
    names = ["__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"]
    names += ["startswith", "endswith", "__contains__"] if base is str else []
    members: dict[str, object] = {name: _deciding(name) for name in names}
    members["__bool__"] = lambda self: self._decide("bool", None, base.__ne__(self, base()))
    members["__hash__"] = base.__hash__
    found = type(base.__name__, (_Tracked, base), members)(value)
    found.origin = (path, tracer)
    return found


@contextlib.contextmanager
def setting(module: nn.Module, path: str, value: object) -> Iterator[None]:
    """Set an attribute of a module within a `with` block."""
    first, rest = (*re.split(r"[.\[]", path.rstrip("]"), maxsplit=1), "")[:2]
    held = vars(module)
    if rest:
        holder = held.get(first, stored(type(module), first))
        held = holder if isinstance(holder, dict) and type(holder) is dict else vars(holder)
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


def value_of(module: nn.Module, path: str) -> object:
    """The present value of a flag."""
    return module.training if path == "training" else plain_attributes(module)[path]


def expression(path: str) -> str:
    """The Python expression that reads a flag."""
    name, bracket, key = path.rstrip("]").partition("[")
    return f"self.{name}[{key!r}]" if bracket else f"self.{name}"


def global_flags(module: nn.Module) -> list[str]:
    """Booleans of its Python module that a forward reads."""
    return sorted(code_of(module).switches)


def _is_plain_tuple(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and type(value) is tuple
        and all(type(item) in PLAIN for item in value)
    )


def _holds_settings(value: object) -> bool:
    """Whether a value is an object of the user that may hold settings."""
    if value is None or value is MISSING:
        return False
    if isinstance(value, nn.Module | Tensor | type | types.ModuleType):
        return False
    known = (str, bytes, int, float, list, tuple, set, frozenset, property, staticmethod)
    has_attributes = stored(value, "__dict__") is not MISSING
    return not callable(value) and not isinstance(value, known) and has_attributes
