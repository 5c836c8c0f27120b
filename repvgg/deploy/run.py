"""One deployment: fold, export, reload every file, verify, certify; and verify a folder again."""

import os
import shlex
from pathlib import Path

import torch

from repvgg import checkpoint, cli
from repvgg.contract import Description, to_float
from repvgg.deploy import certificate, verification
from repvgg.deploy.certificate import Recorded
from repvgg.deploy.files import INT8, describe_files, export, export_int8, in_bf16
from repvgg.deploy.folder import new_folder
from repvgg.deploy.measure import environment, latency, sizes
from repvgg.deploy.report import Report
from repvgg.deploy.sets import load_sets
from repvgg.deploy.settings import DeploySettings
from repvgg.deploy.verification import DEPLOYED, OWN, TRAINED, Forms, require
from repvgg.models.forms import deployed_form
from repvgg.models.libraries import Factory
from repvgg.targets import locate
from repvgg.verify import TOLERANCE, Predictor

BF16_BOUND = TOLERANCE[torch.bfloat16]


def find_factory(network: str | None) -> Factory | None:
    """The function or class that the user passed by name."""
    return None if network is None else locate(network, "network")


def run(settings: DeploySettings) -> None:
    """Deploy a checkpoint; the folder gets its name only if every check passes."""
    with new_folder(settings.out, overwrite=settings.overwrite) as folder:
        report = deploy(settings, folder)
    print(report.to_markdown())
    print(f"written to {shlex.quote(os.path.relpath(settings.out))}")


def verify_again(folder: Path, network: str | None = None) -> None:
    """Verify a deployed folder again: every byte, and every file on the recorded images.

    Args:
        network: the dotted name of what builds the network, if it is the user's own.
    """
    try:
        verdicts = certificate.check(folder, network=find_factory(network))
    except ImportError as error:
        raise ValueError(str(error)) from error
    for name, verdict in verdicts.items():
        if not verdict.passed:
            raise ValueError(f"{folder}: {name}: {verification.exceeds(verdict)}")
        print(f"{name}: error {verdict.error:.1e}, allowed {verdict.tolerance:.0e}")
    print(f"{folder}: no file was changed, and all results are the same")


def deploy(settings: DeploySettings, folder: Path) -> Report:
    """Fold a checkpoint, export it into a folder, verify every file, and write the certificate.

    Raises:
        ValueError: the checkpoint or the data is wrong, or a check failed; the message names it.
    """
    factory = find_factory(settings.network)
    with cli.suggest_import(settings.ckpt):
        restored = checkpoint.load(settings.ckpt, network=factory)
    description = Description(restored.config, restored.data, settings.input, settings.output)
    sets = load_sets(settings, restored)
    images = to_float(restored.probe.images)
    probe = verification.evaluate_probe(restored, images)
    require("probe batch: the restored network and the recorded logits", probe)

    network, fusion = deployed_form(restored.model)
    forms = Forms.of(restored, network, description)
    blocks = verification.compare_blocks(forms, images, fusion.moved)
    of_forms = verification.evaluate_forms(forms, images, blocks)
    bound = of_forms[OWN].tolerance

    files = export(network, description, settings.formats, folder, factory=factory)
    bf16 = in_bf16(forms.folded, folder) if settings.bf16 else {}
    verdicts = {
        **of_forms,
        **verification.evaluate(forms.reference, files, images, tolerance=bound),
        **verification.evaluate(forms.reference, bf16, images, tolerance=BF16_BOUND),
    }
    for name, verdict in verdicts.items():
        require(name, verdict)

    int8 = None
    if settings.int8:
        int8 = export_int8(network, forms, description, restored, sets, settings, folder)
    engines = int8.engines if int8 else {}
    torch_forms = {TRAINED: forms.trained, DEPLOYED: forms.folded}
    predictors: dict[str, Predictor] = {**torch_forms, **files, **bf16, **engines}
    accuracies = verification.measure_accuracies(predictors, restored, sets)
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
        latency=latency(predictors, images[:1]) if settings.benchmark else None,
    )
    reference = forms.reference(images.double()).detach()
    outputs = int8.artifact(images) if int8 else torch.empty(0)
    recorded = Recorded(restored.probe.images, restored.probe.labels, reference, outputs)
    certificate.write(folder, report, recorded)
    return report
