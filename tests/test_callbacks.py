import copy
import os
import resource
import signal
from pathlib import Path

import lightning as L
import pytest
import torch

from repvgg.callbacks import (
    EMA,
    BestCheckpoint,
    Interrupted,
    LastCheckpoint,
    ReestimateBN,
    SaveOnSignal,
    SelfDescribing,
    WholeFileIO,
)
from repvgg.data import digits
from repvgg.datamodule import ImageData
from repvgg.forms import reestimate_bn
from repvgg.module import Classifier

MODEL = {
    "name": "repvgg_tiny",
    "num_classes": 10,
    "in_channels": 1,
    "strides": [1, 1, 2, 2, 1],
    "depths": [1, 1, 1, 1],
    "dropout": 0.2,
}


def classifier(**noise) -> Classifier:
    torch.manual_seed(0)
    return Classifier(
        MODEL | noise,
        lr=0.02,
        momentum=0.9,
        weight_decay=1e-4,
        num_steps=15,
        num_warmup_steps=2,
        rdrop=1.0,
    )


def trainer(
    folder: Path, *callbacks: L.Callback, epochs: int = 3, accumulate: int = 1, **options: int
) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        plugins=[WholeFileIO()],
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


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* not empty:UserWarning")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [0, 3, 4, 7, 9], ids=lambda step: f"step {step} of 5 an epoch")
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
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    trainer(tmp_path, SaveOnSignal(tmp_path / "last.ckpt"), epochs=1).fit(
        classifier(), datamodule=digits(batch_size=256)
    )

    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


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


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("every", [1, 2], ids=lambda every: f"validated every {every}")
def test_every_checkpoint_holds_statistics_without_the_noise(views, every, tmp_path):
    module, data = classifier(branch_drop=0.3), digits(batch_size=256, views=views)
    module.rdrop_views = views
    found = []

    class Compare(LastCheckpoint):
        def _save_checkpoint(self, trainer, filepath):
            super()._save_checkpoint(trainer, filepath)
            saved = torch.load(filepath, weights_only=True)["state_dict"]
            twin = copy.deepcopy(module.net)
            batches = (data.on_after_batch_transfer(b, 0)[0] for b in data.train_dataloader())
            reestimate_bn(twin, (images.flatten(0, -4) for images in batches))
            found.append([torch.equal(v, saved[f"net.{k}"]) for k, v in twin.state_dict().items()])

    callbacks = ReestimateBN(), Compare(tmp_path / "each")
    trainer(tmp_path, *callbacks, check_val_every_n_epoch=every).fit(module, datamodule=data)

    assert len(found) == 3
    assert all(map(all, found))


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


def test_training_is_the_same_with_and_without_the_average(tmp_path):
    without, with_it = Remember(), Remember()

    trainer(tmp_path / "a", without).fit(classifier(), datamodule=digits(batch_size=256))
    trainer(tmp_path / "b", EMA(0.9), with_it).fit(classifier(), datamodule=digits(batch_size=256))

    assert all(map(torch.equal, without.steps[-1], with_it.steps[-1]))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* not empty:UserWarning")
@pytest.mark.parametrize("noise", [{}, {"branch_drop": 0.3}], ids=["plain", "re-estimated"])
@pytest.mark.parametrize("step", [7, 9])
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


def test_what_a_killed_process_left_beside_a_checkpoint_goes_with_the_next_save(tmp_path):
    (tmp_path / ".last.ckpt.4711").write_bytes(b"half of it")

    WholeFileIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")

    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
