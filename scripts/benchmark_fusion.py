"""What fusing gives: python scripts/benchmark_fusion.py

Latency of networks before and after `repvgg.fuse_conv_bn`, in eager mode and compiled (inductor
with freezing, under no_grad), and how far each is from the network in float64. Every candidate
lives in a process of its own; all of one network are timed in turns, one at a time, in a new order
each round. The network before fusing is there twice: the ratio of the two is the noise. Writes a
table, a figure and the numbers of the table.
"""

import copy
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import study
import torch
import turns
from torch import nn

import repvgg
from repvgg import cli, verify
from repvgg.checks import check_integer, refusal

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
    candidates = {
        name: turns.start(f"{network}, {name}", serve, network, name, settings) for name in names
    }
    try:
        times = turns.measure(candidates, None, rounds=settings["rounds"])
    finally:
        turns.stop(candidates)
    rows = []
    for name in names:
        base = COMPILED[0] if name in COMPILED else BEFORE
        timing = turns.summarize(times[name], times[base])
        row = {"network": network, "form": name, **timing._asdict()}
        rows.append({**row, "error": candidates[name].said})
    return rows


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
        error = verify.relative_error(expected, model(images))
        turns.answer(pipe, error, lambda _: model(images))


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
        f"threads. The speed-up is the median over rounds, against "
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
