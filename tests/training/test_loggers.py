"""The loggers and the callbacks of a run, as a user chooses them."""

import csv
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch.loggers
import pytest
import torch
from omegaconf import OmegaConf

from repvgg.training import resuming
from repvgg.training.loggers import MetricsFile
from tests.support.commands import ROOT, SECONDS, compose, run, run_process

SHORT = ("model=repvgg_tiny", "data.batch_size=256", "hydra.run.dir=run")
LAST = Path("run", "checkpoints", "last.ckpt")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_row_is_on_disk_and_a_new_metric_becomes_a_column(tmp_path):
    logger = MetricsFile(tmp_path)

    logger.log_metrics({"a": 1.0, "epoch": 0}, step=1)
    logger.log_metrics({"a": 2.0, "epoch": 0}, step=2)
    logger.log_metrics({"b": 3.0, "epoch": 1}, step=3)

    assert rows(tmp_path) == [
        {"epoch": "0", "step": "1", "a": "1.0", "b": ""},
        {"epoch": "0", "step": "2", "a": "2.0", "b": ""},
        {"epoch": "1", "step": "3", "a": "", "b": "3.0"},
    ]


def test_a_resumed_run_appends_its_rows(tmp_path):
    MetricsFile(tmp_path).log_metrics({"a": 1.0}, step=1)

    resumed = MetricsFile(tmp_path)
    resumed.log_metrics({"a": 2.0}, step=2)
    resumed.log_metrics({"b": 3.0}, step=3)

    assert [(row["step"], row["a"], row["b"]) for row in rows(tmp_path)] == [
        ("1", "1.0", ""),
        ("2", "2.0", ""),
        ("3", "", "3.0"),
    ]


@pytest.mark.parametrize("torn", ["0,2,2.", "0", ""])
def test_a_row_that_a_killed_run_left_unfinished_is_dropped(torn, tmp_path):
    MetricsFile(tmp_path).log_metrics({"a": 1.0, "epoch": 0}, step=1)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write(torn)

    MetricsFile(tmp_path).log_metrics({"a": 2.0, "epoch": 0}, step=2)

    assert [row["a"] for row in rows(tmp_path)] == ["1.0", "2.0"]


def test_nothing_is_written_before_the_first_metric(tmp_path):
    logger = MetricsFile(tmp_path)
    logger.log_hyperparams({"a": 1})
    logger.finalize("success")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ([], ["tensorboard"]),
        (["logger=csv"], []),
        (["logger=[csv,tensorboard]"], ["tensorboard"]),
        (["logger=[tensorboard,wandb,mlflow]"], ["tensorboard", "wandb", "mlflow"]),
        (["logger=csv", "+logger.mine._target_=a.B"], ["mine"]),
    ],
)
def test_several_loggers_compose(chosen, names, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:here")

    config = compose("train", *chosen)["logger"]

    assert list(config) == names
    assert config.get("mlflow", {}).get("tracking_uri", "file:here") == "file:here"


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ([], []),
        (["callbacks=early_stopping"], ["early_stopping"]),
        (
            ["callbacks=[early_stopping,model_summary]", "+callbacks.mine._target_=a.B"],
            ["early_stopping", "model_summary", "mine"],
        ),
    ],
)
def test_several_callbacks_compose(chosen, names):
    assert list(compose("train", *chosen)["callbacks"]) == names


STOPPING = (
    *("callbacks=[early_stopping,learning_rate_monitor]", "logger=[csv,tensorboard]"),
    *("callbacks.early_stopping.patience=2", "callbacks.early_stopping.min_delta=1"),
)


