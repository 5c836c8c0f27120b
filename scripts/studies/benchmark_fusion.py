"""Speed-up by fusing convolutions and BatchNorms: python -m scripts.studies.benchmark_fusion

Latency of networks before and after `repvgg.fuse_conv_bn`, in eager mode and compiled (inductor
with freezing, under no_grad), and the error of each against the network in float64. Each candidate
runs in its own process; all candidates of a network are timed in turns. The network before fusing
is timed twice (A/A control): the ratio of the two is the measurement noise. Writes a table, a
figure and CSV.
"""

import copy
import functools
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import repvgg
from repvgg import cli, figures, verify
from repvgg.checks import check_integer, wrong_value
from scripts.studies import report, runs, timing
from scripts.studies.networks import randomize_batchnorms

DEFAULTS: dict[str, Any] = {
    "networks": ["resnet18", "resnet34", "resnet50", "resnet152", "mobilenet_v2", "repvgg_a0"],
    "batch": 1,
    "size": 224,
    "rounds": 40,
    "threads": torch.get_num_threads(),
    "compile": True,
    "out": "docs/studies/fusion",
}
BEFORE, AGAIN, AFTER = "before", "before (A/A control)", "fused"
MODES = {"eager": (AGAIN, AFTER), "compiled": ("before, compiled (A/A control)", "fused, compiled")}
CAPTION = "Speed-up by fusing, eager and compiled; dots are medians, lines the quartiles"
COMPILED = ("before, compiled", "before, compiled (A/A control)", "fused, compiled")


def main(settings: dict[str, Any]) -> None:
    for key in ("batch", "size", "threads"):
        check_integer(key, settings[key], minimum=1, example=DEFAULTS[key])
    check_integer("rounds", settings["rounds"], minimum=2, example=40)  # quartiles need two
    allowed = DEFAULTS["networks"]
    if not settings["networks"] or any(name not in allowed for name in settings["networks"]):
        known = f"must be some of {', '.join(allowed)}"
        raise wrong_value("networks", settings["networks"], known, "[resnet18]")
    names = (BEFORE, AGAIN, AFTER, *(COMPILED if settings["compile"] else ()))
    out = Path(settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    rows: list[runs.Row] = []
    for network in settings["networks"]:
        rows += measure(network, names, settings)
        text = table(rows, settings)
        (out / "benchmark.md").write_text(text)
        (out / "benchmark.csv").unlink(missing_ok=True)
        for row in rows:
            runs.append(out / "benchmark.csv", row)
    print(text)
    redraw(out / "benchmark.csv")


def redraw(path: Path) -> None:
    """Draw the figure again from the recorded numbers."""
    draw(runs.read(path), path.with_suffix(""))


def measure(network: str, names: tuple[str, ...], settings: dict[str, Any]) -> list[runs.Row]:
    """Latency and error of every candidate of one network."""
    with timing.started(names, serve, network, settings) as candidates:
        times = timing.measure(candidates, None, rounds=settings["rounds"])
    rows = []
    for name in names:
        base = COMPILED[0] if name in COMPILED else BEFORE
        found = timing.summarize(times[name], times[base])
        row = {"network": network, "form": name, **found._asdict()}
        rows.append({**row, "error": candidates[name].number})
    return rows


def serve(pipe: Connection, name: str, network: str, settings: dict[str, Any]) -> None:
    """In its own process: send the candidate's error, then time calls on request."""
    torch.set_num_threads(settings["threads"])
    model, images = build(network), torch.rand(settings["batch"], 3, *[settings["size"]] * 2)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(images.double())
        if name in (AFTER, COMPILED[2]):
            model, report = repvgg.fuse_conv_bn(model)
            assert not report.kept, report.kept
        call = timing.compiled(model) if name in COMPILED else model
        error = verify.relative_error(expected, call(images))
        timing.answer(pipe, error, lambda _: call(images))


def build(name: str) -> nn.Module:
    """The network with random weights and BatchNorm statistics."""
    torch.manual_seed(0)
    if name in repvgg.list_models():
        return randomize_batchnorms(repvgg.create_model(name))
    network: nn.Module = torchvision.models.get_model(name, weights=None)
    return randomize_batchnorms(network)


def table(rows: list[runs.Row], settings: dict[str, Any]) -> str:
    size, threads = settings["size"], settings["threads"]
    lines = [
        "# Before and after fusing",
        "",
        f"`python -m scripts.studies.benchmark_fusion rounds={settings['rounds']}`: batches of "
        f"{settings['batch']}, {size}x{size}, "
        f"float32, {settings['rounds']} rounds after 3 to warm up; {report.machine()}, {threads} "
        f"threads. The speed-up is the median over rounds, against "
        "the same mode before fusing.",
        "",
        report.picture("benchmark", CAPTION),
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


def draw(rows: Sequence[Mapping[str, Any]], stem: Path) -> None:
    """Speed-ups by network with quartiles; 1 is the network before fusing."""
    panels = []
    for mode, (control, fused) in MODES.items():
        series = {
            label: {
                row["network"]: report.Interval(
                    *(float(row[key]) for key in ("speedup", "speedup_lower", "speedup_upper"))
                )
                for row in rows
                if row["form"] == form
            }
            for label, form in (("A/A control", control), ("fused", fused))
        }
        if series["fused"]:
            panels.append(report.Panel(mode, series))
    chart = functools.partial(
        report.intervals,
        panels=panels,
        unit="times as fast as before fusing: median and quartiles of the rounds",
        number="{:.2f}",
        reference=1.0,
    )
    figures.save_svgs(chart, stem)


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
