"""A run on a terminal, and in a file."""

import os
import re
import signal
import sys

import lightning as L
import pytest
import torch

from repvgg import terminal as shown
from repvgg.data.sets import digits
from repvgg.models.registry import build_model
from repvgg.training import progress
from repvgg.training.callbacks import Interrupted, SaveOnSignal, Throughput
from repvgg.training.checkpoints import BestCheckpoint, LastCheckpoint
from repvgg.training.classifier import Classifier
from repvgg.training.progress import EpochLines, RunBar
from tests.support.terminals import terminal

MODEL = {
    "name": "repvgg_tiny",
    "num_classes": 10,
    "in_channels": 1,
    "strides": [1, 1, 2, 2, 1],
    "depths": [1, 1, 1, 1],
    "widths": [8, 8, 8, 8],
    "dropout": 0.2,
}
STEPS = 10  # of two epochs


class Fails(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 7:
            raise RuntimeError("a bug")


class CtrlC(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 7:
            os.kill(os.getpid(), signal.SIGINT)


def train(folder, *callbacks: L.Callback) -> list[torch.Tensor]:
    torch.manual_seed(0)
    module = Classifier(
        build_model(MODEL),
        num_classes=10,
        lr=0.02,
        momentum=0.9,
        weight_decay=1e-4,
        num_steps=STEPS,
        num_warmup_steps=2,
    )
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        log_every_n_steps=2,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[Throughput(), *callbacks, BestCheckpoint(folder), LastCheckpoint(folder)],
    )
    trainer.fit(module, datamodule=digits(batch_size=256))
    trainer.test(module, datamodule=digits(batch_size=256), verbose=False)
    return [value.clone() for value in module.state_dict().values()]


@pytest.mark.slow
@pytest.mark.parametrize("columns", [40, 80])
def test_a_bar_shows_epoch_time_losses_accuracy_best_and_speed(monkeypatch, tmp_path, columns):
    monkeypatch.setattr(shown, "REDRAW_EVERY", 0)
    expected = train(tmp_path / "lines", EpochLines())
    with terminal(monkeypatch, columns=columns) as seen:
        given = train(tmp_path / "bar", RunBar(STEPS))
        text, raw = seen.plain(), seen.text()

    number = r"\d\.\d{4}"
    assert re.search(r"Epoch 1 of 2 .* 30% 0:\d\d:\d\d left", text)
    assert re.search(r"Epoch 2 of 2 .*100% in 0:\d\d:\d\d", text)
    last = " ".join(text.partition("100% in")[2].split())
    assert re.search(
        rf"loss {number} val loss {number} accuracy {number} best {number} [\d,]+ images/s", last
    )
    assert "validating 1/2" in text
    assert "Testing" in text
    assert max(map(len, text.splitlines())) <= columns
    below = [line for line in text.splitlines() if "loss" in line or "images/s" in line]
    assert max(map(len, below)) <= columns - 4  # where a terminal echoes ^C
    assert raw.count("\x1b[?25l") == raw.count("\x1b[?25h") == 2  # the cursor is shown again
    assert all(torch.equal(a, b) for a, b in zip(expected, given, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "message"), [(Fails(), "a bug"), (CtrlC(), "stopped by SIGINT")]
)
def test_a_bar_ends_before_the_error_is_printed(monkeypatch, tmp_path, ending, message):
    with terminal(monkeypatch) as seen:
        with pytest.raises((RuntimeError, Interrupted), match=message):
            train(tmp_path, RunBar(STEPS), ending, SaveOnSignal(tmp_path / "last.ckpt"))
        raw = seen.text()
        assert type(sys.stdout).__name__ == "TextIOWrapper"  # no longer rich's

    assert raw.endswith("\n\x1b[?25h")


@pytest.mark.slow
def test_a_long_epoch_prints_lines(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    monkeypatch.setattr(progress, "LINES", 2)

    train(tmp_path, EpochLines(STEPS))

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch")]
    assert [line.partition(":")[0] for line in lines] == [
        *("Epoch 0, 20%", "Epoch 0, 80%", "Epoch 0"),
        *("Epoch 1, 20%", "Epoch 1, 80%", "Epoch 1"),
    ]
    number = r"\d+\.\d+"
    assert re.fullmatch(
        rf"Epoch 1, 80%: {number} s, train/loss {number}, [\d,]+ images per second, 0:00:0\d left",
        lines[4],
    )
