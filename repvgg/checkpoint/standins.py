"""Read a torch file that holds more than tensors; what is not plain becomes an inert stand-in.

Give this module to `torch.load` as its `pickle_module`. Why it runs no code of the file:

- Only the steps of the pickle format in `Unpickler.dispatch` are known; any other step ends the
  reading. Those of the standard library that are kept make plain values or move them. Each step
  that could call something, change something or look something up is replaced here.
- A name in the file is only ever a `StandIn`, a new object that holds the name's text. Nothing is
  imported and nothing is looked up, so no function, class or module is within reach of the file.
- A call makes something in `_MAKERS` alone: tensors of storages that torch has read, arrays and
  scalars of numpy with numbers, truth values or text, and plain containers. Each checks what it is
  given. Any other call, whatever is called, makes a `StandIn` and drops its arguments.
- State and items go into new plain lists, dictionaries and sets. For a `StandIn` they are dropped.

Names that have no place beside weights (`os.system`, `builtins.eval`) end the reading as well. That
is to tell the reader of them: nothing of the above needs it.

A TorchScript archive or a tar file takes another way through `torch.load`, so a file must have been
tried with `weights_only=True` first, which raises something other than an UnpicklingError for both.
"""

import builtins
import math
import pickle
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

HOSTILE = "os posix nt sys subprocess _posixsubprocess pty shutil importlib runpy ctypes webbrowser"
KEPT = """
PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1
LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE
BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST
EMPTY_DICT EMPTY_SET GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL
"""  # of the standard library's steps; the last two call find_class, which is replaced


class StandIn:
    """In place of what a file names: it remembers the name and does nothing."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<stand-in for {self.name}>"


class DamagedError(pickle.UnpicklingError):
    """What is in the file is not what its own format allows."""


class HostileError(pickle.UnpicklingError):
    """The file names what has no place in a checkpoint; the error's text is that name."""


class _Pending(StandIn):
    """A dtype or an array of numpy whose state is still to come."""

    __slots__ = ("given",)

    def __init__(self, name: str, given: tuple[Any, ...]) -> None:
        super().__init__(name)
        self.given = given


class _Method(StandIn):
    """What pickle writes as `getattr(owner, name)`. It may stand there and is never called."""

    __slots__ = ()


_Base: Any = pickle._Unpickler  # the one in Python, whose steps are a table, as joblib uses it too


