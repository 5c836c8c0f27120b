"""What the bytecode of a forward calls, compares and reads.

Proxies cannot notice `x is y`; the bytecode shows it. All functions here read the forward of a
class and the methods that it calls.
"""

import ast
import dis
import functools
import inspect
import itertools
import linecache
import types
from collections.abc import Iterator
from typing import NamedTuple

from torch import fx, nn

from repvgg.fusion.attributes import Wrapper, stored

GENERATED = "<merged "  # begins the name of the file of a generated forward


def functions_of(cls: type[nn.Module]) -> Iterator[tuple[str, types.FunctionType]]:
    """The forward and the methods that it calls, by name, with their decorators."""
    todo, seen = ["forward"], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for base in cls.__mro__:
            function = vars(base).get(name)
            function = function.fget if isinstance(function, property) else function
            if base is nn.Module or not inspect.isfunction(function):
                continue
            yield name, function
            for code in _codes(inspect.unwrap(function)):
                todo += code.co_names
            if function.__code__.co_filename.startswith(GENERATED):
                break  # it replaces those of the classes below


def _codes(function: types.FunctionType) -> list[types.CodeType]:
    """The code of a function and of the functions defined in it."""
    found = [function.__code__]
    for code in found:  # the list grows meanwhile
        found += [const for const in code.co_consts if inspect.iscode(const)]
    return found


def instructions_of(cls: type[nn.Module]) -> Iterator[list[dis.Instruction]]:
    """The instructions of the forward and of the methods that it calls."""
    for _, function in functions_of(cls):
        for code in _codes(inspect.unwrap(function)):
            yield list(dis.get_instructions(code))


def names_argument(module: nn.Module, name: str) -> bool:
    """Whether a forward uses one of its arguments."""
    return any(
        name
        in (instruction.argval if isinstance(instruction.argval, tuple) else [instruction.argval])
        for instructions in instructions_of(type(module))
        for instruction in instructions
        if instruction.opname.startswith(("LOAD_", "STORE_"))
    )


def compares_identities(module: nn.Module) -> bool:
    """Whether a forward compares two variables by identity, or uses a `match` statement.

    A proxy cannot notice either.
    """
    return _compares_identities(type(module))  # type: ignore[arg-type]  # see code_of


@functools.lru_cache(maxsize=4096)
def _compares_identities(cls: type[nn.Module]) -> bool:
    for instructions in instructions_of(cls):
        for first, second in itertools.pairwise(instructions):
            if second.opname == "IS_OP" and first.opname not in ("LOAD_CONST", "LOAD_GLOBAL"):
                return True
            if second.opname in ("MATCH_SEQUENCE", "MATCH_MAPPING"):
                return True
    return False


def compares_with_none(module: nn.Module) -> bool:
    """Whether a forward compares a variable with None. A proxy never is None; a value may be."""
    return _compares_with_none(type(module))  # type: ignore[arg-type]  # see code_of


@functools.lru_cache(maxsize=4096)
def _compares_with_none(cls: type[nn.Module]) -> bool:
    for instructions in instructions_of(cls):
        for i, instruction in enumerate(instructions):
            operand = i - 1 if instruction.opname.endswith("NONE") else i - 2
            compares = instruction.opname == "IS_OP" or (
                "JUMP" in instruction.opname and instruction.opname.endswith("NONE")
            )
            if compares and instructions[operand].opname.startswith("LOAD_FAST"):
                return True
    return False


def is_decorated(module: nn.Module) -> bool:
    """Whether a decorator wraps the forward or a method that it calls."""
    return not isinstance(module, fx.GraphModule) and any(
        isinstance(function, Wrapper) or any(map(_is_function, _enclosed(function)))
        for _, function in functions_of(type(module))
    )


def _enclosed(function: types.FunctionType) -> list[object]:
    """Variables of a closure, except `__class__`, which `super()` uses."""
    variables = inspect.getclosurevars(function).nonlocals
    return [value for name, value in variables.items() if name != "__class__"]


def _is_function(value: object) -> bool:
    return callable(value) and not isinstance(value, type | nn.Module)


_REPORTS = {
    *("print", "warn", "warning", "warning_once", "info", "debug", "error", "critical", "log"),
    *("_assert", "_check", "check"),
}


