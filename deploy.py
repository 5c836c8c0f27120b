"""Deploy a trained network: python deploy.py ckpt=runs/.../checkpoints/best.ckpt

Folds the network, writes it in each format, reloads every file from disk and compares it with the
trained network in float64. The folder appears under its name when all verdicts passed.
"""

import copy
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from repvgg import cli
from repvgg.checks import check_integer, check_number

if TYPE_CHECKING:
    from torch import Tensor, nn

    from repvgg.checkpoint.native import Checkpoint
    from repvgg.contract import DataContract, Description
    from repvgg.export.artifact import Artifact
    from repvgg.verify import Predictor, Verdict

CONFIG = Path(__file__).absolute().parent / "configs" / "deploy.yaml"
MOST_VALIDATED = 5000  # images, evenly spread: more would not fit into memory at 224 pixels
# As in repvgg.export, known here without importing torch.
CHOICES = ("safetensors", "onnx", "pt2", "openvino", "aoti")
EXTRAS = {"openvino"}  # formats that need a package of their name
INT8 = "model-int8.onnx"
DEPLOYED, TRAINED = "deployed, torch", "trained form, torch"
OWN = "trained form, float32"  # the error that the trained network itself has
NETWORK = "1."  # its place behind the normalization
MAX_NOISE = 0.1  # of the control against its twin, beyond which no ratio is told


def main(config: dict[str, Any], _: Path) -> None:
    if config["verify"] is not None:
        verify_again(config)
        return
    path, out = check_arguments(config)
    near = next(folder for folder in out.absolute().parents if folder.exists())
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=near))
    try:
        text = deploy(path, work, config)
        publish(work, out, overwrite=config["overwrite"])
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(text)
    print(f"written to {shlex.quote(os.path.relpath(out))}")


def verify_again(config: dict[str, Any]) -> None:
    """Check every byte of a deployed folder, and every artifact on the recorded probe."""
    from repvgg import certificate

    folder = Path(str(config["verify"]))
    if config["ckpt"] is not None or config["out"] is not None:
        raise ValueError("verify: it stands alone; type python deploy.py verify=FOLDER")
    try:
        found = certificate.check(folder)
    except ImportError as error:
        raise ValueError(str(error)) from error
    for name, verdict in found.items():
        if not verdict.passed:
            raise ValueError(f"{folder}: {name}: {exceeds(verdict)}")
        print(f"{name}: {verdict.error:.1e}, at most {verdict.tolerance:.0e} is allowed")
    print(f"{folder}: every file is as it was deployed, and gives what it gave")


def check_arguments(config: dict[str, Any]) -> tuple[Path, Path]:
    """Refuse what can be refused before anything is loaded; the checkpoint and the folder."""
    if config["ckpt"] is None:
        found = sorted(Path("runs").rglob("best.ckpt"), key=os.path.getmtime)
        newest = found[-1] if found else "runs/.../checkpoints/best.ckpt"
        raise ValueError(f"ckpt is missing: type python deploy.py ckpt={newest}")
    path = Path(str(config["ckpt"]))
    for key in ("benchmark", "overwrite", "int8", "bf16"):
        if not isinstance(config[key], bool):
            raise ValueError(f"{key}={config[key]}: must be true or false")
    formats = config["formats"]
    if (
        not isinstance(formats, list)
        or not formats
        or any(f not in CHOICES for f in formats)
        or len({*formats}) < len(formats)
    ):
        raise ValueError(
            f"formats={formats}: must be a list of {', '.join(CHOICES)}, each once; "
            f"type for example formats=[{CHOICES[0]}]"
        )
    check_integer("int8_images", config["int8_images"], minimum=1, example=256)
    check_integer("int8_float_layers", config["int8_float_layers"], minimum=0, example=2)
    check_number("int8_drop", config["int8_drop"], below=1, example=0.005)
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
    check_replaceable(out)
    for extra in sorted(EXTRAS & set(formats)):
        if find_spec(extra) is None:
            raise ValueError(f'{extra} is missing: type pip install -e ".[{extra}]"')
    return path, out.resolve()


def check_replaceable(out: Path) -> None:
    """Refuse to replace anything but what deploy.py wrote, and that alone."""
    if not out.exists():
        return
    from repvgg.certificate import SUMS, read_sums

    try:
        ours = {*read_sums(out), SUMS}
    except (ValueError, OSError):
        raise ValueError(
            f"{out} is not a deployment, so it is not replaced: type out=OTHER_FOLDER"
        ) from None
    others = sorted(path.name for path in out.iterdir() if path.name not in ours)
    if others:
        raise ValueError(
            f"{out} holds what deploy.py did not write, so it is not replaced: "
            f"{', '.join(others[:5])}; type out=OTHER_FOLDER"
        )