@pytest.mark.slow
def test_an_early_stop_ends_the_run_as_usual_and_a_resumed_run_goes_on_counting(tmp_path):
    whole = run("train.py", *SHORT, *STOPPING, "trainer.max_epochs=9", cwd=tmp_path)

    assert whole.returncode == 0, whole.stderr
    assert "EarlyStopping ended the run after epoch 2: best val/accuracy 0." in whole.stdout
    assert "test accuracy 0." in whole.stdout
    assert "lr-SGD/decay" in rows(tmp_path / "run")[0]
    saved = torch.load(tmp_path / LAST, weights_only=True)
    (stopping,) = [kept for key, kept in saved["callbacks"].items() if "EarlyStopping" in key]
    assert stopping["wait_count"] == 2

    again = run("train.py", "resume=auto", "hydra.run.dir=run", *STOPPING, cwd=tmp_path)

    assert again.returncode == 0, again.stderr
    assert "EarlyStopping ended the run after epoch 3" in again.stdout  # one more, not three


@pytest.mark.slow
def test_a_resumed_run_appends_to_its_metrics(tmp_path):
    first = run("train.py", *SHORT, "logger=csv", "trainer.max_epochs=1", cwd=tmp_path)
    before = rows(tmp_path / "run")

    second = run("train.py", f"resume={LAST}", "trainer.max_epochs=2", cwd=tmp_path)

    assert (first.returncode, second.returncode) == (0, 0), second.stderr
    after = rows(tmp_path / "run")
    assert [row["step"] for row in after[: len(before)]] == [row["step"] for row in before]
    assert after[-1]["test/accuracy"]
    assert len(after) > len(before)
    assert not list((tmp_path / "run").glob("events*"))
    assert "watch it" not in first.stdout


@pytest.mark.slow
def test_code_of_the_users_own_has_to_be_passed_again(tmp_path):
    (tmp_path / "ownlosses.py").write_text(
        "from torch.nn import functional as F\n"
        "def smooth(logits, targets):\n"
        "    return F.cross_entropy(logits, targets, label_smoothing=0.2)\n"
    )
    loss = "loss._target_=ownlosses.smooth"
    torchs = "optimizer._target_=torch.optim.RMSprop"
    first = run("train.py", *SHORT, loss, torchs, "trainer.max_epochs=1", cwd=tmp_path)
    assert first.returncode == 0, first.stderr

    without = run("train.py", f"resume={LAST}", "trainer.max_epochs=2", cwd=tmp_path)
    passed = run("train.py", f"resume={LAST}", "trainer.max_epochs=2", loss, cwd=tmp_path)

    assert f"if you trust it, pass {loss} too" in without.stderr
    assert passed.returncode == 0, passed.stderr
    assert "loss ownlosses.smooth" in passed.stdout


@pytest.mark.slow
def test_a_loss_that_cannot_take_mixtures_fails_before_the_run_starts(tmp_path):
    loss = "loss._target_=torch.nn.MultiMarginLoss"

    done = run("train.py", *SHORT, loss, "mixup=0.2", cwd=tmp_path)

    assert done.returncode == 1
    assert "MultiMarginLoss: does not take mixtures of mixup or cutmix" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("passed", ["optim.lr=0.5", "trainer.max_epochs=3"])
def test_a_resumed_schedule_of_the_users_own_keeps_its_rate_and_length(passed, tmp_path):
    schedule = "scheduler._target_=torch.optim.lr_scheduler.OneCycleLR"
    first = run("train.py", *SHORT, schedule, "trainer.max_epochs=1", cwd=tmp_path)
    assert first.returncode == 0, first.stderr

    done = run("train.py", f"resume={LAST}", passed, cwd=tmp_path)

    assert done.returncode == 1
    assert f"train.py: {passed}: a resumed torch.optim.lr_scheduler.OneCycleLR" in done.stderr


