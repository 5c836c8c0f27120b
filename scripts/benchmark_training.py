"""How fast a network trains: python scripts/benchmark_training.py root=FOLDER

Times whole steps (forward, backward, SGD) of one network in turns, each way in a process of its
own: a bare loop over the authors' block, written out below, and over timm's model; our network in
the same loop; and our module in Lightning, in several layouts and precisions, with the memory of a
step kept for the next one as train.py does. What Lightning adds is told by pairs of ours in
Lightning and in the loop. The first one runs under two names: their ratio shows how much is noise.
With root=, a folder of small images with train/ and test/, or photos=, one of large images, images
a second of the data alone and of training on it are measured too.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any

import study
import torch
import turns
from benchmark_deploy import measure_peak
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import repvgg
from repvgg import cli
from repvgg.checks import check_integer
from repvgg.models.block import compile_blocks
from repvgg.training.malloc import keep_memory

DEFAULTS: dict[str, Any] = {
    "model": "repvgg_a0",
    "cases": ["224x32x1000", "32x256x10"],
    "rounds": 9,
    "steps": 1,
    "compile": True,
    "root": None,
    "photos": None,
    "threads": torch.get_num_threads(),
    "device": "cuda" if torch.cuda.is_available() else "cpu",
}
BASE = "the authors' block, bare loop"
BARE, IN_LIGHTNING = "ours, bare loop, memory kept", "ours, Lightning"
CASE = "SIZExBATCHxCLASSES"


def main(settings: dict[str, Any]) -> None:
    check_integer("rounds", settings["rounds"], minimum=2, example=9)
    check_integer("steps", settings["steps"], minimum=1, example=1)
    torch.set_num_threads(check_integer("threads", settings["threads"], minimum=1, example=2))
    if settings["model"] not in repvgg.list_models():
        raise ValueError(f"model={settings['model']}: type one of repvgg.list_models()")
    print(
        f"{settings['model']}, {settings['rounds']} rounds of {settings['steps']} steps after "
        f"{turns.WARMUP} to warm up; {study.machine()}, on {settings['device']}, "
        f"{settings['threads']} threads"
    )
    for case in settings["cases"]:
        size, batch, classes = parse(case)
        compare(settings, size, batch, classes)
        validate(settings, size, batch, classes)
    if settings["root"] is not None or settings["photos"] is not None:
        measure_data(settings)


def parse(case: object) -> tuple[int, int, int]:
    numbers = [int(number) for number in str(case).split("x") if number.isdecimal()]
    if len(numbers) != 3 or min(numbers) < 1:
        raise ValueError(f"cases: '{case}' is not {CASE}; type for example cases=[32x256x10]")
    return numbers[0], numbers[1], numbers[2]


def compare(settings: dict[str, Any], size: int, batch: int, classes: int) -> None:
    names = candidates(settings)
    running = {
        name: turns.start(name, serve, name, settings, size, batch, classes) for name in names
    }
    try:
        times = turns.measure(running, None, rounds=settings["rounds"])
    finally:
        turns.stop(running)
    peaks = {precision: measure_peak(precision) for precision in (torch.float32, torch.bfloat16)}
    print(f"\n{batch} images of {size}x{size}, {classes} classes; peak of a product of matrices, ")
    print(", ".join(f"{key}: {(peak or 0) / 1e9:.0f} Gop/s" for key, peak in peaks.items()) + "\n")
    print("| step | ms (quartiles) | images/s | times the first | quartiles | % of its peak |")
    print("|---|---|---|---|---|---|")
    for name in names:
        milliseconds = [value / settings["steps"] for value in times[name]]
        timing = turns.summarize(times[name], times[BASE])
        middle = statistics.median(milliseconds)
        peak = peaks[torch.bfloat16 if "bf16" in name else torch.float32] or float("inf")
        share = running[name].said / (middle / 1000) / peak
        print(
            f"| {name} | {middle:.0f} ({timing.lower / settings['steps']:.0f} to "
            f"{timing.upper / settings['steps']:.0f}) | {1000 * batch / middle:.1f} | "
            f"{timing.speedup:.3f} | {timing.speedup_lower:.3f} to {timing.speedup_upper:.3f} | "
            f"{100 * share:.0f} |"
        )
    added = [
        (ours - bare) / settings["steps"]
        for ours, bare in zip(times[IN_LIGHTNING], times[BARE], strict=True)
    ]
    low, middle, high = statistics.quantiles(added, n=4)
    print(f"\nLightning adds {middle:.2f} ms to a step ({low:.2f} to {high:.2f}, by pairs)")


def candidates(settings: dict[str, Any]) -> list[str]:
    """Every way that this machine can go; bf16 where the processor has it."""
    names = [BASE, "the same again (control)"]
    if find_spec("timm") and settings["model"].startswith("repvgg_"):
        names.append("timm, bare loop")
    names += [f"{BASE}, memory kept", BARE, IN_LIGHTNING, "ours, Lightning, channels_last"]
    if settings["compile"]:
        names += ["ours, Lightning, channels_last, compiled"]
    if settings["device"] == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        names += [f"{name}, bf16" for name in names if "channels_last" in name]
    return names


def serve(
    pipe: Connection, name: str, settings: dict[str, Any], size: int, batch: int, classes: int
) -> None:
    """In a process of its own: train whenever asked, and tell the milliseconds."""
    study.start_worker()
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    device = torch.device(settings["device"])
    if "Lightning" in name or "memory kept" in name:
        keep_memory()
    images = torch.randn(batch, 3, size, size, device=device)
    targets = torch.randint(0, classes, (batch,), device=device)
    if "Lightning" in name:
        in_lightning(pipe, name, settings, (images, targets), classes)
        return
    network = build(name, settings["model"], classes).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    flops = count_flops(network, images)
    for batch_images, batch_targets in on_demand(pipe, (images, targets), flops, settings["steps"]):
        F.cross_entropy(network(batch_images), batch_targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def in_lightning(
    pipe: Connection,
    name: str,
    settings: dict[str, Any],
    batch: tuple[Tensor, Tensor],
    classes: int,
) -> None:
    module = build_module(settings["model"], classes)
    flops = count_flops(module.net, batch[0].cpu())
    trainer(name, module, settings["device"], max_epochs=1).fit(
        module, _OnDemand(pipe, batch, flops, settings["steps"])
    )


def build_module(model: str, classes: int) -> Any:
    from repvgg.training.classifier import Classifier

    return Classifier(
        {"name": model, "num_classes": classes},
        lr=1e-3,
        momentum=0.9,
        weight_decay=1e-4,
        num_steps=10**6,
        num_warmup_steps=0,
    )


def trainer(name: str, module: Any, device: str, **options: Any) -> Any:
    """What steps as the name says; the network is laid out and compiled for it."""
    import lightning as L

    if "channels_last" in name:
        module.net.to(memory_format=torch.channels_last)
    if "compiled" in name:
        compile_blocks(module.net)
    return L.Trainer(
        accelerator=device,
        devices=1,
        precision="bf16-mixed" if "bf16" in name else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        log_every_n_steps=10**9,  # as between two lines of the log
        **options,
    )


class _OnDemand:
    """`on_demand` with a length, as Lightning fetches one batch ahead where it knows none."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __len__(self) -> int:
        return 10**6

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return on_demand(*self.arguments)


