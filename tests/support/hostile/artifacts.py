"""Deployed files that claim absurd sizes, or are well-formed and wrong; each by its kind."""

import copy
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save

import repvgg
from repvgg.contract import METADATA_KEY, DataContract, Description
from tests.support.networks import settle

Graph = onnx.ModelProto
CONFIG = {
    "name": "repvgg_tiny",
    "num_classes": 3,
    "depths": [1, 1, 1, 1],
    "widths": [4, 4, 4, 4],
    "in_channels": 3,
}
DATA = DataContract(["a", "b", "c"], 3, [8, 8], [0.5] * 3, [0.2] * 3, "bilinear", 9)
CONTENT = json.loads(Description(CONFIG, DATA).to_json())
TEXT = json.dumps(CONTENT)
FLOAT, UINT8, INT64 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT64


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    folded = repvgg.switch_to_deploy(settle(repvgg.create_model(**CONFIG)))
    return {key: value.contiguous() for key, value in folded.state_dict().items()}


def write_safetensors(
    path: Path, text: str = TEXT, change: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> None:
    held = weights()
    if change is not None:
        held = {key: change(value).contiguous() for key, value in held.items()}
    path.write_bytes(save(held, metadata={METADATA_KEY: text}))


def constant(name: str, values: Any, kind: type = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values, kind), name)


