"""The settings of a training run, and what of Lightning's Trainer they take."""

import dataclasses

import lightning as L
import pytest

from repvgg.training.settings import Optim, Settings, scale_learning_rate
from tests.support.commands import compose


def read(*typed: str) -> Settings:
    return Settings.read(compose("train", *typed))


def test_the_settings_are_the_keys_of_the_configuration():
    config = compose("train")

    assert {field.name for field in dataclasses.fields(Settings)} == set(config)
    assert {field.name for field in dataclasses.fields(Optim)} == set(config["optim"])


@pytest.mark.parametrize(
    ("typed", "precision"),
    [
        ("32", "32-true"),
        ("'32'", "32-true"),
        ("32-true", "32-true"),
        ("bf16", "bf16-mixed"),
        ("bf16-mixed", "bf16-mixed"),
    ],
)
def test_short_names_of_precisions_are_lightnings(typed, precision):
    assert read(f"trainer.precision={typed}").trainer["precision"] == precision


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("data.batch_size=soon", "data.batch_size='soon': must be an integer of at least 1"),
        ("mixup=-1", "mixup=-1: must be a number of at least 0"),
        ("trainer.max_epochs=0", "trainer.max_epochs=0: must be an integer of at least 1"),
        ("optim.warmup_epochs=99", "optim.warmup_epochs=99: must be at most trainer.max_epochs=24"),
        ("+trainer.use_distributed_sampler=true", "the data deals its batches out"),
        ("+trainer.enable_checkpointing=false", "always keeps best.ckpt and last.ckpt"),
        ("+trainer.min_epochs=2", "nothing here stops a run early"),
    ],
)
def test_a_mistake_is_told_before_data_is_read(typed, message):
    with pytest.raises(ValueError, match=message):
        read(typed)


@pytest.mark.parametrize(
    "typed",
    [
        *("+trainer.limit_train_batches=5", "+trainer.max_steps=30", "+trainer.profiler=simple"),
        *("+trainer.fast_dev_run=true", "+trainer.val_check_interval=0.5"),
        *("trainer.deterministic=warn", "+trainer.logger=false"),
    ],
)
def test_what_lightning_takes_is_passed_on(typed):
    key = typed.lstrip("+").partition("=")[0].removeprefix("trainer.")
    trainer = {**read(typed).trainer, "accelerator": "cpu", "log_every_n_steps": 1}
    trainer.pop("_target_")

    L.Trainer(**trainer)

    assert trainer[key] is not None


def test_the_rate_is_scaled_to_the_images_in_a_step():
    optim = Optim("sgd", 0.1, 256, 0.9, 1e-4, 5)

    assert scale_learning_rate(optim, 512).scaled == 0.2
    adam = dataclasses.replace(optim, name="adamw")
    assert scale_learning_rate(adam, 1024).scaled == 0.2
    assert scale_learning_rate(dataclasses.replace(optim, base_batch_size=None), 7).scaled == 0.1
