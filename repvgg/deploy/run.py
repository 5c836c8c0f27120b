"""One deployment: fold, export, reload every file, verify, certify; and verify a folder again."""

import os
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from repvgg import checkpoint, cli, terminal
from repvgg.checkpoint import Checkpoint
from repvgg.checks import ArgumentError
from repvgg.contract import Description, to_float
from repvgg.deploy import certificate, verification
from repvgg.deploy.certificate import Recorded
from repvgg.deploy.files import INT8, describe_files, export, export_int8, in_bf16
from repvgg.deploy.folder import SUMS, new_folder
from repvgg.deploy.measure import environment, latency, sizes
from repvgg.deploy.report import Latency, Report, events, samples
from repvgg.deploy.report.training import find_training
from repvgg.deploy.sets import Sets, load_sets
from repvgg.deploy.settings import DeploySettings
from repvgg.deploy.verification import (
    DEPLOYED,
    FOLDED32,
    FOLDED64,
    OWN,
    TRAINED,
    Accuracies,
    Forms,
    require,
)
from repvgg.export.artifact import Artifact
from repvgg.models.forms import deployed_form
from repvgg.models.libraries import Factory
from repvgg.targets import locate
from repvgg.verify import TOLERANCE, Predictor, Verdict

BF16_BOUND = TOLERANCE[torch.bfloat16]


def find_factory(network: str | None) -> Factory | None:
    """The function or class that the user passed by name."""
    return None if network is None else locate(network, "network")


def run(settings: DeploySettings) -> None:
    """Deploy a checkpoint; the folder gets its name only if every check passes."""
    with new_folder(settings.out, overwrite=settings.overwrite) as folder:
        report = deploy(settings, folder)
    print()
    for line in report.summary(terminal.width()).split("\n"):
        print(terminal.wrapped(line))
    print(f"\nwritten to {shlex.quote(os.path.relpath(settings.out))}")
    if missing := events.add_to_run(report, settings.ckpt):
        print(missing, file=sys.stderr)


def verify_again(folder: Path, network: str | None = None, *, trust: bool = False) -> None:
    """Verify a deployed folder again: every byte, and every file on the recorded images.

    Args:
        network: the dotted name of what builds the network, if it is the user's own.
        trust: as in `repvgg.export.open_artifact`.

    Raises:
        ValueError: a file was changed, computes something else, or was not opened.
    """
    try:
        verdicts, unopened = certificate.check(folder, network=find_factory(network), trust=trust)
    except ImportError as error:
        raise ValueError(str(error)) from error
    for name, verdict in verdicts.items():
        if not verdict.passed:
            raise ValueError(f"{folder}: {name}: {verification.exceeds(verdict)}")
        print(f"{name}: error {verdict.error:.1e}, allowed {verdict.tolerance:.0e}")
    if unopened:
        names = ", ".join(unopened)
        raise ArgumentError(
            f"{folder}: {names}: no byte was changed, but the results were not verified, because "
            "opening this format can run code; if you trust who made the file, pass trust=true",
            "trust",
        )
    print(f"{folder}: no file was changed, and all results are the same")


