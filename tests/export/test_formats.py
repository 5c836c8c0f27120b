import io
import sys
import zipfile
from collections import Counter
from dataclasses import replace

import onnx
import pytest
import torch
from torch import nn

import repvgg
from repvgg.contract import METADATA_KEY, DataContract, Description
from repvgg.export.artifact import build_program
from repvgg.export.formats import FORMATS, open_artifact
from tests.support.networks import relative_error, settle
from tests.support.reports import run_snippet

CONTRACT = DataContract(["a", "b", "c"], 3, [32, 32], [0.4, 0.5, 0.6], [0.2, 0.3, 0.2], "bilinear")
PORTABLE = [name for name in FORMATS if name != "aoti"]  # compiling takes ten seconds


def networks(
    *, input: str = "float32", output: str = "logits", **config
) -> tuple[nn.Sequential, nn.Module, Description]:
    """The multi-branch predictor in float64, the folded network, and the file's description."""
    torch.manual_seed(0)
    config = {"name": "repvgg_tiny", "num_classes": 3, **config}
    model = settle(repvgg.create_model(**config))
    deployed = repvgg.switch_to_deploy(model)
    description = Description(config, CONTRACT, input, output)
    reference = build_program(model, replace(description, input="float32")).double()
    return reference, deployed, description


@pytest.fixture(scope="module")
def a0(tmp_path_factory):
    path = tmp_path_factory.mktemp("a0") / "model.onnx"
    reference, deployed, description = networks(name="repvgg_a0")
    FORMATS["onnx"].save(deployed, path, description)
    return reference, path


@pytest.mark.slow
@pytest.mark.parametrize("name", PORTABLE)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"se_before_relu": 4},
        {"se_after_relu": 4, "auxiliary_heads": True},
    ],
    ids=["plain", "se before", "se after, auxiliary"],
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
    assert predictor.description == description
    black = predictor(torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(run_snippet(path, description), black)


@pytest.fixture(scope="module", params=PORTABLE)
def saved(request, tmp_path_factory):
    """A file of each format with grouped convolutions, and the network before it was folded."""
    reference, deployed, description = networks(groups=2)
    path = tmp_path_factory.mktemp("saved") / FORMATS[request.param].filename
    FORMATS[request.param].save(deployed, path, description)
    return request.param, path, reference


@pytest.mark.slow
@pytest.mark.parametrize("name", PORTABLE)
@torch.no_grad()
def test_a_file_can_take_uint8_images_and_return_probabilities(name, tmp_path):
    reference, deployed, description = networks(input="uint8", output="probabilities")
    path = tmp_path / FORMATS[name].filename
    images = torch.randint(0, 256, (5, 3, 40, 27)) / 255

    FORMATS[name].save(deployed, path, description)
    artifact = open_artifact(str(path), trust=True)  # a text is fine too

    scores = artifact(images)
    assert description.encode(images).shape == (5, 40, 27, 3)
    assert relative_error(reference(images.double()), scores) < 1e-5
    torch.testing.assert_close(scores.sum(1), torch.ones(5))
    black = artifact(torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(run_snippet(path, description), black)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_code_computes_what_was_trained(tmp_path):
    reference, deployed, description = networks(input="uint8")
    path = tmp_path / FORMATS["aoti"].filename

    FORMATS["aoti"].save(deployed, path, description)
    artifact = open_artifact(path, trust=True)

    for shape in [(1, 3, 32, 32), (5, 3, 40, 27)]:
        images = torch.randint(0, 256, shape) / 255
        assert relative_error(reference(images.double()), artifact(images)) < 1e-5
    assert artifact.description == description
    black = artifact(torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(run_snippet(path, description), black)


def test_compiling_needs_a_compiler(tmp_path, monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    _, deployed, description = networks()

    with pytest.raises(ImportError, match="needs a C\\+\\+ compiler"):
        FORMATS["aoti"].save(deployed, tmp_path / "model.aoti.pt2", description)


@pytest.mark.parametrize("action", ["save", "load"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    action, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "openvino", None)
    _, deployed, description = networks()
    path = tmp_path / "model.xml"
    arguments = (deployed, path, description) if action == "save" else (path,)
    message = "openvino is missing: run pip install openvino"

    with pytest.raises(ImportError, match=message):
        getattr(FORMATS["openvino"], action)(*arguments)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_file_holds_one_convolution_a_block(saved):
    name, path, _ = saved

    assert FORMATS[name].load(path).layers == {"convolutions": 7, "batchnorms": 0}


@pytest.mark.slow
@torch.no_grad()
def test_a_file_takes_images_of_any_memory_layout(saved):
    name, path, reference = saved
    images = torch.rand(2, 40, 40, 3).permute(0, 3, 1, 2)[:, :, 4:36, 4:36]

    logits = FORMATS[name].load(path)(images)

    assert relative_error(reference(images.double()), logits) < 1e-5


@pytest.mark.slow
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


def test_an_archive_names_no_source_files(tmp_path):
    _, deployed, description = networks()
    FORMATS["pt2"].save(deployed, tmp_path / "model.pt2", description)

    with zipfile.ZipFile(io.BytesIO((tmp_path / "model.pt2").read_bytes())) as archive:
        (graph,) = (
            archive.read(name) for name in archive.namelist() if name.endswith("models/model.json")
        )

    assert b".py" not in graph


@pytest.mark.slow
def test_the_graph_names_no_source_files(a0):
    model = onnx.load(a0[1])
    model.graph.ClearField("initializer")  # its bytes may spell anything

    assert ".py" not in str(model)


def test_the_graph_is_one_file_with_dynamic_images_and_its_description(a0):
    model = onnx.load(a0[1])

    dims = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", 3, "height", "width"]
    assert [entry.key for entry in model.metadata_props] == [METADATA_KEY]
    assert [path.name for path in a0[1].parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_network_with_branches_is_not_exported(name, tmp_path):
    reference, _, description = networks()

    with pytest.raises(ValueError, match="switch_to_deploy"):
        FORMATS[name].save(reference[1].float(), tmp_path / "model", description)

    assert list(tmp_path.iterdir()) == []


def without_description(name: str, path, saved) -> None:
    """Write a file of the format as another program could."""
    if name == "safetensors":
        from safetensors.torch import save_file

        save_file({"a": torch.ones(2)}, path)
    elif name == "onnx":
        proto = onnx.load(saved)
        proto.ClearField("metadata_props")
        onnx.save_model(proto, path)
    elif name == "pt2":
        torch.export.save(torch.export.load(saved), path)
    else:
        import openvino

        graph = openvino.Core().read_model(saved)
        del graph.get_rt_info()[METADATA_KEY]
        openvino.save_model(graph, path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Unable to load .*extra_file:UserWarning")
def test_a_file_without_our_description_is_rejected(saved, tmp_path):
    name, whole, _ = saved
    path = tmp_path / FORMATS[name].filename
    without_description(name, path, whole)

    with pytest.raises(ValueError, match="no entry 'repvgg'"):
        FORMATS[name].load(path)


@pytest.mark.parametrize(
    ("name", "message"), [("model.h5", "no known format"), ("none.onnx", "is no file")]
)
def test_a_file_of_an_unknown_format_is_rejected(name, message, tmp_path):
    (tmp_path / "model.h5").touch()

    with pytest.raises(ValueError, match=message):
        open_artifact(tmp_path / name)
