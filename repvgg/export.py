"""Deployed networks as files: one table, format name -> how to save it and how to load it back.

What is saved is a program: preprocessing, the deployed network, softmax if it is wanted. What is
loaded is an `Artifact`: a predictor that runs the file that is on disk, by the engine the format is
made for. Preprocessing is never folded into the stem: the border is padded with zeros after it.
"""

import importlib
import io
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.arguments import refusal
from repvgg.fuse import deployed_form
from repvgg.model import DataContract, Normalize, to_float
from repvgg.zoo import build_model

ONNX_OPSET = 18  # the lowest that torch's exporter writes
METADATA_KEY = "repvgg"
METADATA_FILE = "repvgg.json"  # of a .pt2 archive
INPUTS = ("float32", "uint8")
OUTPUTS = ("logits", "probabilities")


@dataclass(frozen=True)
class Description:
    """What a file says of itself beside the weights.

    Attributes:
        config: the arguments of `repvgg.zoo.build_model`.
        data: what the network expects and what its outputs mean.
        input: "float32", images (N, C, H, W) in [0, 1]; or "uint8", images (N, H, W, C) in 0..255.
        output: "logits", or "probabilities" behind a softmax; (N, K).

    Raises:
        ValueError: an input or output of another name.
    """

    config: Mapping[str, Any]
    data: DataContract
    input: str = "float32"
    output: str = "logits"

    def __post_init__(self) -> None:
        if self.input not in INPUTS:
            raise refusal("input", self.input, f"must be one of {', '.join(INPUTS)}", "uint8")
        if self.output not in OUTPUTS:
            raise refusal("output", self.output, f"must be one of {', '.join(OUTPUTS)}", "logits")

    def to_json(self) -> str:
        return json.dumps(
            {
                "model": dict(self.config),
                "data": asdict(self.data),
                "input": self.input,
                "output": self.output,
            },
            sort_keys=True,
        )

    @classmethod
    def from_json(cls, text: str) -> "Description":
        content = json.loads(text)
        return cls(
            content["model"],
            DataContract(**content["data"]),
            content.get("input", "float32"),
            content.get("output", "logits"),
        )

    def encode(self, images: Tensor) -> Tensor:
        """Turn images (N, C, H, W) in [0, 1] into what the file takes; contiguous.

        Images that were stored as uint8 come back as they were stored.
        """
        if self.input == "uint8":
            images = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        return images.contiguous()

    def example(self, count: int = 2) -> Tensor:
        """Black images as the file takes them."""
        return self.encode(torch.zeros(count, self.data.in_channels, *self.data.image_size))


class FromBytes(nn.Module):
    """Stored images to what networks take: (N, H, W, C) uint8 -> (N, C, H, W) float in [0, 1]."""

    def forward(self, images: Tensor) -> Tensor:
        return to_float(images.permute(0, 3, 1, 2).contiguous())


def build_program(model: nn.Module, description: Description) -> nn.Sequential:
    """Put a deployed network between the preprocessing and the output that its file will have."""
    program = nn.Sequential()
    if description.input == "uint8":
        program.append(FromBytes())
    program.append(Normalize(description.data.mean, description.data.std))
    program.append(model)
    if description.output == "probabilities":
        program.append(nn.Softmax(dim=1))
    return program.eval()


@dataclass(frozen=True)
class Artifact:
    """A file that was opened: a predictor.

    Attributes:
        description: what the file says of itself.
        run: what it takes -> what it gives.
        layers: convolutions and BatchNorms that the file holds; empty where it does not tell.
    """

    description: Description
    run: Callable[[Tensor], Tensor]
    layers: dict[str, int] = field(default_factory=dict)

    def __call__(self, images: Tensor) -> Tensor:
        """Predict: images (N, C, H, W), float32 in [0, 1], in any memory layout -> (N, K)."""
        return self.run(self.description.encode(images))


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        filename: inside the folder of a deployment. Where there are several, that to be loaded.
        save: writes a deployed network to a path, and files beside it if the format needs them.
        load: opens such a file.
    """

    filename: str
    save: Callable[[nn.Module, Path, Description], None]
    load: Callable[[Path], Artifact]


def save_safetensors(model: nn.Module, path: Path, description: Description) -> None:
    """Write the weights of the deployed network, and its description as metadata.

    Raises:
        ValueError: the network was not switched to its deployed form.
    """
    from safetensors.torch import save

    _require_deployed(model)
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    # safetensors' own save_file makes files that nobody else may read.
    path.write_bytes(save(weights, metadata={METADATA_KEY: description.to_json()}))


def load_safetensors(path: Path) -> Artifact:
    """Rebuild the network from the file's own metadata, switch it, and fill in the weights.

    Raises:
        ValueError: the file has no description of ours, or its weights do not fit it.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        description = _described(path, (file.metadata() or {}).get(METADATA_KEY))
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    with torch.device("meta"):
        model, _ = deployed_form(build_model(**description.config))
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split()[:40])
        raise ValueError(f"'{path}' does not fit its own description: {detail}") from error
    program = build_program(model, description)
    return Artifact(description, _without_grad(program), count_layers(program))


