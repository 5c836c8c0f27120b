import os
import socket
from pathlib import Path

import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassCalibrationError

from repvgg.data.batches import Batches, Stored
from repvgg.data.module import ImageData
from repvgg.data.sets import digits
from repvgg.training.classifier import Classifier
from tests.support.trainers import quiet_trainer

SIZES = (1, 3, 9, 21, 257)  # images: one device without any, and unequal numbers of batches


class Linear(nn.Module):
    """A network whose float64 logits do not depend on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = images.flatten(1)[:, :1] * self.weight
        return values * torch.linspace(-3, 3, 10).double()


def module() -> Classifier:
    torch.manual_seed(0)
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
    return Classifier(
        Linear(), num_classes=10, num_steps=1, num_warmup_steps=0, **settings
    ).double()


def data(count: int) -> ImageData:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    made = digits(batch_size=16)
    made.test = made.val = Stored(images, labels)
    made.on_after_batch_transfer = lambda batch, _: (batch[0].double() / 32, batch[1])
    return made


def evaluate(count: int, **options) -> dict[str, float]:
    (values,) = quiet_trainer(**options).test(module(), datamodule=data(count), verbose=False)
    return values


def evaluate_on_one_of_two(rank: int, folder: Path) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = (folder / "port").read_text()
    found = {count: evaluate(count, devices=2, strategy="ddp") for count in SIZES}
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> list[dict[int, dict[str, float]]]:
    """What each of two processes computed."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    torch.multiprocessing.start_processes(
        evaluate_on_one_of_two, (folder,), nprocs=2, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("count", SIZES)
def test_two_devices_measure_what_one_device_measures(count, on_two):
    alone = evaluate(count)

    for found in on_two:
        assert found[count]["test/accuracy"] == alone["test/accuracy"]
        assert found[count] == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("count", SIZES)
def test_metrics_are_exact_means_over_images(count):
    found, source = evaluate(count), data(count).test
    logits = module().net(source.images.double() / 32)
    loss = nn.functional.cross_entropy(logits, source.labels).item()
    hits = (logits.argmax(1) == source.labels).sum().item()
    hits5 = (logits.topk(5).indices == source.labels[:, None]).sum().item()
    calibration = MulticlassCalibrationError(10, n_bins=15)(logits.softmax(1), source.labels)

    assert found["test/accuracy"] == torch.tensor(hits / count, dtype=torch.float32).item()
    assert found["test/accuracy_top5"] == pytest.approx(hits5 / count, rel=1e-6)
    assert found["test/loss"] == pytest.approx(loss, rel=1e-6)
    assert found["test/calibration_error"] == pytest.approx(calibration.item(), rel=1e-6)


@pytest.mark.parametrize(("num_classes", "measured"), [(5, False), (6, True)])
def test_top_5_accuracy_needs_more_than_five_classes(num_classes, measured):
    made = Classifier(
        Linear(),
        num_classes=num_classes,
        lr=0.1,
        momentum=0.9,
        weight_decay=0.0,
        num_steps=1,
        num_warmup_steps=0,
    )

    assert ("accuracy_top5" in made.evaluation["test"]) == measured


def test_metrics_add_no_keys_to_a_checkpoint():
    made = module()
    images = torch.rand(4, 1, 8, 8).double()
    made._evaluate("val", (images, torch.arange(4)))

    assert list(made.state_dict()) == ["net.weight"]


def test_a_device_without_images_evaluates_one_empty_batch():
    source = Stored(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.long))
    loader = Batches(source, batch_size=4, rank=1, world_size=2)
    ((images, labels),) = loader

    assert (images.shape, labels.shape, len(loader)) == ((0, 1, 8, 8), (0,), 1)
