"""Names of the user in a figure: short, on one line, harmless."""

import unicodedata

from repvgg.checks import escape

MOST_NAMES = 120  # rows or columns; above it an axis shows none
LONGEST_NAME = 24  # letters


def shorten(name: str, letters: int = LONGEST_NAME) -> str:
    """A name on one line, without control characters, cut if it is long; wide letters are two."""
    name = escape(name)
    widths = [2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in name]
    if sum(widths) <= letters:
        return name
    while sum(widths) > letters - 1:
        widths.pop()
    return f"{name[: len(widths)]}…"
