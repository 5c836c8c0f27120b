"""How fast a network trains: python -m scripts.studies.benchmark_training root=FOLDER

Times whole steps (forward, backward, SGD) of one network in turns, each way in its own process: a
bare loop over the authors' block, written out below, and over timm's model; our network in the same
loop; and our module in Lightning, in several layouts and precisions, with memory kept from step to
step as train.py does. Pairs of ours in Lightning and in the loop show the overhead of Lightning.
The first way is timed twice: the ratio of the two is the measurement noise (A/A control).
With root=, a folder of small images with train/ and test/, or photos=, one of large images, it also
measures images per second of loading alone and of training.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.nn import functional as F

import repvgg
from repvgg import cli
from repvgg.checks import check_integer
from repvgg.data.folders import imagefolder
from repvgg.data.module import ImageData
from repvgg.data.sets import cifar10
from repvgg.models.block import compile_blocks
from repvgg.training.classifier import Classifier
from repvgg.training.malloc import keep_memory
from scripts.studies import report, runs, timing, training

DEFAULTS: dict[str, Any] = {
    "model": "repvgg_a0",
    "cases": ["224x32x1000", "32x256x10"],
    "rounds": 9,
    "compile": True,
    "root": None,
    "photos": None,
    "threads": torch.get_num_threads(),
    "device": "cuda" if torch.cuda.is_available() else "cpu",
}
BASE = "the authors' block, bare loop"
BARE, IN_LIGHTNING = "ours, bare loop, memory kept", "ours, Lightning"


def main(settings: dict[str, Any]) -> None:
    check_integer("rounds", settings["rounds"], minimum=2, example=9)
    torch.set_num_threads(check_integer("threads", settings["threads"], minimum=1, example=2))
    if settings["model"] not in repvgg.list_models():
        raise ValueError(f"model={settings['model']}: pass one of repvgg.list_models()")
    print(
        f"{settings['model']}, {settings['rounds']} rounds of one step after "
        f"{timing.WARMUP} to warm up; {report.machine()}, on {settings['device']}, "
        f"{settings['threads']} threads"
    )
    for case in settings["cases"]:
        size, batch, classes = timing.parse_case(case)
        compare(settings, size, batch, classes)
        validate(settings, size, batch, classes)
    if settings["root"] is not None or settings["photos"] is not None:
        measure_data(settings)


def compare(settings: dict[str, Any], size: int, batch: int, classes: int) -> None:
    names = candidates(settings)
    with timing.started(names, serve, settings, size, batch, classes) as running:
        times = timing.measure(running, None, rounds=settings["rounds"])
    peaks = {
        precision: timing.measure_peak(precision) for precision in (torch.float32, torch.bfloat16)
    }
    print(f"\n{batch} images of {size}x{size}, {classes} classes; fastest matmul: ")
    print(", ".join(f"{key}: {(peak or 0) / 1e9:.0f} Gop/s" for key, peak in peaks.items()) + "\n")
    print("| step | ms (quartiles) | images/s | speed-up over the first | quartiles | % of peak |")
    print("|---|---|---|---|---|---|")
    for name in names:
        found = timing.summarize(times[name], times[BASE])
        peak = peaks[torch.bfloat16 if "bf16" in name else torch.float32] or float("inf")
        share = running[name].number / (found.milliseconds / 1000) / peak
        print(
            f"| {name} | {found.milliseconds:.0f} ({found.lower:.0f} to {found.upper:.0f}) | "
            f"{1000 * batch / found.milliseconds:.1f} | {found.speedup:.3f} | "
            f"{found.speedup_lower:.3f} to {found.speedup_upper:.3f} | {100 * share:.0f} |"
        )
    added = [ours - bare for ours, bare in zip(times[IN_LIGHTNING], times[BARE], strict=True)]
    low, middle, high = statistics.quantiles(added, n=4)
    print(f"\nLightning adds {middle:.2f} ms to a step ({low:.2f} to {high:.2f}, in pairs)")


def candidates(settings: dict[str, Any]) -> list[str]:
    """All ways that this machine can run; bf16 if the CPU supports it."""
    names = [BASE, f"{BASE} (A/A control)"]
    if timing.in_timm(settings["model"]):
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
    """In its own process: time training steps on request."""
    runs.start_worker()
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
    for batch_images, batch_targets in on_demand(pipe, (images, targets), flops):
        torch.autograd.backward(F.cross_entropy(network(batch_images), batch_targets))
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
        module, _OnDemand(pipe, batch, flops)
    )


def build_module(model: str, classes: int) -> Classifier:
    network = repvgg.create_model(model, num_classes=classes)
    return training.classifier(network, num_classes=classes, lr=1e-3, steps=10**6)


def trainer(name: str, module: Classifier, device: str, **options: Any) -> L.Trainer:
    """A trainer for a way to step; sets the memory layout of the network and compiles it."""
    if "channels_last" in name:
        module.net.to(memory_format=torch.channels_last)
    if "compiled" in name:
        compile_blocks(module.net)
    return training.trainer(
        accelerator=device,
        devices=1,
        precision="bf16-mixed" if "bf16" in name else "32-true",
        log_every_n_steps=10**9,  # no step is logged
        **options,
    )


class _OnDemand:
    """`on_demand` with a length: without one Lightning fetches a batch ahead."""

    def __init__(self, pipe: Connection, batch: tuple[Tensor, Tensor], flops: int) -> None:
        self.arguments = pipe, batch, flops

    def __len__(self) -> int:
        return 10**6

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return on_demand(*self.arguments)


def on_demand(
    pipe: Connection, batch: tuple[Tensor, Tensor], flops: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches on request and send the milliseconds of the step that the loop makes of each.

    The time is from the batch to the request for the next one.
    """
    for _ in range(2):
        yield batch  # allocates, compiles
    pipe.send(flops)
    while pipe.recv() is not None:
        begin = time.perf_counter()
        yield batch
        timing.synchronize(batch[0].device)
        pipe.send(1000 * (time.perf_counter() - begin))


