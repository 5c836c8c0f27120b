"""The model card: what the network was trained on, what it takes and what it returns."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from repvgg.deploy.report import summary
from repvgg.figures import shorten

if TYPE_CHECKING:
    from repvgg.deploy.report.content import Report

MOST_CLASSES = 10  # that are named
LETTERS = 24


def card(report: "Report") -> list[tuple[str, str]]:
    """Rows of a name and a value; what is not known is left out."""
    run, data = report.training, report.data
    trained = run.metrics if run else {}
    measured = {
        "test": trained.get("test/accuracy"),
        "validation": trained.get("val/accuracy"),
    }
    accuracies = [f"{name} {summary.percent(v)}" for name, v in measured.items() if v is not None]
    entries = {
        "network": _network(report),
        "deployed": report.created or "",
        "checkpoint": report.checkpoint,
        "opened as": report.origin,
        "trained in": f"{run.folder}, epoch {run.epoch}" if run and run.epoch is not None else "",
        "trained with": " ".join(run.overrides) if run else "",
        "accuracy in training": ", ".join(accuracies),
        "data": run.data or "" if run else "",
        "classes": _classes(data.classes),
        "input": _input(report),
        "preprocessing": _preprocessing(report),
        "output": _output(report),
        "intended for": (
            f"images like those of the training data, prepared in the same way; it always names "
            f"one of its {len(data.classes):,} classes, whatever the image shows"
        ),
        "command": report.command,
    }
    return [(name, value) for name, value in entries.items() if value]


def _network(report: "Report") -> str:
    sizes = [
        f"{summary.in_words(name)} {size.parameters / 1e6:.2f} M parameters and "
        f"{size.macs / 1e6:.1f} M multiply-accumulates an image"
        for name, size in report.size.items()
    ]
    return f"{summary.network(report)}: {', '.join(sizes)}"


def _classes(names: Sequence[str]) -> str:
    shown = ", ".join(shorten(name, LETTERS) for name in names[:MOST_CLASSES])
    rest = len(names) - MOST_CLASSES
    return f"{len(names):,}: {shown}" + (f" and {rest:,} more" if rest > 0 else "")


def _input(report: "Report") -> str:
    channels, (height, width) = report.data.in_channels, report.data.image_size
    if report.input == "uint8":
        return f"images (N, {height}, {width}, {channels}), uint8 in 0..255"
    return f"images (N, {channels}, {height}, {width}), float32 in [0, 1]"


def _preprocessing(report: "Report") -> str:
    data = report.data
    height, width = data.image_size
    resize = (
        "the smallest size that covers the crop" if data.resize_size is None else data.resize_size
    )
    return (
        f"shorter side resized to {resize} ({data.interpolation}), center crop {height}x{width}; "
        f"the files subtract the mean {_numbers(data.mean)} and divide by {_numbers(data.std)}"
    )


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _output(report: "Report") -> str:
    count = len(report.data.classes)
    return f"{report.output} (N, {count}), a number for each class in this order"
