"""Folded networks as files: a table of formats, each with a function to save and one to load.

Loading returns an `Artifact`: a predictor that runs the file in the engine of its format.
"""

import importlib
import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from repvgg.checks import ArgumentError, escape, require
from repvgg.contract import METADATA_KEY, Description
from repvgg.export.archive import check_archive
from repvgg.export.artifact import (
    Artifact,
    build_program,
    count_layers,
    described,
    layer_counts,
    without_grad,
)
from repvgg.export.graphs import check_openvino, read_onnx, require_ir
from repvgg.models.forms import is_deployed
from repvgg.models.libraries import Factory
from repvgg.models.rebuild import rebuild

if TYPE_CHECKING:
    import onnx
    import onnxruntime

ONNX_OPSET = 18  # the lowest that torch's exporter writes
MOST_SAID = 300  # characters of an engine's message
METADATA_FILE = "repvgg.json"  # inside a .pt2 archive


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        filename: inside a deployed folder. If the format has several files, the one to load.
        save: writes a folded network to a path, and files beside it if the format needs them.
        load: opens such a file.
        builds: the file holds weights alone, so `load` builds the network, and takes `network`.
        runs_code: opening a file can run code that it holds.
    """

    filename: str
    save: Callable[[nn.Module, Path, Description], None]
    load: Callable[..., Artifact]
    builds: bool = False
    runs_code: bool = False

    def open(self, path: Path, *, network: Factory | None = None) -> Artifact:
        """Open a file that is trusted; `network` as in `open_artifact`."""
        return self.load(path, network=network) if self.builds else self.load(path)


def save_safetensors(model: nn.Module, path: Path, description: Description) -> None:
    """Write the weights of a folded network, and its description as metadata.

    Raises:
        ValueError: the network has branches.
    """
    from safetensors.torch import save

    _require_deployed(model)
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    # safetensors' save_file creates files that only their owner may read.
    path.write_bytes(save(weights, metadata={METADATA_KEY: description.to_json()}))


def load_safetensors(path: Path, *, network: Factory | None = None) -> Artifact:
    """Rebuild the folded network from the file's metadata, and load its weights.

    Args:
        network: as in `open_artifact`.

    Raises:
        ValueError: the file has no description, its weights do not fit the description, or
            `network` is missing or has no use.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        description = described(path, (file.metadata() or {}).get(METADATA_KEY))
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    try:
        model = rebuild(description.config, weights, folded=True, network=network)
    except ArgumentError as error:
        raise ArgumentError(f"'{path}': {error}", *error.names) from error
    except ValueError as error:
        raise ValueError(f"'{path}' does not fit its own description: {error}") from error
    program = build_program(model, description)
    return Artifact(description, without_grad(program), count_layers(program))


def export_program(model: nn.Module, description: Description) -> torch.export.ExportedProgram:
    """Trace the program of a folded network; batch, height and width (from 2) are dynamic.

    Raises:
        ValueError: the network has branches.
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
    for node in program.graph.nodes:  # paths of source files on this machine
        node.meta.pop("stack_trace", None)
    return program


def save_pt2(model: nn.Module, path: Path, description: Description) -> None:
    """Write a torch.export archive, which runs in Python without this package."""
    program = export_program(model, description)
    archive = io.BytesIO()  # torch's own writer ends the process when a disk is full
    torch.export.save(program, archive, extra_files={METADATA_FILE: description.to_json()})
    path.write_bytes(archive.getbuffer())


def load_pt2(path: Path) -> Artifact:
    """Open a torch.export archive. Torch unpickles parts of it, so it can run code.

    Raises:
        ValueError: the file has no description, or its archive is malformed.
    """
    check_archive(path)
    files = {METADATA_FILE: ""}
    program = torch.export.load(path, extra_files=files)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    layers = layer_counts(
        sum("conv" in name for name in called), sum("batch_norm" in name for name in called)
    )
    return Artifact(described(path, files[METADATA_FILE]), without_grad(program.module()), layers)


def build_onnx(model: nn.Module, description: Description) -> "onnx.ModelProto":
    """Convert a folded network to an ONNX model: images -> logits or probabilities.

    Batch, height and width are dynamic. The description becomes the metadata. Names of source
    files, which the exporter adds to every node, are removed.

    Raises:
        ValueError: the network has branches. The exporter would write them all without a warning.
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
    """Write one ONNX file; protobuf allows 2 GB, and the largest variant has 0.5."""
    import onnx

    onnx.save_model(build_onnx(model, description), path)


def load_onnx(path: Path, *, spin: bool = False) -> Artifact:
    """Open an ONNX file in onnxruntime, on the CPU.

    Args:
        spin: its threads spin while they wait for the next call. That is onnxruntime's default.
            It makes small networks up to twice as fast and slows everything else in the process.

    Raises:
        ValueError: the file has no description.
    """
    model, description = read_onnx(path)
    types = [node.op_type for node in model.graph.node]
    del model  # onnxruntime reads the file itself
    session = open_session(path, spin=spin)

    def run(images: Tensor) -> Tensor:
        (scores,) = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(scores)

    layers = layer_counts(types.count("Conv"), types.count("BatchNormalization"))
    return Artifact(description, run, layers)


