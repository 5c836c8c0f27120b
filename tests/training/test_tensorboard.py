"""What TensorBoard shows of a run: read back from its event files."""

import io
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from repvgg import figures
from repvgg.contract import DataContract
from repvgg.models.registry import create_model
from repvgg.training import pictures, tensorboard
from repvgg.training.pictures import Budget, Pictures
from repvgg.training.predictions import Predictions
from repvgg.training.tensorboard import Start
from tests.support.commands import run
from tests.support.networks import settle

SHORT = (
    *("model=repvgg_tiny", "rdrop=true", "trainer.max_epochs=2", "data.batch_size=128"),
    "hydra.run.dir=run",
)
STOP = """
from lightning.pytorch.callbacks import Callback
from repvgg.signals import Interrupted

class Stop(Callback):
    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == 2:
            raise Interrupted(2)
"""


def read(folder: Path) -> EventAccumulator:
    everything = dict.fromkeys(("images", "scalars", "tensors"), 0)
    events = EventAccumulator(str(folder), size_guidance=everything)
    events.Reload()
    return events


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """The folder of a run with pictures."""
    home = tmp_path_factory.mktemp("drawn")
    done = run("train.py", *SHORT, "mixup=0.2", cwd=home, pictures=True)
    assert (done.returncode, done.stderr) == (0, "")
    return home / "run"


@pytest.fixture(scope="module")
def events(drawn) -> EventAccumulator:
    return read(drawn)


def hyperparameters(events: EventAccumulator, tag: str) -> HParamsPluginData:
    content = events.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content
    return HParamsPluginData.FromString(content)


def text(events: EventAccumulator, tag: str) -> str:
    (event,) = events.Tensors(f"{tag}/text_summary")
    return event.tensor_proto.string_val[0].decode()


@pytest.mark.slow
def test_a_run_with_its_test_is_one_event_file(drawn):
    assert len([*drawn.rglob("events*")]) == 1
    assert not (drawn / "hparams.yaml").exists()


@pytest.mark.slow
def test_every_picture_of_a_run_is_there_and_not_blank(events):
    assert {*events.Tags()["images"]} == {
        *("train/batch", "val/mistakes", "val/confusion_matrix", "val/reliability"),
        *("val/accuracy_by_class", "branches/shares", "branches/outliers", "branches/kernels"),
    }
    for tag in events.Tags()["images"]:
        (event,) = events.Images(tag)
        pixels = torch.frombuffer(
            bytearray(Image.open(io.BytesIO(event.encoded_image_string)).tobytes()),
            dtype=torch.uint8,
        )
        assert event.step > 0
        assert pixels.float().std() > 5


@pytest.mark.slow
def test_the_branches_are_measured(events):
    stages = ["stem", "stages.0", "stages.1", "stages.2", "stages.3"]
    for stage in stages:
        (shares,) = zip(
            *(events.Scalars(f"branches/{stage}/{part}") for part in ("3x3", "1x1", "identity")),
            strict=True,
        )
        assert sum(share.value for share in shares) == pytest.approx(1)
        assert events.Scalars(f"outliers/{stage}")[0].value >= 1
    assert 0 < events.Scalars("fold/error")[0].value < 1e-5


@pytest.mark.slow
def test_the_graph_holds_both_forms(events):
    graph = GraphDef.FromString(events.Graph().SerializeToString())

    assert {node.name.split("/")[0] for node in graph.node} == {"multi-branch", "folded"}


@pytest.mark.slow
def test_every_chart_of_the_layout_has_data(events):
    (event,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])

    charts = {chart.title: [*chart.multiline.tag] for c in layout.category for chart in c.chart}
    logged = events.Tags()["scalars"]

    assert len(charts) == 14
    for patterns in charts.values():
        assert [tag for tag in logged for pattern in patterns if re.match(pattern, tag)]
    found = [tag for tag in logged for one in charts["accuracy"] if re.match(one, tag)]
    assert found == ["train/accuracy", "val/accuracy"]


@pytest.mark.slow
def test_texts_say_what_the_run_is(events):
    assert "repvgg_tiny" in text(events, "run")
    assert "command" in text(events, "run")
    assert "    mixup: 0.2" in text(events, "configuration").splitlines()
    assert text(events, "classes").splitlines()[9] == "    9  9"


@pytest.mark.slow
def test_the_row_of_a_run_has_eight_hyperparameters_and_no_metric_twice(events):
    columns = hyperparameters(events, "experiment").experiment
    row = hyperparameters(events, "session_start_info").session_start_info.hparams

    assert next(one.name.tag for one in columns.metric_infos) == "val/accuracy"
    assert {one.name for one in columns.hparam_infos if one.differs} == {*tensorboard.COLUMNS}
    assert len(row) == len(columns.hparam_infos) == 8
    assert row["model"].string_value == "repvgg_tiny"
    assert row["epochs"].number_value == 2
    assert row["overrides"].string_value == "mixup=0.2"
    assert hyperparameters(events, "session_end_info").HasField("session_end_info")
    assert len(events.Scalars("test/accuracy")) == 1


