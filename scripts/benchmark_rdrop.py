"""What a training step costs with R-Drop: python scripts/benchmark_rdrop.py

Times whole steps (forward, backward, SGD) of one network, interleaved in one run: without R-Drop,
with it in one forward, with every image twice in one batch, and with two forwards, as its authors
do it. The step without R-Drop is timed under two names: their ratio shows how much is noise.
"""

import copy
import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import study
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from repvgg import cli
from repvgg.checks import check_integer, refusal
from repvgg.losses import rdrop_loss
from repvgg.rdrop import Noise
from repvgg.training.classifier import Classifier

DEFAULTS: dict[str, Any] = {
    "model": "repvgg_a0",
    "cases": ["224x32x1000", "32x256x10", "32x64x10/early"],
    "rounds": 15,
    "device": "cuda" if torch.cuda.is_available() else "cpu",
    "threads": torch.get_num_threads(),
}
STRIDES = {"": [2, 2, 2, 2, 2], "early": [1, 1, 2, 2, 2]}
CASE = "SIZExBATCHxCLASSES, with /early behind it for strides [1,1,2,2,2]"
PLAIN = "without R-Drop"


def main(settings: dict[str, Any]) -> None:
    check_integer("rounds", settings["rounds"], minimum=1, example=15)
    torch.set_num_threads(check_integer("threads", settings["threads"], minimum=1, example=2))
    cases = [parse(case) for case in settings["cases"]]
    device = parse_device(settings["device"])
    print(
        f"{settings['model']}, float32, {settings['rounds']} rounds after 2 to warm up; "
        f"{study.machine()}, on {device.type}, {settings['threads']} threads, load "
        f"{os.getloadavg()[0]:.1f}"
    )
    for size, batch, num_classes, strides in cases:
        steps = training_steps(settings["model"], size, batch, num_classes, strides, device)
        flops = {name: count_flops(step) for name, step in steps.items()}
        times = interleave(steps, settings["rounds"], device)
        print(f"\n{batch} images of {size}x{size}, {num_classes} classes, strides {strides}\n")
        print("| step | ms, median (quartiles) | time | quartiles | FLOPs |")
        print("|---|---|---|---|---|")
        for name, milliseconds in times.items():
            lower, median, upper = quartiles(milliseconds)
            ratios = [a / b for a, b in zip(milliseconds, times[PLAIN], strict=True)]
            low, _, high = quartiles(ratios)
            share = median / quartiles(times[PLAIN])[1]
            print(
                f"| {name} | {median:.1f} ({lower:.1f} to {upper:.1f}) | {share:.3f}x | "
                f"{low:.3f} to {high:.3f} | {flops[name] / flops[PLAIN]:.4f}x |"
            )


def parse_device(name: str) -> torch.device:
    if name not in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        raise refusal("device", name, "there is no such device here", "cpu")
    return torch.device(name)


def parse(case: str) -> tuple[int, int, int, list[int]]:
    numbers, _, strides = str(case).partition("/")
    sizes = [int(number) for number in numbers.split("x") if number.isdecimal()]
    if len(sizes) != 3 or min(sizes) < 1 or strides not in STRIDES:
        raise ValueError(f"cases: '{case}' is not {CASE}; type for example cases=[32x256x10]")
    return sizes[0], sizes[1], sizes[2], STRIDES[strides]


def training_steps(
    model: str, size: int, batch: int, num_classes: int, strides: list[int], device: torch.device
) -> dict[str, Callable[[], None]]:
    """One whole training step by name, all of networks with the same weights."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size, device=device)
    targets = torch.randint(0, num_classes, (batch,), device=device)

    def classifier(rdrop: float, noise: Noise | None = None) -> Classifier:
        torch.manual_seed(0)
        module = Classifier(
            {"name": model, "strides": strides, "num_classes": num_classes, "dropout": 0.2},
            lr=1e-3,
            momentum=0.9,
            weight_decay=1e-4,
            num_steps=1,
            num_warmup_steps=0,
            rdrop=rdrop,
        )
        module.noise = noise
        return module.to(device).train()

    def step(module: Classifier, loss: Callable[[], Tensor]) -> Callable[[], None]:
        optimizer = module.configure_optimizers()["optimizer"]

        def run() -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    def by_module(module: Classifier) -> Callable[[], None]:
        return step(module, lambda: module.losses(images, targets, alpha=module.rdrop).total)

    def two_forwards(module: Classifier) -> Callable[[], None]:
        net = module.net
        return step(module, lambda: rdrop_loss(net(images), net(images), targets, alpha=1.0).total)

    plain = classifier(0.0)
    return {
        PLAIN: by_module(plain),
        "the same again (control)": by_module(copy.deepcopy(plain)),
        "R-Drop, one forward": by_module(classifier(1.0)),
        "R-Drop, every image twice in the batch": by_module(classifier(1.0, Noise(True, True))),
        "R-Drop, two forwards": two_forwards(classifier(1.0)),
    }


def count_flops(step: Callable[[], None]) -> int:
    step()  # the first one asks the network for its noise, once a run
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def interleave(
    steps: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds by round; every round takes each step once, in a new order."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    shuffle = random.Random(0).shuffle
    for _ in range(2 + rounds):
        shuffle(order)
        for name in order:
            synchronize(device)
            start = time.perf_counter()
            steps[name]()
            synchronize(device)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: values[2:] for name, values in times.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4)
    return lower, median, upper


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
