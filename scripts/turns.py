"""What benchmarks share: candidates in processes of their own, timed in turns.

One process for each candidate keeps what one of them compiles, allocates or spins from the others.
Turns, in a new order each round, make ratios hold when the speed of the machine drifts.
"""

import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

WARMUP = 3  # rounds that do not count


class Candidate(NamedTuple):
    """A process that waits for its turns: its pipe, and what it said when it was ready."""

    process: Any
    pipe: Connection
    said: Any


class Timing(NamedTuple):
    """Milliseconds of a call and the speed-up over another candidate: median and quartiles."""

    milliseconds: float
    lower: float
    upper: float
    speedup: float
    speedup_lower: float
    speedup_upper: float


def start(name: str, serve: Callable[..., None], *arguments: Any) -> Candidate:
    """Start a process that runs `serve(pipe, *arguments)`, which ends in `answer`.

    Raises:
        ValueError: it ended before it was ready.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        return Candidate(process, ours, ours.recv())
    except EOFError:
        raise ValueError(f"{name}: the process ended; what it said is above") from None


def answer(pipe: Connection, said: Any, call: Callable[[Any], Any]) -> None:
    """In the process: tell that it is ready, then time `call(argument)` whenever asked."""
    pipe.send(said)
    while (message := pipe.recv()) is not None:
        (argument,) = message
        call(argument)  # wakes threads and caches
        begin = time.perf_counter()
        call(argument)
        pipe.send(1000 * (time.perf_counter() - begin))


def stop(candidates: Mapping[str, Candidate]) -> None:
    for candidate in candidates.values():
        candidate.pipe.send(None)
        candidate.process.join()


def measure(
    candidates: Mapping[str, Candidate], argument: Any, *, rounds: int, rest: float = 0.0
) -> dict[str, list[float]]:
    """Time all candidates in turns; milliseconds of every round that counts.

    Args:
        rest: seconds before each turn, for threads that still spin after the last one.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds + WARMUP):
        shuffle(order)
        for name in order:
            time.sleep(rest)
            candidates[name].pipe.send((argument,))
            times[name].append(candidates[name].pipe.recv())
    return {name: values[WARMUP:] for name, values in times.items()}


def summarize(values: list[float], bases: list[float]) -> Timing:
    """Compare by round, as the speed of the machine drifts."""
    lower, median, upper = statistics.quantiles(values, n=4)
    ratios = [base / value for value, base in zip(values, bases, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return Timing(median, lower, upper, ratio, low, high)