def on_demand(
    pipe: Connection, batch: tuple[Tensor, Tensor], said: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches, when the other end of the pipe asks; the time of all that the loop does with them.

    From the first batch that is handed out to the request for the next but last.
    """
    for _ in range(2):
        yield batch  # allocates, compiles
    pipe.send(said)
    while pipe.recv() is not None:
        begin = time.perf_counter()
        for _ in range(steps):
            yield batch
        _finish(batch[0].device)
        pipe.send(1000 * (time.perf_counter() - begin))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build(name: str, model: str, classes: int) -> nn.Module:
    if name.startswith("timm"):
        import timm

        return timm.create_model(model, num_classes=classes).train()
    ours = repvgg.create_model(model, num_classes=classes).train()
    return ours if name.startswith("ours") else reference(ours)


def reference(ours: nn.Module) -> nn.Module:
    """The network as the authors' program builds it, with its convolutions of stride 2."""
    blocks = [block for block in ours.modules() if isinstance(block, repvgg.RepVGGBlock)]
    return nn.Sequential(
        *(
            ReferenceBlock(block.in_channels, block.out_channels, block.stride, block.groups)
            for block in blocks
        ),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(blocks[-1].out_channels, ours.linear.out_features),
    ).train()


class ReferenceBlock(nn.Module):
    """Three branches as in figure 4 of the paper, each with its own convolution and BatchNorm."""

    def __init__(self, channels: int, out_channels: int, stride: int, groups: int) -> None:
        super().__init__()
        same = channels == out_channels and stride == 1
        self.identity = nn.BatchNorm2d(channels) if same else None
        self.dense, self.point = (
            nn.Sequential(
                nn.Conv2d(
                    channels,
                    out_channels,
                    size,
                    stride=stride,
                    padding=size // 2,
                    groups=groups,
                    bias=False,
                ),
                nn.BatchNorm2d(out_channels),
            )
            for size in (3, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x) + self.point(x)
        return (y if self.identity is None else y + self.identity(x)).relu()


def count_flops(network: nn.Module, images: Tensor) -> int:
    """Of a step, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        network(images).sum().backward()
    network.zero_grad()
    return counter.get_total_flops()


@torch.no_grad()
def validate(settings: dict[str, Any], size: int, batch: int, classes: int) -> None:
    """What deployed_validation gains: four batches by the branches, and folded first."""
    device = torch.device(settings["device"])
    network = repvgg.create_model(settings["model"], num_classes=classes).to(device).eval()
    images = torch.randn(batch, 3, size, size, device=device)

    def seconds(fold: bool) -> float:
        _finish(device)
        begin = time.perf_counter()
        judged = repvgg.switch_to_deploy(network) if fold else network
        for _ in range(4):
            judged(images)
        _finish(device)
        return time.perf_counter() - begin

    pairs = [(seconds(False), seconds(True)) for _ in range(settings["rounds"] + 1)][1:]
    low, middle, high = statistics.quantiles([branches / folded for branches, folded in pairs], n=4)
    print(
        f"\nvalidation of 4 batches, folded first: {middle:.2f} times as fast ({low:.2f} to "
        f"{high:.2f}) as by the branches"
    )


def measure_data(settings: dict[str, Any]) -> None:
    """Images a second of the data alone, and of whole training steps on it."""
    from repvgg.data.sets import cifar10, imagefolder

    study.quieten()
    keep_memory()
    ways: dict[str, Callable[[], Any]] = {}
    if root := settings["root"]:
        begin = time.perf_counter()
        stored = cifar10(root=root, batch_size=256)
        print(f"\ndecoding {root} into memory: {time.perf_counter() - begin:.1f} s")
        ways["memory, 32 pixels"] = lambda: stored
        ways["files, 32 pixels"] = lambda: imagefolder(
            root=root, batch_size=256, image_size=32, resize_size=32
        )
    if photos := settings["photos"]:
        ways["files, cut to 224 pixels"] = lambda: imagefolder(root=photos, batch_size=32)
    step = candidates(settings | {"compile": False})[-1]
    print(f"\nwhole: {settings['model']}, {step}\n")
    print("| source | alone, images/s (least, most of 5) | whole, images/s |")
    print("|---|---|---|")
    for name, make in ways.items():
        data, rates = make(), []
        for epoch in range(5):
            loader = data.train_dataloader()
            loader.set_epoch(epoch)
            begin, count = time.perf_counter(), 0
            for images, _ in itertools.islice(loader, 40):
                count += len(images)
            rates.append(count / (time.perf_counter() - begin))
        print(
            f"| {name} | {statistics.median(rates):.0f} ({min(rates):.0f}, {max(rates):.0f}) | "
            f"{train_on(data, step, settings):.1f} |"
        )


def train_on(data: Any, step: str, settings: dict[str, Any], steps: int = 16) -> float:
    """Images a second of a run's steps but the first four, with loading."""
    from lightning.pytorch.callbacks import LambdaCallback

    ends: list[float] = []

    def note(*_: Any) -> None:
        _finish(torch.device(settings["device"]))
        ends.append(time.perf_counter())

    module = build_module(settings["model"], len(data.contract.classes))
    watch = LambdaCallback(on_train_batch_end=note)
    length = {"max_epochs": -1, "max_steps": steps}
    trainer(step, module, settings["device"], callbacks=[watch], **length).fit(
        module, datamodule=data
    )
    return data.batch_size * (steps - 4) / (ends[-1] - ends[3])


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
