"""Sizes and speed of every variant: python -m scripts.studies.models

Counts parameters and multiply-accumulates of every RepVGG variant, multi-branch and folded, and
measures the latency of the folded network in onnxruntime, in float32 and int8, for one image. All
networks are timed in turns in one process; a second session of some of them is the A/A control.
Weights are random, with BatchNorm statistics re-estimated on random images: they do not change the
time. Writes the numbers to `out` and the page of the models to `page`.
"""

import functools
import json
import os
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import repvgg
from repvgg import cli, figures
from repvgg.checks import check_integer, check_number, wrong_value
from repvgg.contract import DataContract, Description
from repvgg.deploy.measure import measure_latency
from repvgg.export import formats, int8
from repvgg.export.calibration import minmax
from repvgg.models.forms import switch_to_deploy
from repvgg.models.registry import create_model
from repvgg.models.size import sizes_of_forms
from scripts.studies import report, runs

# The variants of the papers; ImageNet top-1 in % as published; the recipe of the published number.
PUBLISHED: dict[str, tuple[str, str]] = {
    "repvgg_a0": ("72.41", "imagenet_120"),
    "repvgg_a1": ("74.46", "imagenet_120"),
    "repvgg_a2": ("76.48", "imagenet_120"),
    "repvgg_b0": ("75.14", "imagenet_120"),
    "repvgg_b1": ("78.37", "imagenet_120"),
    "repvgg_b1g2": ("77.78", "imagenet_120"),
    "repvgg_b1g4": ("77.58", "imagenet_120"),
    "repvgg_b2": ("78.78", "imagenet_120"),
    "repvgg_b2g2": ("", "imagenet_120"),
    "repvgg_b2g4": ("79.38", "imagenet_200"),
    "repvgg_b3": ("80.52", "imagenet_200"),
    "repvgg_b3g2": ("", "imagenet_200"),
    "repvgg_b3g4": ("80.21", "imagenet_200"),
    "repvgg_d2se": ("83.55 at 320", "repvggplus"),
    "repvggplus_l2pse": ("84.06 at 320", "repvggplus"),
}
KINDS = ("", "-int8")  # of a file's name
CAPTION = "Latency of every variant in onnxruntime, float32 and int8"
INTRODUCTION = """\
# Models

Every variant of RepVGG, its size before and after folding, and its speed after. Train one by the
recipe of its published number, then deploy it:

```bash
python train.py experiment=imagenet_120 model=repvgg_a0 data.root=FOLDER trainer.devices=8
python deploy.py ckpt=runs/imagefolder-repvgg_a0/<time>/checkpoints/best.ckpt int8=true
```

`FOLDER` holds ImageNet as `train/CLASS/` and `val/CLASS/`. The last column of the table has the
recipe of each variant. None was run in full by us. Published weights need no training:
`python deploy.py ckpt=RepVGG-A0-train.pth`.
"""
NOTES = """\
- Top-1 is as published, at 224 pixels unless said otherwise: RepVGG (arXiv:2101.03697) for A0 to
  B3g4, the authors' later releases for D2se and L2pse; "-" is a variant without published number.
- `repvggplus` is the recipe of L2pse, for 320 pixels; that of D2se may differ. B2g2 and B3g2 get
  the recipe of their neighbours.
- The trained parameters of L2pse include 5.96 M of its auxiliary classifiers.
- Milliseconds are of one machine; the ratios between variants carry over better.

## QARepVGG

`qarepvgg_a0` to `qarepvgg_b3g4` have the depths and widths of their namesakes. Folded they are the
same graph, so their folded size and their speed are those of the table. What differs is what int8
costs in accuracy. Published for A0 (arXiv:2212.01593), ImageNet top-1 in %:

| | float32 | int8, after training |
|---|---|---|
| `repvgg_a0` | 72.4 | 52.2 |
| `qarepvgg_a0` | 72.2 | 70.4 |
"""

DEFAULTS: dict[str, Any] = {
    "models": list(PUBLISHED),
    "size": 224,
    "threads": 2,
    "seconds": 100.0,  # of measuring; at least ten rounds
    "work": "runs/models",  # files that exist are not built again
    "out": "docs/studies/models",
    "page": "docs/models.md",
}
CONTROLS = ("repvgg_a0", "repvgg_b1")  # timed twice
AGAIN = " (A/A control)"
CALIBRATION = 64  # pixels of the random images for BatchNorm statistics and int8 ranges


