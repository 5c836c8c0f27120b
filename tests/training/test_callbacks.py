import copy
import functools
import os
import pickle
import platform
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from repvgg import checkpoint
from repvgg.data.batches import WorkersDied
from repvgg.data.module import ImageData
from repvgg.data.sets import digits
from repvgg.models.reestimate import reestimate_bn
from repvgg.models.registry import build_model
from repvgg.training import callbacks
from repvgg.training.callbacks import (
    EMA,
    DeployedValidation,
    Interrupted,
    ReestimateBN,
    SaveOnSignal,
    SelfDescribing,
    Throughput,
)
from repvgg.training.checkpoints import BestCheckpoint, LastCheckpoint, WholeFileIO
from repvgg.training.classifier import Classifier
from repvgg.training.divergence import StopOnDivergence
from repvgg.training.processes import cluster_plugins
from repvgg.training.progress import EpochLines
from tests.support.trainers import quiet_trainer

MODEL = {
    "name": "repvgg_tiny",
    "num_classes": 10,
    "in_channels": 1,
    "strides": [1, 1, 2, 2, 1],
    "depths": [1, 1, 1, 1],
    "widths": [8, 8, 8, 8],
    "dropout": 0.2,
}
OUTPUT = {"capture_output": True, "text": True, "check": True}


def classifier(**noise) -> Classifier:
    torch.manual_seed(0)
    return Classifier(
        build_model(MODEL | noise),
        num_classes=10,
        lr=0.02,
        momentum=0.9,
        weight_decay=1e-4,
        num_steps=15,
        num_warmup_steps=2,
        rdrop=1.0,
    )


def trainer(
    folder: Path,
    *callbacks: L.Callback,
    epochs: int = 3,
    accumulate: int = 1,
    environment: Sequence[Any] = (),
    **options: Any,
) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=any(isinstance(part, EpochLines) for part in callbacks),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        plugins=[WholeFileIO(), *environment],
        callbacks=[*callbacks, BestCheckpoint(folder), LastCheckpoint(folder)],
        **options,
    )


def weights(module: Classifier) -> list[torch.Tensor]:
    return [value.clone() for value in module.state_dict().values()]


class SignalAt(L.Callback):
    """Sends this process a signal in the middle of a step, as a user or a scheduler would."""

    def __init__(self, step: int, signum: int = signal.SIGINT) -> None:
        self.step, self.signum = step, signum

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.signum)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> list[torch.Tensor]:
    module = classifier()
    trainer(tmp_path_factory.mktemp("whole")).fit(module, datamodule=digits(batch_size=256))
    return weights(module)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* not empty:UserWarning")
@pytest.mark.parametrize(
    ("step", "signum"),
    [
        pytest.param(0, signal.SIGINT, id="first step"),
        pytest.param(4, signal.SIGTERM, id="last step of an epoch"),
        pytest.param(7, signal.SIGHUP, id="within an epoch"),
        pytest.param(9, signal.SIGUSR1, id="last step of a later epoch"),
    ],
)
def test_a_run_stopped_by_a_signal_and_resumed_ends_with_the_same_weights(
    step, signum, tmp_path, uninterrupted
):
    last = tmp_path / "last.ckpt"
    with pytest.raises(Interrupted) as stopped:
        trainer(tmp_path, SignalAt(step, signum), SaveOnSignal(last)).fit(
            classifier(), datamodule=digits(batch_size=256)
        )

    resumed = classifier()
    trainer(tmp_path).fit(
        resumed, datamodule=digits(batch_size=256), ckpt_path=last, weights_only=True
    )

    assert stopped.value.signum == signum
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), uninterrupted, strict=True))


