"""The appendix of report.html: every table of a report."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from repvgg import verify
from repvgg.deploy.report.summary import in_words, percent, threads

if TYPE_CHECKING:
    from repvgg.deploy.report.content import Report

MOST_NAMED = 8  # of the layers with the same reason


class Section(NamedTuple):
    """A table with a heading.

    Attributes:
        text: below the heading.
        words: how many columns, from the left, are text.
    """

    title: str
    text: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    words: int = 1


def sections(report: "Report") -> list[Section]:
    """All tables of a report that have rows or text."""
    found = [
        _checks(report),
        _batchnorms(report),
        _accuracies(report),
        *_int8(report),
        _sizes(report),
        _latency(report),
        _files(report),
        Section(
            "Environment",
            "",
            ("package", "version"),
            [(name, value) for name, value in report.environment.items()],
            2,
        ),
    ]
    return [section for section in found if section and (section.rows or section.text)]


def _checks(report: "Report") -> Section:
    images = "validation images" if report.accuracy_on_probe else "images of noise"
    text = (
        f"Reference: the multi-branch network in float64, on the {report.images} {images} of the "
        "checkpoint's probe batch. Errors are relative to the largest value of the reference."
    )
    usual = verify.TOLERANCE[torch.float32]
    if report.float32_bound > usual:
        text += (
            f" The network is ill-conditioned: float32 is allowed {report.float32_bound:.1e} "
            f"instead of {usual:.0e}. That is {verify.OWN_ERRORS} times its own float32 error, and "
            f"at most {verify.LARGEST_BOUND:.0e}."
        )
    verdicts = {"restored network and recorded logits": report.probe, **report.verdicts}
    rows = [
        (
            in_words(name),
            f"{found.error:.1e}",
            f"{found.tolerance:.0e}",
            "" if found.agreement is None else percent(found.agreement),
            "passed" if found.passed else "failed",
        )
        for name, found in verdicts.items()
    ]
    return Section("Checks", text, ("compared", "error", "allowed", "same top-1", ""), rows)


def _batchnorms(report: "Report") -> Section | None:
    if not report.batchnorms_left:
        return None
    reasons: dict[str, list[str]] = {}
    for name, reason in report.batchnorms_left.items():
        reasons.setdefault(reason, []).append(name)
    rows = [
        (reason, str(len(names)), ", ".join(names[:MOST_NAMED]) + _more(len(names) - MOST_NAMED))
        for reason, names in reasons.items()
    ]
    text = f"{len(report.batchnorms_left)} BatchNorms could not be folded."
    return Section("BatchNorms that are left", text, ("why", "number", "which"), rows, 3)


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def _accuracies(report: "Report") -> Section:
    columns = {
        "probe batch": report.accuracy_on_probe,
        "validation set": report.accuracy_on_validation,
        "same top-1 there": report.agreement_on_validation,
    }
    present = {header: shares for header, shares in columns.items() if shares}
    if not present:
        return Section("Accuracy", "Not known: the checkpoint holds no labelled images.")
    names = dict.fromkeys(name for shares in present.values() for name in shares)
    rows = [
        (
            "logits recorded in training" if name == "recorded" else in_words(name),
            *(percent(shares[name]) if name in shares else "" for shares in present.values()),
        )
        for name in names
    ]
    return Section("Accuracy", "", ("network", *present), rows)


def _int8(report: "Report") -> list[Section]:
    if not (int8 := report.int8):
        return []
    equalized = ", channels equalized" if int8.chosen.equalized else ""
    text = (
        f"Ranges were measured on {int8.measured_on} images and chosen on {int8.chosen_on} others "
        f"({int8.source}). Chosen: {int8.chosen.ranges}{equalized}. Layers in float32: "
        f"{', '.join(int8.chosen.kept) or 'none'}. Accuracy was compared on {int8.judged_on}."
    )
    lost = [
        (name, percent(found.error), percent(found.tolerance), percent(found.agreement or 0.0))
        for name, found in int8.verdicts.items()
    ]
    trials = [
        (
            trial.ranges,
            "yes" if trial.equalized else "no",
            str(len(trial.kept)),
            percent(trial.agreement),
            percent(trial.error),
        )
        for trial in int8.trials
    ]
    header = ("ranges", "equalized", "layers in float32", "same top-1", "error")
    return [
        Section("int8", text, ("file", "accuracy lost", "allowed", "same top-1"), lost),
        Section("Trials of int8", "", header, trials, 2),
    ]


def _sizes(report: "Report") -> Section:
    rows = [
        (in_words(name), f"{size.parameters:,}", f"{size.macs:,}")
        for name, size in report.size.items()
    ]
    return Section("Size", "", ("network", "parameters", "multiply-accumulates"), rows)


def _latency(report: "Report") -> Section | None:
    if not (latency := report.latency):
        return None
    text = (
        f"Of one image, {threads(latency)}, load {latency.load:.1f}. Calls are interleaved. "
        "The row that appears twice is an A/A control. onnxruntime's threads do not spin between "
        "calls here, which can halve its speed."
    )
    if latency.noisy:
        text += " The control differs too much, so ratios are left out."
    rows = [
        (
            in_words(name),
            f"{timing.median:.2f}",
            f"{timing.lower:.2f} to {timing.upper:.2f}",
            f"{timing.rounds:,}",
            "" if latency.noisy else f"{timing.ratio:.2f}",
        )
        for name, timing in latency.milliseconds.items()
    ]
    header = ("network", "median ms", "quartiles", "calls", "times as fast as folded, PyTorch")
    return Section("Latency", text, header, rows)


def _files(report: "Report") -> Section:
    rows = [
        (
            name,
            f"{file.sha256[:16]}...",
            f"{file.bytes:,}",
            str(file.layers.get("convolutions", "")),
            str(file.layers.get("batchnorms", "")),
        )
        for name, file in report.files.items()
    ]
    header = ("file", "SHA-256", "bytes", "convolutions", "BatchNorms")
    return Section("Files", "", header, rows, 2)