def deploy(settings: DeploySettings, folder: Path) -> Report:
    """Fold a checkpoint, export it into a folder, verify every file, and write the certificate.

    Raises:
        ValueError: the checkpoint or the data is wrong, or a check failed; the message names it.
    """
    factory = find_factory(settings.network)
    with terminal.step("restore") as step:
        with cli.suggest_import(settings.ckpt):
            restored = checkpoint.load(settings.ckpt, network=factory)
        description = Description(restored.config, restored.data, settings.input, settings.output)
        sets = load_sets(settings, restored)
        images = to_float(restored.probe.images)
        probe = verification.evaluate_probe(restored, images)
        require("probe batch: the restored network and the recorded logits", probe)
        step.result = f"{restored.config['name']}, {_shown(probe)}, {len(images)} images"

    with terminal.step("fold") as step:
        network, fusion = deployed_form(restored.model)
        forms = Forms.of(restored, network, description)
        blocks = verification.compare_blocks(forms, images, fusion.moved)
        verdicts = verification.evaluate_forms(forms, images, blocks)
        for name, verdict in verdicts.items():
            require(name, verdict)
        step.result = f"float64 {_shown(verdicts[FOLDED64])}, float32 {_shown(verdicts[FOLDED32])}"
    bound = verdicts[OWN].tolerance

    files: dict[str, Artifact] = {}
    for kind in settings.formats:
        with terminal.step(kind) as step:
            written = export(network, description, [kind], folder, factory=factory)
            verdicts |= _verify(written, forms, images, bound, step)
            files |= written
    bf16 = in_bf16(forms.folded, folder) if settings.bf16 else {}
    for name, predictor in bf16.items():
        with terminal.step("bf16") as step:
            verdicts |= _verify({name: predictor}, forms, images, BF16_BOUND, step)
    int8 = None
    if settings.int8:
        with terminal.step("int8") as step:
            int8 = export_int8(network, forms, description, restored, sets, settings, folder)
            lost = max(verdict.error for verdict in int8.report.verdicts.values())
            step.result = f"{INT8}, accuracy lost {100 * lost:.2f} %, on {int8.report.judged_on}"

    torch_forms = {TRAINED: forms.trained, DEPLOYED: forms.folded}
    engines = int8.engines if int8 else {}
    predictors: dict[str, Predictor] = {**torch_forms, **files, **bf16, **engines}
    accuracies = _measure_accuracies(predictors, restored, sets)
    report = Report(
        checkpoint=str(settings.ckpt),
        int8=int8.report if int8 else None,
        origin=restored.origin,
        model=restored.config,
        data=restored.data,
        input=description.input,
        output=description.output,
        images=len(images),
        probe=probe,
        verdicts=verdicts,
        float32_bound=bound,
        blocks=blocks,
        batchnorms_left=fusion.kept,
        accuracy_on_probe=accuracies.on_probe,
        accuracy_on_validation=accuracies.on_validation,
        agreement_on_validation=accuracies.agreement_on_validation,
        files=describe_files(folder, files | ({INT8: int8.artifact} if int8 else {})),
        size=sizes(forms, images),
        environment=environment(),
        command=cli.command_line(),
        latency=_measure_latency(predictors, images[:1]) if settings.benchmark else None,
        validation_images=None if sets.validation is None else len(sets.validation.labels),
        created=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        training=find_training(settings.ckpt),
    )
    with terminal.step("certificate") as step:
        reference = forms.reference(images.double()).detach()
        outputs = int8.artifact(images) if int8 else torch.empty(0)
        recorded = Recorded(restored.probe.images, restored.probe.labels, reference, outputs)
        shown = samples.collect(accuracies.scores, restored, sets, description.output)
        notes = certificate.write(folder, report, recorded, shown)
        step.result = f"{SUMS} of {len([*folder.iterdir()]) - 1} files"
    print(*notes, sep="\n", end="\n" if notes else "")
    return report


def _verify(
    predictors: Mapping[str, Predictor],
    forms: Forms,
    images: Tensor,
    tolerance: float,
    step: terminal.Step,
) -> dict[str, Verdict]:
    """Compare predictors with the multi-branch network in float64; require every one."""
    found = verification.evaluate(forms.reference, predictors, images, tolerance=tolerance)
    for name, verdict in found.items():
        require(name, verdict)
    step.result = "; ".join(f"{name}, {_shown(verdict)}" for name, verdict in found.items())
    return found


def _measure_accuracies(
    predictors: Mapping[str, Predictor], restored: Checkpoint, sets: Sets
) -> Accuracies:
    with terminal.step("accuracy") as step:
        accuracies = verification.measure_accuracies(predictors, restored, sets)
        measured = accuracies.on_validation or accuracies.on_probe
        part = "validation set" if accuracies.on_validation else "probe batch"
        step.result = (
            f"{100 * measured[TRAINED]:.2f} % before, {100 * measured[DEPLOYED]:.2f} % after, "
            f"on the {part}"
            if measured
            else "not known: no labelled images"
        )
    return accuracies


def _measure_latency(predictors: Mapping[str, Predictor], image: Tensor) -> Latency:
    with terminal.step("latency", still=True) as step:
        timed = latency(predictors, image)
        before, after = (timed.milliseconds[form].median for form in (TRAINED, DEPLOYED))
        noisy = "; too noisy to compare" if timed.noisy else ""
        step.result = f"{before:.2f} ms before, {after:.2f} ms after, one image in torch{noisy}"
    return timed


def _shown(verdict: Verdict) -> str:
    return f"error {verdict.error:.1e}"