def test_a_signal_in_the_last_epoch_leaves_a_finished_run(tmp_path, uninterrupted):
    last = tmp_path / "last.ckpt"
    module = classifier()
    with pytest.raises(Interrupted):
        trainer(tmp_path, SignalAt(14), SaveOnSignal(last)).fit(
            module, datamodule=digits(batch_size=256)
        )

    saved = torch.load(last, weights_only=True)["state_dict"].values()
    assert all(torch.equal(a, b) for a, b in zip(saved, uninterrupted, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* not empty:UserWarning")
@pytest.mark.parametrize(
    ("batch_size", "accumulate", "step"),
    [(256, 2, 1), (128, 3, 2), (128, 3, 5), (1283, 1, 0)],
    ids=["every 2 of 5", "every 3 of 10", "every 3 of 10, later", "one batch an epoch"],
)
def test_a_stop_between_accumulated_gradients_or_epochs_loses_nothing(
    batch_size, accumulate, step, tmp_path
):
    class SignalInBatch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.fit_loop.epoch_loop.total_batch_idx == step * accumulate:
                os.kill(os.getpid(), signal.SIGINT)

    def data() -> ImageData:
        return digits(batch_size=batch_size)

    whole, resumed = classifier(), classifier()
    trainer(tmp_path / "whole", accumulate=accumulate).fit(whole, datamodule=data())
    last = tmp_path / "last.ckpt"
    with pytest.raises(Interrupted):
        trainer(tmp_path, SignalInBatch(), SaveOnSignal(last), accumulate=accumulate).fit(
            classifier(), datamodule=data()
        )
    stopped_in_epoch = torch.load(last, weights_only=True)["epoch"]

    trainer(tmp_path, accumulate=accumulate).fit(
        resumed, datamodule=data(), ckpt_path=last, weights_only=True
    )

    assert stopped_in_epoch < 2
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(whole), strict=True))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* not empty:UserWarning")
def test_a_run_that_was_moved_keeps_its_best_checkpoint(tmp_path):
    trainer(tmp_path / "here", epochs=1).fit(classifier(), datamodule=digits(batch_size=256))
    (tmp_path / "here").rename(tmp_path / "there")
    last = tmp_path / "there" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    (key,) = [key for key in content["callbacks"] if key.startswith("BestCheckpoint")]
    content["callbacks"][key]["best_model_score"] = torch.tensor(2.0)  # never to be beaten
    torch.save(content, last)
    before = (tmp_path / "there" / "best.ckpt").read_bytes()

    trainer(tmp_path / "there", epochs=2).fit(
        classifier(), datamodule=digits(batch_size=256), ckpt_path=last, weights_only=True
    )

    assert (tmp_path / "there" / "best.ckpt").read_bytes() == before


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* not empty:UserWarning")
def test_a_run_that_left_its_best_checkpoint_behind_keeps_a_new_one(tmp_path):
    trainer(tmp_path / "here", epochs=1).fit(classifier(), datamodule=digits(batch_size=256))
    (tmp_path / "there").mkdir()
    last = (tmp_path / "here" / "last.ckpt").rename(tmp_path / "there" / "last.ckpt")

    trainer(tmp_path / "there", epochs=2).fit(
        classifier(), datamodule=digits(batch_size=256), ckpt_path=last, weights_only=True
    )

    best = torch.load(tmp_path / "there" / "best.ckpt", weights_only=True)
    assert best["epoch"] == 1


def test_signal_handlers_are_given_back(tmp_path):
    stopping = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
    before = [signal.getsignal(s) for s in stopping]

    trainer(tmp_path, SaveOnSignal(tmp_path / "last.ckpt"), epochs=1).fit(
        classifier(), datamodule=digits(batch_size=256)
    )

    assert [signal.getsignal(s) for s in stopping] == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_launcher_sends_twice_still_saves(signum, tmp_path):
    last = tmp_path / "last.ckpt"

    with pytest.raises(Interrupted):
        trainer(tmp_path, SignalAt(3, signum), SignalAt(3, signum), SaveOnSignal(last)).fit(
            classifier(), datamodule=digits(batch_size=256)
        )

    assert torch.load(last, weights_only=True)["global_step"] == 4


@pytest.mark.parametrize(
    ("signum", "saved"), [(signal.SIGINT, False), (signal.SIGTERM, True)], ids=["Ctrl-C", "SIGTERM"]
)
def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_saves(
    signum, saved, tmp_path, monkeypatch
):
    monkeypatch.setattr(callbacks, "REPEAT_WITHIN", 0.0)
    last = tmp_path / "last.ckpt"

    with pytest.raises(Interrupted):
        trainer(tmp_path, SignalAt(3, signum), SignalAt(3, signum), SaveOnSignal(last)).fit(
            classifier(), datamodule=digits(batch_size=256)
        )

    assert last.exists() == saved


