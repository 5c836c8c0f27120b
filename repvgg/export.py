"""Deployed networks as files: one table, format name -> how to save it and how to load it back.

What is saved is a predictor: normalization, then the deployed network. What is loaded is a
predictor again, which runs the file that is on disk: float32 images (N, C, H, W) in [0, 1] to
logits (N, K).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.fuse import deployed_form
from repvgg.model import DataContract, Normalize
from repvgg.verify import Predictor
from repvgg.zoo import build_model

ONNX_OPSET = 18  # the lowest that torch's exporter writes
METADATA_KEY = "repvgg"


@dataclass(frozen=True)
class Description:
    """What a file says of itself beside the weights.

    Attributes:
        config: the arguments of `repvgg.zoo.build_model`.
        data: what the network expects and what its logits mean.
    """

    config: Mapping[str, Any]
    data: DataContract

    def to_json(self) -> str:
        return json.dumps({"model": dict(self.config), "data": asdict(self.data)}, sort_keys=True)


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        filename: inside the folder of a deployment.
        save: writes a predictor's network (normalization, deployed network) to a path.
        load: opens such a file as a predictor.
    """

    filename: str
    save: Callable[[nn.Sequential, Path, Description], None]
    load: Callable[[Path], Predictor]


def save_safetensors(network: nn.Sequential, path: Path, description: Description) -> None:
    """Write the weights of the deployed network, and its description as metadata.

    Raises:
        ValueError: the network was not switched to its deployed form.
    """
    from safetensors.torch import save_file

    _require_deployed(network)
    weights = {key: value.contiguous() for key, value in network[1].state_dict().items()}
    save_file(weights, path, metadata={METADATA_KEY: description.to_json()})


def load_safetensors(path: Path) -> nn.Sequential:
    """Rebuild the network from the file's own metadata, switch it, and fill in the weights.

    Raises:
        ValueError: the file has no description of ours, or its weights do not fit it.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if METADATA_KEY not in metadata:
            raise ValueError(f"'{path}' has no entry '{METADATA_KEY}' in its metadata")
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    description = json.loads(metadata[METADATA_KEY])
    data = DataContract(**description["data"])
    with torch.device("meta"):
        model, _ = deployed_form(build_model(**description["model"]))
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split()[:40])
        raise ValueError(f"'{path}' does not fit its own description: {detail}") from error
    return nn.Sequential(Normalize(data.mean, data.std), model).eval()


def save_onnx(network: nn.Sequential, path: Path, description: Description) -> None:
    """Write one ONNX file: images (batch, C, height, width) -> logits (batch, K).

    All but C is dynamic. Weights are inside the file. Names of source files, which the exporter
    puts on every node, are removed.

    Raises:
        ValueError: the network was not switched to its deployed form. The exporter would write
            all branches without a word.
    """
    import onnx

    _require_deployed(network)
    images = torch.zeros(2, description.data.in_channels, *description.data.image_size)
    program = torch.onnx.export(
        network,
        (images,),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),
        opset_version=ONNX_OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    model.graph.ClearField("metadata_props")
    model.ClearField("metadata_props")
    model.metadata_props.add(key=METADATA_KEY, value=description.to_json())
    onnx.checker.check_model(model)
    onnx.save_model(model, path)


def load_onnx(path: Path) -> Predictor:
    """Open an ONNX file in onnxruntime, on the CPU.

    Its threads do not spin between calls: they would slow whatever else the process runs.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def predict(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {"images": images.contiguous().numpy()})
        return torch.from_numpy(logits)

    return predict


def _require_deployed(network: nn.Module) -> None:
    if any(getattr(module, "reparam", module) is None for module in network.modules()):
        raise ValueError(
            "the network still has branches: export what repvgg.switch_to_deploy(model) returns"
        )


FORMATS: dict[str, Format] = {
    "safetensors": Format("model.safetensors", save_safetensors, load_safetensors),
    "onnx": Format("model.onnx", save_onnx, load_onnx),
}
