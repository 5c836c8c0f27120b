"""Post-training quantization: an ONNX file whose convolutions and linear layers run in int8.

Weights are quantized symmetrically, per output channel; activations per tensor, in uint8. The
graph holds pairs of QuantizeLinear and DequantizeLinear ("QDQ"), which onnxruntime and OpenVINO
turn into integer kernels (Nagel et al., 2021, arXiv:2106.08295, sections 2 and 3). onnxruntime
rewrites the graph. The ranges are measured here, and chosen on held-out images.
"""

import copy
import logging
import math
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from repvgg.contract import METADATA_KEY, Description
from repvgg.export.calibration import RANGES, Histogram, Range
from repvgg.export.equalize import can_equalize, equalize
from repvgg.export.formats import build_onnx, open_session
from repvgg.models.network import RepVGG
from repvgg.verify import agreement

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[np.generic]

BINS = 2048
BATCH = 16  # images at a time: all activations of a batch are in memory
# An activation function is fused into the layer before it, and sets that layer's range.
LAYERS = ("Conv", "Gemm", "MatMul")
ACTIVATIONS = ("Relu", "Clip")
BETWEEN = ("Add", "Concat", "MaxPool", "AveragePool")


@dataclass(frozen=True)
class Trial:
    """One way to quantize, and its results on the held-out images.

    Attributes:
        ranges: a key of `RANGES`.
        equalized: the channels were equalized first, see `equalize`.
        kept: layers that stay in float32.
        agreement: share of images with the same top-1 as in float32.
        error: root mean square of the change of the outputs, relative to that of the outputs.
    """

    ranges: str
    equalized: bool
    kept: tuple[str, ...]
    agreement: float
    error: float

    @property
    def merit(self) -> tuple[float, float]:
        return self.agreement, -self.error


@dataclass(frozen=True)
class Quantized:
    """What `quantize` returns.

    Attributes:
        model: the quantized graph, with the description as metadata.
        chosen: the trial that became `model`.
        trials: everything that was tried.
        sensitivity: by layer, the `error` if that layer alone is int8.
    """

    model: "onnx.ModelProto"
    chosen: Trial
    trials: list[Trial]
    sensitivity: dict[str, float]


def quantize(
    model: nn.Module,
    description: Description,
    images: Tensor,
    *,
    held_out: Tensor,
    float_layers: int = 0,
    tolerance: float = 0.005,
) -> Quantized:
    """Choose ranges for a folded network and quantize it to int8.

    Every kind of range is tried, with and without equalized channels if the network allows it. The
    best trial may change the top-1 of a share `tolerance` of the held-out images. If it changes
    more, the most sensitive layers stay in float32, one more at a time.

    Args:
        model: the folded network, float32.
        images: (N, C, H, W), float32 in [0, 1]: ranges are measured on these.
        held_out: (N, C, H, W), float32 in [0, 1]: ranges are chosen on these.
        float_layers: how many layers may stay in float32.

    Raises:
        ValueError: the images do not fit the network, or the network has branches.
    """
    for argument, batch in (("images", images), ("held_out", held_out)):
        channels = description.data.in_channels
        if batch.ndim != 4 or len(batch) == 0 or batch.shape[1] != channels:
            raise ValueError(
                f"{argument} has shape {tuple(batch.shape)}: must be (N, {channels}, H, W) with at "
                "least one image"
            )
    sources = {False: build_onnx(model, description)}
    expected = run(sources[False], description, held_out)
    _require_finite(expected)
    if isinstance(model, RepVGG) and can_equalize(model):
        sources[True] = build_onnx(equalize(model), description)
    histograms = {key: measure(proto, description, images) for key, proto in sources.items()}

    def attempt(
        ranges: str, equalized: bool, kept: tuple[str, ...]
    ) -> tuple[Trial, "onnx.ModelProto"]:
        found = {name: RANGES[ranges](h) for name, h in histograms[equalized].items()}
        proto = rewrite(sources[equalized], found, description, keep=kept)
        scores = run(proto, description, held_out)
        same, change = agreement(expected, scores), _change(expected, scores)
        return Trial(ranges, equalized, kept, same, change), proto

    tried = [attempt(ranges, equalized, ()) for equalized in sources for ranges in RANGES]
    best = max(tried, key=lambda pair: pair[0].merit)
    ranges, equalized = best[0].ranges, best[0].equalized
    names = list(layers(sources[equalized]))
    sensitivity = {
        name: attempt(ranges, equalized, tuple(other for other in names if other != name))[0].error
        for name in names
    }
    worst = sorted(names, key=sensitivity.__getitem__, reverse=True)
    for count in range(1, min(float_layers, len(worst)) + 1):
        if best[0].agreement >= 1 - tolerance:
            break
        tried.append(attempt(ranges, equalized, tuple(worst[:count])))
        best = max(best, tried[-1], key=lambda pair: pair[0].merit)
    return Quantized(best[1], best[0], [trial for trial, _ in tried], sensitivity)


def layers(proto: "onnx.ModelProto") -> dict[str, str]:
    """Layers with weights of an ONNX graph: name in the network -> name of the node."""
    weights = {initializer.name for initializer in proto.graph.initializer}
    found = {}
    for node in proto.graph.node:
        if node.op_type in LAYERS:
            name = node.input[1] if node.input[1] in weights else node.name
            name = name.removesuffix(".weight").removesuffix(".reparam")
            found[name.partition(".")[2] if name[0].isdigit() else name] = node.name
    return found


