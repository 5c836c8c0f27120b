"""What a machine does to a run: full and broken disks, folders that go, too many open files."""

import errno
import os
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import repvgg
from repvgg import checkpoint, whole
from repvgg.cli.composed import report_thread
from repvgg.contract import DataContract
from repvgg.data.images import open_image
from repvgg.deploy import predict
from repvgg.deploy.files import writing
from repvgg.training import lock
from repvgg.training.checkpoints import WholeFileIO
from repvgg.training.loggers import MetricsFile

OLD = b"old, and whole"


def fail_open(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    original = Path.open

    def fail(self, mode="r", *rest, **options):
        if "w" in mode:
            raise error
        return original(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", fail)


def fail_write(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    """Leave the file half-written, as a disk that is full does."""
    original = Path.open

    class Half:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(content[: len(content) // 2])
            raise error

    def fail(self, mode="r", *rest, **options):
        file = original(self, mode, *rest, **options)
        return Half(file) if "w" in mode else file

    monkeypatch.setattr(Path, "open", fail)


def fail_fsync(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def fail(_: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)


def fail_rename(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def fail(self: Path, target: Path) -> None:
        raise error

    monkeypatch.setattr(Path, "replace", fail)


def save_checkpoint(path: Path) -> None:
    WholeFileIO().save_checkpoint({"step": 2, "weights": torch.ones(1000)}, path)


def save_network(path: Path) -> None:
    config = {"name": "repvgg_tiny", "num_classes": 2, "in_channels": 1}
    data = DataContract(["a", "b"], 1, [8, 8], [0.5], [0.5], "bilinear")
    network = checkpoint.Network(repvgg.create_model(**config), config, data, "")
    checkpoint.save(path, checkpoint.with_noise(network, data))


def save_metrics(path: Path) -> None:
    logger = MetricsFile(path.parent)
    logger.path = path
    logger._columns = ["epoch"]
    logger.log_metrics({"a": 1.0})


def save_labels(path: Path) -> None:
    predict.write([predict.Labelled(Path("a.png"), [])], path)


def save_record(path: Path) -> None:
    whole.write(path, b"seed: 0\n" * 100)


SAVES = [save_checkpoint, save_network, save_metrics, save_labels, save_record]
FAULTS = [fail_open, fail_write, fail_fsync, fail_rename]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("save", SAVES, ids=lambda save: save.__name__)
def test_a_save_that_fails_keeps_the_old_file_and_names_it(
    save: Callable[[Path], None],
    fault: Callable[[pytest.MonkeyPatch, OSError], None],
    number: int,
    tmp_path,
    monkeypatch,
):
    path = tmp_path / "file.csv"
    path.write_bytes(OLD)
    fault(monkeypatch, OSError(number, os.strerror(number)))

    with pytest.raises(OSError, match=r"file\.csv") as caught:
        save(path)

    assert caught.value.errno == number
    assert [(left.name, left.read_bytes()) for left in tmp_path.iterdir()] == [(path.name, OLD)]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_row_that_cannot_be_appended_names_the_file(number, tmp_path, monkeypatch):
    logger = MetricsFile(tmp_path)
    logger.log_metrics({"a": 1.0})
    before = logger.path.read_text()

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            raise OSError(number, os.strerror(number))  # when the row is flushed

        def write(self, text):
            pass

    monkeypatch.setattr(Path, "open", lambda *_, **__: Full())
    with pytest.raises(OSError, match=r"metrics\.csv"):
        logger.log_metrics({"a": 2.0})

    monkeypatch.undo()
    assert logger.path.read_text() == before


def test_a_deployed_file_that_cannot_be_written_is_named(tmp_path):
    target = tmp_path / "model.onnx"
    with pytest.raises(OSError, match=r"model\.onnx"), writing(target.name), whole.named(target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_errors_that_name_a_file_or_are_not_of_the_system_stay_as_they_are(tmp_path):
    for error in (OSError(errno.EIO, "broken", "other"), OSError("in words")):
        with (
            pytest.raises(OSError, match=r"^(in words|.*'other')$") as caught,
            whole.named(tmp_path),
        ):
            raise error

        assert caught.value is error


@pytest.mark.parametrize("gone", ["deleted", "moved", "replaced by a file"])
def test_a_folder_that_goes_during_a_run_is_told_in_one_line(gone, tmp_path):
    folder = tmp_path / "run"

    def train() -> None:
        folder.rename(tmp_path / "elsewhere")
        if gone == "deleted":
            shutil.rmtree(tmp_path / "elsewhere")
        elif gone == "replaced by a file":
            folder.touch()
        whole.write(folder / "results.json", b"{}")

    with pytest.raises(ValueError, match=r"run is gone: it was deleted, moved"), lock.hold(folder):
        train()


def test_an_error_in_a_folder_that_is_there_is_not_about_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"), lock.hold(tmp_path / "run"):
        (tmp_path / "none").read_bytes()


def test_metrics_that_are_deleted_during_a_run_begin_anew_with_their_columns(tmp_path):
    logger = MetricsFile(tmp_path)
    logger.log_metrics({"a": 1.0}, step=1)
    logger.path.unlink()

    logger.log_metrics({"a": 2.0}, step=2)
    logger.log_metrics({"b": 3.0}, step=3)

    assert logger.path.read_text() == "epoch,step,a,b\n,2,2.0,\n,3,,3.0\n"


def test_too_many_open_files_are_not_the_fault_of_an_image(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files") as caught:
            open_image(tmp_path / "a.png", 3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    assert caught.value.errno == errno.EMFILE


def test_a_thread_that_keeps_its_error_for_the_main_thread_prints_nothing(tmp_path, capsys):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    keeps, ends = threading.Thread(), threading.Thread()
    keeps.exception = error  # as TensorBoard's writer does

    report_thread(error, keeps)
    assert capsys.readouterr().err == ""
    report_thread(error, ends)
    assert capsys.readouterr().err == "a thread ended: [Errno 28] No space left on device\n"
