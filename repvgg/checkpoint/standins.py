"""Read a torch file that holds more than tensors; other objects become inert stand-ins.

Pass this module to `torch.load` as its `pickle_module`. It runs no code from the file, because:

- Only the opcodes in `Unpickler.dispatch` are known; any other one ends the reading. Those that are
  kept from the standard library create or move plain values. Every opcode that could call, change
  or look up something is replaced here.
- A name in the file only becomes a `StandIn`, a new object that holds the name as text. Nothing is
  imported or looked up, so the file reaches no function, class or module.
- A call creates something only if `_MAKERS` lists it: tensors of storages that torch has read,
  NumPy arrays and scalars of numbers, booleans or text, and plain containers. Each checks its
  arguments. object other call creates a `StandIn` and drops the arguments.
- State and items go into new plain lists, dictionaries and sets. For a `StandIn` they are dropped.

Names that do not belong beside weights (`os.system`, `builtins.eval`) end the reading too. This is
not needed for safety; it warns the reader.

`torch.load` treats TorchScript archives and tar files differently. So try `weights_only=True`
first: for both it raises another error than UnpicklingError.
"""

import builtins
import math
import pickle
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import IO, ClassVar, Literal, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HOSTILE = "os posix nt sys subprocess _posixsubprocess pty shutil importlib runpy ctypes webbrowser"
KEPT = """
PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1
LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE
BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST
EMPTY_DICT EMPTY_SET GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL
"""  # opcodes of the standard library; the last two call find_class, which is replaced


Array = NDArray[np.generic]
Dtype = np.dtype[np.generic]


class StandIn:
    """Replaces an object of a file: it holds the object's name and does nothing."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<stand-in for {self.name}>"


class DamagedError(pickle.UnpicklingError):
    """The file violates its own format."""


class HostileError(pickle.UnpicklingError):
    """The file names something that does not belong in a checkpoint: the error's text."""


class _Pending(StandIn):
    """A NumPy dtype or array whose state comes later in the file."""

    __slots__ = ("given",)

    def __init__(self, name: str, given: tuple[object, ...]) -> None:
        super().__init__(name)
        self.given = given


class _Method(StandIn):
    """What pickle writes as `getattr(owner, name)`. It is never called."""

    __slots__ = ()


class Unpickler(pickle._Unpickler):
    """Reads one pickle, with the table of opcodes of Python's own unpickler; see the module."""

    stack: list[object]
    memo: dict[int, object]
    append: Callable[[object], None]
    pop_mark: Callable[[], list[object]]
    read: Callable[[int], bytes]

    def find_class(self, module: str, name: str) -> StandIn:
        """Create a stand-in for a name. Nothing is imported."""
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        dotted = f"{module}.{name}"
        if not re.fullmatch(r"[\w.<>-]{1,500}", dotted):
            raise DamagedError("a class in it has an impossible name")
        if module.partition(".")[0] in HOSTILE.split():
            raise HostileError(dotted)
        if module == "builtins":
            known = vars(builtins).get(name)
            is_function = callable(known) and not isinstance(known, type)
            if known is None or (is_function and name != "getattr"):  # see _method
                raise HostileError(dotted)
        return StandIn(dotted)

    def load_binpersid(self) -> None:
        """Get a storage from torch; nothing else is requested from it."""
        saved = self.stack.pop()
        match saved:
            case ("module" | "storage", StandIn() as kind, *_):  # a class, in the old format
                self.append(kind)
            case ("storage", torch.serialization.StorageType(), str(), str(), int(size), *rest) if (
                size >= 0 and _is_view(rest)
            ):
                self.append(self.persistent_load(saved))
            case _:
                raise DamagedError("it requests a storage in a way that torch does not write")

    def load_reduce(self) -> None:
        given = self.stack.pop()
        self.stack[-1] = _call(self.stack[-1], given)

    def load_newobj(self) -> None:
        self.stack.pop()
        self.stack[-1] = StandIn(_name(self.stack[-1]))

    def load_newobj_ex(self) -> None:
        self.stack.pop()
        self.load_newobj()

    def load_build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if type(made) is _Pending:
            full = _BUILDERS[made.name](made, state)
            self.stack[-1] = full
            for at in reversed(self.memo):  # pickle memoizes an object just before its state
                if self.memo[at] is made:
                    self.memo[at] = full
                    break
        elif not isinstance(made, StandIn) and type(made) not in (dict, OrderedDict):
            raise DamagedError(f"it gives state to a {type(made).__name__}")

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[object]) -> None:
        made = self.stack[-1]
        if type(made) is list:
            made.extend(items)
        elif not isinstance(made, StandIn):
            raise DamagedError(f"it appends to a {type(made).__name__}")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[object]) -> None:
        made = self.stack[-1]
        if isinstance(made, dict):
            made.update(_pairs(items))
        elif not isinstance(made, StandIn):
            raise DamagedError(f"it sets an item of a {type(made).__name__}")

    def load_dict(self) -> None:
        items = self.pop_mark()  # it replaces self.append
        self.append(dict(_pairs(items)))

    def load_additems(self) -> None:
        items = self.pop_mark()
        made = self.stack[-1]
        if type(made) is set:
            made.update(map(_key, items))
        elif not isinstance(made, StandIn):
            raise DamagedError(f"it adds to a {type(made).__name__}")

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(frozenset(map(_key, items)))

    def load_bytearray8(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
        for name in KEPT.split()
    } | {
        getattr(pickle, name.removeprefix("load_").upper())[0]: step
        for name, step in vars().items()
        if name.startswith("load_")
    }


