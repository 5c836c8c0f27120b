"""Dataclasses from JSON, with every value checked against its type hint."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import TypeVar, cast, get_args, get_origin, get_type_hints

Decoded = TypeVar("Decoded")


def decode(kind: type[Decoded], content: object) -> Decoded:
    """Build a dataclass, and the dataclasses in it, from what `json.loads` returned.

    Unknown keys are ignored: a later version may write more.

    Raises:
        ValueError: a key is missing or its value has another type; the key is named.
    """
    return cast(Decoded, _decode(kind, content, ""))


def _decode(hint: object, content: object, path: str) -> object:
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind is object:
        return content
    if kind is UnionType:  # X | None
        return None if content is None else _decode(arguments[0], content, path)
    if kind is Mapping and isinstance(content, dict):
        return {
            key: _decode(arguments[1], value, f"{path}{key}.") for key, value in content.items()
        }
    if kind in (Sequence, tuple) and isinstance(content, list):
        items = [_decode(arguments[0], item, path) for item in content]
        return items if kind is Sequence else tuple(items)
    if isinstance(kind, type):
        if dataclasses.is_dataclass(kind) and isinstance(content, dict):
            return _decode_fields(kind, content, path)
        if kind is float and type(content) is int:
            return float(content)
        if type(content) is kind:  # a bool is no int here
            return content
    raise ValueError(
        f"{path.rstrip('.')}={str(content)[:60]}: must be {getattr(kind, '__name__', kind)}"
    )


def _decode_fields(kind: type, content: Mapping[str, object], path: str) -> object:
    hints = get_type_hints(kind)
    given = {}
    for field in dataclasses.fields(kind):
        if field.name in content:
            key = f"{path}{field.name}."
            given[field.name] = _decode(hints[field.name], content[field.name], key)
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"{path}{field.name} is missing")
    return kind(**given)