def export_program(model: nn.Module, description: Description) -> torch.export.ExportedProgram:
    """Trace the program of a deployed network; batch, height and width (from 2) are dynamic.

    Raises:
        ValueError: the network was not switched to its deployed form.
    """
    _require_deployed(model)
    dynamic = torch.export.Dim.DYNAMIC
    height = 1 if description.input == "uint8" else 2
    with _any_size():
        program = torch.export.export(
            build_program(model, description),
            (description.example(),),
            dynamic_shapes=({0: dynamic, height: dynamic, height + 1: dynamic},),
        )
    for node in program.graph.nodes:  # where its source stands on this machine
        node.meta.pop("stack_trace", None)
    return program


def save_pt2(model: nn.Module, path: Path, description: Description) -> None:
    """Write a torch.export archive, which runs in Python without this package."""
    program = export_program(model, description)
    archive = io.BytesIO()  # torch's writer ends the process when a disk is full
    torch.export.save(program, archive, extra_files={METADATA_FILE: description.to_json()})
    path.write_bytes(archive.getbuffer())


def load_pt2(path: Path) -> Artifact:
    """Open a torch.export archive.

    Raises:
        ValueError: the file has no description of ours.
    """
    files = {METADATA_FILE: ""}
    program = torch.export.load(path, extra_files=files)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    layers = _layers(
        sum("conv" in name for name in called), sum("batch_norm" in name for name in called)
    )
    return Artifact(_described(path, files[METADATA_FILE]), _without_grad(program.module()), layers)


def build_onnx(model: nn.Module, description: Description) -> Any:
    """Convert a deployed network to an ONNX model: images -> logits or probabilities.

    All but the channels is dynamic. Names of source files, which the exporter puts on every node,
    are removed.

    Returns:
        an `onnx.ModelProto` with the description as metadata.

    Raises:
        ValueError: the network was not switched to its deployed form. The exporter would write
            all branches without a word.
    """
    import onnx

    _require_deployed(model)
    height = 1 if description.input == "uint8" else 2
    converted = torch.onnx.export(
        build_program(model, description),
        (description.example(),),
        input_names=["images"],
        output_names=[description.output],
        dynamic_shapes=({0: "batch", height: "height", height + 1: "width"},),
        opset_version=ONNX_OPSET,
        dynamo=True,
        verbose=False,
    )
    assert converted is not None
    proto = converted.model_proto
    for node in proto.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    proto.graph.ClearField("metadata_props")
    proto.ClearField("metadata_props")
    proto.metadata_props.add(key=METADATA_KEY, value=description.to_json())
    onnx.checker.check_model(proto)
    return proto


def save_onnx(model: nn.Module, path: Path, description: Description) -> None:
    """Write one ONNX file; protobuf allows 2 GB, and the largest of the family has 0.5."""
    import onnx

    onnx.save_model(build_onnx(model, description), path)


def load_onnx(path: Path, *, spin: bool = False) -> Artifact:
    """Open an ONNX file in onnxruntime, on the CPU.

    Args:
        spin: its threads wait for the next call at full speed, which is onnxruntime's default and
            makes small networks up to twice as fast, and slows whatever else the process does.

    Raises:
        ValueError: the file has no description of ours.
    """
    import onnx

    session = open_session(path, spin=spin)

    def run(images: Tensor) -> Tensor:
        (scores,) = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(scores)

    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    types = [node.op_type for node in onnx.load(path).graph.node]
    layers = _layers(types.count("Conv"), types.count("BatchNormalization"))
    return Artifact(_described(path, text), run, layers)


