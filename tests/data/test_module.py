"""The data module in Lightning's hands: its switches, devices and what it says of itself."""

import os

import lightning as L
import pytest
import torch
from torch import nn

from repvgg.data import sets as sources
from repvgg.data.batches import Batches, Stored
from repvgg.data.folders import imagefolder
from repvgg.data.module import Place
from repvgg.data.sets import digits
from tests.support.commands import make
from tests.support.processes import Process
from tests.support.trainers import quiet_trainer


class Recorder(L.LightningModule):
    """Notes a number for each batch that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[float]] = {"train": [], "val": []}

    def note(self, part: str, batch) -> None:
        self.seen[part].append(batch[0].double().sum().item())

    def training_step(self, batch, _):
        self.note("train", batch)
        return self.weight * batch[0].mean()

    def validation_step(self, batch, _):
        self.note("val", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, **options) -> dict[str, list[float]]:
    module = Recorder()
    quiet_trainer(**options).fit(module, datamodule=data)
    return module.seen


def test_overfitting_trains_on_the_same_batch_in_every_epoch():
    data = digits(batch_size=100, mixup=0.2)
    seen = fit(data, overfit_batches=2, max_epochs=3)

    assert seen["train"] == seen["train"][:2] * 3
    assert len(set(seen["train"])) == 2
    assert seen["val"] == seen["val"][:2] * 3


def test_without_the_switch_every_epoch_has_other_batches():
    seen = fit(digits(batch_size=100), limit_train_batches=2, limit_val_batches=2, max_epochs=2)

    assert len(set(seen["train"])) == 4
    assert seen["val"] == seen["val"][:2] * 2


def test_workers_end_with_the_fit_that_they_read_for(tmp_path):
    make(tmp_path / "train")
    data = imagefolder(root=str(tmp_path), batch_size=2, image_size=16, num_workers=1, holdout=0.3)

    fit(data, max_epochs=2)

    assert (data.train._workers, data.val._workers) == (None, None)


def test_images_in_memory_are_sent_to_a_device_once(monkeypatch):
    data = digits()
    monkeypatch.setattr(data, "_place", lambda: Place(device=torch.device("meta")))

    first, again = (data.train_dataloader().source for _ in range(2))

    assert first.images.device.type == "meta"
    assert again is first
    data.train = Stored(*(tensor[:100] for tensor in data.train))
    assert len(data.train_dataloader().source.labels) == 100


@pytest.mark.parametrize("workers", [0, 2])
def test_a_device_without_images_gets_one_batch_of_none(workers, tmp_path):
    make(tmp_path / "train")
    make(tmp_path / "val", count=1)
    files = imagefolder(root=str(tmp_path), batch_size=2, image_size=16, num_workers=workers).val

    loader = Batches(files, batch_size=2, rank=2, world_size=3)

    ((images, labels),) = loader
    assert len(loader) == 1
    assert (images.shape, images.dtype) == ((0, 3, 16, 16), torch.uint8)
    assert (labels.shape, labels.dtype) == ((0,), torch.int64)
    files.close()


DEVICES = """
import lightning as L, torch
from repvgg.data.batches import Stored
from repvgg.data.sets import digits

class Counter(L.LightningModule):
    count = 0.0

    def validation_step(self, batch, _):
        self.count += len(batch[0])

    def on_validation_epoch_end(self):
        self.log("images", self.count, sync_dist=True, reduce_fx="sum", rank_zero_only=False)

data = digits()
data.val = Stored(*(tensor[:1] for tensor in data.val))
trainer = L.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False
)
images = trainer.validate(Counter(), datamodule=data, verbose=False)[0]["images"]
print(f"counted {images}\\n", end="", flush=True)  # in one piece: both processes print
"""


@pytest.mark.slow
def test_more_devices_than_validation_images_neither_hang_nor_count_twice(tmp_path):
    (tmp_path / "devices.py").write_text(DEVICES)

    done = Process(tmp_path / "devices.py", cwd=tmp_path, forks=1).completed()

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("counted 1.0") == 2


def test_the_summary_of_data_with_test_images_is_one_line():
    data = digits()

    assert data.has_test
    assert data.summary() == "10 classes, images: 1,283 training, 257 validation, 257 test"


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ([], 2),
        (["sched_getaffinity"], 5),
    ],
)
def test_workers_are_counted_on_every_system(missing, expected, monkeypatch):
    counts = {
        "sched_getaffinity": lambda _: {0, 1},
        "cpu_count": lambda: 5,
    }
    for name, count in counts.items():
        monkeypatch.setattr(os, name, count, raising=False)
    for name in missing:
        monkeypatch.delattr(os, name)

    assert sources.count_workers(None) == expected
