"""The user's own code: found by its dotted name, and called with arguments that are checked first.

Only names that the user passed belong here. A checkpoint or the folder of a run never names code.
"""

import contextlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Union, get_args, get_origin

from repvgg.checks import ArgumentError, brief, did_you_mean, wrong_value

FROM_USER_CODE = "_from_user_code"  # attribute of an error that was sent to another process
LONGEST_SIGNATURE = 300  # characters
LIBRARIES = {"torch", "torchvision", "lightning", "timm", "repvgg"}  # their errors name arguments
PLAIN = (bool, int, float, str, Path, NoneType)  # types that an argument may be checked for
INSTALLED = {"site-packages", "dist-packages"}  # folders of packages, in any environment
CLONE = Path(__file__).absolute().parents[1]
NOT_THE_USERS = [CLONE / "repvgg", CLONE / "scripts", Path(sysconfig.get_path("stdlib"))]


def is_from_user_code(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, passed through the user's own code.

    That is code which is neither ours nor Python's nor installed.
    """
    if getattr(error, FROM_USER_CODE, False):  # by another process, which has the traceback
        return True
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        frames = traceback.walk_tb(current.__traceback__)
        if any(_is_users(frame.f_code.co_filename) for frame, _ in frames):
            return True
        hidden = None if current.__suppress_context__ else current.__context__
        current = current.__cause__ or hidden
    return False


def keep_users_frames(error: BaseException) -> None:
    """Drop the frames above the user's first one from the traceback of an error and its causes.

    Errors without a frame of the user's stay as they are.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        trace = current.__traceback__
        while trace is not None and not _is_users(trace.tb_frame.f_code.co_filename):
            trace = trace.tb_next
        if trace is not None:
            current.__traceback__ = trace
        current = current.__cause__ or current.__context__


def _is_users(filename: str) -> bool:
    path = Path(filename)
    if not path.is_absolute():  # <string>, <frozen importlib._bootstrap>
        return False
    installed = not INSTALLED.isdisjoint(path.parts)
    return not installed and not any(path.is_relative_to(folder) for folder in NOT_THE_USERS)


def make_importable(config: object) -> None:
    """Let Python find the current folder's modules, if a configuration names one.

    They come after all installed packages. Without such a name the folder stays out: it may be
    somebody else's, with a module named like an optional package that is not installed here.

    Args:
        config: a dotted name, or a configuration that holds some under `_target_`.
    """
    if isinstance(config, str):
        here = str(Path.cwd())
        if here not in sys.path and not _is_installed(config.partition(".")[0]):
            sys.path.append(here)
    elif isinstance(config, Mapping):
        for key, value in config.items():
            if key == "_target_" or not isinstance(value, str):
                make_importable(value)
    elif isinstance(config, Sequence):
        for value in config:
            if not isinstance(value, str):
                make_importable(value)


def locate(target: str, key: str) -> Callable[..., object]:
    """Import a function or class.

    Modules in the current folder are found too.

    Args:
        target: the dotted name: package.module.Class.
        key: the argument that named it, for the errors.

    Raises:
        ArgumentError: there is no such module, class or function, or it cannot be called. Errors
            that a module raises while it is imported pass through.
    """
    parts = target.split(".") if isinstance(target, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        allowed = "must be the dotted name of a class or function"
        dotted = str(target).replace(".py", "").replace(":", ".").replace("/", ".")
        is_name = "." in dotted and all(part.isidentifier() for part in dotted.split("."))
        raise wrong_value(key, target, allowed, dotted if is_name else "mypackage.MyClass")
    make_importable(target)
    found: object = None
    depth = 0
    for depth in range(len(parts)):
        module = _import(".".join(parts[: depth + 1]))
        if module is None:
            break
        found = module
    if found is None:
        raise ArgumentError(
            f"{key}={target}: there is no module {parts[0]}, neither in {Path.cwd()} nor among the "
            "installed packages",
            key,
        )
    for part in parts[depth:]:
        if not hasattr(found, part):
            where = ".".join(parts[: parts.index(part)])
            hint = did_you_mean(part, [name for name in dir(found) if name[0] != "_"])
            raise ArgumentError(f"{key}={target}: {where} has no {part}; {hint}".rstrip("; "), key)
        found = getattr(found, part)
    if not callable(found):
        kind = type(found).__name__
        raise ArgumentError(f"{key}={target}: is a {kind}, not a class or function", key)
    return found


def call(
    function: Callable[..., object], key: str, target: str, *positional: object, **arguments: object
) -> object:
    """Call the user's function or class, if it takes these arguments.

    Raises:
        ArgumentError: it does not, and the message shows its signature; or it is of one of the
            LIBRARIES and rejects the values. Other errors of its own pass through.
    """
    check_arguments(function, key, target, *positional, **arguments)
    with rejections(function, key, target):
        return function(*positional, **arguments)


@contextlib.contextmanager
def rejections(function: Callable[..., object], key: str, target: str) -> Iterator[None]:
    """Blame the arguments for an error of what a function or class of a library made.

    Raises:
        ArgumentError: in the place of such an error. Errors of the user's own code pass through.
    """
    try:
        yield
    except Exception as error:  # libraries raise any kind for a wrong value
        library = str(getattr(function, "__module__", "")).partition(".")[0]
        if library not in LIBRARIES or is_from_user_code(error):
            raise
        detail = " ".join(str(error).split()) or type(error).__name__
        raise ArgumentError(f"{key}={target}: rejects its arguments: {detail}", key) from error


def check_arguments(
    function: Callable[..., object], key: str, target: str, *positional: object, **arguments: object
) -> None:
    """Check that a function takes these arguments.

    Raises:
        ArgumentError: it does not; the message shows its signature.
    """
    signature = signature_of(function)
    if signature is None:
        return
    try:
        signature.bind(*positional, **arguments)
    except TypeError as error:
        shown = str(signature.replace(return_annotation=inspect.Signature.empty))
        if len(shown) > LONGEST_SIGNATURE:
            shown = f"{shown[:LONGEST_SIGNATURE]}...)"
        unknown = [name for name in arguments if f"'{name}'" in str(error)]
        hint = did_you_mean(unknown[0], signature.parameters) if unknown else ""
        raise ArgumentError(
            f"{key}={target}: {error}; {hint}its signature is {target.rpartition('.')[2]}{shown}",
            key,
        ) from error
    if str(getattr(function, "__module__", "")).startswith("lightning."):  # it checks no types
        for name, value in arguments.items():
            kinds = _plain_kinds(signature.parameters.get(name))
            if kinds and not isinstance(value, (*kinds, int) if float in kinds else kinds):
                words = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
                part = key.removesuffix("._target_")
                raise ArgumentError(f"{part}.{name}={brief(value)}: must be {words}", key)


def _plain_kinds(parameter: inspect.Parameter | None) -> tuple[type, ...]:
    """The types of an argument, if all are plain values; else none."""
    if parameter is None:
        return ()
    annotation = parameter.annotation
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return tuple(kinds) if all(kind in PLAIN for kind in kinds) else ()


def accepts(function: Callable[..., object], argument: str) -> bool:
    """Whether a function takes an argument by name; false if that cannot be told."""
    signature = signature_of(function)
    if signature is None:
        return False
    kinds = {name: part.kind for name, part in signature.parameters.items()}
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return kinds.get(argument) in by_name or inspect.Parameter.VAR_KEYWORD in kinds.values()


def signature_of(function: Callable[..., object]) -> inspect.Signature | None:
    """The signature of a function or class; None if Python does not know it."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # of functions in C
        return None


def _is_installed(package: str) -> bool:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # no name of a package, or one without a description
        return False
    return spec is not None and spec.origin is not None  # a folder without __init__.py has none


def _import(name: str) -> ModuleType | None:
    """A module; None if there is none of that name. Its own failed imports are errors."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return None
        raise