class Unpickler(_Base):
    """Reads one pickle; see the module's text."""

    def find_class(self, module: str, name: str) -> StandIn:
        """A stand-in for a name. Nothing is imported."""
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        dotted = f"{module}.{name}"
        if not re.fullmatch(r"[\w.<>-]{1,500}", dotted):
            raise DamagedError("it names a class by what is no name")
        if module.partition(".")[0] in HOSTILE.split():
            raise HostileError(dotted)
        if module == "builtins":
            known = vars(builtins).get(name)
            is_function = callable(known) and not isinstance(known, type)
            if known is None or (is_function and name != "getattr"):  # see _method
                raise HostileError(dotted)
        return StandIn(dotted)

    def load_binpersid(self) -> None:
        """Ask torch for a storage, the one thing of which it is asked."""
        saved = self.stack.pop()
        match saved:
            case ("module" | "storage", StandIn() as kind, *_):  # a class of the old format, bytes
                self.append(kind)
            case ("storage", torch.serialization.StorageType(), str(), str(), int(), *rest) if (
                saved[4] >= 0 and _is_view(rest)
            ):
                self.append(self.persistent_load(saved))
            case _:
                raise DamagedError("it asks for a storage in a way that torch does not write")

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
            for at in reversed(self.memo):  # it was remembered just before its state
                if self.memo[at] is made:
                    self.memo[at] = full
                    break
        elif not isinstance(made, StandIn) and type(made) not in (dict, OrderedDict):
            raise DamagedError(f"it gives state to a {type(made).__name__}")

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
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

    def _set_items(self, items: list[Any]) -> None:
        made = self.stack[-1]
        if type(made) in (dict, OrderedDict):
            made.update(_pairs(items))
        elif not isinstance(made, StandIn):
            raise DamagedError(f"it sets an item of a {type(made).__name__}")

    def load_dict(self) -> None:
        self.append(dict(_pairs(self.pop_mark())))

    def load_additems(self) -> None:
        items = self.pop_mark()
        made = self.stack[-1]
        if type(made) is set:
            made.update(map(_key, items))
        elif not isinstance(made, StandIn):
            raise DamagedError(f"it adds to a {type(made).__name__}")

    def load_frozenset(self) -> None:
        self.append(frozenset(map(_key, self.pop_mark())))

    def load_bytearray8(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch = {
        code: step
        for code, step in _Base.dispatch.items()
        if code in {getattr(pickle, name)[0] for name in KEPT.split()}
    } | {
        pickle.BINPERSID[0]: load_binpersid,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }


def load(file: Any, **options: Any) -> Any:
    """What one pickle in a file holds; torch's old format has several in a row."""
    return Unpickler(file, **options).load()


def _name(called: Any) -> str:
    if isinstance(called, _Method):
        raise HostileError("builtins.getattr")
    if isinstance(called, StandIn):
        return called.name
    raise DamagedError(f"it calls a {type(called).__name__}")


def _call(called: Any, given: Any) -> Any:
    name = _name(called)
    if type(given) is not tuple:
        raise DamagedError(f"it calls {name} without arguments")
    make = _MAKERS.get(name)
    try:
        return StandIn(name) if make is None else make(name, *given)
    except (TypeError, ValueError) as error:
        raise DamagedError(f"it calls {name} with what it does not take ({error})") from error


def _key(key: Any) -> Any:
    """A key whose hash costs little and calls nothing of the file; another one's stand-in."""
    parts = key if type(key) is tuple else (key,)
    if all(type(part) in _ATOMS or isinstance(part, np.generic) for part in parts):
        return key
    return StandIn(f"{type(key).__module__}.{type(key).__qualname__}")


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    return [(_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True)]


def _is_view(rest: list[Any]) -> bool:
    """Whether that is nothing, or where a storage of torch's old format lies in another one."""
    match rest:
        case [] | [None]:
            return True
        case [(str(), int(offset), int(size))]:
            return offset >= 0 and size >= 0
    return False


def _are_counts(numbers: Any) -> bool:
    return type(numbers) in (tuple, list, torch.Size) and all(
        type(number) is int and number >= 0 for number in numbers
    )


def _tensor(
    name: str,
    storage: Any,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
) -> Tensor | StandIn:
    if metadata:  # such as a sign that is not in the values
        return StandIn(name)
    if type(storage) is not torch.storage.TypedStorage:
        raise DamagedError("a tensor of it has no storage")
    if not _are_counts((offset,)) or not _are_counts(size) or not _are_counts(stride):
        raise DamagedError("a tensor of it has no size")
    reach = 1 + offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and reach * storage.element_size() > storage.nbytes():
        raise DamagedError("a tensor of it is larger than its storage")
    return torch._utils._rebuild_tensor(storage, offset, tuple(size), tuple(stride))


def _parameter(name: str, data: Any, *_: Any) -> Tensor | StandIn:
    return data if isinstance(data, Tensor) else StandIn(name)


def _typed_tensor(name: str, make: Any, kind: Any, given: Any, state: Any) -> Any:
    """A tensor with attributes of its own; these are dropped."""
    return _call(make, given)


def _dtype(made: _Pending, state: Any) -> np.dtype | StandIn:
    """Of numbers, truth values or text; that of anything else stays a stand-in."""
    match made.given, state:
        case (str(kind), *_), (int(), ("<" | ">" | "|" | "=") as order, None, None, None, *_):
            if re.fullmatch(r"[biufcSU][1-9]\d{0,8}", kind):
                try:
                    return np.dtype(order + kind)
                except (TypeError, ValueError):  # this machine has none of that size
                    pass
    return StandIn(made.name)


def _array(made: _Pending, state: Any) -> np.ndarray | StandIn:
    match state:
        case (int(), tuple(shape), np.dtype() as dtype, bool() | int() as fortran, raw):
            return _filled(raw, dtype, shape, "F" if fortran else "C")
    return StandIn(made.name)


def _array_of_buffer(name: str, raw: Any, dtype: Any, shape: Any, order: Any) -> Any:
    if isinstance(dtype, np.dtype) and order in ("C", "F"):
        return _filled(raw, dtype, shape, order)
    return StandIn(name)


def _scalar(name: str, dtype: Any, raw: Any = None) -> Any:
    return _filled(raw, dtype, (), "C")[()] if isinstance(dtype, np.dtype) else StandIn(name)


def _filled(raw: Any, dtype: np.dtype, shape: Any, order: Any) -> np.ndarray:
    if (
        not isinstance(raw, bytes | bytearray)
        or not _are_counts(shape)
        or math.prod(shape) * dtype.itemsize != len(raw)
    ):
        raise DamagedError("an array of it has another size than it says")
    return np.ndarray(shape, dtype, bytes(raw), order=order).copy(order="K")


def _encode(name: str, text: Any, encoding: Any = None) -> bytes | StandIn:
    """Bytes, as pickle writes them for Python 2."""
    if type(text) is str and encoding in ("latin1", "latin-1"):
        return text.encode("latin-1")
    return StandIn(name)


def _bytearray(name: str, raw: Any = b"", encoding: Any = None) -> Any:
    raw = _encode(name, raw, encoding) if encoding else raw
    return bytearray(raw) if type(raw) is bytes else StandIn(name)


def _ordered(name: str, items: Any = ()) -> Any:
    if type(items) in (list, tuple):
        return OrderedDict((_key(key), value) for key, value in items)
    return StandIn(name)


def _counter(name: str, counts: Any = None) -> Any:
    return counts.copy() if type(counts) is dict else {}


def _set(name: str, items: Any = ()) -> Any:
    return set(map(_key, items)) if type(items) in (list, tuple) else StandIn(name)


def _complex(name: str, real: Any = 0.0, imaginary: Any = 0.0) -> Any:
    return complex(*(part if type(part) in (int, float) else 0.0 for part in (real, imaginary)))


def _method(name: str, owner: Any, attribute: Any) -> StandIn:
    """A method that stands beside the weights. Anything else that looks up is no pickle of one."""
    if type(owner) is StandIn and type(attribute) is str and re.fullmatch(r"[a-z]\w*", attribute):
        return _Method(f"{owner.name}.{attribute}")
    raise HostileError(name)


def _size(name: str, *given: Any) -> Any:
    return torch.Size(*given) if len(given) == 1 and _are_counts(given[0]) else StandIn(name)


_ATOMS = frozenset({str, int, float, bool, type(None), bytes, complex, StandIn, _Method})
_BUILDERS = {"numpy.dtype": _dtype, "numpy.ndarray": _array}
_MAKERS: dict[str, Callable[..., Any]] = {
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