def open_session(model: Path | bytes, *, spin: bool = False) -> "onnxruntime.InferenceSession":
    """Open an onnxruntime session with as many threads as torch; `spin` as in `load_onnx`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    options.log_severity_level = 4  # errors are raised too
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def save_openvino(model: nn.Module, path: Path, description: Description) -> None:
    """Write OpenVINO's IR: the graph to `path`, and its float32 weights to a .bin beside it.

    Raises:
        ImportError: openvino is not installed.
        ValueError: the network has branches.
    """
    openvino = require("openvino")
    graph = openvino.Core().read_model(build_onnx(model, description).SerializeToString())
    graph.set_rt_info(description.to_json(), METADATA_KEY)
    openvino.save_model(graph, path, compress_to_fp16=False)


def load_openvino(path: Path, *, precision: str = "f32") -> Artifact:
    """Open an IR or an ONNX file in OpenVINO, on the CPU.

    Args:
        precision: to compute in. OpenVINO's default is "bf16" if the CPU has it. That is faster,
            but it is not what was verified.

    Raises:
        ImportError: openvino is not installed.
        ValueError: the file has no description.
    """
    openvino = require("openvino")
    if path.suffix == ".onnx":
        _, description = read_onnx(path)
        graph = openvino.Core().read_model(path)
    else:
        require_ir(path)
        graph = openvino.Core().read_model(path)
        known = graph.has_rt_info(METADATA_KEY)
        text = graph.get_rt_info(METADATA_KEY).value if known else None
        description = described(path, text)
        check_openvino(path, graph, description)
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
    return Artifact(description, run, layer_counts(convolutions, types.count("BatchNormInference")))


def save_aoti(model: nn.Module, path: Path, description: Description) -> None:
    """Compile a folded network to machine code with inductor, for CPUs like this one.

    Raises:
        ImportError: there is no C++ compiler.
        ValueError: the network has branches.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    program = export_program(model, description)
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ImportError(
            "the format aoti needs a C++ compiler: run apt-get install g++, or leave it out"
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
    """Open compiled code, which runs from here on.

    Raises:
        ValueError: the file has no description, or its archive is malformed.
    """
    from torch._inductor import aoti_load_package

    check_archive(path)  # torch unpacks it by the names in it
    program = aoti_load_package(str(path))
    return Artifact(
        described(path, program.get_metadata().get(METADATA_KEY)), without_grad(program)
    )


def open_artifact(
    path: str | Path, *, network: Factory | None = None, trust: bool = False
) -> Artifact:
    """Open an exported file; the end of its name is that of its format.

    Args:
        network: the function or class that builds the network, if it is the user's own and the file
            holds weights alone (safetensors). Other formats hold the program.
        trust: you trust who made the file, so it may run code. .pt2 files need it (torch.export and
            AOTInductor); the others cannot run code.

    Raises:
        ArgumentError: the file can run code, and `trust` is not true.
        ValueError: there is no such file, its format is unknown, it is damaged, or it has no
            description.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"'{path}' is no file; pass an exported file, such as model.onnx")
    known = format_of(path)
    if known.runs_code and not trust:
        raise ArgumentError(
            f"'{path}': opening this format can run code from the file; if you trust who made it, "
            "pass trust=true",
            "trust",
        )
    try:
        return known.open(path, network=network).guarded(path)
    except (ImportError, ValueError):
        raise
    except Exception as error:  # every engine has its own types
        lines = [line for line in str(error).splitlines() if line.strip()]
        said = next((line for line in lines if not line.startswith("Exception from")), None)
        said = escape(said or type(error).__name__)[:MOST_SAID]
        raise ValueError(f"'{path}' cannot be opened: {said}") from error


def format_of(path: Path) -> Format:
    """The format of a file, by the end of its name.

    Raises:
        ValueError: it is unknown.
    """
    for known in sorted(FORMATS.values(), key=lambda known: -len(known.filename)):
        if path.name.endswith(known.filename.partition(".")[2]):
            return known
    endings = ", ".join(known.filename.partition(".")[2] for known in FORMATS.values())
    raise ValueError(f"'{path}' is of no known format; known are the endings {endings}")


def _any_size() -> AbstractContextManager[None]:
    """Keep torch from specializing on the example, whose features may be one pixel wide.

    Otherwise the program rejects images of another size, and compiled code computes wrong numbers
    for them without an error (torch 2.15).
    """
    config: Any = importlib.import_module("torch.fx.experimental._config")
    patch: AbstractContextManager[None] = config.patch(backed_size_oblivious=True)
    return patch


def _require_deployed(network: nn.Module) -> None:
    if not is_deployed(network):
        raise ValueError("model has branches: pass repvgg.switch_to_deploy(model)")


FORMATS: dict[str, Format] = {
    "safetensors": Format("model.safetensors", save_safetensors, load_safetensors, builds=True),
    "onnx": Format("model.onnx", save_onnx, load_onnx),
    "pt2": Format("model.pt2", save_pt2, load_pt2, runs_code=True),
    "openvino": Format("model.xml", save_openvino, load_openvino),
    "aoti": Format("model.aoti.pt2", save_aoti, load_aoti, runs_code=True),
}