@torch.no_grad()
def measure(
    proto: "onnx.ModelProto", description: Description, images: Tensor
) -> dict[str, Histogram]:
    """Run a float ONNX graph on images and count the values of every tensor to quantize.

    Returns:
        histograms of BINS bins, by the tensor's name.

    Raises:
        ValueError: a value is NaN or inf.
    """
    import onnx

    proto = copy.deepcopy(proto)
    names = _tensors_to_quantize(proto)
    outputs = {output.name for output in proto.graph.output}
    proto.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in names
        if name not in outputs
    )
    session = open_session(proto.SerializeToString())

    def batches() -> Iterator[list[Array]]:
        for batch in torch.split(images, BATCH):
            yield session.run(names, {"images": description.encode(batch).numpy()})

    low, high = [math.inf] * len(names), [-math.inf] * len(names)
    for values in batches():
        low = [min(old, float(value.min())) for old, value in zip(low, values, strict=True)]
        high = [max(old, float(value.max())) for old, value in zip(high, values, strict=True)]
    _require_finite(torch.tensor(low + high))
    counts = [torch.zeros(BINS, dtype=torch.float64) for _ in names]
    for values in batches():
        for i, value in enumerate(values):
            bins = torch.from_numpy(value).histc(BINS, low[i], max(high[i], low[i] + 1e-30))
            counts[i] += bins.double()
    return {name: Histogram(counts[i], low[i], high[i]) for i, name in enumerate(names)}


def _tensors_to_quantize(proto: "onnx.ModelProto") -> list[str]:
    """Float tensors between the layers, without the inputs of activations, which are fused."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(proto).graph
    floats = {
        value.name
        for value in (*graph.value_info, *graph.input, *graph.output)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    } - {initializer.name for initializer in graph.initializer}
    consumers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node.op_type)
    found = {
        name
        for node in graph.node
        if node.op_type in (*LAYERS, *ACTIVATIONS, *BETWEEN)
        for name in (*node.input, *node.output)
        if name in floats
    }
    fused = {
        name
        for name in found
        if (types := consumers.get(name)) and all(kind in ACTIVATIONS for kind in types)
    }
    return sorted(found - fused)


def rewrite(
    proto: "onnx.ModelProto",
    ranges: Mapping[str, Range],
    description: Description,
    *,
    keep: Collection[str] = (),
    per_channel: bool = True,
) -> "onnx.ModelProto":
    """Quantize an ONNX graph to int8 with given ranges; returns a new graph.

    Args:
        ranges: smallest and largest value, by tensor; each range is widened to include 0.
        keep: layers that stay in float32, by their names in the network.
        per_channel: quantize weights per output channel; else per tensor, which is coarser.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType
    from onnxruntime.quantization.quantize import quantize_static

    nodes = layers(proto)
    excluded = [nodes[name] for name in keep]
    # The activation function after a float32 layer is not fused, so it stays in float32 too.
    outputs = {
        output for node in proto.graph.node if node.name in excluded for output in node.output
    }
    excluded += [
        node.name
        for node in proto.graph.node
        if (node.op_type in ACTIVATIONS and node.input[0] in outputs)
        # Nodes that compute shapes also add and concatenate.
        or (node.op_type in BETWEEN and not set(node.output) & ranges.keys())
    ]
    with tempfile.TemporaryDirectory() as folder, _advice_hidden():
        path = Path(folder) / "int8.onnx"
        quantize_static(
            copy.deepcopy(proto),
            str(path),
            OneImage(description),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*LAYERS, *ACTIVATIONS, *BETWEEN],
            per_channel=per_channel,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=excluded,
            extra_options={
                "TensorQuantOverrides": {
                    name: [{"rmin": np.float32(low), "rmax": np.float32(high)}]
                    for name, (low, high) in ranges.items()
                }
            },
        )
        rounded = onnx.load(path)
    rounded.ClearField("metadata_props")
    rounded.metadata_props.add(key=METADATA_KEY, value=description.to_json())
    onnx.checker.check_model(rounded)
    return rounded


class OneImage:
    """The images that quantize_static requires; `rewrite` overrides the ranges it finds on them."""

    def __init__(self, description: Description) -> None:
        self.left = [description.example(1).numpy()]

    def get_next(self) -> dict[str, Array] | None:
        return {"images": self.left.pop()} if self.left else None


@contextmanager
def _advice_hidden() -> Iterator[None]:
    """Hide onnxruntime's advice to optimize the graph first; it uses the root logger."""

    def is_other(record: logging.LogRecord) -> bool:
        return "pre-processing before quantization" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(is_other)
    try:
        yield
    finally:
        root.removeFilter(is_other)


def run(proto: "onnx.ModelProto", description: Description, images: Tensor) -> Tensor:
    """Run an ONNX graph in onnxruntime: images (N, C, H, W) in [0, 1] -> outputs (N, K)."""
    session = open_session(proto.SerializeToString())
    scores = [
        session.run(None, {"images": description.encode(batch).numpy()})[0]
        for batch in torch.split(images, BATCH)
    ]
    return torch.from_numpy(np.concatenate(scores))


def _require_finite(values: Tensor) -> None:
    if not values.isfinite().all():
        raise ValueError("model computes NaN or inf on images")


def _change(expected: Tensor, given: Tensor) -> float:
    """Root mean square of the change, relative to that of the expected outputs."""
    difference = (given.double() - expected.double()).square().mean()
    scale = expected.double().square().mean()
    return (difference / scale.clamp_min(torch.finfo(scale.dtype).tiny)).sqrt().item()
