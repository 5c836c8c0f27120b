"""What fusing gives: python scripts/benchmark_fusion.py

Latency of networks before and after `repvgg.fuse_conv_bn`, in eager mode and compiled (inductor
with freezing, under no_grad), and how far each is from the network in float64. Every candidate
lives in a process of its own; all of one network are timed in turns, one at a time, in a new order
each round. The network before fusing is there twice: the ratio of the two is the noise. Writes a
table, a figure and the numbers of the table.
"""

import copy
import multiprocessing
import os
import random
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import study
import torch
from torch import nn

import repvgg
from repvgg import cli, verify
from repvgg.arguments import check_integer, refusal

DEFAULTS: dict[str, Any] = {
    "networks": ["resnet18", "resnet34", "resnet50", "resnet152", "mobilenet_v2", "repvgg_a0"],
    "batch": 1,
    "size": 224,
    "rounds": 40,
    "threads": torch.get_num_threads(),
    "compile": True,
    "out": "docs/fusion",
}
BEFORE, AGAIN, AFTER = "before", "before, again", "fused"
COMPILED = ("before, compiled", "before, compiled, again", "fused, compiled")


class Candidate(NamedTuple):
    """One process: its pipe, and how far its network is from the float64 one."""

    process: Any
    pipe: Connection
    error: float


def main(settings: dict[str, Any]) -> None:
    study.require_packages()
    for key in ("batch", "size", "threads"):
        check_integer(key, settings[key], minimum=1, example=DEFAULTS[key])
    check_integer("rounds", settings["rounds"], minimum=2, example=40)  # quartiles need two
    allowed = DEFAULTS["networks"]
    if not settings["networks"] or any(name not in allowed for name in settings["networks"]):
        names = f"must be some of {', '.join(allowed)}"
        raise refusal("networks", settings["networks"], names, "[resnet18]")
    names = (BEFORE, AGAIN, AFTER, *(COMPILED if settings["compile"] else ()))
    out = Path(settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    rows: list[study.Row] = []
    for network in settings["networks"]:
        rows += measure(network, names, settings)
        text = table(rows, settings)
        (out / "benchmark.md").write_text(text)
        (out / "benchmark.csv").unlink(missing_ok=True)
        for row in rows:
            study.append(out / "benchmark.csv", row)
    print(text)
    draw(rows, out / "benchmark.png")


def measure(network: str, names: tuple[str, ...], settings: dict[str, Any]) -> list[study.Row]:
    """Latency and error of every candidate of one network."""
    candidates = {name: start(network, name, settings) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    order = list(names)
    shuffle = random.Random(0).shuffle
    try:
        for _ in range(settings["rounds"] + 3):
            shuffle(order)
            for name in order:
                candidates[name].pipe.send("run")
                times[name].append(candidates[name].pipe.recv())
    finally:
        for candidate in candidates.values():
            candidate.pipe.send("stop")
            candidate.process.join()
    rows = []
    for name in names:
        base = COMPILED[0] if name in COMPILED else BEFORE
        values, bases = times[name][3:], times[base][3:]
        lower, median, upper = statistics.quantiles(values, n=4)
        # By round, as the speed of the machine drifts.
        low, ratio, high = statistics.quantiles(
            [b / v for v, b in zip(values, bases, strict=True)], n=4
        )
        rows.append(
            {
                "network": network,
                "form": name,
                "milliseconds": median,
                "lower": lower,
                "upper": upper,
                "speedup": ratio,
                "speedup_lower": low,
                "speedup_upper": high,
                "error": candidates[name].error,
            }
        )
    return rows


def start(network: str, name: str, settings: dict[str, Any]) -> Candidate:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, network, name, settings), daemon=True)
    process.start()
    theirs.close()
    try:
        return Candidate(process, ours, ours.recv())
    except EOFError:
        raise ValueError(f"{network}, {name}: the process ended; what it said is above") from None


def serve(pipe: Connection, network: str, name: str, settings: dict[str, Any]) -> None:
    """Build a candidate, send its error, then time one call whenever asked."""
    torch.set_num_threads(settings["threads"])
    model, images = build(network), torch.rand(settings["batch"], 3, *[settings["size"]] * 2)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(images.double())
        if name in (AFTER, COMPILED[2]):
            model, report = repvgg.fuse_conv_bn(model)
            assert not report.kept, report.kept
        if name in COMPILED:
            import torch._inductor.config as inductor

            inductor.freezing = True
            model = torch.compile(model)  # type: ignore[assignment]
        pipe.send(verify.relative_error(expected, model(images)))
        while pipe.recv() == "run":
            model(images)  # wakes threads and caches
            begin = time.perf_counter()
            model(images)
            pipe.send(1000 * (time.perf_counter() - begin))


def build(name: str) -> nn.Module:
    """The network with random weights and BatchNorm statistics far from fresh."""
    torch.manual_seed(0)
    if name in repvgg.list_models():
        return study.settle(repvgg.create_model(name))
    import torchvision

    return study.settle(torchvision.models.get_model(name, weights=None))


def table(rows: list[study.Row], settings: dict[str, Any]) -> str:
    size, threads = settings["size"], settings["threads"]
    lines = [
        "# Before and after fusing",
        "",
        f"`python scripts/benchmark_fusion.py rounds={settings['rounds']}`: batches of "
        f"{settings['batch']}, {size}x{size}, "
        f"float32, {settings['rounds']} rounds after 3 to warm up; {study.machine()}, {threads} "
        f"threads, load {os.getloadavg()[0]:.1f}. The speed-up is the median over rounds, against "
        "the same mode before fusing.",
        "",
        "| network | form | ms, median (quartiles) | speed-up (quartiles) | largest error |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['network']} | {row['form']} | {row['milliseconds']:.2f} ({row['lower']:.2f} to "
        f"{row['upper']:.2f}) | {row['speedup']:.3f}x ({row['speedup_lower']:.3f} to "
        f"{row['speedup_upper']:.3f}) | {row['error']:.1e} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def draw(rows: list[study.Row], path: Path) -> None:
    """Bars of the speed-up by network, with quartiles; 1 is the form before fusing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    networks = list(dict.fromkeys(row["network"] for row in rows))
    forms = [form for form in dict.fromkeys(row["form"] for row in rows) if form != BEFORE]
    forms = [form for form in forms if form != COMPILED[0]]
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    width = 0.8 / len(forms)
    for i, form in enumerate(forms):
        own = [row for row in rows if row["form"] == form]
        places = [
            networks.index(row["network"]) + (i - (len(forms) - 1) / 2) * width for row in own
        ]
        values = [row["speedup"] for row in own]
        spread = [
            [row["speedup"] - row["speedup_lower"] for row in own],
            [row["speedup_upper"] - row["speedup"] for row in own],
        ]
        label = {AGAIN: "control", COMPILED[1]: "control, compiled"}.get(form, form)
        axes.bar(places, values, width, yerr=spread, label=label, error_kw={"elinewidth": 1})
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(networks)), networks)
    axes.set_ylabel("times as fast as before fusing")
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