def build(name: str, model: str, classes: int) -> nn.Module:
    if name.startswith("timm"):
        import timm

        return timm.create_model(model, num_classes=classes).train()
    ours = repvgg.create_model(model, num_classes=classes).train()
    return ours if name.startswith("ours") else reference(ours)


def reference(ours: repvgg.RepVGG) -> nn.Sequential:
    """The network of the authors' program, in training mode."""
    blocks = [block for block in ours.modules() if isinstance(block, repvgg.RepVGGBlock)]
    assert isinstance(ours.linear, nn.Linear)
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
        return F.relu(y if self.identity is None else y + self.identity(x))


def count_flops(network: nn.Module, images: Tensor) -> int:
    """FLOPs of a forward and a backward."""
    flops = timing.count_flops(lambda: torch.autograd.backward(network(images).sum()))
    network.zero_grad()
    return flops


@torch.no_grad()
def validate(settings: dict[str, Any], size: int, batch: int, classes: int) -> None:
    """Speed-up of validation by deployed_validation, over four batches."""
    device = torch.device(settings["device"])
    network = repvgg.create_model(settings["model"], num_classes=classes).to(device).eval()
    images = torch.randn(batch, 3, size, size, device=device)

    def seconds(fold: bool) -> float:
        timing.synchronize(device)
        begin = time.perf_counter()
        evaluated = repvgg.switch_to_deploy(network) if fold else network
        for _ in range(4):
            evaluated(images)
        timing.synchronize(device)
        return time.perf_counter() - begin

    pairs = [(seconds(False), seconds(True)) for _ in range(settings["rounds"] + 1)][1:]
    low, middle, high = statistics.quantiles([branches / folded for branches, folded in pairs], n=4)
    print(
        f"\nvalidation of 4 batches: folding first is {middle:.2f} times as fast ({low:.2f} to "
        f"{high:.2f}) as the multi-branch network"
    )


def measure_data(settings: dict[str, Any]) -> None:
    """Images per second of loading alone, and of training."""
    runs.silence_lightning()
    keep_memory()
    ways: dict[str, Callable[[], ImageData]] = {}
    if root := settings["root"]:
        begin = time.perf_counter()
        stored = cifar10(root=root, batch_size=256)
        print(f"\ndecoding {root} into memory: {time.perf_counter() - begin:.1f} s")
        ways["memory, 32 pixels"] = lambda: stored
        ways["files, 32 pixels"] = lambda: imagefolder(
            root=root, batch_size=256, image_size=32, resize_size=32
        )
    if photos := settings["photos"]:
        ways["files, cropped to 224 pixels"] = lambda: imagefolder(root=photos, batch_size=32)
    step = candidates(settings | {"compile": False})[-1]
    print(f"\ntraining: {settings['model']}, {step}\n")
    print("| source | loading alone, images/s (min, max of 5) | training, images/s |")
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


def train_on(data: ImageData, step: str, settings: dict[str, Any], steps: int = 16) -> float:
    """Images per second of training with loading, without the first four steps."""
    ends: list[float] = []

    def note(*_: object) -> None:
        timing.synchronize(torch.device(settings["device"]))
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
