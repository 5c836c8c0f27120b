"""Verdicts: every form and every file against the trained network in float64."""

import copy
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repvgg import verify
from repvgg.checkpoint import Checkpoint
from repvgg.contract import Description
from repvgg.deploy import certificate
from repvgg.export.artifact import Artifact, build_program
from repvgg.models.forms import deployed_form
from repvgg.verify import Predictor, Verdict

DEPLOYED, TRAINED = "deployed, torch", "trained form, torch"
OWN = "trained form, float32"  # the error that the trained network itself has
NETWORK = "1."  # its place behind the normalization


@dataclass
class Findings:
    """What was found of every form and every file.

    Attributes:
        verdicts: on each of them, in float64, float32 and, if asked, bf16.
        predictors: all that runs, as the report calls it.
        files: of those that were verified, their layers and the precision.
    """

    verdicts: dict[str, Verdict]
    predictors: dict[str, Predictor]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


class Forms(NamedTuple):
    """A network before and after folding, each a predictor with the output that was asked for.

    Attributes:
        reference: as it was trained, in float64.
        trained: as it was trained.
        folded, folded64: deployed; folded in float64, whatever they compute in.
    """

    reference: nn.Sequential
    trained: nn.Sequential
    folded: nn.Sequential
    folded64: nn.Sequential

    @classmethod
    def of(cls, restored: Checkpoint, network: nn.Module, description: Description) -> "Forms":
        plain = replace(description, input="float32")
        double = copy.deepcopy(restored.model).double()
        return cls(
            build_program(double, plain).double(),
            build_program(restored.model, plain),
            build_program(network, plain),
            build_program(deployed_form(double)[0], plain).double(),
        )


def judge_forms(
    forms: "Forms", images: Tensor, blocks: dict[str, dict[str, float]]
) -> dict[str, Verdict]:
    """Verdicts on the network before and after folding, and on its worst block."""
    own = verify.compare(forms.reference, forms.trained, images)
    bound = verify.float32_bound(own.error)
    verdicts = {
        OWN: replace(own, tolerance=bound),
        "folded, float64": verify.compare(forms.reference, forms.folded64, images.double()),
        "folded, float32": verify.compare(forms.reference, forms.folded, images, tolerance=bound),
    }
    for name, errors in blocks.items():
        allowed = dict.fromkeys(errors, verify.TOLERANCE[getattr(torch, name)])
        if name == "float32":
            trained = verify.compare_blocks(forms.reference, forms.trained, images)
            for block, error in trained.items():
                allowed[block.removeprefix(NETWORK)] = verify.float32_bound(error)
        worst = max(errors, key=lambda block: errors[block] / allowed[block])
        verdicts[f"worst block, {name} ({worst})"] = verify.Verdict(errors[worst], allowed[worst])
    return verdicts


def score(predictors: dict[str, Predictor], images: Tensor) -> dict[str, Tensor]:
    return {name: batched(predict, images) for name, predict in predictors.items()}


def accuracies(scores: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
    return {name: certificate.accuracy(given, labels) for name, given in scores.items()}


def compare_blocks(forms: Forms, images: Tensor, moved: set[str]) -> dict[str, dict[str, float]]:
    """The error of every block, or of every module where there are no blocks, by precision."""
    moved = {NETWORK + name for name in moved}
    found = {
        name: {
            block: error
            for block, error in verify.compare_blocks(forms.reference, candidate, images).items()
            if block not in moved
        }
        for name, candidate in (("float64", forms.folded64), ("float32", forms.folded))
    }
    if not found["float64"]:
        errors = verify.compare_modules(
            forms.reference, forms.folded64, [images.double()], moved=moved
        )
        found = {"float64": {key: e for key, e in errors.items() if key.startswith(NETWORK)}}
    return {
        name: {block.removeprefix(NETWORK): error for block, error in errors.items()}
        for name, errors in found.items()
    }


def require_layers(name: str, artifact: Artifact, layers: dict[str, int]) -> None:
    """Raise ValueError unless a file holds the layers that it should, if it tells."""
    if artifact.layers and artifact.layers != layers:
        raise ValueError(
            f"verification failed, nothing was written: {name} holds {artifact.layers}, "
            f"the deployed network {layers}"
        )


def require(name: str, verdict: Verdict) -> None:
    """Raise ValueError unless the verdict passed."""
    if not verdict.passed:
        raise ValueError(f"verification failed, nothing was written: {name}: {exceeds(verdict)}")


def exceeds(verdict: Verdict) -> str:
    return f"error {verdict.error:.1e} exceeds {verdict.tolerance:.0e}"


def batched(predict: Predictor, images: Tensor, size: int = 64) -> Tensor:
    """Predict a set of images of any size."""
    with torch.no_grad():
        return torch.cat([predict(batch) for batch in images.split(size)])


def as_dict(verdict: Verdict) -> dict[str, Any]:
    return {**asdict(verdict), "passed": verdict.passed}