@pytest.mark.slow
def test_a_run_of_an_earlier_version_with_its_own_callbacks_is_resumed(tmp_path):
    first = run("train.py", *SHORT, "logger=csv", "trainer.max_epochs=1", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    recorded = OmegaConf.load(tmp_path / "run" / ".hydra" / "config.yaml")
    for key in ("optimizer", "scheduler", "scheduler_interval", "loss", "freeze", "logger"):
        del recorded[key]
    del recorded["callbacks"]
    del recorded["optim"]["layer_decay"]
    recorded["trainer"]["logger"] = False
    monitor = {"_target_": "lightning.pytorch.callbacks.LearningRateMonitor"}
    recorded["trainer"]["callbacks"] = {"rates": monitor}
    OmegaConf.save(recorded, tmp_path / "run" / ".hydra" / "config.yaml")

    done = run("train.py", f"resume={LAST}", "trainer.max_epochs=2", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "run")[-1]["lr-SGD/decay"] == ""
    assert not list((tmp_path / "run").glob("events*"))


@pytest.mark.slow
def test_a_summary_of_the_layers_and_a_profile_are_printed(tmp_path):
    printing = ("callbacks=model_summary", "+trainer.profiler=simple")

    done = run_process("train.py", *SHORT, *printing, "+trainer.fast_dev_run=true", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "branch_3x3" in done.stdout + done.stderr
    assert "FIT Profiler Report" in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_missing_package_is_named_with_its_command(tmp_path):
    for name in ("wandb", "mlflow"):
        if importlib.util.find_spec(name) is not None:
            pytest.skip(f"{name} is installed")

        done = run("train.py", *SHORT, f"logger={name}", cwd=tmp_path)

        assert done.stderr == f"train.py: logger={name} needs {name}: pip install {name}\n"
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_wandb_logs_offline_and_each_run_of_a_sweep_is_its_own(tmp_path):
    pytest.importorskip("wandb")
    sweep = ("-m", "seed=0,1", "model=repvgg_tiny", "trainer.max_epochs=1", "hydra.sweep.dir=runs")

    done = run_plainly(*sweep, "logger=wandb", "logger.wandb.offline=true", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs").rglob("run-*.wandb"))) == 2


@pytest.mark.slow
def test_mlflow_holds_the_settings_and_the_test_accuracy(tmp_path):
    mlflow = pytest.importorskip("mlflow")

    done = run_plainly(*SHORT, "logger=mlflow", "trainer.max_epochs=1", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    with warnings.catch_warnings(action="ignore"):  # of SQLAlchemy, which mlflow calls
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("repvgg")
        (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.status == "FINISHED"
    assert logged.data.params["model/name"] == "repvgg_tiny"
    assert 0 < logged.data.metrics["test/accuracy"] <= 1


def run_plainly(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Train in a process where the warnings of a logger's package are no errors."""
    command = [sys.executable, ROOT / "train.py", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=SECONDS)


def test_the_code_that_a_run_folder_may_name_is_optimizers_schedules_and_losses():
    from torch import nn, optim
    from torch.optim import lr_scheduler

    for module, kind, some in (
        (optim, optim.Optimizer, "RMSprop"),
        (lr_scheduler, lr_scheduler.LRScheduler, "OneCycleLR"),
        (nn, nn.Module, "MultiMarginLoss"),
    ):
        prefix = module.__name__
        named = [n for n in dir(module) if resuming._OWN_CODE.fullmatch(f"{prefix}.{n}")]
        assert some in named
        assert all(issubclass(getattr(module, name), kind) for name in named)


@pytest.mark.parametrize(
    "target",
    [
        *("torch.optim.lr_scheduler.warnings", "torch.optim.sgd.torch.hub.load"),
        *("torch.nn.Module", "torch.nn.modules.loss.CrossEntropyLoss", "torch.optim.SGD.step"),
        *("timm.optim.Lion", "torch.nn.CrossEntropyLoss.forward"),
    ],
)
def test_other_code_of_torch_has_to_be_passed_again(target):
    assert not resuming._OWN_CODE.fullmatch(target)


def test_lightnings_loggers_are_where_the_configs_say():
    for chosen in ("wandb", "mlflow"):
        target = compose("train", f"logger={chosen}")["logger"][chosen]["_target_"]
        assert hasattr(lightning.pytorch.loggers, target.rpartition(".")[2])
