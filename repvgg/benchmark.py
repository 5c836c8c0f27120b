"""How big and how fast: parameters, operations, and latency measured in interleaved rounds."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: the median and quartiles over all rounds."""

    median: float
    lower: float
    upper: float
    rounds: int


def count_parameters(model: nn.Module) -> int:
    """Number of scalars a network learned; BatchNorm statistics do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_macs(model: nn.Module, images: Tensor) -> int:
    """Multiply-accumulates of one forward of `images`, by torch's counter (two FLOPs each)."""
    with FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() // 2


@torch.inference_mode()
def measure_latency(
    predictors: Mapping[str, Callable[[Tensor], Tensor]], images: Tensor, *, seconds: float = 3.0
) -> dict[str, Latency]:
    """Time several predictors on the same images in one run, a call of each in every round.

    Interleaving makes their ratios hold when the machine's speed drifts, and a call that is not
    timed before each one that is keeps one predictor from paying for the threads and caches of
    another. Time the same predictor under two names to see how much of a ratio is noise.

    Args:
        predictors: by name; called with `images`.
        images: (N, C, H, W), on the CPU.
        seconds: how long to measure, after three rounds to warm up; at least ten rounds are made.
    """
    images = images.contiguous()
    times: dict[str, list[float]] = {name: [] for name in predictors}
    deadline = None
    warmup = 3
    done = 0
    while done < warmup + 10 or (deadline is not None and time.perf_counter() < deadline):
        for name, predict in predictors.items():
            predict(images)
            start = time.perf_counter()
            predict(images)
            times[name].append(1000 * (time.perf_counter() - start))
        done += 1
        if done == warmup:
            deadline = time.perf_counter() + seconds
    result = {}
    for name, values in times.items():
        lower, median, upper = statistics.quantiles(values[warmup:], n=4)
        result[name] = Latency(median, lower, upper, len(values) - warmup)
    return result
