"""The certificate of a deployment: written beside the files, and verified again at any time.

It is the report (`report.json`, `report.md`, `report.html`), the probe batch with the logits of the
float64 reference (`probe.safetensors`), and the checksums of all files (`SHA256SUMS`).
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from repvgg import verify, whole
from repvgg.checks import brief
from repvgg.contract import to_float
from repvgg.deploy.folder import HTML, PAGE, PROBE, REPORT, check_sums, write_sums
from repvgg.deploy.report import Report
from repvgg.deploy.report.samples import Samples
from repvgg.deploy.report.webpage import Figure, draw
from repvgg.export.formats import format_of, open_artifact
from repvgg.models.libraries import Factory
from repvgg.verify import Predictor, Verdict


class Recorded(NamedTuple):
    """The probe batch of a deployment, and the results to reproduce.

    Attributes:
        images: (N, C, H, W), uint8.
        labels: (N,).
        scores: (N, K), float64: the outputs of the trained network, after a softmax if the files
            have one.
        int8: (N, K): the outputs of the int8 file; empty if there is none.
    """

    images: Tensor
    labels: Tensor
    scores: Tensor
    int8: Tensor


def write(
    folder: Path, report: Report, recorded: Recorded, samples: Samples | None = None
) -> list[str]:
    """Add the report, the probe batch and the checksums to a folder of artifacts.

    Args:
        samples: images to show in the report.

    Returns:
        a line for each part of the report that could not be made.
    """
    from safetensors.torch import save

    lacking = []
    figures: list[Figure] = []
    try:
        figures = draw(report, samples)
    except ImportError as error:
        lacking.append(f"{HTML} has no figures: {error}")
    with whole.named(folder):
        (folder / PROBE).write_bytes(save(recorded._asdict()))
        (folder / REPORT).write_text(report.to_json())
        (folder / PAGE).write_text(report.to_markdown(), encoding="utf-8")
        (folder / HTML).write_text(report.to_html(samples, figures), encoding="utf-8")
        write_sums(folder)
    return lacking


class Checked(NamedTuple):
    """What came out when a folder was verified again; all its bytes are as they were.

    Attributes:
        verdicts: by file, passed or not.
        unopened: files that can run code and were not trusted, so their results are not verified.
    """

    verdicts: dict[str, Verdict]
    unopened: list[str]


def check(folder: Path, *, network: Factory | None = None, trust: bool = False) -> Checked:
    """Verify a deployed folder again: every byte, then every file on the recorded images.

    float32 files are compared with the recorded float64 logits. The int8 file must reproduce its
    recorded top-1, except for one image.

    Args:
        network, trust: as in `repvgg.export.open_artifact`.

    Raises:
        ValueError: this is not a deployed folder, or a file is missing, changed or new.
    """
    present = check_sums(folder)
    try:
        report = Report.from_json((folder / REPORT).read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"{folder}: its report is damaged: {brief(error)}") from error
    recorded = _recorded(folder)
    verified = {name: file.verified for name, file in report.files.items() if file.verified}
    listed = report.files.keys() == present - {
        REPORT,
        PAGE,
        HTML,
        PROBE,
    }  # version 0.1 wrote no HTML
    if not verified or not listed:
        raise ValueError(f"{folder}: its report does not list the files of the folder")
    unopened = [name for name in verified if format_of(folder / name).runs_code and not trust]
    verdicts = {
        name: _compare(
            open_artifact(folder / name, network=network, trust=trust),
            precision,
            recorded,
            min(report.float32_bound, verify.LARGEST_BOUND),
        )
        for name, precision in verified.items()
        if name not in unopened
    }
    return Checked(verdicts, unopened)


def _recorded(folder: Path) -> Recorded:
    """Read the probe batch.

    Raises:
        ValueError: it is damaged, or its tensors do not belong together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        recorded = Recorded(**load_file(folder / PROBE))
    except (TypeError, SafetensorError) as error:
        raise ValueError(f"{folder}: {PROBE} is damaged: {brief(error)}") from error
    images, scores = recorded.images, recorded.scores
    if (
        images.dtype != torch.uint8
        or images.dim() != 4
        or images.numel() == 0
        or not scores.is_floating_point()
        or scores.dim() != 2
        or len(scores) != len(images)
        or recorded.int8.shape not in (scores.shape, scores[:0].shape, (0,))
        or recorded.int8.is_complex()
    ):
        raise ValueError(f"{folder}: {PROBE} is damaged: its images and scores do not fit")
    return recorded


def _compare(artifact: Predictor, precision: str, recorded: Recorded, bound: float) -> Verdict:
    images = to_float(recorded.images)
    if precision == "int8" and len(recorded.int8):
        same = verify.agreement(recorded.int8, artifact(images))
        return Verdict(1 - same, 1.0 / len(images), same)
    return verify.compare(lambda _: recorded.scores, artifact, images, tolerance=bound)
