"""8 bits after training: an ONNX file whose convolutions and linear layers compute in int8.

Weights are rounded symmetrically by output channel, activations by tensor in uint8, as pairs of
QuantizeLinear and DequantizeLinear ("QDQ"), which onnxruntime and OpenVINO turn into integer
kernels (Nagel et al., 2021, arXiv:2106.08295, sections 2 and 3). onnxruntime rewrites the graph;
ranges are measured here, and each kind is tried on images that nothing was measured on.
"""

import copy
import logging
import math
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from repvgg.contract import METADATA_KEY, Description
from repvgg.export.calibration import RANGES, Histogram, Range
from repvgg.export.equalize import can_equalize, equalize
from repvgg.export.formats import build_onnx, open_session
from repvgg.models.network import RepVGG
from repvgg.verify import agreement

BINS = 2048
BATCH = 16  # images at a time: all activations of a batch are in memory
# An activation function disappears into the layer in front of it, whose range it sets.
LAYERS = ("Conv", "Gemm", "MatMul")
ACTIVATIONS = ("Relu", "Clip")
BETWEEN = ("Add", "Concat", "MaxPool", "AveragePool")


class Trial(NamedTuple):
    """One way to quantize, and what it gave on the held-out images.

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
    """What `quantize` found.

    Attributes:
        model: the `onnx.ModelProto`, with the description as metadata.
        chosen: how it was made.
        trials: all that was tried.
        sensitivity: the `error` with one layer alone in int8, by the layer's name.
    """

    model: Any
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
    """Choose ranges for a deployed network and round it to 8 bits.

    Every kind of range is tried, with and without equalized channels where they can be. If the best
    disagrees with the float network on more than `tolerance` of the held-out images, the layers
    that suffer most stay in float32, one more at a time.

    Args:
        model: the deployed network, float32.
        images: (N, C, H, W), float32 in [0, 1]: ranges are measured on these.
        held_out: likewise: the choice is made on these.
        float_layers: how many layers may stay in float32.

    Raises:
        ValueError: the images do not fit the network, or the network was not switched.
    """
    for kind, batch in (("calibration", images), ("held-out", held_out)):
        wanted = description.data.in_channels
        if batch.ndim != 4 or len(batch) == 0 or batch.shape[1] != wanted:
            raise ValueError(
                f"int8: the {kind} images are {tuple(batch.shape)}, the network takes at least one "
                f"(N, {wanted}, H, W): give data of its kind"
            )
    sources = {False: build_onnx(model, description)}
    expected = run(sources[False], description, held_out)
    if isinstance(model, RepVGG) and can_equalize(model):
        sources[True] = build_onnx(equalize(model), description)
    histograms = {key: measure(proto, description, images) for key, proto in sources.items()}

    def attempt(ranges: str, equalized: bool, kept: tuple[str, ...]) -> tuple[Trial, Any]:
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


def layers(proto: Any) -> dict[str, str]:
    """Layers with weights of an ONNX graph: the name in the network -> the name of the node."""
    weights = {initializer.name for initializer in proto.graph.initializer}
    found = {}
    for node in proto.graph.node:
        if node.op_type in LAYERS:
            name = node.input[1] if node.input[1] in weights else node.name
            name = name.removesuffix(".weight").removesuffix(".reparam")
            found[name.partition(".")[2] if name[0].isdigit() else name] = node.name
    return found


@torch.no_grad()
def measure(proto: Any, description: Description, images: Tensor) -> dict[str, Histogram]:
    """Run a float ONNX graph on images and count the values of every tensor that will be rounded.

    Returns:
        histograms of BINS bins, by the tensor's name.
    """
    import onnx

    proto = copy.deepcopy(proto)
    names = _rounded(proto)
    outputs = {output.name for output in proto.graph.output}
    proto.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in names
        if name not in outputs
    )
    session = open_session(proto.SerializeToString())

    def batches() -> Iterator[list[np.ndarray]]:
        for batch in images.split(BATCH):
            yield session.run(names, {"images": description.encode(batch).numpy()})

    low, high = [math.inf] * len(names), [-math.inf] * len(names)
    for values in batches():
        low = [min(old, float(value.min())) for old, value in zip(low, values, strict=True)]
        high = [max(old, float(value.max())) for old, value in zip(high, values, strict=True)]
    if not all(map(math.isfinite, low + high)):
        raise ValueError("int8: the network gives NaN or infinite values on the calibration images")
    counts = [torch.zeros(BINS, dtype=torch.float64) for _ in names]
    for values in batches():
        for i, value in enumerate(values):
            bins = torch.from_numpy(value).histc(BINS, low[i], max(high[i], low[i] + 1e-30))
            counts[i] += bins.double()
    return {name: Histogram(counts[i], low[i], high[i]) for i, name in enumerate(names)}


def _rounded(proto: Any) -> list[str]:
    """Float tensors between the layers, but for those in front of an activation, which vanish."""
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
    vanish = {
        name
        for name in found
        if (types := consumers.get(name)) and all(kind in ACTIVATIONS for kind in types)
    }
    return sorted(found - vanish)


def rewrite(
    proto: Any,
    ranges: Mapping[str, Range],
    description: Description,
    *,
    keep: Collection[str] = (),
    per_channel: bool = True,
) -> Any:
    """Round an ONNX graph to 8 bits, given the range of every tensor.

    Args:
        ranges: from the smallest to the largest value of each tensor; 0 is added to them.
        keep: layers that stay in float32, by their names in the network.
        per_channel: round weights by output channel; else by tensor, which is coarser.

    Returns:
        a new `onnx.ModelProto`.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization.quantize import quantize_static

    class OneImage(CalibrationDataReader):
        """quantize_static asks for images; the ranges it reads off them are overridden."""

        def __init__(self) -> None:
            self.left = [description.example(1).numpy()]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return {"images": self.left.pop()} if self.left else None

    nodes = layers(proto)
    excluded = [nodes[name] for name in keep]
    # An activation function behind a layer in float32 has nothing to vanish into.
    outputs = {
        output for node in proto.graph.node if node.name in excluded for output in node.output
    }
    excluded += [
        node.name
        for node in proto.graph.node
        if (node.op_type in ACTIVATIONS and node.input[0] in outputs)
        # What computes shapes adds and concatenates too.
        or (node.op_type in BETWEEN and not set(node.output) & ranges.keys())
    ]
    with tempfile.TemporaryDirectory() as folder, _without_advice():
        path = Path(folder) / "int8.onnx"
        quantize_static(
            copy.deepcopy(proto),
            str(path),
            OneImage(),
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


@contextmanager
def _without_advice() -> Iterator[None]:
    """Without onnxruntime's advice, through the root logger, to optimize the graph first."""

    def is_news(record: logging.LogRecord) -> bool:
        return "pre-processing before quantization" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(is_news)
    try:
        yield
    finally:
        root.removeFilter(is_news)


def run(proto: Any, description: Description, images: Tensor) -> Tensor:
    """Run an ONNX graph in onnxruntime on images (N, C, H, W) in [0, 1]; what it gives, (N, K)."""
    session = open_session(proto.SerializeToString())
    scores = [
        session.run(None, {"images": description.encode(batch).numpy()})[0]
        for batch in images.split(BATCH)
    ]
    return torch.from_numpy(np.concatenate(scores))


def _change(expected: Tensor, given: Tensor) -> float:
    """Root mean square of the change, relative to that of what is expected."""
    difference = (given.double() - expected.double()).square().mean()
    return (difference / expected.double().square().mean()).sqrt().item()