def open_session(model: Path | bytes, *, spin: bool = False) -> Any:
    """Open an onnxruntime session with as many threads as torch; `spin` as in `load_onnx`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def save_openvino(model: nn.Module, path: Path, description: Description) -> None:
    """Write OpenVINO's IR: the graph under the given name, its weights (float32) in .bin beside it.

    Raises:
        ImportError: the extra `openvino` is not installed.
        ValueError: the network was not switched to its deployed form.
    """
    openvino = require("openvino")
    graph = openvino.Core().read_model(build_onnx(model, description).SerializeToString())
    graph.set_rt_info(description.to_json(), METADATA_KEY)
    openvino.save_model(graph, path, compress_to_fp16=False)


def load_openvino(path: Path, *, precision: str = "f32") -> Artifact:
    """Open an IR, or an ONNX file of ours, in OpenVINO, on the CPU.

    Args:
        precision: to compute in. OpenVINO's own choice is "bf16" where the processor has it, which
            is fast and is not what was certified.

    Raises:
        ImportError: the extra `openvino` is not installed.
        ValueError: the file has no description of ours.
    """
    openvino = require("openvino")
    graph = openvino.Core().read_model(path)
    if path.suffix == ".onnx":
        import onnx

        entries = onnx.load(path, load_external_data=False).metadata_props
        text = next((entry.value for entry in entries if entry.key == METADATA_KEY), None)
    else:
        known = graph.has_rt_info(METADATA_KEY)
        text = graph.get_rt_info(METADATA_KEY).value if known else None
    compiled = openvino.compile_model(
        graph,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        },
    )

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled(images.numpy())[0].copy())

    types = [node.get_type_name() for node in graph.get_ops()]
    convolutions = types.count("Convolution") + types.count("GroupConvolution")
    return Artifact(
        _described(path, text), run, _layers(convolutions, types.count("BatchNormInference"))
    )


def save_aoti(model: nn.Module, path: Path, description: Description) -> None:
    """Compile the network to machine code with inductor: for processors like this one.

    Raises:
        ImportError: there is no C++ compiler.
        ValueError: the network was not switched to its deployed form.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    program = export_program(model, description)
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ImportError(
            "formats: 'aoti' needs a C++ compiler: type apt-get install g++, or leave it out"
        ) from error
    with _any_size():
        aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={
                "freezing": True,
                "aot_inductor.metadata": {METADATA_KEY: description.to_json()},
            },
        )


def load_aoti(path: Path) -> Artifact:
    """Open compiled code. It is not checked before it runs: open what you made yourself.

    Raises:
        ValueError: the file has no description of ours.
    """
    from torch._inductor import aoti_load_package

    program = aoti_load_package(str(path))
    return Artifact(
        _described(path, program.get_metadata().get(METADATA_KEY)), _without_grad(program)
    )


def require(package: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ImportError: it is not installed; says what to type.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f'{package} is missing: type pip install -e ".[{package}]"') from error


def open_artifact(path: Path) -> Artifact:
    """Open a file of any format, known by its name.

    Raises:
        ValueError: there is no such file, no format has files of that name, it is damaged or not
            ours.
    """
    if not path.is_file():
        raise ValueError(f"'{path}' is no file; give a model.onnx that deploy.py wrote")
    for known in sorted(FORMATS.values(), key=lambda known: -len(known.filename)):
        if path.name.endswith(known.filename.partition(".")[2]):
            try:
                return known.load(path)
            except (ImportError, ValueError):
                raise
            except Exception as error:  # every engine has its own
                said = (str(error).splitlines() or [type(error).__name__])[0]
                raise ValueError(f"'{path}' cannot be opened: {said}") from error
    endings = ", ".join(known.filename.partition(".")[2] for known in FORMATS.values())
    raise ValueError(f"'{path}' is of no known format; known are the endings {endings}")


def _any_size() -> AbstractContextManager[None]:
    """Keep torch from taking it for a law that the features of the example are one pixel wide.

    It would refuse images of another size, and its compiled code would give wrong numbers for them
    without a word (torch 2.15).
    """
    config: Any = importlib.import_module("torch.fx.experimental._config")
    return config.patch(backed_size_oblivious=True)


def _described(path: Path, text: str | None) -> Description:
    if not text:
        raise ValueError(f"'{path}' has no entry '{METADATA_KEY}' in its metadata: it is not ours")
    try:
        return Description.from_json(text)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"'{path}' has a damaged description: {error!r}") from error


def _without_grad(program: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return program(images).clone()

    return run


def count_layers(network: nn.Module) -> dict[str, int]:
    """Convolutions and BatchNorms of a network, as `Artifact.layers` tells those of a file."""
    modules = list(network.modules())
    return _layers(
        sum(isinstance(module, nn.Conv2d) for module in modules),
        sum(isinstance(module, nn.BatchNorm2d) for module in modules),
    )


def _layers(convolutions: int, norms: int) -> dict[str, int]:
    return {"convolutions": convolutions, "batchnorms": norms}


def _require_deployed(network: nn.Module) -> None:
    if any(getattr(module, "reparam", module) is None for module in network.modules()):
        raise ValueError(
            "the network still has branches: export what repvgg.switch_to_deploy(model) returns"
        )


FORMATS: dict[str, Format] = {
    "safetensors": Format("model.safetensors", save_safetensors, load_safetensors),
    "onnx": Format("model.onnx", save_onnx, load_onnx),
    "pt2": Format("model.pt2", save_pt2, load_pt2),
    "openvino": Format("model.xml", save_openvino, load_openvino),
    "aoti": Format("model.aoti.pt2", save_aoti, load_aoti),
}
