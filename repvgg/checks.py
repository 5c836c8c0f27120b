"""Checks of arguments: the error names the argument, what was given and what is allowed."""

import difflib
import math
from collections.abc import Iterable, Sequence


class ArgumentError(ValueError):
    """An argument has a value that is not allowed.

    Attributes:
        argument: its name.
        given: its value.
        allowed: the rule, such as "must be at least 1".
        example: an allowed value; None shows none.
    """

    def __init__(
        self, argument: str, given: object, allowed: str, example: object | None = None
    ) -> None:
        super().__init__(argument, given, allowed, example)
        self.argument = argument
        self.given = given
        self.allowed = allowed
        self.example = example

    def __str__(self) -> str:
        given = f"'{self.given}'" if isinstance(self.given, str) else self.given
        example = str(self.example).replace(" ", "")
        shown = "" if self.example is None else f"; for example {self.argument}={example}"
        return f"{self.argument}={given}: {self.allowed}{shown}"

    def of(self, owner: str) -> "ArgumentError":
        """Name the argument `owner.argument`, as a nested configuration does."""
        return ArgumentError(f"{owner}.{self.argument}", self.given, self.allowed, self.example)


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """A hint at the allowed word that is most like the given one; empty if none is close."""
    close = difflib.get_close_matches(given, list(allowed), n=1)
    return f"did you mean {close[0]}? " if close else ""


def check_integer(
    argument: str, given: object, *, minimum: int, maximum: float = math.inf, example: int
) -> int:
    """Return `given` if it is an integer in [minimum, maximum], else raise ArgumentError."""
    allowed = f"must be an integer of at least {minimum}"
    if maximum != math.inf:
        allowed += f" and at most {maximum}"
    if isinstance(given, bool) or not isinstance(given, int) or not minimum <= given <= maximum:
        raise ArgumentError(argument, given, allowed, example)
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
        raise ArgumentError(argument, given, allowed, example)
    if not minimum <= given < below:
        raise ArgumentError(argument, given, allowed, example)
    return float(given)


def check_boolean(argument: str, given: object) -> bool:
    """Return `given` if it is True or False, else raise ArgumentError."""
    if not isinstance(given, bool):
        raise ArgumentError(argument, given, "must be true or false", "true")
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
        raise ArgumentError(argument, given, f"must be {length} integers of at least 1", example)
    return tuple(given)


refusal = ArgumentError
