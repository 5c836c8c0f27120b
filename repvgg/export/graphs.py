"""Check the graph of a deployed file before an engine gets it, which would make any size in it."""

import copy
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from repvgg.checks import brief
from repvgg.contract import METADATA_KEY, Description
from repvgg.export.artifact import described

if TYPE_CHECKING:
    import onnx
    import openvino

SMALL = 2**22  # numbers that any value of a graph may have
PER_PIXEL = 1024  # numbers for each pixel of an image that a value may have
CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap", "TensorIterator")
SIZED_BY_VALUES = (  # nodes whose output may be far larger than their inputs
    *("ConstantOfShape", "Expand", "Tile", "Range", "Pad", "Resize", "Upsample", "OneHot"),
    *("RandomNormal", "RandomUniform", "CenterCropPad", "Col2Im", "MaxUnpool", "AffineGrid"),
)
ARITHMETIC = (  # nodes that compute sizes
    *("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Cast", "Floor", "Ceil", "Identity"),
    *("Concat", "Gather", "Slice", "Squeeze", "Unsqueeze", "Reshape", "ReduceProd", "Constant"),
)
ROUNDS = 4  # of computing sizes from shapes, and shapes from sizes
DYNAMIC = -1

Port = tuple[str, Sequence[int]]  # the type of an input or output, and its shape


def read_onnx(path: Path) -> tuple["onnx.ModelProto", Description]:
    """Parse and check an ONNX file.

    Its graph may hold one sequence of nodes of ONNX's own and all its weights, and no value that is
    far larger than the weights or an image.

    Raises:
        ValueError: it is damaged, has no description, or does not fit it.
    """
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # of protobuf, which is not a dependency of its own
        raise ValueError(f"'{path}' cannot be opened: it is truncated, or not ONNX") from error
    entries = [entry.value for entry in model.metadata_props if entry.key == METADATA_KEY]
    description = described(path, entries[0] if len(entries) == 1 else None)
    if wrong := _nodes(model) or _ports_of(model, description):
        raise ValueError(f"'{path}' cannot be opened: {wrong}")
    try:
        shapes = _shapes(model, description)
    except Exception as error:  # of many types, all of a graph that contradicts itself
        raise ValueError(f"'{path}' cannot be opened: {brief(error)}") from error
    makers = {name: node.op_type for node in model.graph.node for name in node.output if name}
    values = ((makers[name], shapes.get(name)) for name in makers)
    if wrong := _sizes(values, path.stat().st_size, description):
        raise ValueError(f"'{path}' cannot be opened: {wrong}")
    return model, description


def _nodes(model: "onnx.ModelProto") -> str:
    """What a graph may not hold, if it does."""
    if model.functions:
        return "it defines functions"
    for tensor in model.graph.initializer:
        if tensor.external_data or tensor.data_location:
            return f"its weights {brief(tensor.name)} are in another file"
    if model.graph.sparse_initializer:
        return "its weights are sparse"
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            return f"it has a node of another package, {brief(node.domain)}"
        held = [part for part in node.attribute if part.HasField("g") or part.graphs]
        if held or node.op_type in CONTROL_FLOW:
            return f"it has a loop or a branch, {brief(node.op_type)}"
        tensors = [tensor for part in node.attribute for tensor in (part.t, *part.tensors)]
        if any(tensor.external_data or tensor.data_location for tensor in tensors):
            return f"a constant of {brief(node.name)} is in another file"
    return ""


def _ports_of(model: "onnx.ModelProto", description: Description) -> str:
    import onnx

    def port(value: "onnx.ValueInfoProto") -> Port:
        kind = value.type.tensor_type
        shape = [
            part.dim_value if part.HasField("dim_value") else DYNAMIC for part in kind.shape.dim
        ]
        return onnx.TensorProto.DataType.Name(kind.elem_type).lower(), shape

    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: port(value) for value in model.graph.input if value.name not in weights}
    if set(inputs) != {"images"}:
        return f"its inputs are {brief([*inputs])}, not images"
    return fit(inputs.values(), [port(value) for value in model.graph.output], description)


def fit(inputs: Iterable[Port], outputs: Iterable[Port], description: Description) -> str:
    """How the inputs and outputs of a graph contradict its description; empty if they do not."""
    channels, classes = description.data.in_channels, len(description.data.classes)
    images = [DYNAMIC, channels, DYNAMIC, DYNAMIC]
    if description.input == "uint8":
        images = [DYNAMIC, DYNAMIC, DYNAMIC, channels]
    wanted = (
        ("input", inputs, {"float32": "float", "uint8": "uint8"}[description.input], images),
        ("output", outputs, "float", [DYNAMIC, classes]),
    )
    for what, ports, kind, shape in wanted:
        given = list(ports)
        if len(given) != 1:
            return f"it has {len(given)} {what}s, not one"
        (found, sizes), *_ = given
        free = all(size in (DYNAMIC, want) for size, want in zip(sizes, shape, strict=False))
        if found != kind or len(sizes) != len(shape) or not free:
            needed = f"{kind} {_shown(shape)}"
            return f"its {what} is {found} {_shown(sizes)}, its description needs {needed}"
    return ""


