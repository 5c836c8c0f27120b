"""How big and how fast: parameters, operations, and latency measured in interleaved rounds."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import repvgg
from repvgg.deploy.verification import DEPLOYED, Forms
from repvgg.export.artifact import Artifact
from repvgg.verify import Predictor

MAX_NOISE = 0.1  # of the control against its twin, beyond which no ratio is told


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


def sizes(forms: Forms, images: Tensor) -> dict[str, Any]:
    """Parameters and multiply-accumulates for one image, before and after."""
    return {
        name: {
            "parameters": count_parameters(network),
            "macs": count_macs(network, images[:1]),
        }
        for name, network in (("trained form", forms.trained), ("deployed", forms.folded))
    }


def latency(predictors: dict[str, Predictor], images: Tensor) -> dict[str, Any]:
    """Milliseconds per image, all predictors interleaved, one of them twice as a control."""
    control = f"{DEPLOYED}, again"

    def ready(predict: Predictor) -> Predictor:
        """What a file takes is made beforehand."""
        if not isinstance(predict, Artifact):
            return predict
        encoded = predict.description.encode(images)
        return lambda _: predict.run(encoded)

    timed = {name: ready(predict) for name, predict in predictors.items()}
    measured = measure_latency({**timed, control: timed[DEPLOYED]}, images, seconds=3.0)
    base = measured[DEPLOYED].median
    return {
        "batch": len(images),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "noisy": abs(measured[control].median / base - 1) > MAX_NOISE,
        "milliseconds": {
            name: {**asdict(value), "ratio": base / value.median}
            for name, value in measured.items()
        },
    }


def environment() -> dict[str, str]:
    """Versions and machine."""
    found = {"repvgg": repvgg.__version__, "python": platform.python_version()}
    packages = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "safetensors")
    for package in (*packages, "openvino"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # an extra
    found["system"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors"
    return found
