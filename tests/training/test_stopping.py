"""Signals, locks and Lightning's own switches, on runs of train.py as a user starts them."""

import os
import pty
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.commands import ROOT, SECONDS, run, wait_for
from tests.support.processes import Process, spawning_from_server

LONG = ("model=repvgg_tiny", "trainer.max_epochs=1000", "hydra.run.dir=run")
SHORT = ("model=repvgg_tiny", "trainer.max_epochs=2", "hydra.run.dir=run", "optim.warmup_epochs=0")
LAST = Path("run", "checkpoints", "last.ckpt")


def start(*arguments: str, cwd: Path) -> Process:
    """A run in a process group of its own, which has saved a checkpoint."""
    process = Process(ROOT / "train.py", *arguments, cwd=cwd, forks=1)
    try:
        wait_for(cwd / LAST, process)
    except BaseException:
        process.kill()
        raise
    return process


class Stopped(NamedTuple):
    """What was seen of a run that ended by SIGTERM, as `timeout` sends it: twice, to the group."""

    folder: Path
    second: subprocess.CompletedProcess[str]
    still_running: bool
    status: int
    stderr: str
    saved_before: int


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Stopped:
    """A run on two devices that was stopped after another one was started in its folder."""
    folder = tmp_path_factory.mktemp("stopped")
    process = start(*LONG, "trainer.devices=2", "trainer.accelerator=cpu", cwd=folder)
    try:
        short = f"resume={LAST}", "trainer.max_epochs=1"  # ends soon if it is let in
        second = run("train.py", *LONG[:-1], *short, cwd=folder)
        running = process.poll() is None
        before = (folder / LAST).stat().st_mtime_ns
        for _ in range(2):
            os.killpg(process.pid, signal.SIGTERM)
        _, stderr = process.communicate()
    finally:
        process.kill()
    return Stopped(folder, second, running, process.returncode, stderr, before)


@pytest.mark.slow
def test_a_signal_to_the_process_group_saves_and_names_the_command(stopped):
    assert stopped.status == 128 + signal.SIGTERM, stopped.stderr
    assert stopped.stderr.splitlines()[-1] == (
        f"train.py: stopped by SIGTERM; saved {LAST}; "
        f"resume with: python {ROOT / 'train.py'} resume={LAST}"
    )
    assert (stopped.folder / LAST).stat().st_mtime_ns >= stopped.saved_before


@pytest.mark.slow
def test_a_second_run_is_kept_out_of_the_folder_of_a_running_one(stopped):
    assert stopped.second.returncode == 1
    assert "run is in use by another run: wait until that ends" in stopped.second.stderr
    assert len(stopped.second.stderr.splitlines()) == 1
    assert stopped.still_running


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_saves(tmp_path):
    terminal, end = pty.openpty()
    process = Process(ROOT / "train.py", *LONG, cwd=tmp_path, terminal=os.ttyname(end))
    try:
        deadline = time.monotonic() + SECONDS
        while not (tmp_path / LAST).exists():
            if select.select([terminal], [], [], 0.01)[0]:
                os.read(terminal, 1 << 16)
            assert process.poll() is None
            assert time.monotonic() < deadline
        before = (tmp_path / LAST).stat().st_mtime_ns
    finally:
        os.close(end)
        os.close(terminal)
        status = process.wait()

    assert status == 128 + signal.SIGHUP
    assert (tmp_path / LAST).stat().st_mtime_ns >= before


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, "RANK=1: set, but trainer.devices=1"),
        (
            {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
            "torchrun started 2 processes, 2 on this node; pass trainer.devices=2",
        ),
    ],
)
def test_processes_that_the_trainer_does_not_expect_write_nothing(
    environment, message, tmp_path, monkeypatch
):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)

    done = run("train.py", *SHORT, cwd=tmp_path)

    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("*.*"))


def test_a_development_run_ends_without_a_checkpoint(tmp_path):
    done = run("train.py", *SHORT, "+trainer.fast_dev_run=true", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        "fast_dev_run: trained, validated and tested; nothing was saved"
    )
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_a_run_without_validation_tests_the_last_checkpoint(tmp_path):
    done = run("train.py", *SHORT, "+trainer.limit_val_batches=0", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "no validation ran: best.ckpt is the last checkpoint\n" in done.stdout
    assert "test accuracy 0." in done.stdout


@pytest.mark.slow
def test_a_run_without_a_test_keeps_its_checkpoints(tmp_path):
    done = run("train.py", *SHORT, "+trainer.limit_test_batches=0", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "test accuracy" not in done.stdout
    assert "ckpt=run/checkpoints/best.ckpt" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("switch", "steps"),
    [
        ("+trainer.limit_train_batches=0.5", 20),
        ("+trainer.max_steps=30", 30),
    ],
)
def test_the_learning_rate_ends_at_zero_after_the_steps_that_run(switch, steps, tmp_path):
    done = run("train.py", *SHORT, switch, "trainer.log_every_n_steps=1", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert f", {steps} steps of 64 images" in done.stdout
    last = torch.load(tmp_path / LAST, weights_only=True)
    assert last["global_step"] == steps
    assert last["lr_schedulers"][0]["_last_lr"] == [0.0, 0.0]
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert len(events.Scalars("train/learning_rate")) == steps


@pytest.mark.slow
def test_spawned_processes_train(tmp_path):
    spawned = ("trainer.strategy=ddp_spawn", "trainer.devices=2", "trainer.accelerator=cpu")
    short = ("trainer.max_epochs=1", "data.batch_size=256", "logger.tensorboard.pictures=false")

    with spawning_from_server():
        done = run("train.py", *SHORT, *short, "ema=0.9", *spawned, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy 0.") == 1
