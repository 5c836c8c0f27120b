"""The certificate in the event files of the run that trained the checkpoint."""

import io
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from repvgg.deploy.report.events import add_to_run
from tests.support.reports import whole_report


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """In the folder of a run with an event file."""
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("val/accuracy", 0.5)
    return tmp_path / "checkpoints" / "best.ckpt"


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_the_run_shows_the_certificate_and_its_figures(checkpoint, tmp_path):
    assert add_to_run(whole_report(), checkpoint) == ""

    events = read(tmp_path)
    (text,) = events.Tensors("deploy/certificate/text_summary")
    assert text.tensor_proto.string_val[0].decode() == whole_report().to_markdown()
    assert events.Tags()["images"] == [
        "deploy/latency",
        "deploy/error_by_block",
        "deploy/int8_by_layer",
    ]
    for tag in events.Tags()["images"]:
        picture = Image.open(io.BytesIO(events.Images(tag)[0].encoded_image_string))
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        assert pixels.float().std() > 5
    assert events.Scalars("val/accuracy")[0].value == 0.5


def test_a_run_without_event_files_gets_none(tmp_path):
    assert add_to_run(whole_report(), tmp_path / "checkpoints" / "best.ckpt") == ""
    assert add_to_run(whole_report(), tmp_path / "best.ckpt") == ""

    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_outside_of_a_run_changes_nothing(checkpoint, tmp_path):
    before = sorted(tmp_path.rglob("*"))

    assert add_to_run(whole_report(), tmp_path / "models" / "best.ckpt") == ""

    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_written_is_said_in_one_line(checkpoint, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(SummaryWriter, "_get_file_writer", fail)

    missing = add_to_run(whole_report(), checkpoint)

    assert missing.startswith("TensorBoard does not show all of the certificate: ")
    assert "\n" not in missing


def test_without_matplotlib_the_text_is_there(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    missing = add_to_run(whole_report(), checkpoint)

    assert "pip install matplotlib" in missing
    assert read(tmp_path).Tags()["tensors"] == ["deploy/certificate/text_summary"]