def load(file: IO[bytes], *, encoding: str = "ASCII") -> object:
    """Read one pickle from a file; torch's old format has several in a row."""
    return Unpickler(file, encoding=encoding).load()


def _name(called: object) -> str:
    if isinstance(called, _Method):
        raise HostileError("builtins.getattr")
    if isinstance(called, StandIn):
        return called.name
    raise DamagedError(f"it calls a {type(called).__name__}")


def _call(called: object, given: object) -> object:
    name = _name(called)
    if type(given) is not tuple:
        raise DamagedError(f"it calls {name} without arguments")
    make = _MAKERS.get(name)
    try:
        return StandIn(name) if make is None else make(name, *given)
    except (TypeError, ValueError) as error:
        raise DamagedError(f"it calls {name} with wrong arguments ({error})") from error


def _key(key: object) -> object:
    """A key with a cheap hash that calls nothing from the file; a stand-in for any other."""
    parts = key if type(key) is tuple else (key,)
    if all(type(part) in _ATOMS or isinstance(part, np.generic) for part in parts):
        return key
    return StandIn(f"{type(key).__module__}.{type(key).__qualname__}")


def _pairs(items: list[object]) -> list[tuple[object, object]]:
    return [(_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True)]


def _is_view(rest: list[object]) -> bool:
    """Whether the rest of an id is empty, or a view of a storage in torch's old format."""
    match rest:
        case [] | [None]:
            return True
        case [(str(), int(offset), int(size))]:
            return offset >= 0 and size >= 0
    return False


def _are_counts(numbers: object) -> TypeGuard[Sequence[int]]:
    return isinstance(numbers, tuple | list) and all(
        type(number) is int and number >= 0 for number in numbers
    )


def _tensor(
    name: str,
    storage: object,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: object = False,
    hooks: object = None,
    metadata: object = None,
) -> Tensor | StandIn:
    if metadata:  # such as a negative bit
        return StandIn(name)
    if not isinstance(storage, torch.storage.TypedStorage):
        raise DamagedError("a tensor of it has no storage")
    if not _are_counts((offset,)) or not _are_counts(size) or not _are_counts(stride):
        raise DamagedError("a tensor of it has no size")
    reach = 1 + offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    held = storage._untyped_storage
    if 0 not in size and reach * storage.dtype.itemsize > held.nbytes():
        raise DamagedError("a tensor of it is larger than its storage")
    empty = torch.empty(0, dtype=storage.dtype, device=held.device)
    return empty.set_(held, offset, tuple(size), tuple(stride))


def _parameter(name: str, data: object, *_: object) -> Tensor | StandIn:
    return data if isinstance(data, Tensor) else StandIn(name)


def _typed_tensor(name: str, make: object, kind: object, given: object, state: object) -> object:
    """A tensor with extra attributes, which are dropped."""
    return _call(make, given)


