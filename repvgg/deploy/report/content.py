"""The report of a deployment: errors, accuracy, files, sizes, latency; as data and as JSON.

The names of the fields are the keys of report.json, which other programs read. `summary` puts a
report into words, `markdown` and `webpage` write it for people.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from repvgg import verify
from repvgg.contract import DataContract
from repvgg.deploy.report import markdown, summary, webpage
from repvgg.deploy.report.decode import decode
from repvgg.export.int8 import Trial
from repvgg.verify import Verdict

if TYPE_CHECKING:
    from repvgg.deploy.report.samples import Samples
    from repvgg.deploy.report.webpage import Figure


@dataclass(frozen=True)
class DeployedFile:
    """One file of a deployment.

    Attributes:
        bytes: its size.
        sha256: its checksum.
        layers: number of convolutions and BatchNorms; empty if the format does not show them.
        verified: "float32" or "int8", how it was verified; None for a part of another file.
    """

    bytes: int
    sha256: str
    layers: Mapping[str, int]
    verified: str | None


@dataclass(frozen=True)
class Size:
    """Parameters, and multiply-accumulates for one image."""

    parameters: int
    macs: int


@dataclass(frozen=True)
class Quartiles:
    """Milliseconds of one call, over all rounds."""

    median: float
    lower: float
    upper: float
    rounds: int


@dataclass(frozen=True)
class Timing(Quartiles):
    """Milliseconds of one call, and the speedup over the folded model in torch."""

    ratio: float


@dataclass(frozen=True)
class Latency:
    """How fast every predictor is.

    Attributes:
        batch: images in a call.
        threads: of torch, and of every engine.
        load: of the machine, over the last minute, when the measurement ended.
        noisy: the A/A control differs too much for the ratios to mean anything.
        milliseconds: by predictor.
    """

    batch: int
    threads: int
    load: float
    noisy: bool
    milliseconds: Mapping[str, Timing]


@dataclass(frozen=True)
class Int8:
    """How the int8 file was made, and the accuracy it loses.

    Attributes:
        source: where the calibration and the held-out images come from.
        judged_on: the images on which accuracy was compared.
        measured_on: number of calibration images.
        chosen_on: number of held-out images.
        chosen: the trial that became the file.
        trials: everything that was tried.
        sensitivity: by layer, the error if that layer alone is int8.
        verdicts: by engine, the accuracy lost.
    """

    source: str
    judged_on: str
    measured_on: int
    chosen_on: int
    chosen: Trial
    trials: Sequence[Trial]
    sensitivity: Mapping[str, float]
    verdicts: Mapping[str, Verdict]


@dataclass(frozen=True)
class Training:
    """The run that trained a checkpoint, as its folder describes it.

    Attributes:
        folder: of the run.
        data: name of the data set.
        overrides: what was passed to the training command.
        epoch: of the checkpoint; counted from 0.
        metrics: such as test/accuracy; empty if they are those of another checkpoint.
    """

    folder: str
    data: str | None = None
    overrides: Sequence[str] = ()
    epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that one deployment measured.

    Attributes:
        verdict: "passed"; a deployment that fails leaves no report.
        checkpoint: the path that was deployed.
        int8: of the int8 file, if there is one.
        origin: how a third-party checkpoint was opened; empty for the package's own.
        model: the arguments of `repvgg.models.registry.build_model`.
        data: the preprocessing and the classes.
        input, output: as in `repvgg.contract.Description`.
        images: number of images in the probe batch.
        probe: the restored network against the recorded logits.
        verdicts: every form and every file against the multi-branch network in float64.
        float32_bound: the error allowed in float32.
        blocks: by precision and block, the error.
        batchnorms_left: by BatchNorm that was not folded, why.
        accuracy_on_probe: by predictor; empty if the probe batch has no labels.
        accuracy_on_validation: by predictor, if a data set was passed.
        agreement_on_validation: by predictor, share of images with the top-1 of the multi-branch
            network.
        files: by name, all files but those of the certificate.
        size: before and after folding.
        environment: versions of packages, and the machine.
        command: the command line.
        latency: if it was measured.
        validation_images: number of images of the validation set that were used.
        created: UTC, in ISO 8601.
        training: the run that trained the checkpoint, if the checkpoint lies in its folder.
    """

    verdict: str = "passed"
    checkpoint: str
    int8: Int8 | None = None
    origin: str
    model: Mapping[str, object]
    data: DataContract
    input: str
    output: str
    images: int
    probe: Verdict
    verdicts: Mapping[str, Verdict]
    float32_bound: float = verify.TOLERANCE[torch.float32]  # version 0.1 did not write it
    blocks: Mapping[str, Mapping[str, float]]
    batchnorms_left: Mapping[str, str]
    accuracy_on_probe: Mapping[str, float]
    accuracy_on_validation: Mapping[str, float] | None = None
    agreement_on_validation: Mapping[str, float] | None = None
    files: Mapping[str, DeployedFile]
    size: Mapping[str, Size]
    environment: Mapping[str, str]
    command: str
    latency: Latency | None = None
    validation_images: int | None = None
    created: str | None = None
    training: Training | None = None

    def to_json(self) -> str:
        """The text of report.json; a field that is None is left out."""
        present = {key: value for key, value in vars(self).items() if value is not None}
        return json.dumps(present, indent=2, default=_fields) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Read a report.json of version 0.1 or later.

        Raises:
            ValueError: it is not JSON, a key is missing, or a value has another type.
        """
        return decode(cls, json.loads(text))

    def to_markdown(self) -> str:
        """The text of report.md."""
        return markdown.page(self)

    def to_html(self, samples: "Samples | None" = None, figures: "Sequence[Figure]" = ()) -> str:
        """The text of report.html: one file without scripts and without links to other places.

        Args:
            samples: images with predictions, to be shown.
            figures: what `repvgg.deploy.report.webpage.draw` returned.
        """
        return webpage.page(self, samples, figures)

    def summary(self, width: int | None = None) -> str:
        """The verdict and a row for each file, as plain text; see `summary.text`."""
        return summary.text(self, width)


def _fields(value: object) -> dict[str, object]:
    """The fields of a dataclass for `json.dumps`; of a verdict, whether it passed too."""
    return vars(value) | ({"passed": value.passed} if isinstance(value, Verdict) else {})
