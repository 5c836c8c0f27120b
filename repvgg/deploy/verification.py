"""Verdicts: every form and every file against the multi-branch network in float64."""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from repvgg import verify
from repvgg.checkpoint import Checkpoint
from repvgg.contract import Description, to_float
from repvgg.deploy.sets import Sets, is_labelled
from repvgg.export.artifact import Artifact, build_program
from repvgg.models.forms import deployed_form
from repvgg.verify import Predictor, Verdict

DEPLOYED, TRAINED = "deployed, torch", "trained form, torch"
OWN = "trained form, float32"  # the error that the trained network itself has
FOLDED64, FOLDED32 = "folded, float64", "folded, float32"
NETWORK = "1."  # prefix of the network's modules, which follow the normalization


@dataclass(frozen=True)
class Forms:
    """A network before and after folding, as predictors with the output of the files.

    Attributes:
        reference: the multi-branch network in float64.
        trained: the multi-branch network.
        folded: the folded network.
        folded64: the folded network in float64. Both were folded in float64.
    """

    reference: nn.Sequential
    trained: nn.Sequential
    folded: nn.Sequential
    folded64: nn.Sequential

    @classmethod
    def of(cls, restored: Checkpoint, network: nn.Module, description: Description) -> "Forms":
        """Build all forms.

        Args:
            network: the folded network.
        """
        plain = replace(description, input="float32")
        double = copy.deepcopy(restored.model).double()
        return cls(
            build_program(double, plain).double(),
            build_program(restored.model, plain),
            build_program(network, plain),
            build_program(deployed_form(double)[0], plain).double(),
        )


@dataclass(frozen=True)
class Accuracies:
    """Accuracy by predictor, and the share of images with the top-1 of the multi-branch one.

    Attributes:
        scores: (N, K), of the folded network on the validation set, else on the probe batch.
    """

    on_probe: dict[str, float]
    scores: Tensor
    on_validation: dict[str, float] | None = None
    agreement_on_validation: dict[str, float] | None = None


def evaluate_probe(restored: Checkpoint, images: Tensor) -> Verdict:
    """Compare the restored network with the logits recorded in training."""
    return verify.compare(
        lambda _: restored.probe.logits,
        restored.predictor,
        images,
        tolerance=verify.PROBE_TOLERANCE,
    )


def evaluate_forms(
    forms: Forms, images: Tensor, blocks: Mapping[str, Mapping[str, float]]
) -> dict[str, Verdict]:
    """Verdicts on the network before and after folding, and on its worst block.

    The verdict `OWN` holds the error allowed in float32.

    Args:
        blocks: what `compare_blocks` returned.
    """
    own = verify.compare(forms.reference, forms.trained, images)
    bound = verify.float32_bound(own.error)
    verdicts = {
        OWN: replace(own, tolerance=bound),
        FOLDED64: verify.compare(forms.reference, forms.folded64, images.double()),
        FOLDED32: verify.compare(forms.reference, forms.folded, images, tolerance=bound),
    }
    for name, errors in blocks.items():
        allowed = dict.fromkeys(errors, verify.TOLERANCE[getattr(torch, name)])
        if name == "float32":
            trained = verify.compare_blocks(forms.reference, forms.trained, images)
            for block, error in trained.items():
                allowed[block.removeprefix(NETWORK)] = verify.float32_bound(error)
        worst = max(errors, key=lambda block: errors[block] / allowed[block])
        verdicts[f"worst block, {name} ({worst})"] = Verdict(errors[worst], allowed[worst])
    return verdicts


def compare_blocks(
    forms: Forms, images: Tensor, moved: Collection[str]
) -> dict[str, dict[str, float]]:
    """The error of every block, by precision. Without blocks, of every module, in float64 alone.

    Args:
        moved: modules that are left out: another module does their part after folding.
    """
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


def evaluate(
    reference: Predictor, predictors: Mapping[str, Predictor], images: Tensor, *, tolerance: float
) -> dict[str, Verdict]:
    """Compare each predictor with the reference."""
    return {
        name: verify.compare(reference, predictor, images, tolerance=tolerance)
        for name, predictor in predictors.items()
    }


def compare_accuracy(
    expected: Tensor, scores: Tensor, labels: Tensor, *, tolerance: float
) -> Verdict:
    """A verdict on a network in low precision: its error is the accuracy it loses.

    It may always lose one image.

    Args:
        expected, scores: (N, K), of the reference and of the candidate.
        labels: (N,).
        tolerance: share of the images.
    """
    lost = accuracy(expected, labels) - accuracy(scores, labels)
    if not scores.isfinite().all():
        lost = float("inf")
    same = verify.agreement(expected, scores)
    return Verdict(max(0.0, lost), max(tolerance, 1.0 / len(labels)), same)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest entry is the label's; a row with NaN counts as wrong."""
    right = (scores.argmax(1) == labels) & ~scores.isnan().any(1)
    return right.double().mean().item()


def measure_accuracies(
    predictors: Mapping[str, Predictor], restored: Checkpoint, sets: Sets
) -> Accuracies:
    """Accuracy on the probe batch if it has labels, and on the validation set if there is one."""
    on_probe: dict[str, float] = {}
    scores: dict[str, Tensor] = {}
    if is_labelled(restored.probe):
        scores = _score(predictors, to_float(restored.probe.images))
        on_probe = _accuracies({"recorded": restored.probe.logits, **scores}, restored.probe.labels)
    if sets.validation is None:
        return Accuracies(on_probe, scores.get(DEPLOYED, torch.empty(0)))
    scores = _score(predictors, sets.validation.images)
    agreement = {name: verify.agreement(scores[TRAINED], given) for name, given in scores.items()}
    shares = _accuracies(scores, sets.validation.labels)
    return Accuracies(on_probe, scores[DEPLOYED], shares, agreement)


def _accuracies(scores: Mapping[str, Tensor], labels: Tensor) -> dict[str, float]:
    return {name: accuracy(given, labels) for name, given in scores.items()}


def _score(predictors: Mapping[str, Predictor], images: Tensor) -> dict[str, Tensor]:
    return {name: predict_all(predictor, images) for name, predictor in predictors.items()}


def predict_all(predictor: Predictor, images: Tensor, batch_size: int = 64) -> Tensor:
    """Predict a set of images of any size."""
    with torch.no_grad():
        return torch.cat([predictor(batch) for batch in torch.split(images, batch_size)])


def require(name: str, verdict: Verdict) -> None:
    """Raise ValueError unless the verdict passed."""
    if not verdict.passed:
        raise ValueError(f"verification failed, nothing was written: {name}: {exceeds(verdict)}")


def require_layers(name: str, artifact: Artifact, expected: Mapping[str, int]) -> None:
    """Raise ValueError unless a file holds the expected layers, if its format shows them.

    An exporter may fold a BatchNorm that the folded network kept.
    """
    given = artifact.layers or expected
    same = given["convolutions"] == expected["convolutions"]
    if not same or given["batchnorms"] > expected["batchnorms"]:
        raise ValueError(
            f"verification failed, nothing was written: {name} holds "
            f"{_in_words(artifact.layers)}, the folded network {_in_words(expected)}"
        )


def exceeds(verdict: Verdict) -> str:
    return f"error {verdict.error:.1e} exceeds {verdict.tolerance:.0e}"


def _in_words(layers: Mapping[str, int]) -> str:
    return f"{layers['convolutions']} convolutions and {layers['batchnorms']} BatchNorms"
