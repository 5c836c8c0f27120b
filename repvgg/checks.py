"""Checks of arguments: the error names the argument, what was given and what is allowed."""

import difflib
import importlib
import math
import re
import reprlib
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType

# Control and bidirectional characters, line ends, and bytes that are not UTF-8.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


MOST_LISTED = 10  # words that an error lists without leaving one out
FEW = 6  # words that it lists of more
LONGEST = 100  # characters of a value in an error
MOST_SHOWN = 4  # names of many in an error


class ArgumentError(ValueError):
    """Arguments have values that are not allowed. On the command line `cli.explain` shows keys.

    Args:
        message: names arguments as NAME=VALUE, as NAME: or as "NAME is missing".
        names: these arguments.
    """

    def __init__(self, message: str, *names: str) -> None:
        super().__init__(message)
        self.names = names


def brief(value: object) -> str:
    """A value in one short line, also if it is huge, deep, or holds itself."""
    shown = _short.repr(value) if not isinstance(value, str | BaseException) else str(value)
    shown = " ".join(escape(shown[: 4 * LONGEST]).split(" "))
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 20]}...{shown[-10:]}"


def first_of(names: Sequence[str]) -> str:
    """The first of many names, for a message."""
    return ", ".join(map(brief, names[:MOST_SHOWN])) + (", ..." if names[MOST_SHOWN:] else "")


_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxtuple, _short.maxdict = 3, 8, 8, 6
_short.maxstring, _short.maxlong, _short.maxother = 60, 40, 60


def wrong_value(
    argument: str, given: object, allowed: str, example: object | None = None
) -> ArgumentError:
    """The error of one value, for the caller to raise: what was given, allowed, an example."""
    given = f"'{brief(given)}'" if isinstance(given, str) else brief(given)
    shown = "" if example is None else f"; for example {argument}={str(example).replace(' ', '')}"
    return ArgumentError(f"{argument}={given}: {allowed}{shown}", argument)


def did_you_mean(given: object, allowed: Iterable[str]) -> str:
    """A hint at the allowed word that is most like the given one; empty if none is close."""
    close = difflib.get_close_matches(str(given), list(allowed), n=1)
    return f"did you mean {close[0]}? " if close else ""


def listed(given: object, allowed: Iterable[str]) -> str:
    """The allowed words for an error: all of a few, else the closest and how many more there are.

    Places are filled with the first words.
    """
    words = list(allowed)
    if len(words) <= MOST_LISTED:
        return ", ".join(words)
    near = difflib.get_close_matches(str(given), words, n=FEW)
    shown = list(dict.fromkeys([*near, *words]))[:FEW]
    return f"{', '.join(shown)} and {len(words) - FEW} more"


def unknown_name(
    argument: str, given: str, allowed: Sequence[str], *, what: str = "name"
) -> ArgumentError:
    """The error of a word that is in no list, for the caller to raise.

    Args:
        what: the words of the list are, such as "model".
    """
    given = brief(given)
    hint = did_you_mean(given.lower(), allowed)
    shown = listed(given.lower(), allowed)
    text = f"{argument}={given}: there is no such {what}; {hint}allowed are {shown}"
    return ArgumentError(text, argument)


def unknown_key(
    key: str, allowed: Sequence[str], *, section: str = "", elsewhere: Sequence[str] = ()
) -> ValueError:
    """The error of a key that nothing reads, for the caller to raise.

    Args:
        allowed: the keys of the same section.
        section: where the key was passed, such as "optim."; not part of the names.
        elsewhere: keys of other sections, which may have been meant.
    """
    full = {name: section + name for name in allowed}
    close = difflib.get_close_matches(key, [*full, *elsewhere], n=1)
    hint = f"did you mean {full.get(close[0], close[0])}? " if close else ""
    shown = listed(section + key, full.values())
    return ValueError(f"{section}{key}: there is no such key; {hint}allowed are {shown}")


def check_integer(
    argument: str, given: object, *, minimum: int, maximum: float = math.inf, example: int
) -> int:
    """Return `given` if it is an integer in [minimum, maximum], else raise ArgumentError."""
    allowed = f"must be an integer of at least {minimum}"
    if maximum != math.inf:
        allowed += f" and at most {maximum}"
    if isinstance(given, bool) or not isinstance(given, int) or not minimum <= given <= maximum:
        raise wrong_value(argument, given, allowed, example)
    return given


def check_number(
    argument: str,
    given: object,
    *,
    minimum: float = 0.0,
    below: float = math.inf,
    example: float,
) -> float:
    """Return `given` as a float if minimum <= given < below, else raise ArgumentError.

    NaN, infinities, booleans and strings are errors.
    """
    allowed = f"must be a number of at least {minimum:g}"
    if below != math.inf:
        allowed += f" and below {below:g}"
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise wrong_value(argument, given, allowed, example)
    if not minimum <= given < below or given > sys.float_info.max:  # as an integer may be
        raise wrong_value(argument, given, allowed, example)
    return float(given)


def check_boolean(argument: str, given: object) -> bool:
    """Return `given` if it is True or False, else raise ArgumentError."""
    if not isinstance(given, bool):
        raise wrong_value(argument, given, "must be true or false", "true")
    return given


def check_integers(
    argument: str, given: object, *, length: int, example: object
) -> tuple[int, ...]:
    """Return `given` as a tuple if it is `length` integers >= 1, else raise ArgumentError."""
    if (
        isinstance(given, str)
        or not isinstance(given, Sequence)
        or len(given) != length
        or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in given)
    ):
        raise wrong_value(argument, given, f"must be {length} integers of at least 1", example)
    return tuple(given)


def require(package: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ImportError: it is not installed; the message holds the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} is missing: run pip install {package}") from error


def escape(text: object) -> str:
    """A text in one line: line breaks and characters that steer a terminal become escapes."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))