class FailAt(L.Callback):
    """Raises an error in a step, after a signal or without one."""

    def __init__(self, error: Exception, *, after_signal: bool) -> None:
        self.error, self.after_signal = error, after_signal

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.after_signal:
            os.kill(os.getpid(), signal.SIGTERM)
        raise self.error


@pytest.mark.parametrize(
    ("error", "after_signal", "expected"),
    [
        (WorkersDied("a worker died"), True, Interrupted),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated."),
            True,
            Interrupted,
        ),
        (WorkersDied("a worker died"), False, WorkersDied),
        (KeyError("of the user"), True, KeyError),
    ],
)
def test_workers_that_die_of_a_signal_count_as_the_signal(error, after_signal, expected, tmp_path):
    fail = FailAt(error, after_signal=after_signal)

    with pytest.raises(expected):
        trainer(tmp_path, fail, SaveOnSignal(tmp_path / "last.ckpt")).fit(
            classifier(), datamodule=digits(batch_size=256)
        )


def test_under_slurm_a_signal_saves_once_and_no_other_run_starts_from_it(tmp_path, monkeypatch):
    numbers = {"NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_ID": "7"}
    for key, value in numbers.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"of another run")

    def fit(folder: Path) -> None:
        loop = trainer(
            folder,
            SignalAt(3, signal.SIGUSR1),
            SaveOnSignal(folder / "last.ckpt"),
            default_root_dir=folder,
            environment=cluster_plugins(),
        )
        with pytest.raises(Interrupted, match="SIGUSR1"):
            loop.fit(classifier(), datamodule=digits(batch_size=256))

    for name in ("first", "second"):
        fit(tmp_path / name)
        assert torch.load(tmp_path / name / "last.ckpt", weights_only=True)["global_step"] == 4

    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "first",
        "hpc_ckpt_1.ckpt",
        "second",
    ]


def test_a_run_keeps_the_best_and_the_last_checkpoint_and_nothing_else(tmp_path):
    trainer(tmp_path).fit(classifier(), datamodule=digits(batch_size=256))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 2


@pytest.mark.parametrize(
    ("history", "kept"),
    [
        ([(0.9, 0.3), (0.8, 0.1)], 0),
        ([(0.9, 0.3), (0.95, 0.5)], 1),
        ([(0.9, 0.3), (0.9, 0.2), (0.9, 0.25)], 1),
        ([(0.9, 0.3), (0.95, 0.5), (0.95, 0.5), (0.95, 0.4)], 3),
    ],
    ids=["first", "more accurate", "tie, lower loss", "both"],
)
def test_the_best_is_the_most_accurate_and_of_those_the_lowest_loss(history, kept, tmp_path):
    class Scripted(L.LightningModule):
        """Reports a given history, and remembers the epoch in its one weight."""

        def __init__(self):
            super().__init__()
            self.epoch = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch, batch_idx):
            self.epoch.data.fill_(self.current_epoch)
            return self.epoch.sum() * 0

        def validation_step(self, batch, batch_idx):
            accuracy, loss = history[self.current_epoch]
            self.log_dict({"val/accuracy": accuracy, "val/loss": loss}, batch_size=1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    data = digits(batch_size=512)
    trainer(tmp_path, epochs=len(history)).fit(Scripted(), datamodule=data)

    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert saved["state_dict"]["epoch"].item() == kept


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2], ids=lambda every: f"validated every {every}")
def test_every_checkpoint_holds_statistics_with_stochastic_layers_off(every, tmp_path):
    module, data = classifier(branch_drop=0.3), digits(batch_size=256)
    found = []

    class Compare(LastCheckpoint):
        def _save_checkpoint(self, trainer, filepath):
            super()._save_checkpoint(trainer, filepath)
            saved = torch.load(filepath, weights_only=True)["state_dict"]
            network = copy.deepcopy(module.net)
            batches = (data.on_after_batch_transfer(b, 0)[0] for b in data.train_dataloader())
            reestimate_bn(network, batches)
            found.append(
                [torch.equal(v, saved[f"net.{k}"]) for k, v in network.state_dict().items()]
            )

    trainer(
        tmp_path, ReestimateBN(), Compare(tmp_path / "each"), check_val_every_n_epoch=every
    ).fit(module, datamodule=data)

    assert len(found) == 3
    assert all(map(all, found))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* not empty:UserWarning")
