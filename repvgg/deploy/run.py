"""One deployment: fold, export, reload every file, verify, certify; and verify a folder again."""

import os
import shlex
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from repvgg import checkpoint, cli, verify
from repvgg.contract import Description, to_float
from repvgg.deploy import certificate
from repvgg.deploy.files import INT8, describe_files, export, judge_int8, quantize
from repvgg.deploy.measure import environment, latency, sizes
from repvgg.deploy.sets import load_sets
from repvgg.deploy.settings import check_replaceable
from repvgg.deploy.verification import (
    DEPLOYED,
    OWN,
    TRAINED,
    Findings,
    Forms,
    accuracies,
    as_dict,
    compare_blocks,
    exceeds,
    judge_forms,
    require,
    score,
)
from repvgg.models.forms import deployed_form


def run(path: Path, out: Path, config: dict[str, Any]) -> None:
    """Deploy a checkpoint beside its place; the folder gets its name when every verdict passed."""
    near = next(folder for folder in out.absolute().parents if folder.exists())
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=near))
    try:
        text = deploy(path, work, config)
        publish(work, out, overwrite=config["overwrite"])
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(text)
    print(f"written to {shlex.quote(os.path.relpath(out))}")


def verify_again(folder: Path) -> None:
    """Check every byte of a deployed folder, and every artifact on the recorded probe."""
    try:
        found = certificate.check(folder)
    except ImportError as error:
        raise ValueError(str(error)) from error
    for name, verdict in found.items():
        if not verdict.passed:
            raise ValueError(f"{folder}: {name}: {exceeds(verdict)}")
        print(f"{name}: {verdict.error:.1e}, at most {verdict.tolerance:.0e} is allowed")
    print(f"{folder}: every file is as it was deployed, and gives what it gave")


def deploy(path: Path, folder: Path, config: dict[str, Any]) -> str:
    """Fold, export into `folder`, verify, and write the certificate.

    Returns:
        the report, for people.

    Raises:
        ValueError: the checkpoint is bad, or a verdict failed; it says which.
    """
    restored = checkpoint.load(path)
    labelled = bool((restored.probe.labels != checkpoint.UNKNOWN).all())
    if config["int8"] and config.get("data") is None and not labelled:
        raise ValueError(
            f"int8=true: '{path}' holds no images to measure ranges on; type for example "
            "data=imagefolder data.root=FOLDER"
        )
    description = Description(restored.config, restored.data, config["input"], config["output"])
    sets = load_sets(config, restored)
    images, labels = to_float(restored.probe.images), restored.probe.labels
    probe = verify.compare(
        lambda _: restored.probe.logits,
        restored.predictor,
        images,
        tolerance=verify.PROBE_TOLERANCE,
    )
    require("probe: the restored network and the recorded logits", probe)

    network, fusion = deployed_form(restored.model)
    forms = Forms.of(restored, network, description)
    blocks = compare_blocks(forms, images, fusion.moved)
    found = Findings(
        judge_forms(forms, images, blocks), {TRAINED: forms.trained, DEPLOYED: forms.folded}
    )
    export(network, forms, description, images, folder, config, found)
    for name, verdict in found.verdicts.items():
        require(name, verdict)

    report: dict[str, Any] = {"verdict": "passed", "checkpoint": str(path)}
    by_int8 = torch.empty(0)
    if config["int8"]:
        report["int8"], rounded = quantize(network, restored, description, sets, config)
        report["int8"]["verdicts"] = judge_int8(
            rounded, network, forms, sets.validation or (images, labels), folder, config, found
        )
        by_int8 = found.predictors[f"{INT8}, onnxruntime"](images)
    report |= {
        "origin": restored.origin,
        "model": restored.config,
        "data": asdict(restored.data),
        "input": description.input,
        "output": description.output,
        "images": len(images),
        "probe": as_dict(probe),
        "verdicts": {name: as_dict(verdict) for name, verdict in found.verdicts.items()},
        "float32_bound": found.verdicts[OWN].tolerance,
        "blocks": blocks,
        "batchnorms_left": fusion.kept,
        "accuracy_on_probe": {},
    }
    if labelled:
        report["accuracy_on_probe"] = {
            "recorded": certificate.accuracy(restored.probe.logits, labels),
            **accuracies(score(found.predictors, images), labels),
        }
    if sets.validation is not None:
        shown, truth = sets.validation
        scores = score(found.predictors, shown)
        report["accuracy_on_validation"] = accuracies(scores, truth)
        report["agreement_on_validation"] = {
            name: verify.agreement(scores[TRAINED], given) for name, given in scores.items()
        }
    report |= {
        "files": describe_files(folder, found.files),
        "size": sizes(forms, images),
        "environment": environment(),
        "command": cli.command_line(),
    }
    if config["benchmark"]:
        report["latency"] = latency(found.predictors, images[:1])
    expected = forms.reference(images.double()).detach()
    recorded = certificate.Recorded(restored.probe.images, labels, expected, by_int8)
    certificate.write(folder, report, recorded)
    return certificate.as_markdown(report)


def publish(work: Path, out: Path, *, overwrite: bool) -> None:
    """Give the finished folder its name; what had that name goes only then."""
    umask = os.umask(0)
    os.umask(umask)
    work.chmod(0o777 & ~umask)  # mkdtemp makes it private
    if out.exists() and not overwrite:
        raise ValueError(f"{out} was made by somebody else meanwhile: type out=OTHER_FOLDER")
    if out.exists():
        check_replaceable(out)
        old = work.with_name(work.name + "-old")
        out.rename(old)
        try:
            work.rename(out)
        except BaseException:
            old.rename(out)
            raise
        shutil.rmtree(old)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        work.rename(out)
