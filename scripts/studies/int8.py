"""What int8 costs in accuracy: python -m scripts.studies.int8 [root=FOLDER]

Trains RepVGG and QARepVGG under one recipe, folds them, quantizes them with every kind of range,
and measures accuracy before and after on the test images. The data are the embedded digits, or with
`root` a folder with train/CLASS/ and test/CLASS/. Every network is trained in a single-threaded
process and saved as a checkpoint in `work`: the same command resumes a stopped study, and
`python deploy.py ckpt=...` deploys the networks. Writes a table, a figure and their numbers.
"""

import functools
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repvgg import checkpoint, cli, figures, verify
from repvgg.checks import check_integer, check_number, wrong_value
from repvgg.contract import Description, to_float
from repvgg.deploy.verification import accuracy
from repvgg.export import int8
from repvgg.export.calibration import RANGES, Histogram, minmax
from repvgg.export.formats import build_onnx
from repvgg.models.forms import switch_to_deploy
from repvgg.models.registry import list_models
from scripts.studies import report, runs, training

DEFAULTS: dict[str, Any] = {
    "root": None,
    "models": ["repvgg_a0", "qarepvgg_a0"],
    "width": 1.0,  # of every stage, relative to the variant
    "strides": [1, 1, 2, 2, 1],
    "seeds": 3,
    "epochs": 24,
    "batch_size": 64,
    "lr": 0.02,
    "dropout": 0.2,
    "images": 256,  # to measure ranges on; as many others to choose among them
    "workers": 2,
    "work": "runs/int8",
    "out": "docs/studies/int8",
}


CAPTION = "Change of the test accuracy by int8, for every kind of range and both networks"


def check(settings: dict[str, Any]) -> None:
    for key in ("seeds", "epochs", "batch_size", "images"):
        check_integer(key, settings[key], minimum=1, example=DEFAULTS[key])
    check_integer("workers", settings["workers"], minimum=0, example=2)
    check_number("lr", settings["lr"], example=0.02)
    check_number("width", settings["width"], minimum=0.05, example=1.0)
    unknown = [name for name in settings["models"] if name not in list_models()]
    if unknown or not settings["models"]:
        raise wrong_value(
            "models", settings["models"], f"must be of {', '.join(list_models())}", "[repvgg_a0]"
        )


def outlier_ratio(values: Tensor) -> float:
    """Largest absolute value over the root mean square: how coarse int8 is for most of them."""
    return (values.abs().max() / values.square().mean().sqrt()).item()


