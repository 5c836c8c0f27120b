"""A report in words: a verdict, and a row for each file."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, NamedTuple

from repvgg.checks import escape
from repvgg.deploy.verification import DEPLOYED, TRAINED
from repvgg.figures import shorten
from repvgg.verify import Verdict

if TYPE_CHECKING:
    from repvgg.deploy.report.content import DeployedFile, Latency, Report

ENGINES = {  # by the end of a file's name; the first that fits
    ".safetensors": "PyTorch",
    ".onnx": "onnxruntime",
    ".xml": "OpenVINO",
    ".aoti.pt2": "AOTInductor",
    ".pt2": "torch.export",
}
WEIGHTS = {".xml": ".bin"}  # a second file beside the first
LETTERS = 60  # of a name in a sentence


class Row(NamedTuple):
    """One file in words; what is not known is empty.

    Attributes:
        size: of all its parts.
        error: relative to the largest output; of int8, the accuracy lost.
        agreement: share of images with the top-1 of the multi-branch network.
        speedup: over the multi-branch network in PyTorch.
    """

    file: str
    engine: str
    size: str
    error: str
    allowed: str
    agreement: str
    accuracy: str
    milliseconds: str
    quartiles: str
    speedup: str


def network(report: "Report") -> str:
    """The name of the network on one line."""
    return shorten(str(report.model.get("name", "network")), LETTERS)


def verdict(report: "Report") -> str:
    """Short sentences: what was compared, the largest error, the speedup, the accuracy."""
    compared = _of_files(report)
    exact = {name: found for name, found in compared.items() if name in report.verdicts}
    parts = [f"{network(report)} was folded without changing its results."]
    if exact:
        worst = max(exact.values(), key=lambda found: found.error)
        files = f"its {len(exact)} files" if len(exact) > 1 else escape(*exact)
        parts.append(
            f"The largest error of {files} against the multi-branch network in float64 is "
            f"{worst.error:.1e} of the largest output ({worst.tolerance:.0e} allowed)."
        )
    if report.int8:
        lost = max(report.int8.verdicts.values(), key=lambda found: found.error)
        parts.append(
            f"int8 loses {percent(lost.error)} accuracy ({percent(lost.tolerance)} allowed)."
        )
    if speeds := _speedups(report):
        parts.append(_faster(report, speeds))
    if best := accuracy(report):
        parts.append(f"Accuracy on {best[1]}: {percent(best[0])}.")
    return " ".join(parts)


def accuracy(report: "Report") -> tuple[float, str] | None:
    """The accuracy that says most, and the images that it was measured on."""
    if report.training and "test/accuracy" in report.training.metrics:
        return report.training.metrics["test/accuracy"], "the test set"
    if report.accuracy_on_validation:
        return report.accuracy_on_validation[DEPLOYED], validation(report)
    if DEPLOYED in report.accuracy_on_probe:
        return report.accuracy_on_probe[DEPLOYED], f"{report.images} validation images"
    return None


def validation(report: "Report") -> str:
    """The validation set with its size, if that is known."""
    count = report.validation_images
    return "the validation set" if count is None else f"{count:,} validation images"


def rows(report: "Report") -> list[Row]:
    """A row for each file that runs."""
    shares = report.accuracy_on_validation or report.accuracy_on_probe
    speeds = _speedups(report)
    found = []
    for name, file in sorted(report.files.items(), key=_rank):
        if file.verified is None:
            continue
        predictor = predictor_of(name, file)
        compared = _of_files(report).get(predictor)
        agreement = (report.agreement_on_validation or {}).get(predictor)
        if agreement is None and compared:
            agreement = compared.agreement
        times = report.latency.milliseconds if report.latency else {}
        timing = times.get(predictor)
        found.append(
            Row(
                file=name,
                engine=engine(name) + (", int8" if file.verified == "int8" else ""),
                size=megabytes(_bytes(name, report.files)),
                error=_error(compared, file.verified),
                allowed=_allowed(compared, file.verified),
                agreement="" if agreement is None else percent(agreement),
                accuracy=percent(shares[predictor]) if predictor in shares else "",
                milliseconds=milliseconds(timing.median) if timing else "",
                quartiles=(
                    f"{milliseconds(timing.lower)} to {milliseconds(timing.upper)}"
                    if timing
                    else ""
                ),
                speedup=f"{speeds[predictor]:.1f}" if predictor in speeds else "",
            )
        )
    return found


def text(report: "Report", width: int | None = None) -> str:
    """The verdict and the rows, for a terminal.

    Args:
        width: columns. A table that is wider becomes a paragraph for each file.
    """
    header = ("file", "engine", "size", "error", "same top-1", "accuracy", "ms", "speedup")
    cells = [
        (r.file, r.engine, r.size, r.error, r.agreement, r.accuracy, r.milliseconds, r.speedup)
        for r in rows(report)
    ]
    table = [header, *([escape(cell) for cell in row] for row in cells)]
    filled = [index for index in range(len(header)) if any(row[index] for row in table[1:])]
    widths = {index: max(len(row[index]) for row in table) for index in filled}
    lines = [
        "  ".join(
            row[index].ljust(widths[index]) if index < 2 else row[index].rjust(widths[index])
            for index in filled
        ).rstrip()
        for row in table
    ]
    if width is not None and max(map(len, lines)) > width:
        lines = [
            f"{row[0]}: "
            + ", ".join(f"{header[index]} {row[index]}" for index in filled[1:] if row[index])
            for row in table[1:]
        ]
    return "\n".join([verdict(report), "", *lines])


def engine(name: str) -> str:
    """What runs a file."""
    return next((known for ending, known in ENGINES.items() if name.endswith(ending)), "")


def predictor_of(name: str, file: "DeployedFile") -> str:
    """The name under which a report lists the results of a file."""
    return f"{name}, onnxruntime" if file.verified == "int8" else name


def in_words(name: str) -> str:
    """A predictor or a form of a report in the words of the pages; keys are those of 0.1."""
    if name.endswith(", again"):
        return in_words(name.removesuffix(", again")) + ", again (A/A control)"
    for old, new in (("trained form", "multi-branch"), ("deployed", "folded")):
        if name.startswith(old):
            return (new + name.removeprefix(old)).replace(", torch", ", PyTorch")
    if engine(name):
        return f"{name}, {engine(name)}"
    file, _, rest = name.partition(", ")
    if engine(file) and rest.startswith("bf16"):
        return f"{file}, {engine(file)}, {rest}"
    return name


def threads(latency: "Latency") -> str:
    return f"{latency.threads} thread{'' if latency.threads == 1 else 's'}"


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def milliseconds(value: float) -> str:
    """Two decimals; three below a tenth."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def megabytes(count: int) -> str:
    """A size of a file; kB below a tenth of a megabyte."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _of_files(report: "Report") -> dict[str, Verdict]:
    """Verdicts on files, by predictor."""
    known = {**report.verdicts, **(report.int8.verdicts if report.int8 else {})}
    names = (predictor_of(name, file) for name, file in report.files.items() if file.verified)
    return {name: known[name] for name in names if name in known}


def _speedups(report: "Report") -> dict[str, float]:
    """Times as fast as the multi-branch network in PyTorch; empty if that is not known."""
    if report.latency is None or report.latency.noisy:
        return {}
    times = report.latency.milliseconds
    if TRAINED not in times:
        return {}
    return {name: times[TRAINED].median / timing.median for name, timing in times.items()}


def _faster(report: "Report", speeds: Mapping[str, float]) -> str:
    """Folding alone, in the same engine; and the fastest file, in its own."""
    said = f"The folded network runs {speeds[DEPLOYED]:.1f} times as fast in PyTorch"
    files = {
        name: speeds[predictor]
        for name, file in report.files.items()
        if (predictor := predictor_of(name, file)) in speeds and engine(name) != "PyTorch"
    }
    if not files:
        return f"{said}."
    best = max(files, key=lambda name: files[name])
    return f"{said} and {files[best]:.1f} times in {engine(best)} ({escape(best)})."


def _bytes(name: str, files: Mapping[str, "DeployedFile"]) -> int:
    weights = PurePath(name).with_suffix(WEIGHTS.get(PurePath(name).suffix, ".none")).name
    return sum(files[part].bytes for part in (name, weights) if part in files)


def _rank(item: "tuple[str, DeployedFile]") -> tuple[bool, int]:
    """The order of the rows: float32 before int8, by engine."""
    name, file = item
    return file.verified == "int8", [*ENGINES.values(), ""].index(engine(name))


def _error(found: Verdict | None, precision: str) -> str:
    if found is None:
        return ""
    return f"{percent(found.error)} lost" if precision == "int8" else f"{found.error:.1e}"


def _allowed(found: Verdict | None, precision: str) -> str:
    if found is None:
        return ""
    return percent(found.tolerance) if precision == "int8" else f"{found.tolerance:.0e}"
