"""The files of a deployment: written, reloaded and verified one by one; int8 and bf16 too."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from repvgg import whole
from repvgg.checkpoint import Checkpoint
from repvgg.contract import Description, to_float
from repvgg.deploy.folder import digest
from repvgg.deploy.report import DeployedFile, Int8
from repvgg.deploy.sets import Labelled, Sets
from repvgg.deploy.settings import DeploySettings
from repvgg.deploy.verification import (
    DEPLOYED,
    Forms,
    compare_accuracy,
    predict_all,
    require,
    require_layers,
)
from repvgg.export import int8
from repvgg.export.artifact import Artifact, count_layers
from repvgg.export.formats import FORMATS, load_onnx, load_openvino
from repvgg.fusion.normalizations import is_never_updated, is_normalization
from repvgg.models.libraries import Factory
from repvgg.verify import Predictor

INT8 = "model-int8.onnx"


@dataclass(frozen=True)
class Int8File:
    """The int8 file.

    Attributes:
        report: how it was made, and the accuracy it loses.
        artifact: opened in onnxruntime.
        engines: opened in every engine that is installed, by name.
    """

    report: Int8
    artifact: Artifact
    engines: dict[str, Artifact]


def export(
    network: nn.Module,
    description: Description,
    formats: Iterable[str],
    folder: Path,
    *,
    factory: Factory | None = None,
) -> dict[str, Artifact]:
    """Write every format, open each file from disk, and check its layers.

    Args:
        factory: builds the network, if it is the user's own.

    Returns:
        the opened files, by their names.
    """
    artifacts = {}
    for name in formats:
        target = folder / FORMATS[name].filename
        with writing(target.name), whole.named(target):
            FORMATS[name].save(network, target, description)
        artifact = FORMATS[name].open(target, network=factory)  # from disk: what will be shipped
        require_layers(target.name, artifact, count_layers(network))
        artifacts[target.name] = artifact
    return artifacts


@contextmanager
def writing(name: str) -> Iterator[None]:
    """Turn what an engine raises while it writes a file into one line.

    Engines raise many types of errors when a disk is full or not writable.
    """
    try:
        yield
    except ImportError as error:  # a compiler or a package is missing
        raise ValueError(f"formats: {error}") from error
    except (ValueError, OSError):
        raise
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"{name} could not be written, nothing is left: {first}") from error


def describe_files(folder: Path, artifacts: Mapping[str, Artifact]) -> dict[str, DeployedFile]:
    """Size, checksum and layers of every file.

    Args:
        artifacts: the files that were verified. OpenVINO's weights are a second file beside one.
    """
    return {
        path.name: DeployedFile(
            bytes=path.stat().st_size,
            sha256=digest(path),
            layers=artifacts[path.name].layers if path.name in artifacts else {},
            verified=_precision(path.name) if path.name in artifacts else None,
        )
        for path in sorted(folder.iterdir())
    }


def _precision(name: str) -> str:
    return "int8" if name == INT8 else "float32"


def in_bf16(folded: nn.Sequential, folder: Path) -> dict[str, Predictor]:
    """The folded network in bf16: in torch, and in OpenVINO if its file is in the folder.

    Raises:
        ValueError: the CPU has no bf16.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ValueError("bf16=true: this CPU has no bf16; pass bf16=false")
    normalize, network, *rest = copy.deepcopy(folded)
    network.bfloat16()

    def run(images: Tensor) -> Tensor:
        scores: Tensor = network(normalize(images).bfloat16()).float()
        for layer in rest:
            scores = layer(scores)
        return scores

    predictors: dict[str, Predictor] = {f"{DEPLOYED}, bf16": run}
    path = folder / FORMATS["openvino"].filename
    if path.exists():
        predictors[f"{path.name}, bf16"] = load_openvino(path, precision="bf16")
    return predictors


def export_int8(
    network: nn.Module,
    forms: Forms,
    description: Description,
    restored: Checkpoint,
    sets: Sets,
    settings: DeploySettings,
    folder: Path,
) -> Int8File:
    """Quantize, write the file, and require its accuracy in every engine.

    Raises:
        ValueError: the network was never trained, or int8 loses more than `int8_drop`.
    """
    import onnx

    _require_trained(restored.model)
    quantized = int8.quantize(
        network,
        description,
        sets.calibration,
        held_out=sets.held_out,
        float_layers=settings.int8_float_layers,
        tolerance=settings.int8_drop,
    )
    with writing(INT8), whole.named(folder / INT8):
        onnx.save_model(quantized.model, folder / INT8)
    artifact = load_onnx(folder / INT8)
    engines = {f"{INT8}, onnxruntime": artifact}
    if find_spec("openvino"):
        engines[f"{INT8}, OpenVINO"] = load_openvino(folder / INT8)
    probe = Labelled(to_float(restored.probe.images), restored.probe.labels)
    images, labels = sets.validation or probe
    expected = predict_all(forms.folded, images)
    verdicts = {}
    for name, engine in engines.items():
        require_layers(INT8, engine, count_layers(network))
        scores = predict_all(engine, images)
        verdicts[name] = compare_accuracy(expected, scores, labels, tolerance=settings.int8_drop)
        require(f"{name}: accuracy lost", verdicts[name])
    report = Int8(
        source=sets.source,
        judged_on="the validation set" if sets.validation else "the whole probe batch",
        measured_on=len(sets.calibration),
        chosen_on=len(sets.held_out),
        chosen=quantized.chosen,
        trials=quantized.trials,
        sensitivity=quantized.sensitivity,
        verdicts=verdicts,
    )
    return Int8File(report, artifact, engines)


def _require_trained(model: nn.Module) -> None:
    norms = [module for module in model.modules() if is_normalization(module)]
    if norms and all(is_never_updated(norm) for norm in norms):
        raise ValueError(
            "int8=true: this network was never trained: its BatchNorms have their initial "
            "statistics, so the measured ranges would be wrong; train it first"
        )
