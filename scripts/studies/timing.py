"""Time candidates in turns, each in its own process.

Separate processes keep what one candidate compiles, allocates or spins from the others. Turns, in
a new order each round, make ratios hold when the speed of the machine drifts.
"""

import contextlib
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

WARMUP = 3  # rounds that do not count
CASE = "SIZExBATCHxCLASSES"

Argument = TypeVar("Argument")


class Candidate(NamedTuple):
    """A process that waits for its turns, the pipe to it, and its number: an error or FLOPs."""

    process: SpawnProcess
    pipe: Connection
    number: float


class Timing(NamedTuple):
    """Milliseconds of a call and the speed-up over another candidate: median and quartiles."""

    milliseconds: float
    lower: float
    upper: float
    speedup: float
    speedup_lower: float
    speedup_upper: float


@contextlib.contextmanager
def started(
    names: Iterable[str], serve: Callable[..., None], *arguments: object
) -> Iterator[dict[str, Candidate]]:
    """Run candidates, each as `serve(pipe, name, *arguments)` in its own process.

    `serve` ends in `answer`. Leaving the context stops the processes.

    Raises:
        ValueError: a process ended before it was ready.
    """
    running: dict[str, Candidate] = {}
    try:
        for name in names:
            running[name] = start(name, serve, *arguments)
        yield running
    finally:
        for candidate in running.values():
            candidate.pipe.send(None)
            candidate.process.join()


def start(name: str, serve: Callable[..., None], *arguments: object) -> Candidate:
    """Start a process and wait until it is ready."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, name, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        return Candidate(process, ours, ours.recv())
    except EOFError:
        raise ValueError(f"{name}: the process ended; its output is above") from None


def answer(pipe: Connection, number: float, call: Callable[[Argument], object]) -> None:
    """In the process: send the candidate's number, then time `call(argument)` on every request."""
    pipe.send(number)
    while (message := pipe.recv()) is not None:
        (argument,) = message
        call(argument)  # wakes threads and caches
        begin = time.perf_counter()
        call(argument)
        pipe.send(1000 * (time.perf_counter() - begin))


def measure(
    candidates: Mapping[str, Candidate], argument: Any, *, rounds: int, rest: float = 0.0
) -> dict[str, list[float]]:
    """Time all candidates in turns; milliseconds of every round that counts.

    Args:
        argument: of each call, sent through the pipe.
        rest: seconds before each turn, in which threads that still spin stop.
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


def parse_case(case: object) -> tuple[int, int, int]:
    """Image size, batch size and number of classes in SIZExBATCHxCLASSES."""
    numbers = [int(number) for number in str(case).split("x") if number.isdecimal()]
    if len(numbers) != 3 or min(numbers) < 1:
        raise ValueError(f"cases: '{case}' is not {CASE}; pass for example cases=[32x256x10]")
    return numbers[0], numbers[1], numbers[2]


def count_flops(step: Callable[[], object]) -> int:
    """FLOPs of a call, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def compiled(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Compile a network for inference by inductor with freezing, each input size separately."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    return torch.compile(network, dynamic=False)


def in_timm(model: str) -> bool:
    """Whether timm is installed and has a variant of RepVGG."""
    if not find_spec("timm"):
        return False
    import timm

    return model in timm.list_models("repvgg*")


def synchronize(device: torch.device) -> None:
    """Wait for the kernels that a GPU still runs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_peak(dtype: torch.dtype, *, size: int = 2048, seconds: float = 2.0) -> float | None:
    """The most operations per second that a matmul reached; None if the CPU has none for it."""
    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    matmul = torch._int_mm if dtype == torch.int8 else torch.mm
    best, deadline = float("inf"), time.perf_counter() + seconds
    try:
        while time.perf_counter() < deadline:
            begin = time.perf_counter()
            matmul(a, b)
            best = min(best, time.perf_counter() - begin)
    except (RuntimeError, NotImplementedError):
        return None
    return 2 * size**3 / best