def _shown(shape: Sequence[int]) -> str:
    return brief("(" + ", ".join("N" if size == DYNAMIC else str(size) for size in shape) + ")")


def _shapes(model: "onnx.ModelProto", description: Description) -> dict[str, list[int]]:
    """The shape of every value for one image of the description, where it is known."""
    import onnx

    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    bare.graph.name = "g"
    bare.graph.node.extend(model.graph.node)
    bare.graph.output.extend(model.graph.output)
    images = bare.graph.input.add()
    images.CopyFrom(next(value for value in model.graph.input if value.name == "images"))
    example = description.data
    sizes = [1, example.in_channels, *example.image_size]
    if description.input == "uint8":
        sizes = [1, *example.image_size, example.in_channels]
    for part, size in zip(images.type.tensor_type.shape.dim, sizes, strict=True):
        part.dim_value = size
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= PER_PIXEL:  # it may be a size
            bare.graph.initializer.append(tensor)
        else:
            bare.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    for value in bare.graph.output:
        value.type.tensor_type.ClearField("shape")
    for _ in range(ROUNDS):
        inferred = onnx.shape_inference.infer_shapes(bare, strict_mode=True, data_prop=True).graph
        shapes = {
            value.name: [part.dim_value for part in shape.dim]
            for value in (*inferred.input, *inferred.value_info, *inferred.output)
            if (shape := value.type.tensor_type.shape)
            and value.type.tensor_type.HasField("shape")
            and all(part.HasField("dim_value") for part in shape.dim)
        }
        if not _compute_sizes(bare.graph, shapes):
            break
    return shapes


def _compute_sizes(graph: "onnx.GraphProto", shapes: Mapping[str, Sequence[int]]) -> bool:
    """Replace nodes that compute a few numbers from known shapes by constants; whether one was."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    held = {tensor.name: tensor for tensor in graph.initializer}
    left = []
    for node in graph.node:
        value: np.ndarray | None = None
        given = [name for name in node.input if name]
        if node.op_type == "Shape" and given[0] in shapes:
            part = {str(item.name): int(item.i) for item in node.attribute}
            kept = slice(part.get("start", 0), part.get("end"))
            value = np.array(shapes[given[0]][kept], np.int64)
        elif node.op_type in ARITHMETIC and all(name in held for name in given):
            feeds = {name: onnx.numpy_helper.to_array(held[name]) for name in given}
            value = np.asarray(next(iter(ReferenceEvaluator(node).run(None, feeds))))
        if value is not None and value.size <= PER_PIXEL and len(node.output) == 1:
            held[node.output[0]] = onnx.numpy_helper.from_array(value, node.output[0])
            graph.initializer.append(held[node.output[0]])
        else:
            left.append(node)
    found = len(left) < len(graph.node)
    if found:
        copies = [copy.deepcopy(node) for node in left]  # the graph owns the others
        del graph.node[:]
        graph.node.extend(copies)
    return found


def _sizes(
    values: Iterable[tuple[str, Sequence[int] | None]], bytes_: int, description: Description
) -> str:
    """Which value is far larger than the file and an image, or of a size that nothing bounds."""
    most = max(SMALL, bytes_, PER_PIXEL * math.prod(description.data.image_size))
    for kind, shape in values:
        if shape is None and kind in SIZED_BY_VALUES:
            return f"the size of what {brief(kind)} makes is not known before it runs"
        if shape is not None and math.prod(shape) > most:
            return (
                f"{brief(kind)} makes {math.prod(shape):,} numbers; at most {most:,} fit its size"
            )
    return ""


def require_ir(path: Path) -> None:
    """Raise ValueError if a file is not OpenVINO's IR; OpenVINO would try its other readers."""
    with path.open("rb") as file:
        if not re.match(rb'(<\?xml[^>]*\?>)?\s*<net [^>]*version="1\d"', file.read(4096)):
            raise ValueError(f"'{path}' cannot be opened: it is not a graph of OpenVINO")


def check_openvino(path: Path, graph: "openvino.Model", description: Description) -> None:
    """Check a graph that OpenVINO read, before it is compiled; as in `read_onnx`.

    Raises:
        ValueError: it does not fit the description.
    """

    def port(node: "openvino.Output") -> Port:
        kind, shape = node.get_element_type().get_type_name(), node.get_partial_shape()
        sizes = [DYNAMIC if part.is_dynamic else part.get_length() for part in shape]
        return {"f32": "float", "u8": "uint8"}.get(kind, kind), sizes

    example = graph.clone()
    wrong = fit(map(port, graph.inputs), map(port, graph.outputs), description)
    if not wrong:
        example.reshape([*description.example(1).shape])
        nodes = example.get_ops()
        loops = [node.get_type_name() for node in nodes if node.get_type_name() in CONTROL_FLOW]
        held = sum(
            file.stat().st_size for file in (path, path.with_suffix(".bin")) if file.exists()
        )
        values = (
            (node.get_type_name(), [*shape.to_shape()] if shape.is_static else None)
            for node in nodes
            for shape in (output.get_partial_shape() for output in node.outputs())
        )
        wrong = (
            f"it has a loop or a branch, {loops[0]}" if loops else _sizes(values, held, description)
        )
    if wrong:
        raise ValueError(f"'{path}' cannot be opened: {wrong}")