def test_a_run_with_reestimated_statistics_resumes_to_the_same_weights(tmp_path):
    def data() -> ImageData:
        return digits(batch_size=256)

    whole = classifier(branch_drop=0.3)
    trainer(tmp_path / "whole", ReestimateBN()).fit(whole, datamodule=data())
    last = tmp_path / "last.ckpt"
    with pytest.raises(Interrupted):
        trainer(tmp_path, ReestimateBN(), SignalAt(7), SaveOnSignal(last)).fit(
            classifier(branch_drop=0.3), datamodule=data()
        )
    resumed = classifier(branch_drop=0.3)

    trainer(tmp_path, ReestimateBN()).fit(
        resumed, datamodule=data(), ckpt_path=last, weights_only=True
    )

    assert all(map(torch.equal, weights(resumed), weights(whole)))


@pytest.mark.slow
def test_training_is_the_same_with_and_without_the_reestimate(tmp_path):
    def parameters(*callbacks: L.Callback) -> list[torch.Tensor]:
        module = classifier(drop_path=0.3)
        trainer(tmp_path / str(len(callbacks)), *callbacks).fit(
            module, datamodule=digits(batch_size=256)
        )
        return [parameter.detach() for parameter in module.parameters()]

    pairs = zip(parameters(), parameters(ReestimateBN()), strict=True)
    assert all(torch.equal(without, with_it) for without, with_it in pairs)