def one_run(arguments: cli.Arguments) -> cli.Plan:
    """Refuse a sweep: every deployment is certified by itself."""
    if cli.SWEEP & set(arguments.options):
        raise ValueError("-m: one checkpoint at a time; type python deploy.py ckpt=PATH")
    return cli.Plan(arguments)


@dataclass
class Findings:
    """What was found of every form and every file.

    Attributes:
        verdicts: on each of them, in float64, float32 and, if asked, bf16.
        predictors: all that runs, as the report calls it.
        files: of those that were verified, their layers and the precision.
    """

    verdicts: "dict[str, Verdict]"
    predictors: "dict[str, Predictor]"
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def deploy(path: Path, folder: Path, config: dict[str, Any]) -> str:
    """Fold, export into `folder`, verify, and write the certificate.

    Returns:
        the report, for people.

    Raises:
        ValueError: the checkpoint is bad, or a verdict failed; it says which.
    """
    import torch  # here, so that --help answers at once

    from repvgg import certificate, checkpoint, verify
    from repvgg.contract import Description, to_float
    from repvgg.models.forms import deployed_form

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
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }
    if config["benchmark"]:
        report["latency"] = latency(found.predictors, images[:1])
    expected = forms.reference(images.double()).detach()
    recorded = certificate.Recorded(restored.probe.images, labels, expected, by_int8)
    certificate.write(folder, report, recorded)
    return certificate.as_markdown(report)


def judge_forms(
    forms: "Forms", images: "Tensor", blocks: dict[str, dict[str, float]]
) -> "dict[str, Verdict]":
    """Verdicts on the network before and after folding, and on its worst block."""
    import torch

    from repvgg import verify

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


def export(
    network: "nn.Module",
    forms: "Forms",
    description: "Description",
    images: "Tensor",
    folder: Path,
    config: dict[str, Any],
    found: Findings,
) -> None:
    """Write every format, open each file from disk, and judge it; 16 bits too, if asked."""
    import torch

    from repvgg import verify
    from repvgg.export.artifact import count_layers
    from repvgg.export.formats import FORMATS

    for name in config["formats"]:
        target = folder / FORMATS[name].filename
        write(target.name, FORMATS[name].save, network, target, description)
        artifact = FORMATS[name].load(target)  # from disk: what will be shipped
        require_layers(target.name, artifact, count_layers(network))
        found.verdicts[target.name] = verify.compare(
            forms.reference, artifact, images, tolerance=found.verdicts[OWN].tolerance
        )
        found.predictors[target.name] = artifact
        found.files[target.name] = {"layers": artifact.layers, "verified": "float32"}
    if config["bf16"]:
        tolerance = verify.TOLERANCE[torch.bfloat16]
        for name, predictor in in_bf16(forms.folded, folder).items():
            found.verdicts[name] = verify.compare(
                forms.reference, predictor, images, tolerance=tolerance
            )
            found.predictors[name] = predictor


def judge_int8(
    rounded: Any,
    network: "nn.Module",
    forms: "Forms",
    judged: "tuple[Tensor, Tensor]",
    folder: Path,
    config: dict[str, Any],
    found: Findings,
) -> dict[str, Any]:
    """Write the file of 8 bits and require its accuracy in every engine; the verdicts."""
    import onnx

    from repvgg import certificate
    from repvgg.export.artifact import count_layers

    write(INT8, onnx.save_model, rounded, folder / INT8)
    images, labels = judged
    expected = batched(forms.folded, images)
    verdicts = {}
    for name, artifact in open_int8(folder / INT8).items():
        require_layers(INT8, artifact, count_layers(network))
        verdict = certificate.judge_rounded(
            expected, batched(artifact, images), labels, tolerance=config["int8_drop"]
        )
        require(f"{name}: accuracy lost", verdict)
        verdicts[name] = as_dict(verdict)
        found.predictors[name] = artifact
        found.files[INT8] = {"layers": artifact.layers, "verified": "int8"}
    return verdicts


def score(predictors: "dict[str, Predictor]", images: "Tensor") -> "dict[str, Tensor]":
    return {name: batched(predict, images) for name, predict in predictors.items()}


def accuracies(scores: "dict[str, Tensor]", labels: "Tensor") -> dict[str, float]:
    from repvgg.certificate import accuracy

    return {name: accuracy(given, labels) for name, given in scores.items()}


