from collections import Counter

import onnx
import pytest
import torch
from networks import relative_error, settle
from torch import nn

import repvgg
from repvgg.export import FORMATS, METADATA_KEY, Description
from repvgg.model import DataContract, Normalize

CONTRACT = DataContract(["a", "b", "c"], 3, [32, 32], [0.4, 0.5, 0.6], [0.2, 0.3, 0.2], "bilinear")


def networks(**config) -> tuple[nn.Sequential, nn.Sequential, Description]:
    """The multi-branch predictor in float64, the deployed one, and their description."""
    torch.manual_seed(0)
    config = {"name": "repvgg_tiny", "num_classes": 3, **config}
    model = settle(repvgg.create_model(**config))
    normalize = Normalize(CONTRACT.mean, CONTRACT.std)
    deployed = nn.Sequential(normalize, repvgg.switch_to_deploy(model)).eval()
    reference = nn.Sequential(Normalize(CONTRACT.mean, CONTRACT.std), model).double().eval()
    return reference, deployed, Description(config, CONTRACT)


@pytest.fixture(scope="module")
def a0(tmp_path_factory):
    path = tmp_path_factory.mktemp("a0") / "model.onnx"
    reference, deployed, description = networks(name="repvgg_a0")
    FORMATS["onnx"].save(deployed, path, description)
    return reference, path


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"se_before_relu": 4},
        {"se_after_relu": 4, "auxiliary_heads": True},
        {"groups": 2},
    ],
    ids=["plain", "se before", "se after, auxiliary", "groups"],
)
@torch.no_grad()
def test_a_file_reloaded_from_disk_computes_what_was_trained(name, config, tmp_path):
    reference, deployed, description = networks(**config)
    path = tmp_path / FORMATS[name].filename

    FORMATS[name].save(deployed, path, description)
    predictor = FORMATS[name].load(path)

    for shape in [(1, 3, 32, 32), (5, 3, 32, 32), (2, 3, 40, 27)]:
        images = torch.rand(shape)
        assert relative_error(reference(images.double()), predictor(images)) < 1e-5


@torch.no_grad()
def test_an_exported_network_takes_images_of_any_memory_layout(a0):
    reference, path = a0
    images = torch.rand(2, 32, 32, 3).permute(0, 3, 1, 2)

    logits = FORMATS["onnx"].load(path)(images)

    assert relative_error(reference(images.double()), logits) < 1e-5


def test_the_graph_of_a0_is_minimal(a0):
    graph = onnx.load(a0[1]).graph

    assert Counter(node.op_type for node in graph.node) == {
        "Sub": 1,
        "Div": 1,
        "Conv": 22,
        "Relu": 22,
        "ReduceMean": 1,
        "Gemm": 1,
    }


def test_the_graph_says_nothing_of_source_files(a0):
    model = onnx.load(a0[1])
    model.graph.ClearField("initializer")  # numbers may spell anything

    assert ".py" not in str(model)


def test_the_graph_is_one_file_with_dynamic_images_and_its_description(a0):
    model = onnx.load(a0[1])

    dims = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", 3, "height", "width"]
    assert [entry.key for entry in model.metadata_props] == [METADATA_KEY]
    assert [path.name for path in a0[1].parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_network_that_was_not_switched_is_not_exported(name, tmp_path):
    reference, _, description = networks()

    with pytest.raises(ValueError, match="switch_to_deploy"):
        FORMATS[name].save(reference.float(), tmp_path / "model", description)

    assert list(tmp_path.iterdir()) == []


def test_weights_without_our_description_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")

    with pytest.raises(ValueError, match="no entry 'repvgg'"):
        FORMATS["safetensors"].load(tmp_path / "model.safetensors")