def test_a_failed_write_leaves_the_old_checkpoint_whole(tmp_path):
    path, limits = tmp_path / "last.ckpt", resource.getrlimit(resource.RLIMIT_FSIZE)
    WholeFileIO().save_checkpoint({"step": 1}, path)

    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a disk with 1000 bytes left
    try:
        with pytest.raises(OSError, match="File too large"):
            WholeFileIO().save_checkpoint({"step": 2, "weights": torch.ones(10_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


class Remember(L.Callback):
    """The weights after each step, as they train."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append([value.clone() for value in pl_module.net.state_dict().values()])


def test_the_average_is_the_formulas_and_is_what_is_saved_validated_and_tested(tmp_path):
    module, remember = classifier(), Remember()
    seen = {}

    class Look(L.Callback):
        def on_validation_batch_start(self, trainer, pl_module, *_):
            seen["val"] = pl_module.net.state_dict()["linear.weight"].clone()

        def on_test_batch_start(self, trainer, pl_module, *_):
            seen["test"] = pl_module.net.state_dict()["linear.weight"].clone()

    loop = trainer(tmp_path, EMA(0.9), remember, Look(), epochs=2)
    loop.fit(module, datamodule=digits(batch_size=256))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    loop.test(
        module,
        datamodule=digits(batch_size=256),
        ckpt_path=tmp_path / "last.ckpt",
        weights_only=True,
        verbose=False,
    )

    average = remember.steps[0]
    for k, step in enumerate(remember.steps[1:], start=1):
        decay = min(0.9, (1 + k) / (10 + k))
        average = [
            decay * old + (1 - decay) * new if new.is_floating_point() else new
            for old, new in zip(average, step, strict=True)
        ]
    for (name, _), value in zip(module.net.state_dict().items(), average, strict=True):
        torch.testing.assert_close(saved[f"net.{name}"], value, rtol=1e-4, atol=1e-6)
    assert torch.equal(seen["val"], saved["net.linear.weight"])
    assert torch.equal(seen["test"], saved["net.linear.weight"])


@pytest.mark.slow
def test_training_is_the_same_with_and_without_the_average(tmp_path):
    without, with_it = Remember(), Remember()

    trainer(tmp_path / "a", without).fit(classifier(), datamodule=digits(batch_size=256))
    trainer(tmp_path / "b", EMA(0.9), with_it).fit(classifier(), datamodule=digits(batch_size=256))

    assert all(map(torch.equal, without.steps[-1], with_it.steps[-1]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* not empty:UserWarning")
@pytest.mark.parametrize(
    ("step", "noise"),
    [(9, {}), (7, {"branch_drop": 0.3})],
    ids=["last step of an epoch", "within an epoch, re-estimated"],
)
def test_a_run_with_an_average_resumes_to_the_same_average(step, noise, tmp_path):
    def callbacks() -> list[L.Callback]:
        return [*([ReestimateBN()] if noise else []), EMA(0.9)]

    def last_of(folder: Path) -> dict:
        content = torch.load(folder / "last.ckpt", weights_only=True)
        return content["state_dict"] | {
            f"current {key}": value for key, value in content["current_model_state"].items()
        }

    trainer(tmp_path / "whole", *callbacks()).fit(
        classifier(**noise), datamodule=digits(batch_size=256)
    )
    last = tmp_path / "stopped" / "last.ckpt"
    with pytest.raises(Interrupted):
        trainer(last.parent, *callbacks(), SignalAt(step), SaveOnSignal(last)).fit(
            classifier(**noise), datamodule=digits(batch_size=256)
        )

    trainer(last.parent, *callbacks()).fit(
        classifier(**noise), datamodule=digits(batch_size=256), ckpt_path=last, weights_only=True
    )

    expected, given = last_of(tmp_path / "whole"), last_of(tmp_path / "stopped")
    assert all(torch.equal(expected[key], given[key]) for key in expected)


def test_a_checkpoint_describes_the_average(tmp_path):
    module = classifier()
    describe = SelfDescribing("key", lambda net: {"weight": net.linear.weight.detach().clone()})

    trainer(tmp_path, EMA(0.9), describe, epochs=1).fit(module, datamodule=digits(batch_size=256))

    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(content["key"]["weight"], content["state_dict"]["net.linear.weight"])
    assert not torch.equal(
        content["key"]["weight"], content["current_model_state"]["net.linear.weight"]
    )


def test_folded_validation_folds_the_average(tmp_path):
    images = torch.rand(4, 1, 8, 8)
    logits = []

    class Look(L.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_):
            logits.append((pl_module.evaluated(images), pl_module.net(images)))

    trainer(tmp_path, EMA(0.9), DeployedValidation(), Look(), epochs=1).fit(
        classifier(), datamodule=digits(batch_size=256)
    )

    torch.testing.assert_close(*logits[0], rtol=1e-4, atol=1e-5)


def test_what_a_killed_process_left_beside_a_checkpoint_goes_with_the_next_save(tmp_path):
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], **OUTPUT)
    host = platform.node()
    (tmp_path / f".last.ckpt.{host}-{int(child.stdout)}-0a").write_bytes(b"half of it")
    kept = [f".last.ckpt.{host}-{os.getppid()}-0a", ".last.ckpt.elsewhere-4711-0a"]
    for name in kept:
        (tmp_path / name).write_bytes(b"of a process that runs, here or on another machine")

    WholeFileIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")

    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "last.ckpt"])


def test_a_checkpoint_is_not_written_with_storage_options(tmp_path):
    with pytest.raises(ValueError, match=r"storage_options={'anon': True}: .*leave them out"):
        WholeFileIO().save_checkpoint({}, tmp_path / "last.ckpt", storage_options={"anon": True})


def test_a_remote_path_is_written_as_lightning_writes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    WholeFileIO().save_checkpoint({"step": 1}, "memory://runs/last.ckpt")

    assert WholeFileIO().load_checkpoint("memory://runs/last.ckpt") == {"step": 1}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "average"),
    [({"limit_val_batches": 0}, False), ({"check_val_every_n_epoch": 9}, True)],
    ids=["never validated", "not yet, EMA"],
)
def test_without_validation_the_best_checkpoint_is_the_last(options, average, tmp_path, capsys):
    averages = [EMA(0.9)] if average else []

    trainer(tmp_path, *averages, epochs=2, **options).fit(
        classifier(), datamodule=digits(batch_size=256)
    )

    best, last = (torch.load(tmp_path / f"{name}.ckpt")["state_dict"] for name in ("best", "last"))
    assert all(torch.equal(best[key], last[key]) for key in last)


def test_a_run_that_ends_within_an_epoch_is_validated_there(tmp_path):
    module = classifier()

    trainer(tmp_path, max_steps=7).fit(module, datamodule=digits(batch_size=256))

    best = torch.load(tmp_path / "best.ckpt")
    assert best["global_step"] == 7
    assert torch.equal(best["state_dict"]["net.linear.weight"], module.net.linear.weight)


def test_a_development_run_saves_nothing(tmp_path):
    trainer(tmp_path / "run", SaveOnSignal(tmp_path / "last.ckpt"), fast_dev_run=True).fit(
        classifier(), datamodule=digits(batch_size=256)
    )

    assert list(tmp_path.rglob("*.ckpt")) == []


def test_overfitting_trains_on_the_same_images_in_every_epoch(tmp_path):
    class Look(L.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen.append(batch[0])

    look = Look()
    trainer(tmp_path, look, overfit_batches=2).fit(classifier(), datamodule=digits(batch_size=64))

    first, second, *rest = look.seen
    assert len(rest) == 4
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(rest, [first, second] * 2, strict=True))


class Own(Classifier):
    """A user's module that brings its own loaders."""

    def train_dataloader(self):
        return loader(shuffle=True)

    def val_dataloader(self):
        return loader()


class OwnData(L.LightningDataModule):
    """A user's data module."""

    def train_dataloader(self):
        return loader(shuffle=True)

    def val_dataloader(self):
        return loader()


def loader(**options) -> DataLoader:
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images, torch.arange(40) % 10), batch_size=8, **options)


SETTINGS = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4, "num_steps": 10}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize("source", ["loaders", "persistent workers", "data module", "module"])
def test_callbacks_work_with_the_loaders_of_a_user(source, tmp_path):
    kind = Own if source == "module" else Classifier
    network = build_model(MODEL | {"branch_drop": 0.3})
    module = kind(network, num_classes=10, num_warmup_steps=2, **SETTINGS)
    workers = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
    options = workers if source == "persistent workers" else {}
    data = {
        "loaders": {"train_dataloaders": loader(shuffle=True), "val_dataloaders": loader()},
        "persistent workers": {
            "train_dataloaders": loader(shuffle=True, **options),
            "val_dataloaders": loader(),
        },
        "data module": {"datamodule": OwnData()},
        "module": {},
    }[source]
    last = tmp_path / "stopped.ckpt"
    used = ReestimateBN(16), EMA(0.9), SignalAt(7), SaveOnSignal(last), Throughput(), EpochLines()

    with pytest.raises(Interrupted):
        trainer(tmp_path, *used).fit(module, **data)

    assert torch.load(last)["global_step"] == 8


