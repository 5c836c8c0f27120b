"""A bar for the first decode of a data set, which can take minutes."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from repvgg import terminal

Result = TypeVar("Result")
LEAST = 2_000  # images; fewer are read at once


def show(results: Iterable[Result], count: int, step: int, verb: str) -> Iterator[Result]:
    """Pass results on, with a bar on a terminal and one line elsewhere.

    Args:
        count: images in all results.
        step: images in a result; the last may have fewer.
        verb: what happens to them, such as "decoding".
    """
    if count < LEAST:
        yield from results
    elif terminal.is_interactive():
        with terminal.bar(f"{verb} images", count) as advance:
            for result in results:
                yield result
                advance(step)
    else:
        start = time.monotonic()
        print(f"{verb} {count:,} images ...", end="", flush=True)
        try:
            yield from results
        finally:
            print(f" {time.monotonic() - start:.0f} s", flush=True)