def describe_files(folder: Path, verified: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file; OpenVINO's weights are one by themselves."""
    from repvgg.certificate import digest

    return {
        written.name: {
            "bytes": written.stat().st_size,
            "sha256": digest(written),
            "layers": {},
            "verified": None,
            **verified.get(written.name, {}),
        }
        for written in sorted(folder.iterdir())
    }


class Forms(NamedTuple):
    """A network before and after folding, each a predictor with the output that was asked for.

    Attributes:
        reference: as it was trained, in float64.
        trained: as it was trained.
        folded, folded64: deployed; folded in float64, whatever they compute in.
    """

    reference: "nn.Sequential"
    trained: "nn.Sequential"
    folded: "nn.Sequential"
    folded64: "nn.Sequential"

    @classmethod
    def of(
        cls, restored: "Checkpoint", network: "nn.Module", description: "Description"
    ) -> "Forms":
        from repvgg.export.artifact import build_program
        from repvgg.models.forms import deployed_form

        plain = replace(description, input="float32")
        double = copy.deepcopy(restored.model).double()
        return cls(
            build_program(double, plain).double(),
            build_program(restored.model, plain),
            build_program(network, plain),
            build_program(deployed_form(double)[0], plain).double(),
        )


def compare_blocks(forms: Forms, images: "Tensor", moved: set[str]) -> dict[str, dict[str, float]]:
    """The error of every block, or of every module where there are no blocks, by precision."""
    from repvgg import verify

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


class Sets(NamedTuple):
    """Images (float32 in [0, 1]) and labels beside the checkpoint's own.

    Attributes:
        measured: images on which ranges of int8 are measured.
        held_out: images on which they are chosen.
        validation: of the data that was given, if any was.
        source: where `measured` and `held_out` come from.
    """

    measured: "Tensor"
    held_out: "Tensor"
    validation: "tuple[Tensor, Tensor] | None"
    source: str


def load_sets(config: dict[str, Any], restored: "Checkpoint") -> Sets:
    """Read the data set, if one was given, or divide the probe.

    Raises:
        ValueError: the data does not fit the checkpoint.
    """
    import torch

    from repvgg.contract import to_float

    images = to_float(restored.probe.images)
    if config.get("data") is None:
        return Sets(images[::2], images[1::2], None, "the checkpoint's probe")
    from hydra.utils import instantiate

    data = instantiate(config["data"])
    wanted, given = as_json(restored.data), as_json(data.contract)
    for key in ("in_channels", "image_size", "classes"):
        if wanted[key] != given[key]:
            theirs, ours = (str(contract[key])[:60] for contract in (given, wanted))
            raise ValueError(
                f"data: its {key} is {theirs}, the checkpoint was trained on {ours}; give the data "
                "it was trained on, or none"
            )
    held = len(data.train.labels)
    count = min(config["int8_images"], held // 2)
    order = torch.randperm(held, generator=torch.Generator().manual_seed(0))
    measured, held_out = (
        to_float(data.read(data.train, rows)[0])
        for rows in (order[:count], order[count : 2 * count])
    )
    images, labels = data.spread(data.val, MOST_VALIDATED)
    validation = to_float(images), labels
    return Sets(measured, held_out, validation, "the training set")


def as_json(contract: "DataContract") -> dict[str, Any]:
    """As a checkpoint holds it: lists, where the data has tuples."""
    return json.loads(json.dumps(asdict(contract)))


def quantize(
    network: "nn.Module",
    restored: "Checkpoint",
    description: "Description",
    sets: Sets,
    config: dict[str, Any],
) -> tuple[dict[str, Any], Any]:
    """Choose how to round; what the report says of it, and the `onnx.ModelProto`."""
    from repvgg.export import int8
    from repvgg.fusion.normalizations import is_never_updated, is_normalization

    norms = [module for module in restored.model.modules() if is_normalization(module)]
    if norms and all(is_never_updated(norm) for norm in norms):
        raise ValueError(
            "int8=true: this network was never trained: its BatchNorms have the statistics they "
            "began with, so ranges would be measured on what it will never see; train it first"
        )
    found = int8.quantize(
        network,
        description,
        sets.measured,
        held_out=sets.held_out,
        float_layers=config["int8_float_layers"],
        tolerance=config["int8_drop"],
    )
    said = {
        "source": sets.source,
        "judged_on": "the validation set" if sets.validation else "the whole probe",
        "measured_on": len(sets.measured),
        "chosen_on": len(sets.held_out),
        "chosen": found.chosen._asdict(),
        "trials": [trial._asdict() for trial in found.trials],
        "sensitivity": found.sensitivity,
    }
    return said, found.model


def open_int8(path: Path) -> "dict[str, Artifact]":
    """Open a file of 8 bits in every engine that is installed."""
    from repvgg.export.formats import load_onnx, load_openvino

    found = {f"{path.name}, onnxruntime": load_onnx(path)}
    if find_spec("openvino"):
        found[f"{path.name}, OpenVINO"] = load_openvino(path)
    return found


def in_bf16(folded: "nn.Sequential", folder: Path) -> "dict[str, Predictor]":
    """The deployed network in 16 bits, in torch and in OpenVINO if its file was written.

    Raises:
        ValueError: the processor computes no bf16.
    """
    import torch

    from repvgg.export.formats import FORMATS, load_openvino

    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ValueError("bf16=true: this processor has no bf16; type bf16=false")
    normalize, network, *rest = copy.deepcopy(folded)
    network.bfloat16()

    def run(images: "Tensor") -> "Tensor":
        scores = network(normalize(images).bfloat16()).float()
        for layer in rest:
            scores = layer(scores)
        return scores

    found: dict[str, Predictor] = {f"{DEPLOYED}, bf16": run}
    path = folder / FORMATS["openvino"].filename
    if path.exists():
        found[f"{path.name}, bf16"] = load_openvino(path, precision="bf16")
    return found


def write(name: str, save: Callable[..., None], *arguments: Any) -> None:
    """Write one file. Engines fail in many ways when a disk is full or refuses."""
    try:
        save(*arguments)
    except ImportError as error:  # a compiler, a package
        raise ValueError(str(error)) from error
    except (ValueError, OSError):
        raise
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"{name} could not be written, nothing is left: {said}") from error


def require_layers(name: str, artifact: "Artifact", layers: dict[str, int]) -> None:
    """Raise ValueError unless a file holds the layers that it should, if it tells."""
    if artifact.layers and artifact.layers != layers:
        raise ValueError(
            f"verification failed, nothing was written: {name} holds {artifact.layers}, "
            f"the deployed network {layers}"
        )


def require(name: str, verdict: "Verdict") -> None:
    """Raise ValueError unless the verdict passed."""
    if not verdict.passed:
        raise ValueError(f"verification failed, nothing was written: {name}: {exceeds(verdict)}")


def exceeds(verdict: "Verdict") -> str:
    return f"error {verdict.error:.1e} exceeds {verdict.tolerance:.0e}"


def batched(predict: "Predictor", images: "Tensor", size: int = 64) -> "Tensor":
    """Predict a set of images of any size."""
    import torch

    with torch.no_grad():
        return torch.cat([predict(batch) for batch in images.split(size)])


def sizes(forms: Forms, images: "Tensor") -> dict[str, Any]:
    """Parameters and multiply-accumulates for one image, before and after."""
    from repvgg.benchmark import count_macs, count_parameters

    return {
        name: {
            "parameters": count_parameters(network),
            "macs": count_macs(network, images[:1]),
        }
        for name, network in (("trained form", forms.trained), ("deployed", forms.folded))
    }


def latency(predictors: "dict[str, Predictor]", images: "Tensor") -> dict[str, Any]:
    """Milliseconds per image, all predictors interleaved, one of them twice as a control."""
    import torch

    from repvgg.benchmark import measure_latency
    from repvgg.export.artifact import Artifact

    control = f"{DEPLOYED}, again"

    def ready(predict: "Predictor") -> "Predictor":
        """What a file takes is made beforehand."""
        if not isinstance(predict, Artifact):
            return predict
        encoded = predict.description.encode(images)
        return lambda _: predict.run(encoded)

    timed = {name: ready(predict) for name, predict in predictors.items()}
    measured = measure_latency({**timed, control: timed[DEPLOYED]}, images, seconds=3.0)
    base = measured[DEPLOYED].median
    return {
        "batch": len(images),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "noisy": abs(measured[control].median / base - 1) > MAX_NOISE,
        "milliseconds": {
            name: {**asdict(value), "ratio": base / value.median}
            for name, value in measured.items()
        },
    }


def environment() -> dict[str, str]:
    """Versions and machine."""
    from importlib.metadata import PackageNotFoundError, version

    import repvgg

    found = {"repvgg": repvgg.__version__, "python": platform.python_version()}
    packages = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "safetensors")
    for package in (*packages, "openvino"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # an extra
    found["system"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors"
    return found


def as_dict(verdict: "Verdict") -> dict[str, Any]:
    return {**asdict(verdict), "passed": verdict.passed}


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


if __name__ == "__main__":
    cli.run(main, CONFIG, prepare=one_run)
