"""The certificate of a deployment: what was compared with what, and how to compare it again.

A deployed folder holds, beside its artifacts, `report.json` and `report.md`, the probe with the
logits of the float64 reference, and `SHA256SUMS` over all of them (`sha256sum -c` reads it). It
finds accidents; whoever can write to the folder can also write sums that fit.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repvgg import verify
from repvgg.contract import to_float
from repvgg.export.formats import open_artifact
from repvgg.verify import Predictor, Verdict

SUMS = "SHA256SUMS"
REPORT = "report.json"
PAGE = "report.md"
PROBE = "probe.safetensors"


class Recorded(NamedTuple):
    """The probe of a deployment.

    Attributes:
        images: (N, C, H, W), uint8.
        labels: (N,).
        scores: (N, K), float64: what the multi-branch network gives, behind a softmax if the
            artifacts have one.
        int8: (N, K): what the file of 8 bits gave; no rows if there is none.
    """

    images: Tensor
    labels: Tensor
    scores: Tensor
    int8: Tensor


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest entry is the label's."""
    return (scores.argmax(1) == labels).double().mean().item()


def judge_rounded(expected: Tensor, scores: Tensor, labels: Tensor, *, tolerance: float) -> Verdict:
    """Judge a network in low precision by the accuracy it loses; it may always lose one image.

    Args:
        expected, scores: (N, K), of the reference and of the candidate.
        tolerance: share of the images.
    """
    lost = accuracy(expected, labels) - accuracy(scores, labels)
    if not scores.isfinite().all():
        lost = float("inf")
    same = verify.agreement(expected, scores)
    return Verdict(max(0.0, lost), max(tolerance, 1.0 / len(labels)), same)