def _dtype(made: _Pending, state: object) -> Dtype | StandIn:
    """A dtype of numbers, booleans or text; any other stays a stand-in."""
    match made.given, state:
        case (str(kind), *_), (int(), ("<" | ">" | "|" | "=") as order, None, None, None, *_):
            if re.fullmatch(r"[biufcSU][1-9]\d{0,8}", kind):
                try:
                    return np.dtype(order + kind)
                except (TypeError, ValueError):  # this machine lacks that size
                    pass
    return StandIn(made.name)


def _array(made: _Pending, state: object) -> Array | StandIn:
    match state:
        case (int(), tuple(shape), np.dtype() as dtype, bool() | int() as fortran, raw):
            return _filled(raw, dtype, shape, "F" if fortran else "C")
    return StandIn(made.name)


def _array_of_buffer(name: str, raw: object, dtype: object, shape: object, order: object) -> object:
    if isinstance(dtype, np.dtype) and order in ("C", "F"):
        return _filled(raw, dtype, shape, order)
    return StandIn(name)


def _scalar(name: str, dtype: object, raw: object = None) -> object:
    return _filled(raw, dtype, (), "C")[()] if isinstance(dtype, np.dtype) else StandIn(name)


def _filled(raw: object, dtype: Dtype, shape: object, order: Literal["C", "F"]) -> Array:
    if (
        not isinstance(raw, bytes | bytearray)
        or not _are_counts(shape)
        or math.prod(shape) * dtype.itemsize != len(raw)
    ):
        raise DamagedError("an array of it does not have its recorded size")
    return np.ndarray(shape, dtype, bytes(raw), order=order).copy(order="K")


def _encode(name: str, text: object, encoding: object = None) -> bytes | StandIn:
    """Bytes, as pickle writes them for Python 2."""
    if type(text) is str and encoding in ("latin1", "latin-1"):
        return text.encode("latin-1")
    return StandIn(name)


def _bytearray(name: str, raw: object = b"", encoding: object = None) -> object:
    raw = _encode(name, raw, encoding) if encoding else raw
    return bytearray(raw) if type(raw) is bytes else StandIn(name)


def _ordered(name: str, items: object = ()) -> object:
    if isinstance(items, list | tuple):
        return OrderedDict((_key(key), value) for key, value in items)
    return StandIn(name)


def _counter(name: str, counts: object = None) -> object:
    return counts.copy() if type(counts) is dict else {}


def _set(name: str, items: object = ()) -> object:
    return set(map(_key, items)) if isinstance(items, list | tuple) else StandIn(name)


def _complex(name: str, real: object = 0.0, imaginary: object = 0.0) -> object:
    parts = (part if isinstance(part, int | float) else 0.0 for part in (real, imaginary))
    return complex(*parts)


def _method(name: str, owner: object, attribute: object) -> StandIn:
    """A method beside the weights; any other use of getattr is hostile."""
    if type(owner) is StandIn and type(attribute) is str and re.fullmatch(r"[a-z]\w*", attribute):
        return _Method(f"{owner.name}.{attribute}")
    raise HostileError(name)


def _size(name: str, *given: object) -> object:
    if len(given) == 1 and _are_counts(given[0]):
        return torch.Size(given[0])
    return StandIn(name)


_ATOMS = frozenset({str, int, float, bool, type(None), bytes, complex, StandIn, _Method})
_BUILDERS = {"numpy.dtype": _dtype, "numpy.ndarray": _array}
_MAKERS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _typed_tensor,
    "torch.Size": _size,
    "collections.OrderedDict": _ordered,
    "collections.Counter": _counter,
    "collections.defaultdict": lambda name, *given: {},
    "builtins.getattr": _method,
    "builtins.set": _set,
    "builtins.bytes": lambda name, *given: StandIn(name) if given else b"",  # protocol 2
    "builtins.complex": _complex,
    "builtins.bytearray": _bytearray,
    "_codecs.encode": _encode,
    "numpy.dtype": lambda name, *given: _Pending(name, given),
    **{
        f"numpy.{core}.{function}": make
        for core in ("core", "_core")
        for function, make in (
            (
                "multiarray._reconstruct",
                lambda name, kind, *given: (
                    _Pending(kind.name, given)
                    if isinstance(kind, StandIn) and kind.name == "numpy.ndarray"
                    else StandIn(name)
                ),
            ),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _array_of_buffer),
        )
    },
}