def main(settings: dict[str, Any]) -> None:
    check(settings)
    out = Path(settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    work = Path(settings["work"])
    work.mkdir(parents=True, exist_ok=True)
    calls = [(name, work) for name in settings["models"] if not files_of(name, work)[1].exists()]
    if calls:
        runs.run(build, calls, work / "built.csv", workers=1)
    torch.set_num_threads(settings["threads"])
    before = os.getloadavg()[0]
    timed = measure(work, settings)
    record = {
        "command": report.command("models", settings, DEFAULTS),
        "machine": report.machine(),
        "versions": report.versions("onnxruntime"),
        "size": settings["size"],
        "threads": settings["threads"],
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "load_before": before,
        "load_after": os.getloadavg()[0],
        "sizes": {name: sizes(name, settings["size"]) for name in settings["models"]},
        "milliseconds": timed,
    }
    (out / "models.json").write_text(json.dumps(record, indent=2) + "\n")
    redraw(out / "models.json", Path(settings["page"]))
    print(Path(settings["page"]).read_text())


def check(settings: dict[str, Any]) -> None:
    for key in ("size", "threads"):
        check_integer(key, settings[key], minimum=1, example=DEFAULTS[key])
    check_number("seconds", settings["seconds"], example=100)
    if not settings["models"] or any(name not in PUBLISHED for name in settings["models"]):
        raise wrong_value(
            "models", settings["models"], f"must be of {', '.join(PUBLISHED)}", "[repvgg_a0]"
        )


def files_of(name: str, work: Path) -> tuple[Path, Path]:
    """The folded network as ONNX, in float32 and int8."""
    return work / f"{name}.onnx", work / f"{name}-int8.onnx"


@torch.no_grad()
def build(name: str, work: Path) -> runs.Row:
    """Write a folded network as ONNX, in float32 and int8."""
    start = time.perf_counter()
    torch.manual_seed(0)
    network = create_model(name)
    images = torch.rand(8, 3, CALIBRATION, CALIBRATION)
    repvgg.reestimate_bn(network, [images])
    contract = DataContract(
        [str(i) for i in range(1000)], 3, [CALIBRATION] * 2, [0.5] * 3, [0.25] * 3, "bilinear"
    )
    description = Description({"name": name}, contract)
    proto = formats.build_onnx(switch_to_deploy(network), description)
    found = int8.measure(proto, description, images)
    ranges = {tensor: minmax(histogram) for tensor, histogram in found.items()}
    rounded = int8.rewrite(proto, ranges, description)
    for path, graph in zip(files_of(name, work), (proto, rounded), strict=True):
        path.write_bytes(graph.SerializeToString())
    return {"model": name, "seconds": round(time.perf_counter() - start, 1)}


def sizes(name: str, size: int) -> dict[str, int | None]:
    """Parameters and multiply-accumulates for one image, multi-branch and folded."""
    with torch.device("meta"):
        network = create_model(name)
    trained, folded = sizes_of_forms(network, (3, size, size))
    assert folded is not None
    return {
        "parameters": trained.parameters,
        "macs": trained.macs,
        "parameters_folded": folded.parameters,
        "macs_folded": folded.macs,
    }


def measure(work: Path, settings: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Milliseconds of every network, median and quartiles, by name."""
    files = {path.stem: path for name in settings["models"] for path in files_of(name, work)}
    again = {name: path for name, path in files.items() if name.removesuffix("-int8") in CONTROLS}
    files |= {f"{name}{AGAIN}": path for name, path in again.items()}
    # One thread per CPU: beside other work the scheduler may put two threads on one for a while.
    allowed = os.sched_getaffinity(0)
    first, *others = sorted(allowed)[: settings["threads"]]
    calls = {name: session(path, others) for name, path in files.items()}
    images = torch.rand(1, 3, settings["size"], settings["size"])
    os.sched_setaffinity(0, {first})
    try:
        timed = measure_latency(calls, images, seconds=settings["seconds"])
    finally:
        os.sched_setaffinity(0, allowed)
    return {name: vars(found) for name, found in timed.items()}


def session(path: Path, others: list[int]) -> Callable[[Tensor], object]:
    """Open an ONNX file. Its threads spin within a call, as by default, and rest between calls.

    Args:
        others: the CPU of every thread but the caller's.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Spinning threads of a session would take the cores from the next one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if others:
        places = ";".join(str(cpu + 1) for cpu in others)  # counted from 1
        options.add_session_config_entry("session.intra_op_thread_affinities", places)
    options.log_severity_level = 3  # errors
    opened = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: opened.run(None, {"images": images.numpy()})


def redraw(path: Path, page: Path | None = None) -> None:
    """Write the page and its figure again from the recorded numbers."""
    record = json.loads(path.read_text())
    drawn = draw(record, path.with_suffix(""))
    page = page or path.parents[2] / "models.md"
    page.write_text(text(record, Path(os.path.relpath(drawn, page.parent))))


def draw(record: dict[str, Any], stem: Path) -> Path:
    """Latency of every variant in float32 and int8, with quartiles."""
    timed = record["milliseconds"]
    series = {
        label: {
            name: report.Interval(
                *(timed[f"{name}{kind}"][key] for key in ("median", "lower", "upper"))
            )
            for name in record["sizes"]
        }
        for label, kind in (("float32", ""), ("int8", "-int8"))
    }
    chart = functools.partial(
        report.intervals,
        panels=[report.Panel("", series)],
        unit="milliseconds: median and quartiles",
        number="{:.1f}",
    )
    figures.save_svgs(chart, stem)
    return stem


def text(record: dict[str, Any], figure: Path) -> str:
    """The page: what is published, what was measured, and how to train and deploy each."""
    size, timed = record["size"], record["milliseconds"]
    lines = [INTRODUCTION, report.picture(figure, CAPTION), "", *table(record), "", NOTES]
    controls = ", ".join(
        f"{name} {timed[f'{name}{AGAIN}']['median'] / found['median']:.3f}"
        for name, found in timed.items()
        if f"{name}{AGAIN}" in timed
    )
    rounds = {found["rounds"] for found in timed.values()}
    raised = f", for a process of nice {record['nice']}" if record["nice"] else ""
    measured = (
        f"`{record['command']}` on {record['machine']}, {record['versions']}. One image of "
        f"{size}x{size}, {record['threads']} threads, each on its own CPU, all networks in "
        f"turns in one process: {max(rounds)} rounds, each with an untimed call before the timed "
        "one. The table has medians; the dots and lines of the figure are medians and quartiles. "
        f"The machine was shared: its load was {record['load_before']:.1f} before and "
        f"{record['load_after']:.1f} after{raised}. A/A control, a second session of the same "
        "file over the first: "
        f"{controls}. Weights are random, with BatchNorm statistics re-estimated on random "
        "images, which does not change the time. `repvgg.models.size` counts parameters and "
        "GMACs. All numbers: `docs/studies/models/models.json`."
    )
    lines += ["## How this was measured", "", textwrap.fill(measured, 110, break_on_hyphens=False)]
    return "\n".join(lines) + "\n"


def table(record: dict[str, Any]) -> list[str]:
    lines = [
        "| `model=` | parameters, M: trained | folded | GMACs: trained | folded | ImageNet top-1, %"
        " | ms, float32 | ms, int8 | times as fast | trained by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, sized in record["sizes"].items():
        top1, experiment = PUBLISHED[name]
        whole, rounded = (record["milliseconds"][f"{name}{kind}"]["median"] for kind in KINDS)
        sizes = [
            f"{sized['parameters'] / 1e6:.2f}",
            f"{sized['parameters_folded'] / 1e6:.2f}",
            f"{sized['macs'] / 1e9:.2f}",
            f"{sized['macs_folded'] / 1e9:.2f}",
        ]
        lines.append(
            f"| `{name}` | {' | '.join(sizes)} | {top1 or '-'} | {whole:.1f} | {rounded:.1f} "
            f"| {whole / rounded:.1f} | `experiment={experiment}` |"
        )
    return lines


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