def write(folder: Path, report: dict[str, Any], recorded: Recorded) -> None:
    """Complete a folder of artifacts by the report for people and programs, probe and sums."""
    from safetensors.torch import save

    (folder / PROBE).write_bytes(save(recorded._asdict()))
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    (folder / PAGE).write_text(as_markdown(report))
    sums = [f"{digest(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / SUMS).write_text("".join(sums))


def read_sums(folder: Path) -> dict[str, str]:
    """The files that a deployment wrote, and their SHA-256.

    Raises:
        ValueError: this is no deployed folder.
    """
    path = folder / SUMS
    if not path.is_file():
        kind = "a folder without" if folder.is_dir() else "no folder with"
        raise ValueError(f"{folder}: {kind} {SUMS}; give a folder that deploy.py wrote")
    sums = {}
    for line in path.read_text(errors="replace").splitlines():
        checksum, _, name = line.partition("  ")
        if name in sums or Path(name).name != name:
            raise ValueError(f"{folder}: {SUMS} was changed since it was deployed")
        sums[name] = checksum
    if not {REPORT, PAGE, PROBE} <= sums.keys():
        raise ValueError(f"{folder}: {SUMS} was changed since it was deployed")
    return sums


def check(folder: Path) -> dict[str, Verdict]:
    """Verify a deployed folder again: every byte, then every artifact on the recorded probe.

    The file of 8 bits must give what it gave: the same top-1, but for one image.

    Returns:
        what was found, by the name of the artifact; all of it may have passed or not.

    Raises:
        ValueError: this is no deployed folder, or a file is missing, changed or new.
    """
    from safetensors.torch import load_file

    wanted = read_sums(folder)
    present = {path.name for path in folder.iterdir()} - {SUMS}
    missing, new = wanted.keys() - present, present - wanted.keys()
    changed = {
        name
        for name in wanted.keys() & present
        if (folder / name).is_symlink()
        or not (folder / name).is_file()
        or digest(folder / name) != wanted[name]
    }
    for kind, names in (("missing", missing), ("changed", changed), ("new", new)):
        if names:
            raise ValueError(f"{folder}: {kind} since it was deployed: {sorted(names)}")
    try:
        report = json.loads((folder / REPORT).read_text())
        recorded = Recorded(**load_file(folder / PROBE))
        images = to_float(recorded.images)
        bound = float(report.get("float32_bound", verify.TOLERANCE[torch.float32]))
        verdicts = {
            name: _judge_again(open_artifact(folder / name), entry, images, recorded, bound)
            for name, entry in report["files"].items()
            if entry["verified"]
        }
        listed = report["files"].keys() == present - {REPORT, PAGE, PROBE}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: its report is damaged: {error!r}") from error
    if not verdicts or not listed or not len(images):
        raise ValueError(f"{folder}: its report does not tell of what is there")
    return verdicts


def _judge_again(
    artifact: Predictor, entry: dict[str, Any], images: Tensor, recorded: Recorded, bound: float
) -> Verdict:
    if entry["verified"] == "int8":
        same = verify.agreement(recorded.int8, artifact(images))
        return Verdict(1 - same, 1.0 / len(images), same)
    return verify.compare(lambda _: recorded.scores, artifact, images, tolerance=bound)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    origin = report.get("origin")
    lines = [
        f"# {report['model']['name']}: {report['verdict']}",
        "",
        *([f"Opened as {origin}.", ""] if origin else []),
        f"Compared with the trained network in float64 on {report['images']} "
        f"{'validation images' if report.get('accuracy_on_probe') else 'images of noise'}. "
        "Errors are relative to the largest value.",
        "",
        *_verdicts({"restored network and recorded logits": report["probe"], **report["verdicts"]}),
    ]
    bound = report.get("float32_bound", 0.0)
    if bound > verify.TOLERANCE[torch.float32]:
        lines += [
            "",
            f"The trained network is ill-conditioned: float32 is allowed {bound:.1e}, "
            f"{verify.OWN_ERRORS} times the error that it has itself in float32 (at most "
            f"{verify.LARGEST_BOUND:.0e}), instead of {verify.TOLERANCE[torch.float32]:.0e}.",
        ]
    if report["batchnorms_left"]:
        reasons = "; ".join(sorted(set(report["batchnorms_left"].values())))
        lines += ["", f"{len(report['batchnorms_left'])} BatchNorms are left: {reasons}."]
    lines += ["", *_accuracies(report)]
    if "int8" in report:
        lines += ["", *_int8(report["int8"])]
    lines += ["", "| | parameters | multiply-accumulates |", "|---|---|---|"]
    for name, value in report["size"].items():
        lines.append(f"| {name} | {value['parameters']:,} | {value['macs']:,} |")
    lines += ["", "| file | bytes | convolutions | BatchNorms | SHA-256 |", "|---|---|---|---|---|"]
    for name, value in report["files"].items():
        layers = value["layers"]
        lines.append(
            f"| {name} | {value['bytes']:,} | {layers.get('convolutions', '')} | "
            f"{layers.get('batchnorms', '')} | {value['sha256'][:16]}... |"
        )
    if "latency" in report:
        lines += ["", *_latency(report["latency"])]
    versions = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    lines += ["", f"{versions}", "", f"`{report['command']}`", ""]
    return "\n".join(lines)


def _verdicts(verdicts: dict[str, Any]) -> list[str]:
    lines = ["| compared | largest error | allowed | same top-1 |", "|---|---|---|---|"]
    for name, verdict in verdicts.items():
        agreement = "" if verdict["agreement"] is None else f"{verdict['agreement']:.1%}"
        lines.append(
            f"| {name} | {verdict['error']:.1e} | {verdict['tolerance']:.0e} | {agreement} |"
        )
    return lines


def _accuracies(report: dict[str, Any]) -> list[str]:
    columns = {
        "accuracy_on_probe": "accuracy on the probe",
        "accuracy_on_validation": "on the validation set",
        "agreement_on_validation": "same top-1 there as trained",
    }
    present = [key for key in columns if report.get(key)]
    if not present:
        return ["Accuracy is not known: the checkpoint holds no labelled images."]
    lines = [
        "| | " + " | ".join(columns[key] for key in present) + " |",
        "|---" * (1 + len(present)) + "|",
    ]
    for name in dict.fromkeys(name for key in present for name in report[key]):
        values = [report[key].get(name) for key in present]
        shown = ["" if value is None else f"{value:.2%}" for value in values]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return lines


def _int8(found: dict[str, Any]) -> list[str]:
    chosen = found["chosen"]
    kept = ", ".join(chosen["kept"]) or "none"
    worst = sorted(found["sensitivity"].items(), key=lambda item: -item[1])[:5]
    lines = [
        f"| 8 bits, {found['judged_on']} | accuracy lost | allowed | same top-1 |",
        "|---|---|---|---|",
    ]
    for name, verdict in found["verdicts"].items():
        lines.append(
            f"| {name} | {verdict['error']:.2%} | {verdict['tolerance']:.2%} | "
            f"{verdict['agreement']:.2%} |"
        )
    return [
        *lines,
        "",
        f"int8: ranges measured on {found['measured_on']} images, chosen on {found['chosen_on']} "
        f"others ({found['source']}). Chosen: {chosen['ranges']}"
        f"{', channels equalized' if chosen['equalized'] else ''}; layers in float32: {kept}. "
        "Most sensitive, by the change of the outputs when they alone are rounded: "
        + ", ".join(f"{name} {error:.1%}" for name, error in worst)
        + ".",
        "",
        "| ranges | equalized | layers in float32 | same top-1 | change of the outputs |",
        "|---|---|---|---|---|",
        *(
            f"| {trial['ranges']} | {'yes' if trial['equalized'] else 'no'} | "
            f"{len(trial['kept'])} | {trial['agreement']:.2%} | {trial['error']:.2%} |"
            for trial in found["trials"]
        ),
    ]


def _latency(measured: dict[str, Any]) -> list[str]:
    said = (
        f"Latency of one image, {measured['threads']} threads, load {measured['load']:.1f}, calls "
        "interleaved in one run; the row that stands twice shows the noise. onnxruntime's threads "
        "do not spin between calls here, which can cost it half of its speed."
    )
    if measured["noisy"]:
        said += " It is too large: no ratios are given."
    lines = [said, "", "| | median ms | quartiles | times as fast |", "|---|---|---|---|"]
    for name, value in measured["milliseconds"].items():
        ratio = "" if measured["noisy"] else f"{value['ratio']:.2f}"
        lines.append(
            f"| {name} | {value['median']:.2f} | {value['lower']:.2f} to {value['upper']:.2f} | "
            f"{ratio} |"
        )
    return lines
