"""8 bits after training: an ONNX file whose convolutions and linear layers compute in int8.

Weights are rounded symmetrically by output channel, activations by tensor in uint8, as pairs of
QuantizeLinear and DequantizeLinear ("QDQ"), which onnxruntime and OpenVINO turn into integer
kernels (Nagel et al., 2021, arXiv:2106.08295, sections 2 and 3). onnxruntime rewrites the graph;
ranges are measured and chosen here.

A range is a trade: a wide one rounds coarsely, a narrow one cuts values off. Which is better
depends on the network, so each kind is tried on images that nothing was measured on.
"""

import copy
import functools
import itertools
import logging
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from repvgg.block import RepVGGBlock
from repvgg.export import METADATA_KEY, Description, build_onnx, open_session
from repvgg.model import RepVGG
from repvgg.reparam import scale_input, scale_output
from repvgg.verify import agreement

Range = tuple[float, float]

BINS = 2048
STEPS = 255  # between the 256 values of 8 bits
BATCH = 16  # images at a time: all activations of a batch are in memory
EQUALIZING_ROUNDS = 50
# An activation function disappears into the layer in front of it, whose range it sets.
LAYERS = ("Conv", "Gemm", "MatMul")
ACTIVATIONS = ("Relu", "Clip")
BETWEEN = ("Add", "Concat", "MaxPool", "AveragePool")


class Histogram(NamedTuple):
    """The values that a tensor took: counts of equal bins from the smallest to the largest."""

    counts: Tensor
    low: float
    high: float

    @property
    def edges(self) -> Tensor:
        return torch.linspace(self.low, self.high, len(self.counts) + 1, dtype=torch.float64)


def minmax(histogram: Histogram) -> Range:
    """All that was seen."""
    return histogram.low, histogram.high


def percentile(histogram: Histogram, *, share: float) -> Range:
    """All but the outermost: of the values, the zeros of a ReLU too, 1 - share is cut off."""
    cumulated = histogram.counts.cumsum(0) / histogram.counts.sum()
    first, last = torch.searchsorted(cumulated, torch.tensor([1 - share, share])).tolist()
    edges = histogram.edges
    return edges[first].item(), edges[min(last + 1, len(edges) - 1)].item()


def least_squares(histogram: Histogram) -> Range:
    """The part of the range, shrunk at both ends alike, whose rounding and cutting off lose least.

    "MSE" in Nagel et al., 2021, section 3.1.
    """
    edges, counts = histogram.edges, histogram.counts
    x = (edges[1:] + edges[:-1]) / 2
    widest = min(histogram.low, 0.0), max(histogram.high, 0.0)

    def loss(ends: Range) -> float:
        scale = max(ends[1] - ends[0], 1e-30) / STEPS
        kept = ((x / scale).round() * scale).clamp(*ends)
        return (counts * (kept - x) ** 2).sum().item()

    shares = torch.linspace(1.0, 0.02, 99).tolist()
    return min(((widest[0] * share, widest[1] * share) for share in shares), key=loss)


RANGES: dict[str, Callable[[Histogram], Range]] = {
    "minmax": minmax,
    "percentile 99.999": functools.partial(percentile, share=0.99999),
    "percentile 99.99": functools.partial(percentile, share=0.9999),
    "percentile 99.9": functools.partial(percentile, share=0.999),
    "mse": least_squares,
}


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


def can_equalize(model: nn.Module) -> bool:
    """Whether `equalize` takes the network: a RepVGG without squeeze-and-excite gates."""
    return isinstance(model, RepVGG) and all(
        isinstance(block.se_before_relu, nn.Identity)
        and isinstance(block.se_after_relu, nn.Identity)
        for block in model.modules()
        if isinstance(block, RepVGGBlock)
    )


@torch.no_grad()
def equalize(model: RepVGG) -> RepVGG:
    """Copy a deployed network and balance the channels between each two of its layers.

    ReLU(s y) = s ReLU(y) for s > 0, and pooling is linear, so output channel i of a layer can be
    divided by s_i if the next layer's input channel i is multiplied by it. With
    s = sqrt(r1 / r2), r1 and r2 the largest weights of the channel on either side, both sides use
    their ranges equally (Nagel et al., 2019, arXiv:1906.04721, section 4.1). No data is needed.
    s is rounded to a power of two: the network computes the same numbers, bit for bit.

    Raises:
        ValueError: `can_equalize` says no, or the network was not switched to its deployed form.
    """
    if not can_equalize(model):
        raise ValueError(
            f"{type(model).__name__}: only a chain of convolutions and ReLUs can be equalized, "
            "without squeeze-and-excite gates"
        )
    model = copy.deepcopy(model)
    blocks = [module for module in model.modules() if isinstance(module, RepVGGBlock)]
    if any(block.reparam is None for block in blocks):
        raise ValueError("equalizing needs the deployed form: call repvgg.switch_to_deploy(model)")
    chain: list[Any] = [*(block.reparam for block in blocks), model.linear]
    for _ in range(EQUALIZING_ROUNDS):
        scales = [_equalize(*pair) for pair in itertools.pairwise(chain)]
        if all((scale == 1).all() for scale in scales):
            break
    return model


def _equalize(first: nn.Conv2d, second: nn.Conv2d | nn.Linear) -> Tensor:
    groups = second.groups if isinstance(second, nn.Conv2d) else 1
    given = first.weight.double().abs().flatten(1).amax(1)  # (C,)
    out, width = second.weight.shape[:2]
    taken = second.weight.double().abs().reshape(groups, out // groups, width, -1)
    taken = taken.amax((1, 3)).flatten()  # (C,)
    usable = (given > 0) & (taken > 0)
    ratio = torch.where(usable, given, 1.0) / torch.where(usable, taken, 1.0)
    scale = (ratio.log2() / 2).round().exp2()
    zero = torch.zeros_like(scale)
    kernel, bias = scale_output(first.weight, first.bias, 1 / scale, zero)
    first.weight.copy_(kernel)
    assert first.bias is not None
    first.bias.copy_(bias)
    second.weight.copy_(scale_input(second.weight, None, scale, zero, groups=groups).kernel)
    return scale


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
