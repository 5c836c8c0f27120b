"""The settings of a training run, and what of Lightning's Trainer they take."""

import dataclasses

import lightning as L
import pytest

from repvgg.training.settings import Optim, Settings, scale_learning_rate
from tests.support.commands import compose


def read(*typed: str) -> Settings:
    settings = Settings.read(compose("train", *typed))
    settings.check_trainer()
    return settings


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
    assert read(f"trainer.precision={typed}").trainer.precision == precision


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("data.batch_size=soon", "data.batch_size='soon': must be an integer of at least 1"),
        (
            "data=cifar10 data.augment=basic",
            "must be a list .* pass data/augment=basic",
        ),
        ("mixup=-1", "mixup=-1: must be a number of at least 0"),
        ("rdrop=-1", "rdrop=-1: must be a number of at least 0"),
        ("rdrop=maybe", "rdrop='maybe': must be a number of at least 0"),
        ("rdrop=true model.dropout=0", "model.dropout=0: .*pass rdrop=false"),
        ("trainer.log_every_n_steps=soon", "trainer.log_every_n_steps='soon': must be an integer"),
        ("trainer.max_epochs=0", "trainer.max_epochs=0: must be an integer of at least 1"),
        ("optim.warmup_epochs=99", "optim.warmup_epochs=99: must be at most trainer.max_epochs=24"),
        ("+trainer.use_distributed_sampler=true", "the data module splits the batches"),
        ("+trainer.enable_checkpointing=false", "always keeps best.ckpt and last.ckpt"),
        ("+trainer.min_epochs=2", "nothing here stops a run early"),
        ("+trainer.logger=false", "trainer.logger=False: pass logger=csv, logger=wandb, "),
        ("+trainer.callbacks=[]", r"trainer.callbacks=\[\]: pass callbacks=early_stopping, "),
        ("+optimizer.lr=1", "optimizer.lr=1: pass optim.lr=RATE"),
        ("+optimizer.weight_decay=1", "optimizer.weight_decay=1: pass optim.weight_decay=DECAY"),
        ("+optimizer.alpha=1", "optimizer.alpha=1: has no effect without optimizer._target_"),
        ("+scheduler.optimizer=1", "scheduler.optimizer=1: the run passes the optimizer"),
        ("+loss.margin=1", "loss.margin=1: has no effect without loss._target_"),
        ("loss=focal", "loss=focal: pass loss._target_=package.Class"),
        ("loss=mine.focal", "loss=mine.focal: pass loss._target_=mine.focal"),
        ("+experiment.seed=1", "experiment: the recipe must begin with # @package _global_"),
        ("+epochs=10", "epochs: there is no such key; pass trainer.max_epochs=10"),
        ("scheduler_interval=epoch", "scheduler_interval='epoch': has no effect without sched"),
        (
            "scheduler._target_=torch.optim.lr_scheduler.StepLR scheduler_interval=batch",
            "scheduler_interval='batch': must be null or one of step, epoch",
        ),
        ("freeze=stem", "freeze='stem': must be a list of module names"),
        ("freeze=[true]", r"freeze=\[True\]: must be a list of module names"),
        ("+logger.mine=5", "logger.mine=5: pass logger.mine._target_=package.Class"),
        ("+callbacks.mine.patience=5", "callbacks.mine.patience=5: has no effect without"),
    ],
)
def test_a_mistake_is_an_error_before_data_is_read(typed, message):
    with pytest.raises(ValueError, match=message):
        read(*typed.split())


def test_the_modules_of_a_sequential_are_named_by_numbers():
    assert read("freeze=[0,stem,features.1]").freeze == ["0", "stem", "features.1"]


@pytest.mark.parametrize(
    ("typed", "rdrop"), [("true", 1.0), ("false", 0.0), ("0.3", 0.3), ("2", 2.0)]
)
def test_rdrop_is_one_number_whose_zero_is_off(typed, rdrop):
    assert read(f"rdrop={typed}").rdrop == rdrop


@pytest.mark.parametrize(
    ("passed", "message"),
    [
        ("+losss=focal", "losss: there is no such key; did you mean loss?"),
        ("+rdrop_warmpu=1", "rdrop_warmpu: .*did you mean rdrop_warmup?"),
        ("+optim.momentun=1", "optim.momentun: .*did you mean optim.momentum?"),
        ("+trainer.max_step=1", "trainer.max_step: .*did you mean max_steps?"),
    ],
)
def test_an_added_key_that_nothing_reads_is_an_error(passed, message):
    with pytest.raises(ValueError, match=message):
        read(passed)


@pytest.mark.parametrize(
    "typed",
    [
        *("+trainer.limit_train_batches=5", "+trainer.max_steps=30", "+trainer.profiler=simple"),
        *("+trainer.fast_dev_run=true", "+trainer.val_check_interval=0.5"),
        *("trainer.deterministic=warn", "+trainer.inference_mode=false"),
    ],
)
def test_what_lightning_takes_is_passed_on(typed):
    key = typed.lstrip("+").partition("=")[0].removeprefix("trainer.")
    arguments = read(typed).trainer
    trainer = {**arguments.scalars(), "logger": False, "accelerator": "cpu"}
    trainer.pop("_target_")

    L.Trainer(**trainer)

    assert trainer[key] is not None


def test_the_rate_is_scaled_to_the_images_in_a_step():
    optim = Optim("sgd", 0.1, 256, 0.9, 1e-4, 5)

    assert scale_learning_rate(optim, 512).scaled == 0.2
    adam = dataclasses.replace(optim, name="adamw")
    assert scale_learning_rate(adam, 1024).scaled == 0.2
    assert scale_learning_rate(dataclasses.replace(optim, base_batch_size=None), 7).scaled == 0.1
