"""The report of a deployment: errors, accuracy, files, sizes, latency; as JSON and as Markdown.

The names of the fields are the keys of report.json, which other programs read.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from repvgg import verify
from repvgg.contract import DataContract
from repvgg.deploy.decode import decode
from repvgg.export.int8 import Trial
from repvgg.verify import Verdict


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

    def to_markdown(self) -> list[str]:
        text = (
            f"Latency of one image, {self.threads} threads, load {self.load:.1f}. Calls are "
            "interleaved. The row that appears twice is an A/A control. onnxruntime's threads do "
            "not spin between calls here, which can halve its speed."
        )
        if self.noisy:
            text += " The control differs too much, so ratios are left out."
        rows = (
            (
                name,
                f"{timing.median:.2f}",
                f"{timing.lower:.2f} to {timing.upper:.2f}",
                "" if self.noisy else f"{timing.ratio:.2f}",
            )
            for name, timing in self.milliseconds.items()
        )
        return [text, "", *_table(("", "median ms", "quartiles", "times as fast"), rows)]


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

    def to_markdown(self) -> list[str]:
        verdicts = (
            (name, f"{verdict.error:.2%}", f"{verdict.tolerance:.2%}", f"{verdict.agreement:.2%}")
            for name, verdict in self.verdicts.items()
        )
        trials = (
            (
                trial.ranges,
                "yes" if trial.equalized else "no",
                len(trial.kept),
                f"{trial.agreement:.2%}",
                f"{trial.error:.2%}",
            )
            for trial in self.trials
        )
        worst = sorted(self.sensitivity.items(), key=lambda item: -item[1])[:5]
        equalized = ", channels equalized" if self.chosen.equalized else ""
        header = (f"int8, {self.judged_on}", "accuracy lost", "allowed", "same top-1")
        return [
            *_table(header, verdicts),
            "",
            f"int8: ranges were measured on {self.measured_on} images and chosen on "
            f"{self.chosen_on} others ({self.source}). Chosen: {self.chosen.ranges}{equalized}. "
            f"Layers in float32: {', '.join(self.chosen.kept) or 'none'}. Most sensitive layers, "
            "with the error if that layer alone is int8: "
            + ", ".join(f"{name} {error:.1%}" for name, error in worst)
            + ".",
            "",
            *_table(("ranges", "equalized", "layers in float32", "same top-1", "error"), trials),
        ]


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
        verdicts: every form and every file against the trained network in float64.
        float32_bound: the error allowed in float32.
        blocks: by precision and block, the error.
        batchnorms_left: by BatchNorm that was not folded, why.
        accuracy_on_probe: by predictor; empty if the probe batch has no labels.
        accuracy_on_validation: by predictor, if a data set was passed.
        agreement_on_validation: by predictor, share of images with the trained network's top-1.
        files: by name, all files but those of the certificate.
        size: before and after folding.
        environment: versions of packages, and the machine.
        command: the command line.
        latency: if it was measured.
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
        probe = "validation images" if self.accuracy_on_probe else "images of noise"
        verdicts = {"restored network and recorded logits": self.probe, **self.verdicts}
        versions = ", ".join(f"{name} {value}" for name, value in self.environment.items())
        sections = [
            [f"# {self.model['name']}: {self.verdict}"],
            [f"Opened as {self.origin}."] if self.origin else [],
            [
                f"Reference: the trained network in float64, on {self.images} {probe}. "
                "Errors are relative to the largest value of the reference."
            ],
            _verdicts(verdicts),
            self._bound(),
            self._batchnorms(),
            self._accuracies(),
            self.int8.to_markdown() if self.int8 else [],
            _table(
                ("", "parameters", "multiply-accumulates"),
                ((name, f"{s.parameters:,}", f"{s.macs:,}") for name, s in self.size.items()),
            ),
            _files(self.files),
            self.latency.to_markdown() if self.latency else [],
            [versions],
            [f"`{self.command}`"],
        ]
        return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"

    def _bound(self) -> list[str]:
        usual = verify.TOLERANCE[torch.float32]
        if self.float32_bound <= usual:
            return []
        return [
            f"The trained network is ill-conditioned: float32 is allowed {self.float32_bound:.1e} "
            f"instead of {usual:.0e}. That is {verify.OWN_ERRORS} times its own float32 error, and "
            f"at most {verify.LARGEST_BOUND:.0e}."
        ]

    def _batchnorms(self) -> list[str]:
        if not self.batchnorms_left:
            return []
        reasons = "; ".join(sorted(set(self.batchnorms_left.values())))
        return [f"{len(self.batchnorms_left)} BatchNorms are left: {reasons}."]

    def _accuracies(self) -> list[str]:
        columns = {
            "accuracy on the probe batch": self.accuracy_on_probe,
            "accuracy on the validation set": self.accuracy_on_validation,
            "same top-1 there as the trained network": self.agreement_on_validation,
        }
        present = {header: shares for header, shares in columns.items() if shares}
        if not present:
            return ["Accuracy is not known: the checkpoint holds no labelled images."]
        names = dict.fromkeys(name for shares in present.values() for name in shares)
        rows = (
            (name, *(f"{s[name]:.2%}" if name in s else "" for s in present.values()))
            for name in names
        )
        return _table(("", *present), rows)


def _verdicts(verdicts: Mapping[str, Verdict]) -> list[str]:
    rows = (
        (
            name,
            f"{verdict.error:.1e}",
            f"{verdict.tolerance:.0e}",
            "" if verdict.agreement is None else f"{verdict.agreement:.1%}",
        )
        for name, verdict in verdicts.items()
    )
    return _table(("compared", "largest error", "allowed", "same top-1"), rows)


def _files(files: Mapping[str, DeployedFile]) -> list[str]:
    rows = (
        (
            name,
            f"{file.bytes:,}",
            file.layers.get("convolutions", ""),
            file.layers.get("batchnorms", ""),
            f"{file.sha256[:16]}...",
        )
        for name, file in files.items()
    )
    return _table(("file", "bytes", "convolutions", "BatchNorms", "SHA-256"), rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [f"| {' | '.join(map(str, row))} |" for row in (header, *rows)]
    return [lines[0], "|---" * len(header) + "|", *lines[1:]]


def _fields(value: object) -> dict[str, object]:
    """The fields of a dataclass for `json.dumps`; of a verdict, whether it passed too."""
    return vars(value) | ({"passed": value.passed} if isinstance(value, Verdict) else {})
