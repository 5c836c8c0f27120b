from collections import Counter

import onnx
import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock
from torchvision.models.shufflenetv2 import InvertedResidual

import repvgg
from repvgg.contract import DataContract, Description
from repvgg.export.calibration import RANGES, minmax
from repvgg.export.formats import build_onnx, load_onnx, load_openvino
from repvgg.export.int8 import layers, measure, quantize, rewrite, run
from repvgg.models.forms import deployed_form
from tests.support.networks import settle

pytestmark = pytest.mark.slow  # each test exports and quantizes a network

CONTRACT = DataContract(["a", "b", "c"], 3, [32, 32], [0.4, 0.5, 0.6], [0.2, 0.3, 0.2], "bilinear")


def deployed(**config) -> tuple[nn.Module, Description]:
    torch.manual_seed(0)
    config = {"name": "repvgg_tiny", "num_classes": 3, "strides": (1, 2, 2, 2, 1), **config}
    model = settle(repvgg.create_model(**config))
    return repvgg.switch_to_deploy(model), Description(config, CONTRACT)


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def exported():
    """The folded network, its description and its graph, which no test changes."""
    model, description = deployed()
    return model, description, build_onnx(model, description)


@pytest.fixture(scope="module")
def found():
    model, description = deployed()
    return model, quantize(model, description, images(24), held_out=images(24, 1))


def test_layers_are_named_as_in_the_network(exported):
    assert list(layers(exported[-1])) == [
        "stem",
        "stages.0.0",
        "stages.1.0",
        "stages.1.1",
        "stages.2.0",
        "stages.2.1",
        "stages.3.0",
        "linear",
    ]


def test_what_is_measured_is_what_the_network_computes(exported):
    model, description, proto = exported
    seen = []

    histograms = measure(proto, description, images(20))
    model.stem.register_forward_hook(lambda *args: seen.append(args[-1]))
    with torch.no_grad():
        mean, std = (torch.tensor(v)[:, None, None] for v in (CONTRACT.mean, CONTRACT.std))
        model((images(20) - mean) / std)

    assert histograms["relu"].high == pytest.approx(seen[0].max().item(), rel=1e-5)
    assert histograms["relu"].counts.sum() == seen[0].numel()


def test_every_kind_of_range_is_tried_with_and_without_equalizing(found):
    trials = found[1].trials

    assert {(trial.ranges, trial.equalized) for trial in trials} == {
        (ranges, equalized) for ranges in RANGES for equalized in (False, True)
    }
    assert found[1].chosen.merit == max(trial.merit for trial in trials)


def test_the_choice_depends_on_the_network():
    """With one huge activation, minmax is a bad range."""
    model, description = deployed()
    with torch.no_grad():
        model.stages[1][0].reparam.bias[0] += 2000  # one channel; the next layer hardly uses it
        model.stages[1][1].reparam.weight[:, 0] /= 2000

    chosen = quantize(model, description, images(24), held_out=images(24, 1)).chosen

    assert (chosen.ranges, chosen.equalized) != ("minmax", False)


def test_a_quantized_network_computes_only_in_int8(found):
    graph = found[1].model.graph
    types = Counter(node.op_type for node in graph.node)
    produced = {name: node.op_type for node in graph.node for name in node.output}

    inputs = {
        produced.get(name) for node in graph.node if node.op_type == "Conv" for name in node.input
    }
    assert inputs == {"DequantizeLinear"}
    assert (types["Conv"], types["Gemm"], types["Relu"]) == (7, 1, 0)


def test_weights_are_rounded_by_output_channel_and_symmetrically(found):
    values = {v.name: onnx.numpy_helper.to_array(v) for v in found[1].model.graph.initializer}

    assert values["1.stem.reparam.weight_quantized"].dtype == "int8"
    assert values["1.stem.reparam.weight_scale"].shape == (16,)
    assert not values["1.stem.reparam.weight_zero_point"].any()


