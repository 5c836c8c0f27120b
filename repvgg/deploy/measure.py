"""How big and how fast a network is: sizes of both forms, and latency in interleaved rounds."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

import repvgg
from repvgg.deploy.report import Latency, Quartiles, Size, Timing
from repvgg.deploy.verification import DEPLOYED, Forms
from repvgg.export.artifact import Artifact
from repvgg.models.size import count_macs, count_parameters
from repvgg.verify import Predictor

# No ratio is reported beyond these.
MAX_NOISE = 0.1  # by which the medians of the A/A control differ
MAX_SPREAD = 0.5  # between its quartiles, of the median


@torch.inference_mode()
def measure_latency(
    predictors: Mapping[str, Callable[[Tensor], object]], images: Tensor, *, seconds: float = 3.0
) -> dict[str, Quartiles]:
    """Time several predictors on the same images, with one call of each in every round.

    Interleaved calls keep the ratios right when the machine's speed drifts. An untimed call before
    each timed one keeps a predictor from paying for the threads and caches of another. For an A/A
    control, pass the same predictor under two names.

    Args:
        predictors: by name; called with `images`.
        images: (N, C, H, W), on the CPU.
        seconds: how long to measure, after three rounds of warm-up; at least ten rounds.
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
        result[name] = Quartiles(median, lower, upper, len(values) - warmup)
    return result


def sizes(forms: Forms, images: Tensor) -> dict[str, Size]:
    """Parameters and multiply-accumulates for one image, before and after."""
    return {
        name: Size(count_parameters(network), count_macs(network, images[:1]))
        for name, network in (("trained form", forms.trained), ("deployed", forms.folded))
    }


def latency(predictors: Mapping[str, Predictor], images: Tensor) -> Latency:
    """Milliseconds of a call, all predictors interleaved, the folded network twice as a control."""
    control = f"{DEPLOYED}, again"
    timed = {name: _encoded(predictor, images) for name, predictor in predictors.items()}
    measured = measure_latency({**timed, control: timed[DEPLOYED]}, images, seconds=3.0)
    base = measured[DEPLOYED].median
    return Latency(
        batch=len(images),
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0],
        noisy=is_noisy(measured[DEPLOYED], measured[control]),
        milliseconds={
            name: Timing(**asdict(quartiles), ratio=base / quartiles.median)
            for name, quartiles in measured.items()
        },
    )


def is_noisy(first: Quartiles, second: Quartiles) -> bool:
    """Whether an A/A control, one network timed twice, shows that times mean nothing."""
    spread = max((one.upper - one.lower) / one.median for one in (first, second))
    return abs(second.median / first.median - 1) > MAX_NOISE or spread > MAX_SPREAD


def _encoded(predictor: Predictor, images: Tensor) -> Predictor:
    """A file's predictor whose input is encoded beforehand, so that encoding is not timed."""
    if not isinstance(predictor, Artifact):
        return predictor
    encoded = predictor.description.encode(images)
    return lambda _: predictor.run(encoded)


def environment() -> dict[str, str]:
    """Versions of packages, and the machine."""
    found = {"repvgg": repvgg.__version__, "python": platform.python_version()}
    packages = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "safetensors")
    for package in (*packages, "openvino"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # an extra
    found["system"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    return found
