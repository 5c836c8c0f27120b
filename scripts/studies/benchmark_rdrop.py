"""What a training step costs with R-Drop: python -m scripts.studies.benchmark_rdrop

Times whole steps (forward, backward, SGD) of one network in turns, each way in its own process:
without R-Drop, with it in one forward, with every image twice in one batch, and with two forwards,
as in the authors' program. The step without R-Drop is timed twice: the ratio of the two is the
measurement noise (A/A control).
"""

import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from repvgg import cli
from repvgg.checks import check_integer, wrong_value
from repvgg.losses import rdrop_loss
from repvgg.models.registry import create_model
from repvgg.rdrop import StochasticLayers
from scripts.studies import report, runs, timing, training

DEFAULTS: dict[str, Any] = {
    "model": "repvgg_a0",
    "cases": ["224x32x1000", "32x256x10", "32x64x10/early"],
    "rounds": 15,
    "device": "cuda" if torch.cuda.is_available() else "cpu",
    "threads": torch.get_num_threads(),
}
STRIDES = {"": [2, 2, 2, 2, 2], "early": [1, 1, 2, 2, 2]}
PLAIN, CONTROL = "without R-Drop", "without R-Drop (A/A control)"
ONE_FORWARD = "R-Drop, one forward"
IMAGE_TWICE = "R-Drop, every image twice in the batch"
TWO_FORWARDS = "R-Drop, two forwards"
WAYS = (PLAIN, CONTROL, ONE_FORWARD, IMAGE_TWICE, TWO_FORWARDS)


def main(settings: dict[str, Any]) -> None:
    check_integer("rounds", settings["rounds"], minimum=2, example=15)  # quartiles need two
    check_integer("threads", settings["threads"], minimum=1, example=2)
    for case in settings["cases"]:
        parse(case)
    if settings["device"] not in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        raise wrong_value("device", settings["device"], "there is no such device here", "cpu")
    print(
        f"{settings['model']}, float32, {settings['rounds']} rounds after {timing.WARMUP} to warm "
        f"up; {report.machine()}, on {settings['device']}, {settings['threads']} threads, load "
        f"{os.getloadavg()[0]:.1f}"
    )
    for case in settings["cases"]:
        compare(case, settings)


def parse(case: str) -> tuple[int, int, int, list[int]]:
    """Image size, batch size, number of classes and strides of SIZExBATCHxCLASSES[/early]."""
    sizes, _, strides = str(case).partition("/")
    if strides not in STRIDES:
        raise ValueError(f"cases: '{case}': /early sets strides [1,1,2,2,2], nothing else does")
    return *timing.parse_case(sizes), STRIDES[strides]


def compare(case: str, settings: dict[str, Any]) -> None:
    """Time every way to step on one case and print the table."""
    with timing.started(WAYS, serve, case, settings) as running:
        times = timing.measure(running, None, rounds=settings["rounds"])
    size, batch, num_classes, strides = parse(case)
    print(f"\n{batch} images of {size}x{size}, {num_classes} classes, strides {strides}\n")
    print("| step | ms, median (quartiles) | time | quartiles | FLOPs |")
    print("|---|---|---|---|---|")
    for way in WAYS:
        own = timing.summarize(times[way], times[PLAIN])
        cost = timing.summarize(times[PLAIN], times[way])  # the inverse ratio
        flops = running[way].number / running[PLAIN].number
        print(
            f"| {way} | {own.milliseconds:.1f} ({own.lower:.1f} to {own.upper:.1f}) | "
            f"{cost.speedup:.3f}x | {cost.speedup_lower:.3f} to {cost.speedup_upper:.3f} | "
            f"{flops:.4f}x |"
        )


def serve(pipe: Connection, way: str, case: str, settings: dict[str, Any]) -> None:
    """In its own process: count the FLOPs of a step, then time steps on request."""
    runs.start_worker()
    torch.set_num_threads(settings["threads"])
    device = torch.device(settings["device"])
    step = training_step(way, settings["model"], case, device)
    step()  # detects stochastic layers, once per run
    timing.answer(pipe, timing.count_flops(step), lambda _: step())


def training_step(way: str, model: str, case: str, device: torch.device) -> Callable[[], None]:
    """One whole training step; every way starts from the same weights."""
    size, batch, num_classes, strides = parse(case)
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size, device=device)
    targets = torch.randint(0, num_classes, (batch,), device=device)
    torch.manual_seed(0)
    module = training.classifier(
        create_model(model, strides=strides, num_classes=num_classes, dropout=0.2),
        num_classes=num_classes,
        lr=1e-3,
        steps=1,
        rdrop=0.0 if way in (PLAIN, CONTROL) else 1.0,
    )
    if way == IMAGE_TWICE:
        module.stochastic = StochasticLayers(backbone=True, head=True)
    module.to(device).train()
    optimizer = module.configure_optimizers()["optimizer"]

    def step() -> None:
        if way == TWO_FORWARDS:
            net = module.net
            loss = rdrop_loss(net(images), net(images), targets, alpha=1.0).total
        else:
            loss = module.losses(images, targets, alpha=module.rdrop).total
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        timing.synchronize(device)

    return step


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