@pytest.mark.parametrize("load", [load_onnx, load_openvino])
def test_a_quantized_file_runs_in_both_engines_and_hardly_differs(load, found, tmp_path):
    model, quantized = found
    path = tmp_path / "model-int8.onnx"
    onnx.save_model(quantized.model, path)

    artifact = load(path)

    with torch.no_grad():
        mean, std = (torch.tensor(v)[:, None, None] for v in (CONTRACT.mean, CONTRACT.std))
        expected = model((images(32, 2) - mean) / std)
    change = (artifact(images(32, 2)) - expected).square().mean().sqrt()
    assert change < 0.15 * expected.square().mean().sqrt()
    assert artifact.description.data == CONTRACT


def test_a_quantized_file_is_a_quarter_of_the_float_one():
    model, description = deployed(widths=(48, 96, 96, 128))
    proto = build_onnx(model, description)
    ranges = {name: minmax(h) for name, h in measure(proto, description, images(4)).items()}

    rounded = rewrite(proto, ranges, description)

    assert rounded.ByteSize() < 0.27 * proto.ByteSize()


def test_a_layer_that_is_kept_stays_in_float32_with_its_activation(exported):
    _, description, proto = exported
    ranges = {name: minmax(h) for name, h in measure(proto, description, images(4)).items()}

    graph = rewrite(proto, ranges, description, keep=["stages.1.0"]).graph

    weights = {node.input[1] for node in graph.node if node.op_type == "Conv"}
    assert [name for name in weights if name.endswith(".weight")] == ["1.stages.1.0.reparam.weight"]
    assert sum(node.op_type == "Relu" for node in graph.node) == 1


def test_the_worst_layers_stay_in_float32_when_int8_loses_too_much():
    model, description = deployed()
    everything = {"held_out": images(24, 1), "tolerance": -1.0}  # no agreement is enough

    found = quantize(model, description, images(24), float_layers=2, **everything)

    worst = sorted(found.sensitivity, key=found.sensitivity.__getitem__)[-2:]
    assert [len(trial.kept) for trial in found.trials[-2:]] == [1, 2]
    assert set(found.trials[-1].kept) == set(worst)


def test_every_layer_has_its_sensitivity(found):
    model, quantized = found

    assert set(quantized.sensitivity) == {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear)
    } | {
        name.removesuffix(".reparam")
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    assert all(0 < error < 1 for error in quantized.sensitivity.values())


@pytest.mark.parametrize(
    "shape", [(0, 3, 32, 32), (4, 1, 32, 32), (3, 32, 32)], ids=["none", "gray", "no batch"]
)
def test_images_that_do_not_fit_are_rejected(shape):
    model, description = deployed()

    with pytest.raises(ValueError, match="images has shape"):
        quantize(model, description, torch.zeros(shape), held_out=images(4))


def test_a_network_that_computes_inf_is_rejected():
    model, description = deployed()
    with torch.no_grad():
        model.stem.reparam.bias[0] = float("inf")

    with pytest.raises(ValueError, match="computes NaN or inf on images"):
        quantize(model, description, images(4), held_out=images(4))


def test_held_out_images_that_are_no_numbers_are_an_error(exported):
    with pytest.raises(ValueError, match="computes NaN or inf on images"):
        quantize(*exported[:2], images(4), held_out=images(4) * float("nan"))


def test_a_network_that_adds_concatenates_and_computes_shapes_is_quantized():
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        BasicBlock(16, 16),  # adds
        *(InvertedResidual(16, 32, 2), InvertedResidual(32, 32, 1)),  # shuffle their channels
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3)),
    )
    model, _ = deployed_form(settle(network))
    description = Description({}, CONTRACT)
    proto = build_onnx(model, description)
    ranges = {key: minmax(h) for key, h in measure(proto, description, images(8)).items()}

    rounded = rewrite(proto, ranges, description)

    expected, given = (run(graph, description, images(8)) for graph in (proto, rounded))
    change = (given - expected).square().mean().sqrt()
    assert change < 0.15 * expected.square().mean().sqrt()
