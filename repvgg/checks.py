"""Argument checks: the key, what was given, what is allowed, what to pass."""

import difflib
import math
from collections.abc import Iterable, Sequence


def refusal(key: str, given: object, allowed: str, example: object) -> ValueError:
    """Word the refusal of one value, for the caller to raise."""
    shown = f"'{given}'" if isinstance(given, str) else given
    return ValueError(f"{key}={shown}: {allowed}; type for example {key}={example}")


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """A hint at the allowed word that is most like the one given, or nothing."""
    close = difflib.get_close_matches(given, list(allowed), n=1)
    return f"did you mean {close[0]}? " if close else ""


def check_integer(
    key: str, given: object, *, minimum: int, maximum: float = math.inf, example: int
) -> int:
    """Return `given` if it is an integer in [minimum, maximum], else raise ValueError."""
    allowed = f"must be an integer of at least {minimum}"
    if maximum != math.inf:
        allowed += f" and at most {maximum}"
    if isinstance(given, bool) or not isinstance(given, int) or not minimum <= given <= maximum:
        raise refusal(key, given, allowed, example)
    return given


def check_number(
    key: str,
    given: object,
    *,
    minimum: float = 0.0,
    below: float = math.inf,
    example: float,
) -> float:
    """Return `given` as a float if minimum <= given < below, else raise ValueError.

    NaN, infinities, booleans and strings are refused.
    """
    allowed = f"must be a number of at least {minimum:g}"
    if below != math.inf:
        allowed += f" and below {below:g}"
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise refusal(key, given, allowed, example)
    if not minimum <= given < below:
        raise refusal(key, given, allowed, example)
    return float(given)


def check_integers(key: str, given: object, *, length: int, example: str) -> tuple[int, ...]:
    """Return `given` as a tuple if it is `length` integers of at least 1, else raise ValueError."""
    if (
        isinstance(given, str)
        or not isinstance(given, Sequence)
        or len(given) != length
        or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in given)
    ):
        raise refusal(key, given, f"must be {length} integers of at least 1", example)
    return tuple(given)
