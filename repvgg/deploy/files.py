"""The files of a deployment: written, reloaded and verified one by one; int8 and bf16 too."""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repvgg import verify
from repvgg.checkpoint import Checkpoint
from repvgg.contract import Description
from repvgg.deploy import certificate
from repvgg.deploy.certificate import digest
from repvgg.deploy.sets import Sets
from repvgg.deploy.verification import (
    DEPLOYED,
    OWN,
    Findings,
    Forms,
    as_dict,
    batched,
    require,
    require_layers,
)
from repvgg.export import int8
from repvgg.export.artifact import Artifact, count_layers
from repvgg.export.formats import FORMATS, load_onnx, load_openvino
from repvgg.fusion.normalizations import is_never_updated, is_normalization
from repvgg.verify import Predictor

INT8 = "model-int8.onnx"


def export(
    network: nn.Module,
    forms: "Forms",
    description: Description,
    images: Tensor,
    folder: Path,
    config: dict[str, Any],
    found: Findings,
) -> None:
    """Write every format, open each file from disk, and judge it; 16 bits too, if asked."""
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


def describe_files(folder: Path, verified: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file; OpenVINO's weights are one by themselves."""
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


def quantize(
    network: nn.Module,
    restored: Checkpoint,
    description: Description,
    sets: Sets,
    config: dict[str, Any],
) -> tuple[dict[str, Any], Any]:
    """Choose how to round; what the report says of it, and the `onnx.ModelProto`."""
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


def open_int8(path: Path) -> dict[str, Artifact]:
    """Open a file of 8 bits in every engine that is installed."""
    found = {f"{path.name}, onnxruntime": load_onnx(path)}
    if find_spec("openvino"):
        found[f"{path.name}, OpenVINO"] = load_openvino(path)
    return found


def in_bf16(folded: nn.Sequential, folder: Path) -> dict[str, Predictor]:
    """The deployed network in 16 bits, in torch and in OpenVINO if its file was written.

    Raises:
        ValueError: the processor computes no bf16.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ValueError("bf16=true: this processor has no bf16; type bf16=false")
    normalize, network, *rest = copy.deepcopy(folded)
    network.bfloat16()

    def run(images: Tensor) -> Tensor:
        scores = network(normalize(images).bfloat16()).float()
        for layer in rest:
            scores = layer(scores)
        return scores

    found: dict[str, Predictor] = {f"{DEPLOYED}, bf16": run}
    path = folder / FORMATS["openvino"].filename
    if path.exists():
        found[f"{path.name}, bf16"] = load_openvino(path, precision="bf16")
    return found


def judge_int8(
    rounded: Any,
    network: nn.Module,
    forms: "Forms",
    judged: "tuple[Tensor, Tensor]",
    folder: Path,
    config: dict[str, Any],
    found: Findings,
) -> dict[str, Any]:
    """Write the file of 8 bits and require its accuracy in every engine; the verdicts."""
    import onnx

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