class Images(L.LightningModule):
    """Learns from batches of any structure, and notes what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.speeds: list[float] = []

    def training_step(self, batch, _):
        return self.weight * 1

    def log(self, name, value, **_):
        self.speeds.append(value)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("structure", [tuple, dict, list], ids=lambda kind: kind.__name__)
def test_the_speed_counts_the_images_of_every_batch(structure, monkeypatch):
    class Collated(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            pair = torch.zeros(3), torch.zeros(())
            return dict(zip("xy", pair, strict=True)) if structure is dict else structure(pair)

    seconds = iter(range(100))
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: next(seconds))
    module = Images()
    loader = DataLoader(Collated(), batch_size=5)
    quiet_trainer(max_epochs=1, log_every_n_steps=1, callbacks=[Throughput()]).fit(module, loader)

    assert module.speeds == [5, 5, 5, 5]


def test_the_lines_of_epochs_can_be_disabled_and_enabled(tmp_path, capsys):
    class Switch(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            lines.disable() if trainer.current_epoch == 1 else lines.enable()

    lines = EpochLines()
    trainer(tmp_path, Switch(), lines).fit(classifier(), datamodule=digits(batch_size=256))

    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed] == ["Epoch 0", "Epoch 2"]


def test_callbacks_can_be_handed_to_another_process(tmp_path):
    describe = functools.partial(checkpoint.describe, config=MODEL)
    made = [
        EMA(0.9),
        DeployedValidation(),
        StopOnDivergence(),
        SelfDescribing("key", describe),
        BestCheckpoint(tmp_path),
        LastCheckpoint(tmp_path),
        SaveOnSignal(tmp_path / "last.ckpt"),
        ReestimateBN(),
        Throughput(),
        EpochLines(),
        WholeFileIO(),
    ]

    copies = pickle.loads(pickle.dumps(made))

    assert [type(part) for part in copies] == [type(part) for part in made]


def test_an_average_that_was_pickled_averages_the_same(tmp_path):
    def average(ema: EMA) -> list[torch.Tensor]:
        trainer(tmp_path / str(id(ema)), ema, epochs=1).fit(
            module := classifier(), datamodule=digits(batch_size=256)
        )
        return weights(module)

    copied = pickle.loads(pickle.dumps(EMA(0.9)))
    assert all(map(torch.equal, average(copied), average(EMA(0.9))))
