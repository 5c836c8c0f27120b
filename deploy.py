"""Deploy a trained network: python deploy.py ckpt=runs/.../checkpoints/best.ckpt

Folds the network, writes it in each format, reloads every file from disk and compares it with the
multi-branch network in float64. The folder appears under its name when all verdicts passed.
"""

import copy
import hashlib
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg import cli

if TYPE_CHECKING:
    from repvgg.verify import Verdict

CONFIG = Path(__file__).absolute().parent / "configs" / "deploy.yaml"
CHOICES = ("safetensors", "onnx")  # as repvgg.export.FORMATS, known here without importing torch


def main(config: dict[str, Any], _: Path) -> None:
    path, out = check_arguments(config)
    near = next(folder for folder in out.absolute().parents if folder.exists())
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=near))
    try:
        report = deploy(path, work, formats=config["formats"], benchmark=config["benchmark"])
        (work / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        (work / "report.md").write_text(as_markdown(report))
        publish(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(as_markdown(report))
    print(f"written to {shlex.quote(os.path.relpath(out))}")


def check_arguments(config: dict[str, Any]) -> tuple[Path, Path]:
    """Refuse what can be refused before anything is loaded; the checkpoint and the folder."""
    if config["ckpt"] is None:
        found = sorted(Path("runs").rglob("best.ckpt"), key=os.path.getmtime)
        newest = found[-1] if found else "runs/.../checkpoints/best.ckpt"
        raise ValueError(f"ckpt is missing: type python deploy.py ckpt={newest}")
    path = Path(str(config["ckpt"]))
    for key in ("benchmark", "overwrite"):
        if not isinstance(config[key], bool):
            raise ValueError(f"{key}={config[key]}: must be true or false")
    formats = config["formats"]
    if not isinstance(formats, list) or not formats or any(f not in CHOICES for f in formats):
        raise ValueError(
            f"formats={formats}: must be a list of {', '.join(CHOICES)}; "
            f"type for example formats=[{CHOICES[0]}]"
        )
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no file"
        raise ValueError(
            f"ckpt={path}: there is {kind} of that name; give a best.ckpt that train.py wrote"
        )
    if config["out"] is not None:
        out = Path(str(config["out"]))
    elif path.parent.name == "checkpoints":
        out = path.parent.parent / "deploy"
    else:
        out = path.parent / f"{path.stem}-deploy"
    if out.exists() and not config["overwrite"]:
        raise ValueError(f"{out} exists: type overwrite=true to replace it, or out=OTHER_FOLDER")
    if out.exists() and not (out / "report.json").is_file():
        raise ValueError(f"{out} is not a deployment, so it is not replaced: type out=OTHER_FOLDER")
    return path, out.resolve()


def one_run(arguments: list[str]) -> list[str]:
    """Refuse a sweep: every deployment is certified by itself."""
    if {"-m", "--multirun"} & set(arguments):
        raise ValueError("-m: one checkpoint at a time; type python deploy.py ckpt=PATH")
    return arguments


def deploy(path: Path, folder: Path, *, formats: list[str], benchmark: bool) -> dict[str, Any]:
    """Fold, export into `folder` and verify.

    Returns:
        the report, of plain types.

    Raises:
        ValueError: the checkpoint is bad, or a verdict failed; it says which.
    """
    import torch  # here, so that --help answers at once
    from torch import nn

    from repvgg import checkpoint, verify
    from repvgg.export import FORMATS, Description
    from repvgg.fuse import deployed_form
    from repvgg.model import to_float

    restored = checkpoint.load(path)
    trained = restored.predictor  # normalization, then the multi-branch network
    images = to_float(restored.probe.images)
    probe = verify.compare(
        lambda _: restored.probe.logits, trained, images, tolerance=verify.PROBE_TOLERANCE
    )
    require("probe: the restored network and the recorded logits", probe)

    reference = copy.deepcopy(trained).double()
    network, fusion = deployed_form(restored.model)
    folded = nn.Sequential(trained[0], network).eval()
    network64, _ = deployed_form(reference[1])
    folded64 = nn.Sequential(reference[0], network64).eval()
    verdicts = {
        "multi-branch, float32": verify.compare(reference, trained, images),
        "folded, float64": verify.compare(reference, folded64, images.double()),
        "folded, float32": verify.compare(reference, folded, images),
    }
    moved = {f"1.{name}" for name in fusion.moved}
    blocks = {
        name: {
            block: error
            for block, error in verify.compare_blocks(reference, candidate, images).items()
            if block not in moved
        }
        for name, candidate in (("float64", folded64), ("float32", folded))
    }
    if not blocks["float64"]:  # it has none: every module counts whose output should be the same
        errors = verify.compare_modules(reference, folded64, [images.double()], moved=moved)
        blocks = {"float64": {key: e for key, e in errors.items() if key.startswith("1.")}}
    for name, errors in blocks.items():
        worst = max(errors, key=errors.__getitem__)
        verdicts[f"worst block, {name} ({worst.removeprefix('1.')})"] = verify.Verdict(
            errors[worst], verify.TOLERANCE[getattr(torch, name)]
        )
    blocks = {
        name: {block.removeprefix("1."): error for block, error in errors.items()}
        for name, errors in blocks.items()
    }

    predictors = {"multi-branch, torch": trained, "deployed, torch": folded}
    files = {}
    for name in formats:
        target = folder / FORMATS[name].filename
        FORMATS[name].save(folded, target, Description(restored.config, restored.data))
        predictor = FORMATS[name].load(target)  # from disk: what will be shipped
        verdicts[target.name] = verify.compare(reference, predictor, images)
        predictors[target.name] = predictor
        content = target.read_bytes()
        files[target.name] = {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    for name, verdict in verdicts.items():
        require(name, verdict)

    labels = restored.probe.labels
    report = {
        "verdict": "passed",
        "checkpoint": str(path),
        "model": restored.config,
        "data": asdict(restored.data),
        "images": len(images),
        "probe": as_dict(probe),
        "verdicts": {name: as_dict(verdict) for name, verdict in verdicts.items()},
        "blocks": blocks,
        "batchnorms_left": fusion.kept,
        "accuracy_on_probe": {
            "recorded": accuracy(restored.probe.logits, labels),
            **{name: accuracy(predict(images), labels) for name, predict in predictors.items()},
        },
        "files": files,
        "size": sizes(trained, folded, images),
        "environment": environment(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }
    if benchmark:
        report["latency"] = latency(predictors, images[:1])
    return report


def require(name: str, verdict: "Verdict") -> None:
    """Raise ValueError unless the verdict passed."""
    if not verdict.passed:
        raise ValueError(
            f"verification failed, nothing was written: {name}: relative error "
            f"{verdict.error:.1e} exceeds {verdict.tolerance:.0e}"
        )


def sizes(trained: Any, folded: Any, images: Any) -> dict[str, Any]:
    """Parameters and multiply-accumulates for one image, before and after."""
    from repvgg.benchmark import count_macs, count_parameters

    return {
        name: {
            "parameters": count_parameters(network),
            "macs": count_macs(network, images[:1]),
        }
        for name, network in (("multi-branch", trained), ("deployed", folded))
    }


def latency(predictors: dict[str, Any], images: Any) -> dict[str, Any]:
    """Milliseconds per image, all predictors interleaved, one of them twice as a control."""
    import torch

    from repvgg.benchmark import measure_latency

    control = "deployed, torch, again"
    measured = measure_latency(
        {**predictors, control: predictors["deployed, torch"]}, images, seconds=3.0
    )
    return {
        "batch": len(images),
        "threads": torch.get_num_threads(),
        "milliseconds": {name: asdict(value) for name, value in measured.items()},
    }


def environment() -> dict[str, str]:
    """Versions and machine."""
    from importlib.metadata import version

    import repvgg

    packages = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "safetensors")
    return {
        "repvgg": repvgg.__version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
    }


def accuracy(logits: Any, labels: Any) -> float:
    return (logits.argmax(1) == labels).double().mean().item()


def as_dict(verdict: "Verdict") -> dict[str, Any]:
    return {**asdict(verdict), "passed": verdict.passed}


def publish(work: Path, out: Path) -> None:
    """Give the finished folder its name; what had that name goes only then."""
    work.chmod(0o755)  # mkdtemp makes it private
    if out.exists():
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


def as_markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    size = report["size"]
    lines = [
        f"# {report['model']['name']}: {report['verdict']}",
        "",
        f"Compared with the multi-branch network in float64 on {report['images']} validation "
        "images. Errors are relative to the largest value.",
        "",
        "| compared | largest error | allowed | same top-1 |",
        "|---|---|---|---|",
    ]
    probe = {"restored network and recorded logits": report["probe"]}
    for name, verdict in (probe | report["verdicts"]).items():
        agreement = "" if verdict["agreement"] is None else f"{verdict['agreement']:.1%}"
        lines.append(
            f"| {name} | {verdict['error']:.1e} | {verdict['tolerance']:.0e} | {agreement} |"
        )
    if report["batchnorms_left"]:
        reasons = "; ".join(sorted(set(report["batchnorms_left"].values())))
        lines += ["", f"{len(report['batchnorms_left'])} BatchNorms are left: {reasons}."]
    lines += ["", "| | parameters | multiply-accumulates |", "|---|---|---|"]
    for name, value in size.items():
        lines.append(f"| {name} | {value['parameters']:,} | {value['macs']:,} |")
    lines += ["", "| file | bytes | SHA-256 |", "|---|---|---|"]
    for name, value in report["files"].items():
        lines.append(f"| {name} | {value['bytes']:,} | {value['sha256'][:16]}... |")
    if "latency" in report:
        measured = report["latency"]
        lines += [
            "",
            f"Latency of one image, {measured['threads']} threads, calls interleaved in one run; "
            "the row that stands twice shows the noise.",
            "",
            "| | median ms | quartiles | rounds |",
            "|---|---|---|---|",
        ]
        for name, value in measured["milliseconds"].items():
            lines.append(
                f"| {name} | {value['median']:.2f} | {value['lower']:.2f} to "
                f"{value['upper']:.2f} | {value['rounds']} |"
            )
    versions = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    lines += ["", f"{versions}", "", f"`{report['command']}`", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, CONFIG, prepare=one_run)