def in_message(frame: types.FrameType) -> bool:
    """Whether code builds the text of an exception, an assertion, a log entry or a print."""
    code = frame.f_code
    line, end, column, end_column = list(code.co_positions())[frame.f_lasti // 2]
    if line is None or end is None or column is None or end_column is None:
        return False
    return any(
        (node.lineno, node.col_offset) <= (line, column)
        and (end, end_column) <= (node.end_lineno or 0, node.end_col_offset or 0)
        for node in _reports(code.co_filename)
    )


@functools.lru_cache(maxsize=256)
def _reports(path: str) -> list[ast.expr | ast.Assert]:
    """The expressions of a file that build messages."""
    try:
        tree = ast.parse("".join(linecache.getlines(path)))
    except SyntaxError:
        return []
    found: list[ast.expr | ast.Assert] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            found.append(node.exc)
        elif isinstance(node, ast.Assert):
            found.append(node)
        elif isinstance(node, ast.Call):
            name = _name(node.func)
            if name in _REPORTS or name.endswith(("Error", "Exception", "Warning")):
                found.append(node)
    return found


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


class Code(NamedTuple):
    """How a forward uses attributes.

    Attributes:
        names: of all attributes, string constants included (`getattr(self, "deploy", False)`).
        compared: attributes that are compared with constants, and the constants.
        indices: attributes that are used as an index.
        switches: booleans of the Python module that are read.
        probed: names in calls of `getattr` and `hasattr`.
        tests: whether anything is compared or tested.
        properties: of the class that are read.
        passes_itself: whether `self` is passed to other code.
        children: attributes of attributes, (first, second).
    """

    names: frozenset[str]
    compared: dict[str, set[int | str]]
    indices: frozenset[str]
    switches: frozenset[str]
    probed: frozenset[str]
    tests: bool
    properties: frozenset[str]
    passes_itself: bool
    children: frozenset[tuple[str, str]]


def code_of(module: nn.Module) -> Code:
    """How the forward of a module uses attributes."""
    return _code_of(type(module))  # type: ignore[arg-type]  # mypy takes no class as hashable


@functools.lru_cache(maxsize=4096)
def _code_of(cls: type[nn.Module]) -> Code:
    names: set[str] = set()
    compared: dict[str, set[int | str]] = {}
    indices: set[str] = set()
    switches: set[str] = set()
    probed: set[str] = set()
    tests = passes_itself = False
    pairs: set[tuple[str, str]] = set()
    for _, function in functions_of(cls):
        for code in _codes(inspect.unwrap(function)):
            read = {key: function.__globals__.get(key) for key in code.co_names}
            switches |= {key for key, value in read.items() if type(value) is bool}
            itself = (*inspect.unwrap(function).__code__.co_varnames, "")[0]
            passes_itself = passes_itself or _is_passed(itself, list(dis.get_instructions(code)))
    for instructions in instructions_of(cls):
        for place, instruction in enumerate(instructions):
            operation, value = instruction.opname, instruction.argval
            before = instructions[max(0, place - 2) : place]
            attributes = [str(i.argval) for i in before if i.opname == "LOAD_ATTR"]
            tests = tests or operation.startswith(
                ("COMPARE_OP", "CONTAINS_OP", "POP_JUMP", "JUMP_IF")
            )
            if operation == "LOAD_GLOBAL" and value in ("getattr", "hasattr"):
                texts = [
                    i.argval for i in instructions[place : place + 4] if i.opname == "LOAD_CONST"
                ]
                probed |= {text for text in texts if isinstance(text, str)}
            if operation in ("LOAD_ATTR", "LOAD_METHOD"):
                names.add(str(value))
                pairs |= {(attributes[-1], str(value))} if before[-1:] and attributes else set()
            elif operation == "LOAD_CONST" and isinstance(value, str) and value.isidentifier():
                names.add(value)
            elif operation in ("COMPARE_OP", "CONTAINS_OP") and attributes:
                constants = [i.argval for i in before if i.opname.startswith("LOAD_")]
                for constant in constants:
                    parts = constant if isinstance(constant, tuple | frozenset) else (constant,)
                    known = {part for part in parts if type(part) in (int, str)}
                    compared.setdefault(attributes[-1], set()).update(known - {attributes[-1]})
            elif operation == "BINARY_SUBSCR" or (
                operation == "BINARY_OP" and "[" in instruction.argrepr
            ):
                indices |= set(attributes[-1:])
    own = {name for name in names if isinstance(stored(cls, name), property)}
    return Code(
        frozenset(names),
        compared,
        frozenset(indices),
        frozenset(switches),
        frozenset(probed),
        tests,
        frozenset(own - set(vars(nn.Module))),
        passes_itself,
        frozenset(pairs),
    )


def _is_passed(itself: str, instructions: list[dis.Instruction]) -> bool:
    """Whether `self` is loaded for anything but an attribute."""
    used = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR", "LOAD_SUPER_ATTR")
    for place, instruction in enumerate(instructions[:-1]):
        loads = instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF"))
        if not loads or instruction.argval != itself:
            continue
        before = {i.argval for i in instructions[max(0, place - 2) : place]}
        looks_up = before & {"hasattr", "getattr", "super", "isinstance"}
        if instructions[place + 1].opname not in used and not looks_up:
            return True
    return False