@pytest.mark.slow
def test_pictures_can_be_turned_off_and_change_no_weight(drawn, tmp_path):
    off = "logger.tensorboard.pictures=false"

    done = run("train.py", *SHORT, "mixup=0.2", off, cwd=tmp_path, pictures=True)

    events = read(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert events.Tags()["images"] == []
    assert text(events, "classes")
    assert "fold/error" not in events.Tags()["scalars"]
    with_, without = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in (drawn, tmp_path / "run")
    )
    assert with_["callbacks"].keys() == without["callbacks"].keys()
    assert all(
        torch.equal(value, without["state_dict"][key]) for key, value in with_["state_dict"].items()
    )


@pytest.mark.slow
def test_a_stopped_run_has_its_row(tmp_path):
    (tmp_path / "stopping.py").write_text(STOP)
    stop = "+callbacks.stop._target_=stopping.Stop"

    done = run("train.py", *SHORT, stop, cwd=tmp_path, pictures=True)

    events = read(tmp_path / "run")
    row = hyperparameters(events, "session_start_info").session_start_info.hparams
    assert done.returncode == 130
    assert row["rdrop"].number_value == 1
    assert "repvgg_tiny" in text(events, "run")


def start(classes: list[str]) -> Start:
    contract = DataContract(classes, 1, [8, 8], [0.5], [0.25], "bilinear")
    return Start(contract, {}, {})


@pytest.fixture
def validated() -> Pictures:
    """After a validation with two classes."""
    callback = Pictures()
    callback.start = start(["cat", "dog"])
    callback._predictions = Predictions()
    callback._predictions.add(torch.randn(9, 1, 8, 8), torch.randn(9, 2), torch.arange(9) % 2)
    callback._probe = torch.randn(2, 1, 8, 8)
    return callback


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return settle(create_model("repvgg_tiny", num_classes=2, in_channels=1)).train()


def test_without_matplotlib_one_line_says_so_and_scalars_are_there(
    validated, network, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with SummaryWriter(str(tmp_path)) as writer:
        validated._writers = [writer]
        for _ in range(2):
            validated._measure(network)
            validated._draw(network)

    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("TensorBoard shows no pictures: ")
    assert "pip install matplotlib" in error
    tags = read(tmp_path).Tags()
    assert "fold/error" in tags["scalars"]
    assert tags["images"] == []
    assert tags["graph"]


def test_a_network_without_branches_has_pictures_of_its_predictions_alone(validated, tmp_path):
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with SummaryWriter(str(tmp_path)) as writer:
        validated._writers = [writer]
        validated._measure(plain)
        validated._draw(plain)

    tags = read(tmp_path).Tags()
    assert {tag.split("/")[0] for tag in tags["images"]} == {"val"}
    assert (tags["scalars"], tags["graph"]) == ([], False)
    assert "branches" not in tensorboard.make_layout(plain, rdrop=False)


def test_the_budget_is_a_share_of_the_time_since_the_start():
    now = 0.0
    budget = Budget(0.02, guess=1.0, clock=lambda: now)

    now = 49.0
    assert not budget.allows()
    now = 50.0
    assert budget.allows()
    with budget.spending():
        now += 3.0
    assert (budget.spent, budget.next) == (3.0, 3.0)
    now = 299.0
    assert not budget.allows()
    now = 300.0
    assert budget.allows()


def test_a_network_of_many_blocks_is_drawn_by_stage():
    blocks = nn.Sequential(*(create_model("repvgg_tiny", num_classes=2).stem for _ in range(101)))

    (name, draw), *_ = pictures.draw_anatomy(nn.ModuleDict({"body": blocks}))

    assert name == "branches/shares"
    assert figures.rasterize(draw).shape[0] < 300


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        "# title",
        "[link](http://example.com)",
        "```\n# title\n```",
        "a\n\n<b>bold</b>",
        "\x1b[31mred",
    ],
)
def test_markdown_and_html_in_texts_are_shown_as_they_are(hostile):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # inside TensorBoard
        from tensorboard.plugin_util import markdown_to_safe_html

    page = markdown_to_safe_html(tensorboard.as_code(f"name  {hostile}"))

    tags = {*re.findall(r"<(\w+)", page)}
    assert tags == {"pre", "code"}
    assert "\x1b" not in page


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["model=repvgg_a0", "rdrop=1", "seed=3", "hydra.run.dir=x", "data.root=/a"], ""),
        (["mixup=0.2", "optim.lr=1", "+optimizer.x=1"], "mixup=0.2 +optimizer.x=1"),
        (["model.dropout=0.3", "logger=csv", "resume=auto"], "model.dropout=0.3"),
        ([f"model.name={'x' * 300}"], f"model.name={'x' * 188}…"),
    ],
)
def test_overrides_without_a_column_of_their_own_share_one(given, shown):
    assert tensorboard.join_overrides(given) == shown
