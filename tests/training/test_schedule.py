import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from repvgg.training.schedule import Schedule, from_trainer_arguments, optimizer_steps
from tests.support.trainers import quiet_trainer

BATCHES = 10


class Count(L.LightningModule):
    """Remembers the steps and the batches that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches: list[int] = []

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.batches.append(0)
        self.batches[-1] += 1
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(torch.zeros(BATCHES))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_epochs": 3}, (30, 10, 10)),
        ({"max_epochs": 3, "accumulate_grad_batches": 4}, (9, 3, 10)),
        ({"max_epochs": 2, "limit_train_batches": 5}, (10, 5, 5)),
        ({"max_epochs": 2, "limit_train_batches": 50}, (20, 10, 10)),
        ({"max_epochs": 2, "limit_train_batches": 1}, (2, 1, 1)),
        ({"max_epochs": 2, "limit_train_batches": 1.0}, (20, 10, 10)),
        ({"max_epochs": 2, "limit_train_batches": 3.0}, (6, 3, 3)),
        ({"max_epochs": 2, "limit_train_batches": 0.29}, (4, 2, 2)),
        ({"max_epochs": 2, "limit_train_batches": 0.7}, (14, 7, 7)),
        ({"max_epochs": 2, "limit_train_batches": 5, "accumulate_grad_batches": 2}, (6, 3, 5)),
        ({"max_epochs": 3, "max_steps": 17}, (17, 10, 10)),
        ({"max_epochs": 1, "max_steps": 17}, (10, 10, 10)),
        ({"max_epochs": 3, "max_steps": 4, "accumulate_grad_batches": 4}, (4, 3, 10)),
        ({"max_epochs": 3, "overfit_batches": 2}, (6, 2, 2)),
        ({"max_epochs": 3, "overfit_batches": 0.35}, (9, 3, 3)),
        ({"max_epochs": 3, "overfit_batches": 2, "limit_train_batches": 7}, (6, 2, 2)),
        ({"max_epochs": 3, "fast_dev_run": True}, (1, 1, 1)),
        ({"max_epochs": 3, "fast_dev_run": 3}, (3, 3, 3)),
        ({"max_epochs": 3, "fast_dev_run": 3, "accumulate_grad_batches": 2}, (2, 2, 3)),
        ({"max_epochs": 3, "fast_dev_run": 3, "limit_train_batches": 7}, (3, 3, 3)),
        ({"max_epochs": 3, "fast_dev_run": 3, "overfit_batches": 2}, (2, 2, 2)),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled:UserWarning")
def test_the_steps_are_those_that_a_trainer_takes(options, expected):
    module = Count()
    trainer = quiet_trainer(**options)
    trainer.fit(module)

    counted = optimizer_steps(BATCHES, **options)
    assert counted == Schedule(*expected)
    assert counted.total == trainer.global_step
    assert counted.batches == max(module.batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit_train_batches": 0}, "trainer.limit_train_batches=0: trains on none of the 10"),
        ({"limit_train_batches": 0.05}, "trainer.limit_train_batches=0.05: trains on none"),
        ({"overfit_batches": 0.05}, "trainer.overfit_batches=0.05: trains on none"),
        ({"max_steps": 0}, "trainer.max_steps=0: trains on none"),
        ({"limit_train_batches": 2.5}, r"limit_train_batches=2.5: must be a share in \[0, 1\]"),
        ({"limit_train_batches": -1}, "limit_train_batches=-1: must be a share"),
    ],
)
def test_a_run_without_steps_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        optimizer_steps(BATCHES, max_epochs=2, **options)


def test_settings_of_a_trainer_that_are_null_or_others_do_not_count():
    settings = {"max_epochs": 2, "max_steps": None, "devices": 2, "accumulate_grad_batches": 3}

    assert from_trainer_arguments(BATCHES, settings) == Schedule(8, 4, 10)