def graph(text: str = TEXT) -> Graph:
    """A small network in ONNX that is right: (N, 3, H, W) -> (N, 3)."""
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Sub", ["images", "mean"], ["x0"]),
        helper.make_node("Conv", ["x0", "kernel"], ["x1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["x1"], ["x2"]),
        helper.make_node("GlobalAveragePool", ["x2"], ["x3"]),
        helper.make_node("Flatten", ["x3"], ["x4"]),
        helper.make_node("Gemm", ["x4", "head"], ["logits"]),
    ]
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("images", FLOAT, ["batch", 3, "height", "width"])],
            [helper.make_tensor_value_info("logits", FLOAT, ["batch", 3])],
            [
                constant("mean", np.full((1, 3, 1, 1), 0.5)),
                constant("kernel", random.normal(size=(4, 3, 3, 3))),
                constant("head", random.normal(size=(4, 3))),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    made.metadata_props.add(key=METADATA_KEY, value=text)
    return made


def insert(made: Graph, *nodes: onnx.NodeProto, constants: tuple[TensorProto, ...] = ()) -> None:
    """Put nodes in front of the head, whose input becomes their output `y`."""
    made.graph.node[-1].input[0] = "y"
    for node in nodes:
        made.graph.node.insert(len(made.graph.node) - 1, node)
    made.graph.initializer.extend(constants)


def _sum_of(node: onnx.NodeProto, *constants: TensorProto) -> Callable[[Graph], None]:
    """Add the sum of what a node makes, `big`, to the features."""

    def change(made: Graph) -> None:
        insert(
            made,
            node,
            helper.make_node("ReduceMean", ["big"], ["small"], keepdims=0),
            helper.make_node("Add", ["x4", "small"], ["y"]),
            constants=constants,
        )

    return change


def _external(location: str, length: int = 432, offset: int = 0) -> Callable[[Graph], None]:
    def change(made: Graph) -> None:
        kernel = made.graph.initializer[1]
        kernel.ClearField("raw_data")
        kernel.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            kernel.external_data.add(key=key, value=str(value))

    return change


def _loop(made: Graph) -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Exp", ["v"], ["v2"])],
        "body",
        [
            helper.make_tensor_value_info("i", INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("c2", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v2", FLOAT, None),
        ],
    )
    insert(
        made,
        helper.make_node("Loop", ["trips", "go", "x4"], ["y"], body=body),
        constants=(constant("trips", 2**60, np.int64), constant("go", True, np.bool_)),
    )


def _recursive_function(made: Graph) -> None:
    domain = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    call = helper.make_node("F", ["a"], ["b"], domain="own")
    made.functions.append(helper.make_function("own", "F", ["a"], ["b"], [call], domain))
    made.opset_import.append(domain[1])
    insert(made, helper.make_node("F", ["x4"], ["y"], domain="own"))


def _doubling_functions(made: Graph) -> None:
    domain = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    for level in range(40):
        name = f"F{level + 1}" if level < 39 else "Exp"
        own = "own" if level < 39 else ""
        calls = [
            helper.make_node(name, ["a"], ["m"], domain=own),
            helper.make_node(name, ["m"], ["b"], domain=own),
        ]
        made.functions.append(helper.make_function("own", f"F{level}", ["a"], ["b"], calls, domain))
    made.opset_import.append(domain[1])
    insert(made, helper.make_node("F0", ["x4"], ["y"], domain="own"))


def _custom_operator(domain: str) -> Callable[[Graph], None]:
    def change(made: Graph) -> None:
        made.opset_import.append(helper.make_opsetid(domain, 1))
        insert(made, helper.make_node("Mine", ["x4"], ["y"], domain=domain))

    return change


def _doubled(made: Graph) -> None:
    """Forty concatenations of a value with itself: 2^40 times the features."""
    nodes = [helper.make_node("Identity", ["mean"], ["d0"])]
    nodes += [
        helper.make_node("Concat", [f"d{n}", f"d{n}"], [f"d{n + 1}"], axis=0) for n in range(30)
    ]
    nodes += [
        helper.make_node("ReduceMean", ["d30"], ["small"], keepdims=0),
        helper.make_node("Add", ["x4", "small"], ["y"]),
    ]
    insert(made, *nodes)


def _hidden_size(made: Graph) -> None:
    """A size that is computed: 2^31 as a product."""
    insert(
        made,
        helper.make_node("Mul", ["half", "half"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["big"]),
        helper.make_node("ReduceMean", ["big"], ["small"], keepdims=0),
        helper.make_node("Add", ["x4", "small"], ["y"]),
        constants=(constant("half", [2**16], np.int64),),
    )


def _from_the_image(made: Graph) -> None:
    """A size that depends on the image: its pixels, 10^8 times."""
    insert(
        made,
        helper.make_node("Shape", ["images"], ["shape"]),
        helper.make_node("ReduceProd", ["shape"], ["pixels"], keepdims=1),
        helper.make_node("Mul", ["pixels", "many"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["big"]),
        helper.make_node("ReduceMean", ["big"], ["small"], keepdims=0),
        helper.make_node("Add", ["x4", "small"], ["y"]),
        constants=(constant("many", [10**8], np.int64),),
    )


def _huge_initializer(made: Graph) -> None:
    made.graph.initializer[1].dims[:] = [2**20, 2**20, 3, 3]


SIZE = constant("size", [2**31], np.int64)
EXPANDING: dict[str, Callable[[Graph], None]] = {
    "ConstantOfShape": _sum_of(helper.make_node("ConstantOfShape", ["size"], ["big"]), SIZE),
    "Expand": _sum_of(
        helper.make_node("Expand", ["one", "size"], ["big"]), SIZE, constant("one", [1])
    ),
    "Tile": _sum_of(helper.make_node("Tile", ["one", "size"], ["big"]), SIZE, constant("one", [1])),
    "Range": _sum_of(
        helper.make_node("Range", ["zero", "end", "step"], ["big"]),
        constant("zero", 0),
        constant("end", 2e9),
        constant("step", 1),
    ),
    "Pad": _sum_of(
        helper.make_node("Pad", ["one", "pads"], ["big"]),
        constant("one", [1]),
        constant("pads", [0, 2**31], np.int64),
    ),
    "Resize": _sum_of(
        helper.make_node("Resize", ["mean", "", "scales"], ["big"], mode="nearest"),
        constant("scales", [1, 1, 50000, 50000]),
    ),
    "OneHot": _sum_of(
        helper.make_node("OneHot", ["index", "depth", "values"], ["big"]),
        constant("index", [0], np.int64),
        constant("depth", 2**31, np.int64),
        constant("values", [0, 1]),
    ),
    "doubled": _doubled,
    "computed size": _hidden_size,
    "size from the image": _from_the_image,
    "huge initializer": _huge_initializer,
    "loop of 2^60": _loop,
    "recursive function": _recursive_function,
    "doubling functions": _doubling_functions,
    "custom operator": _custom_operator("mine"),
    "com.microsoft operator": _custom_operator("com.microsoft"),
    "external /etc/passwd": _external("/etc/passwd"),
    "external above": _external("../../x"),
    "external beside": _external("weights.bin"),
    "external long": _external("weights.bin", 2**40),
    "external negative": _external("weights.bin", 432, -8),
    "external itself": _external("model.onnx", 100),
    "external fifo": _external("fifo"),
}


def write_onnx(
    path: Path, change: Callable[[Graph], None] = lambda made: None, text: str = TEXT
) -> None:
    made = graph(text)
    change(made)
    path.write_bytes(made.SerializeToString())
    (path.parent / "weights.bin").write_bytes(bytes(4096))


def _ports(made: Graph) -> tuple[Any, Any]:
    return made.graph.input[0].type.tensor_type, made.graph.output[0].type.tensor_type


def _channels(count: int) -> Callable[[Graph], None]:
    def change(made: Graph) -> None:
        _ports(made)[0].shape.dim[1].dim_value = count
        made.graph.initializer[1].CopyFrom(constant("kernel", np.ones((4, count, 3, 3))))

    return change


def _outputs(count: int) -> Callable[[Graph], None]:
    def change(made: Graph) -> None:
        _ports(made)[1].shape.dim[1].dim_value = count
        made.graph.initializer[2].CopyFrom(constant("head", np.ones((4, count))))

    return change


def _hidden_outputs(made: Graph) -> None:
    _outputs(5)(made)
    _ports(made)[1].shape.dim[1].dim_param = "classes"


def _fixed(axis: int, size: int) -> Callable[[Graph], None]:
    def change(made: Graph) -> None:
        _ports(made)[0].shape.dim[axis].dim_value = size

    return change


def _cast(kind: int) -> Callable[[Graph], None]:
    """The output has another type."""

    def change(made: Graph) -> None:
        made.graph.node[-1].output[0] = "float"
        made.graph.node.append(helper.make_node("Cast", ["float"], ["logits"], to=kind))
        _ports(made)[1].elem_type = kind

    return change


def _typed_input(kind: int) -> Callable[[Graph], None]:
    def change(made: Graph) -> None:
        _ports(made)[0].elem_type = kind
        made.graph.node[0].input[0] = "float"
        made.graph.node.insert(0, helper.make_node("Cast", ["images"], ["float"], to=FLOAT))

    return change


def _shaped(shape: list[int], rank: int) -> Callable[[Graph], None]:
    """The output has another rank."""

    def change(made: Graph) -> None:
        made.graph.node[-1].output[0] = "flat"
        made.graph.node.append(helper.make_node("Reshape", ["flat", "as"], ["logits"]))
        made.graph.initializer.append(constant("as", shape, np.int64))
        made.graph.output[0].CopyFrom(
            helper.make_tensor_value_info("logits", FLOAT, [f"d{axis}" for axis in range(rank)])
        )

    return change


def _second_input(made: Graph) -> None:
    made.graph.input.append(helper.make_tensor_value_info("more", FLOAT, ["batch", 4]))
    insert(made, helper.make_node("Add", ["x4", "more"], ["y"]))


def _second_output(made: Graph) -> None:
    made.graph.output.append(helper.make_tensor_value_info("x4", FLOAT, ["batch", 4]))


def _no_output(made: Graph) -> None:
    del made.graph.output[:]


def _no_input(made: Graph) -> None:
    del made.graph.input[:]
    made.graph.initializer.append(constant("images", np.zeros((1, 3, 8, 8))))


def _other_name(made: Graph) -> None:
    made.graph.input[0].name = made.graph.node[0].input[0] = "pictures"


def _two_descriptions(made: Graph) -> None:
    made.metadata_props.add(key=METADATA_KEY, value=TEXT)


def with_nan(made: Graph) -> None:
    made.graph.initializer[1].CopyFrom(constant("kernel", np.full((4, 3, 3, 3), np.nan)))


def _cut_weights(made: Graph) -> None:
    made.graph.initializer[1].raw_data = made.graph.initializer[1].raw_data[:-4]


def _transposed(made: Graph) -> None:
    made.graph.initializer[1].dims[:] = [3, 4, 3, 3]


def _unknown_operator(made: Graph) -> None:
    insert(made, helper.make_node("NoSuch", ["x4"], ["y"]))


def _cycle(made: Graph) -> None:
    insert(made, helper.make_node("Add", ["x4", "y"], ["y"]))


def _opset(version: int) -> Callable[[Graph], None]:
    def change(made: Graph) -> None:
        made.opset_import[0].version = version

    return change


WRONG: dict[str, Callable[[Graph], None]] = {
    "one channel": _channels(1),
    "four channels": _channels(4),
    "two outputs of three": _outputs(2),
    "five outputs of three": _outputs(5),
    "five outputs, not declared": _hidden_outputs,
    "fixed batch": _fixed(0, 1),
    "fixed height of another size": _fixed(2, 64),
    **{
        f"output {TensorProto.DataType.Name(kind)}": _cast(kind)
        for kind in (
            *(TensorProto.INT64, TensorProto.UINT8, TensorProto.BOOL, TensorProto.STRING),
            *(TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16),
        )
    },
    **{
        f"input {TensorProto.DataType.Name(kind)}": _typed_input(kind)
        for kind in (UINT8, TensorProto.DOUBLE, TensorProto.FLOAT16, INT64, TensorProto.BOOL)
    },
    "output of rank 1": _shaped([-1], 1),
    "output of rank 3": _shaped([-1, 3, 1], 3),
    "second input": _second_input,
    "second output": _second_output,
    "no output": _no_output,
    "no input": _no_input,
    "input of another name": _other_name,
    "two descriptions": _two_descriptions,
    "weights cut": _cut_weights,
    "weights transposed": _transposed,
    "unknown operator": _unknown_operator,
    "a cycle": _cycle,
    "opset 9999": _opset(9999),
    "opset -1": _opset(-1),
}


def _with(*place: str, value: object) -> str:
    content = copy.deepcopy(CONTENT)
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    return json.dumps(content)


def _without(*place: str) -> str:
    content = copy.deepcopy(CONTENT)
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    del holder[place[-1]]
    return json.dumps(content)


DESCRIPTIONS: dict[str, str] = {
    "empty": "",
    "no JSON": "{",
    "null": "null",
    "a list": "[]",
    "a text": '"x"',
    "a number": "1",
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep value": TEXT.replace('"a"', "[" * 100_000 + "]" * 100_000),
    "huge integer": TEXT.replace("[8, 8]", "[8, " + "9" * 10_000 + "]"),
    "size 10^6 x 10^6": _with("data", "image_size", value=[10**6, 10**6]),
    "size 10^308": TEXT.replace("[8, 8]", "[8, 1e308]"),
    "size of texts": _with("data", "image_size", value=["8", "8"]),
    "size 0": _with("data", "image_size", value=[0, 8]),
    "size -8": _with("data", "image_size", value=[-8, 8]),
    "one size": _with("data", "image_size", value=8),
    "three sizes": _with("data", "image_size", value=[8, 8, 8]),
    "10^9 channels": _with("data", "in_channels", value=10**9),
    "-1 channels": _with("data", "in_channels", value=-1),
    "0 channels": _with("data", "in_channels", value=0),
    "true channels": _with("data", "in_channels", value=True),
    "one channel": TEXT.replace('"in_channels": 3, "i', '"in_channels": 1, "i')
    .replace("[0.5, 0.5, 0.5]", "[0.5]")
    .replace("[0.2, 0.2, 0.2]", "[0.2]"),
    "std 0": _with("data", "std", value=[0.2, 0, 0.2]),
    "std -1": _with("data", "std", value=[0.2, -1, 0.2]),
    "std NaN": _with("data", "std", value=[0.2, float("nan"), 0.2]),
    "std 1e-300": _with("data", "std", value=[0.2, 1e-300, 0.2]),
    "mean NaN": _with("data", "mean", value=[0.5, float("nan"), 0.5]),
    "mean Infinity": _with("data", "mean", value=[0.5, float("inf"), 0.5]),
    "mean 10^400": TEXT.replace("[0.5,", "[" + "1" * 400 + ","),
    "mean of texts": _with("data", "mean", value=["0.5"] * 3),
    "two means": _with("data", "mean", value=[0.5] * 2),
    "no classes": _with("data", "classes", value=[]),
    "two classes": _with("data", "classes", value=["a", "b"]),
    "four classes": _with("data", "classes", value=list("abcd")),
    "10^5 classes": _with("data", "classes", value=["x"] * 10**5),
    "classes of numbers": _with("data", "classes", value=[1, 2, 3]),
    "classes a text": _with("data", "classes", value="abc"),
    "classes a mapping": _with("data", "classes", value={"a": 1}),
    "interpolation a list": _with("data", "interpolation", value=[[]]),
    "interpolation of 1 MB": _with("data", "interpolation", value="\x1b[31m" * 200_000),
    "resize 10^12": _with("data", "resize_size", value=10**12),
    "resize 0": _with("data", "resize_size", value=0),
    "resize a text": _with("data", "resize_size", value="9"),
    "unknown key": _with("data", "\x1b[2Jmine\n", value=1),
    "data missing": _without("data"),
    "data a list": _with("data", value=[]),
    "classes missing": _without("data", "classes"),
    "model missing": _without("model"),
    "model a list": _with("model", value=[1]),
    "model null": _with("model", value=None),
    "name missing": _without("model", "name"),
    "name a list": _with("model", "name", value=["x"]),
    "input of no kind": _with("input", value="int8"),
    "input a list": _with("input", value=[]),
    "input uint8": _with("input", value="uint8"),
    "output of 1 MB": _with("output", value="x\n" * 500_000),
}
# What only model.safetensors is built from.
CONFIGS: dict[str, str] = {
    key: _with("model", key.split(":")[0], value=value)
    for key, value in {
        "depths:10^9": [1, 10**9, 1, 1],
        "depths:negative": [1, -1, 1, 1],
        "depths:a text": "1111",
        "widths:10^6": [10**6] * 4,
        "widths:10^30": [10**30] * 4,
        "widths:0": [0] * 4,
        "num_classes:10^9": 10**9,
        "num_classes:4": 4,
        "num_classes:null": None,
        "in_channels:10^9": 10**9,
        "in_channels:1": 1,
        "name:of none": "no_such",
        "name:1 MB": "\x1b" * 10**6,
        "name:timm": "timm/resnet18",
        "groups:7": 7,
        "unknown:1": 1,
    }.items()
}


def _raw(header: object, body: bytes = b"", length: int | None = None) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)

    return write


def _entry(shape: list[int], begin: int, end: int, kind: str = "F32") -> dict[str, object]:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


def _header(**tensors: object) -> dict[str, object]:
    return {"__metadata__": {METADATA_KEY: TEXT}, **tensors}


def _sparse(path: Path) -> None:
    _raw(_header(w=_entry([2**20, 2**10], 0, 2**32)))(path)
    os.truncate(path, path.stat().st_size + 2**32)


def _change(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda path: write_safetensors(path, change=change)


def _keys(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        held = weights()
        change(held)
        path.write_bytes(save(held, metadata={METADATA_KEY: TEXT}))

    return write


SAFETENSORS: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: path.write_bytes(b"") and None,
    "eight bytes": lambda path: path.write_bytes(bytes(8)) and None,
    "header beyond": _raw(_header(), length=10**6),
    "header of 2^63": _raw(_header(), length=2**63),
    "header of 2^64-1": _raw(_header(), length=2**64 - 1),
    "header no JSON": _raw(b"{{{{"),
    "header no UTF-8": _raw(b'{"\xff\xfe": 1}'),
    "header deep": _raw(b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
    "no tensors": _raw(_header()),
    "tensors beyond": _raw(_header(w=_entry([10**6], 0, 4 * 10**6))),
    "overlapping": _raw(_header(a=_entry([2], 0, 8), b=_entry([2], 4, 12)), bytes(12)),
    "a gap": _raw(_header(a=_entry([1], 0, 4), b=_entry([1], 8, 12)), bytes(12)),
    "backwards": _raw(_header(a=_entry([1], 8, 4)), bytes(8)),
    "shape 2^64": _raw(_header(a=_entry([2**32, 2**32], 0, 4)), bytes(4)),
    "shape -1": _raw(_header(a=_entry([-1], 0, 4)), bytes(4)),
    "shape of zeros": _raw(_header(a=_entry([0, 2**62], 0, 0))),
    "type of none": _raw(_header(a=_entry([1], 0, 4, "X9")), bytes(4)),
    "10^5 empty tensors": _raw(_header(**{f"t{n}": _entry([0], 0, 0) for n in range(10**5)})),
    "4 GB of holes": _sparse,
    "metadata a list": _raw({"__metadata__": [1]}),
    "NaN": _change(lambda tensor: tensor * torch.nan),
    "int64": _change(lambda tensor: tensor.long()),
    "bool": _change(lambda tensor: tensor.bool()),
    "complex": _change(lambda tensor: tensor.to(torch.complex64)),
    "transposed": _change(lambda tensor: tensor.transpose(0, -1)),
    "flat": _change(lambda tensor: tensor.flatten()),
    "empty tensors": _change(lambda tensor: tensor[:0]),
    "double beyond float32": _change(lambda tensor: tensor.double() * 1e300),
    "a key less": _keys(lambda held: held.popitem()),
    "a key more": _keys(lambda held: held.update({"\x1b[31m\n": torch.zeros(1)})),
    "keys of another network": _keys(lambda held: held.clear() or held.update(w=torch.ones(1))),
}


def write_ir(path: Path, big: Callable[[Any], Any] | None = None, text: str = TEXT) -> None:
    """A small network of OpenVINO that is right; `big` makes a value that is added to it."""
    import openvino
    from openvino import opset13 as nodes

    images = nodes.parameter([-1, 3, -1, -1], np.float32, name="images")
    features = nodes.reduce_mean(images, _integers(2, 3), False)
    if big is not None:
        made = big(images)
        axes = range(made.get_output_partial_shape(0).rank.get_length())
        features = nodes.add(features, nodes.reduce_mean(made, _integers(*axes), False))
    logits = nodes.matmul(features, nodes.constant(np.eye(3, dtype=np.float32)), False, False)
    built = openvino.Model([nodes.result(logits)], [images], "g")
    built.set_rt_info(text, METADATA_KEY)
    openvino.serialize(built, path)


def _integers(*values: int) -> Any:
    from openvino import opset13 as nodes

    return nodes.constant(np.array(values, np.int64))


def _number(value: float) -> Any:
    from openvino import opset13 as nodes

    return nodes.constant(np.float32(value))


def _node(name: str, *inputs: Any, **attributes: Any) -> Any:
    from openvino import opset13 as nodes

    return getattr(nodes, name)(*inputs, **attributes)


def _doubled_ir(_: Any) -> Any:
    held = _node("constant", np.ones(1, np.float32))
    for _ in range(32):
        held = _node("concat", [held, held], 0)
    return held


def _of_pixels(images: Any) -> Any:
    pixels = _node("reduce_prod", _node("shape_of", images), _integers(0), True)
    return _node("broadcast", _number(1), _node("multiply", pixels, _integers(10**8)))


EXPANDING_IR: dict[str, Callable[[Any], Any]] = {
    "Broadcast": lambda _: _node("broadcast", _number(1), _integers(2**31)),
    "Tile": lambda _: _node("tile", _node("constant", np.ones(1, np.float32)), _integers(2**31)),
    "Range": lambda _: _node("range", _number(0), _number(2e9), _number(1), output_type="f32"),
    "Pad": lambda _: _node(
        "pad",
        _node("constant", np.ones(1, np.float32)),
        _integers(0),
        _integers(2**31),
        "constant",
        _number(0),
    ),
    "computed size": lambda _: _node(
        "broadcast", _number(1), _node("multiply", _integers(2**16), _integers(2**16))
    ),
    "size from the image": _of_pixels,
    "doubled": _doubled_ir,
}

LAUGHS = "".join(f"<!ENTITY {chr(98 + n)} '{f'&{chr(97 + n)};' * 10}'>" for n in range(12))


def _text(old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


def _bin(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        weights = path.with_suffix(".bin")
        weights.write_bytes(change(weights.read_bytes()))

    return apply


IR: dict[str, Callable[[Path], object]] = {
    "bin missing": lambda path: path.with_suffix(".bin").unlink(),
    "bin empty": _bin(lambda held: b""),
    "bin short": _bin(lambda held: held[:-1]),
    "laughs": _text("?>", f"?><!DOCTYPE x [<!ENTITY a 'ha'>{LAUGHS}]>"),
    "entity from /etc": _text("?>", "?><!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]>"),
    "shape of 2^40": _text('shape="3, 3"', 'shape="1048576, 1048576"'),
    "shape of texts": _text('shape="3, 3"', 'shape="a, b"'),
    "weights of 43 GB": _text('size="36"', 'size="43200000000"'),
    "offset 10^20": _text('offset="0"', 'offset="99999999999999999999"'),
    "offset -8": _text('offset="0"', 'offset="-8"'),
    "unknown layer": _text('type="ReduceMean"', 'type="Mine"'),
    "extension": _text('type="MatMul" version="opset1"', 'type="MatMul" version="extension"'),
    "images of rank 2": _text('shape="?,3,?,?"', 'shape="?,3"'),
    "images of 10^16 pixels": _text('shape="?,3,?,?"', 'shape="?,3,100000000,100000000"'),
    "version 10^10": _text(' version="11"', ' version="99999999999"'),
    "empty": lambda path: path.write_bytes(b""),
    "no XML": lambda path: path.write_bytes(bytes(range(256))),
    "half": lambda path: path.write_text(path.read_text()[:2000]),
}