@torch.no_grad()
def examine(job: training.Job, settings: dict[str, Any]) -> list[runs.Row]:
    """Accuracy of one trained network in float32 and int8, a row for every way to round.

    The ways: each kind of range with weights rounded per channel; the one chosen on held-out
    training images; and weights rounded per tensor, which suffer more from outliers.
    """
    images, test, _, _ = training.loaded(settings["root"])
    restored = checkpoint.load(job.path(settings))
    deployed = switch_to_deploy(restored.model)
    description = Description(restored.config, restored.data)
    count = min(settings["images"], len(images[0]) // 2)
    order = torch.randperm(len(images[0]), generator=torch.Generator().manual_seed(job.seed))
    measured, held_out = (
        to_float(images[0][rows]) for rows in (order[:count], order[count : 2 * count])
    )
    shown, labels = to_float(test[0]), test[1]
    found = int8.quantize(
        deployed,
        description,
        measured,
        held_out=held_out,
    )
    proto = build_onnx(deployed, description)
    histograms = int8.measure(proto, description, measured)
    scores = {
        "float32": int8.run(proto, description, shown),
        "chosen": int8.run(found.model, description, shown),
    }
    for name, find in RANGES.items():
        ranges = {tensor: find(histogram) for tensor, histogram in histograms.items()}
        rounded = int8.rewrite(proto, ranges, description)
        scores[name] = int8.run(rounded, description, shown)
    ranges = {tensor: minmax(histogram) for tensor, histogram in histograms.items()}
    rounded = int8.rewrite(proto, ranges, description, per_channel=False)
    scores["minmax, weights per tensor"] = int8.run(rounded, description, shown)
    kernels = [m.weight for m in deployed.modules() if isinstance(m, nn.Conv2d)]
    return [
        {
            "model": job.model,
            "seed": job.seed,
            "rounding": name,
            "accuracy": accuracy(given, labels),
            "agreement": verify.agreement(scores["float32"], given),
            "chosen": found.chosen.ranges + (", equalized" if found.chosen.equalized else ""),
            "kernel_outliers": statistics.mean(map(outlier_ratio, kernels)),
            "largest_kernel_outlier": max(map(outlier_ratio, kernels)),
            "activation_outliers": statistics.mean(map(spread, histograms.values())),
        }
        for name, given in scores.items()
    ]


def spread(histogram: Histogram) -> float:
    """`outlier_ratio` of the counted values."""
    edges = histogram.edges
    centres = (edges[1:] + edges[:-1]) / 2
    square = (histogram.counts * centres**2).sum() / histogram.counts.sum()
    return max(abs(histogram.low), abs(histogram.high)) / square.sqrt().item()


def main(settings: dict[str, Any]) -> None:
    check(settings)
    jobs = training.train_missing(settings["models"], settings)
    out = Path(settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    data = "digits" if settings["root"] is None else Path(settings["root"]).resolve().name
    results = out / f"{data}.csv"
    results.unlink(missing_ok=True)  # minutes, unlike the training
    for job in jobs:
        for row in examine(job, settings):
            runs.append(results, row)
    rows = runs.read(results)
    text = table(rows, settings, data)
    (out / f"{data}.md").write_text(text)
    redraw(results)
    print(text)


def redraw(path: Path) -> None:
    """Draw the figure again from the recorded numbers."""
    draw(runs.read(path), path.with_suffix(""))


def column(rows: list[dict[str, str]], model: str, rounding: str, key: str) -> list[float]:
    return [float(row[key]) for row in rows if (row["model"], row["rounding"]) == (model, rounding)]


def shown(values: list[float], scale: float = 1.0) -> str:
    """Mean and standard deviation."""
    deviation = f", sd {scale * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.2f}{deviation}"


def table(rows: list[dict[str, str]], settings: dict[str, Any], data: str) -> str:
    models = list(dict.fromkeys(row["model"] for row in rows))
    roundings = list(dict.fromkeys(row["rounding"] for row in rows))
    command = report.command("int8", settings, DEFAULTS)
    lines = [
        f"# int8 on {data}",
        "",
        f"`{command}`: {settings['epochs']} epochs, "
        f"{settings['seeds']} seeds, ranges measured on {settings['images']} training images and "
        f"chosen on as many others; {report.machine()}, {report.versions('onnxruntime')}. Mean and "
        "standard deviation over seeds; the change is paired by seed.",
        "",
        report.picture(data, CAPTION),
        "",
        "| rounding | " + " | ".join(f"{m}: accuracy, % | change | same top-1, %" for m in models),
        "|---" * (1 + 3 * len(models)) + "|",
    ]
    lines[-2] += " |"
    for rounding in roundings:
        cells = []
        for model in models:
            values = column(rows, model, rounding, "accuracy")
            before = column(rows, model, "float32", "accuracy")
            change = [new - old for new, old in zip(values, before, strict=True)]
            same = column(rows, model, rounding, "agreement")
            cells += [shown(values, 100), shown(change, 100), shown(same, 100)]
        lines.append(f"| {rounding} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Largest absolute value over root mean square: of the folded kernels (mean over layers, "
        "then the worst layer), and of the activations (mean over layers).",
        "",
        "| | kernels | worst kernel | activations | chosen |",
        "|---|---|---|---|---|",
    ]
    for model in models:
        keys = ("kernel_outliers", "largest_kernel_outlier", "activation_outliers")
        cells = [shown(column(rows, model, "float32", key)) for key in keys]
        chosen = [row["chosen"] for row in rows if row["model"] == model]
        lines.append(
            f"| {model} | " + " | ".join(cells) + f" | {'; '.join(chosen[:: len(roundings)])} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, str]], stem: Path) -> None:
    """Change of the accuracy by int8, for every way to round."""
    series: dict[str, dict[str, report.Interval]] = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        before = column(rows, model, "float32", "accuracy")
        series[model] = {}
        for rounding in dict.fromkeys(row["rounding"] for row in rows):
            if rounding == "float32":
                continue
            after = column(rows, model, rounding, "accuracy")
            change = [100 * (new - old) for new, old in zip(after, before, strict=True)]
            series[model][rounding] = report.Interval(
                statistics.mean(change), min(change), max(change)
            )
    chart = functools.partial(
        report.intervals,
        panels=[report.Panel("", series)],
        unit="points of accuracy gained or lost by int8: mean, smallest and largest of the seeds",
        number="{:+.2f}",
        reference=0.0,
    )
    figures.save_svgs(chart, stem)


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
