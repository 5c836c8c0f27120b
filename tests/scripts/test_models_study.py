"""The page of the models, from recorded numbers."""

import json
from pathlib import Path

import pytest
from onnx import helper

from scripts.studies import models
from tests.support.figures import assert_drawn

SIZES = [
    {"parameters": 9108968, "macs": 1512e6, "parameters_folded": 8309384, "macs_folded": 1361e6},
    {"parameters": 70854632, "macs": 15e9, "parameters_folded": 63959528, "macs_folded": 14e9},
]


@pytest.fixture
def record():
    """What the study writes, for two variants with made-up times."""
    names = ("repvgg_a0", "repvgg_b2g2")
    timed = {
        f"{name}{kind}": {"median": 12.0, "lower": 11.0, "upper": 14.0, "rounds": 20}
        for name in (*names, "repvgg_a0-int8", "repvgg_b2g2-int8")
        for kind in ("", models.AGAIN)
    }
    timed["repvgg_a0-int8"]["median"] = 4.0
    return {
        "command": "c",
        "machine": "m",
        "versions": "onnxruntime 1",
        "size": 224,
        "threads": 2,
        "nice": 0,
        "load_before": 1.0,
        "load_after": 2.0,
        "sizes": dict(zip(names, SIZES, strict=True)),
        "milliseconds": timed,
    }


def test_the_page_has_a_row_for_each_variant(record, tmp_path):
    path = tmp_path / "studies" / "models" / "models.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))

    models.redraw(path)

    page = (tmp_path / "models.md").read_text()
    assert (
        "| `repvgg_a0` | 9.11 | 8.31 | 1.51 | 1.36 | 72.41 | 12.0 | 4.0 | 3.0 "
        "| `experiment=imagenet_120` |" in page
    )
    assert "| `repvgg_b2g2` | 70.85 | 63.96 |" in page
    assert 'src="studies/models/models-light.svg"' in page
    assert_drawn(path.with_suffix(""))


def write_relu(path: Path) -> None:
    """A graph that takes images."""
    shape = ["N", 3, "H", "W"]
    ends = [helper.make_tensor_value_info(name, 1, shape) for name in ("images", "logits")]
    node = helper.make_node("Relu", ["images"], ["logits"])
    graph = helper.make_graph([node], "relu", ends[:1], ends[1:])
    opset = helper.make_opsetid("", 18)
    path.write_bytes(
        helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
    )


def test_files_that_exist_are_timed_with_a_control(run, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    for path in models.files_of("repvgg_a0", work):
        write_relu(path)

    printed = run(
        models,
        "models=[repvgg_a0]",
        "size=32",
        "seconds=0.01",
        "work=work",
        "out=studies/models",
        "page=page.md",
    )

    assert "| `repvgg_a0` | 9.11 | 8.31 |" in printed
    assert (tmp_path / "page.md").read_text() in printed
    timed = json.loads((tmp_path / "studies" / "models" / "models.json").read_text())
    assert set(timed["milliseconds"]) == {
        f"repvgg_a0{kind}{again}" for kind in ("", "-int8") for again in ("", models.AGAIN)
    }
    assert min(found["median"] for found in timed["milliseconds"].values()) > 0


def test_a_model_without_a_paper_is_one_line(run, capfd):
    with pytest.raises(SystemExit):
        run(models, "models=[repvgg_tiny]")

    assert "must be of repvgg_a0, " in capfd.readouterr().err
