"""Sweeps and searches: their names, their tables, and what happens to jobs that fail."""

import csv
import json
import signal
import sys

import pytest
from hydra.errors import MissingConfigException

from repvgg import cli
from repvgg.cli.sweeps import LONGEST_NAME, direction, job_name
from tests.support.commands import CONFIGS, run

ROOT = """
defaults: [_self_]
alpha: 1
seed: 0
objective: val/accuracy
hydra:
  output_subdir: null
  sweep: {dir: sweep, subdir: "${job_name:${hydra:job.num},${hydra:overrides.task}}"}
  callbacks: {sweep: {_target_: repvgg.cli.sweeps.Sweep}}
"""
SEARCH = """
# @package _global_
defaults: [{override /hydra/sweeper: optuna}]
hydra:
  mode: MULTIRUN
  sweeper:
    direction: ${direction:${objective}}
    n_trials: 5
    n_jobs: 1
    max_failure_rate: 1.0
    sampler: {seed: 0}
    params: {alpha: "interval(0.0, 1.0)"}
"""


# Optuna 2 uses what its dependencies will remove.
of_optuna = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    """A job of a configuration with two keys, run with arguments; the rows of the new CSV."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "root.yaml").write_text(ROOT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(cli.FULL_ERROR, "0")

    def start(job, *arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        known = {*tmp_path.glob("sweep/*.csv")}
        status = 0
        try:
            cli.run(job, tmp_path / "configs" / "root.yaml")
        except SystemExit as stopped:
            status = stopped.code
        (table,) = {*tmp_path.glob("sweep/*.csv")} - known
        with table.open() as file:
            return status, list(csv.DictReader(file))

    before = signal.getsignal(signal.SIGTERM)
    yield start
    signal.signal(signal.SIGTERM, before)


def measuring():
    """A job that writes results as a run does; it fails for a negative alpha."""

    def job(config, folder):
        alpha, seed = config["alpha"], config["seed"]
        if alpha < 0:
            raise ValueError(f"alpha={alpha}: must be positive")
        value = 1 - (alpha - 0.3) ** 2 - seed / 100
        metrics = {"val/accuracy": value, "test/accuracy": value / 2, "test/loss": 1.0}
        (folder / "results.json").write_text(json.dumps({"metrics": metrics}))
        return value

    return job


def test_each_job_says_which_it_is_and_has_a_row(sweep, capsys):
    status, rows = sweep(measuring(), "-m", "alpha=0.25,0.5", "seed=0,1")

    shown = capsys.readouterr().out
    assert status == 0
    for number, named in enumerate(("alpha=0.25 seed=0", "alpha=0.25 seed=1"), 1):
        assert f"{number} of 4: {named}\n" in shown
    assert [row["job"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[2]["val/accuracy"]) == pytest.approx(0.96)
    assert rows[3]["folder"].endswith("sweep/4-alpha=0.5,seed=1")


def test_several_seeds_have_a_mean_and_a_deviation(sweep, capsys):
    sweep(measuring(), "-m", "alpha=0.3,0.5", "seed=0,1,2")

    shown = capsys.readouterr().out
    assert "alpha=0.3: val/accuracy 0.9900, standard deviation 0.0100, n = 3" in shown


def test_a_failed_job_is_a_row_and_the_others_run(sweep, capsys):
    status, rows = sweep(measuring(), "-m", "alpha=-1,0.3,-2")

    assert status == 1
    assert [row["status"] for row in rows] == ["failed", "done", "failed"]
    assert rows[0]["message"] == "alpha=-1: must be positive"
    assert rows[0]["val/accuracy"] == ""
    assert capsys.readouterr().err.splitlines()[-1] == "train.py: 2 of the sweep's jobs failed"


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(130)])
def test_a_sweep_that_is_interrupted_keeps_what_it_has(sweep, stop):
    measure = measuring()

    def job(config, folder):
        if config["alpha"] == 2:
            raise stop
        return measure(config, folder)

    status, rows = sweep(job, "-m", "alpha=1,2,3")

    assert status == 130
    assert [(row["alpha"], row["status"]) for row in rows] == [("1", "done"), ("2", "stopped")]


def test_a_table_never_replaces_an_earlier_one(sweep, tmp_path):
    _, first = sweep(measuring(), "-m", "alpha=0.1,0.2")
    _, second = sweep(measuring(), "-m", "alpha=0.3,0.4")

    assert [row["alpha"] for row in first] == ["0.1", "0.2"]
    assert [row["alpha"] for row in second] == ["0.3", "0.4"]
    assert {path.name for path in tmp_path.glob("sweep/*.csv")} == {"results.csv", "results-2.csv"}
    assert not list(tmp_path.glob("sweep/.jobs*"))


def test_results_of_an_earlier_job_are_not_those_of_a_failed_one(sweep):
    sweep(measuring(), "-m", "seed=0,1")

    def fail(config, folder):
        raise ValueError("the folder belongs to another run")

    _, rows = sweep(fail, "-m", "seed=0,1")

    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert "val/accuracy" not in rows[0]


@pytest.mark.slow
def test_jobs_in_other_processes_have_rows(sweep, capfd):
    status, rows = sweep(
        measuring(), "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "alpha=0.3,-1"
    )

    shown = capfd.readouterr()
    assert status == 1
    assert [row["status"] for row in rows] == ["done", "failed"]
    assert float(rows[0]["val/accuracy"]) == 1
    assert rows[0]["folder"].endswith("sweep/1-alpha=0.3")
    assert "1 of 2: alpha=0.3" in shown.out
    assert "alpha=-1: must be positive" in shown.err


@of_optuna
@pytest.mark.slow
def test_a_search_optimizes_what_the_job_returns(sweep, tmp_path, capsys):
    (tmp_path / "configs" / "search").mkdir()
    (tmp_path / "configs" / "search" / "optuna.yaml").write_text(SEARCH.strip())

    status, rows = sweep(measuring(), "+search=optuna")

    values = [float(row["val/accuracy"]) for row in rows]
    assert status == 0
    assert len(values) == 5
    best = f"best val/accuracy {max(values):.4f}, job {1 + values.index(max(values))}: "
    assert best in capsys.readouterr().out


@pytest.mark.parametrize("plugin", ["sweeper/optuna", "launcher/joblib", "launcher/submitit_slurm"])
def test_a_missing_package_of_sweeps_is_named_with_its_command(plugin):
    error = MissingConfigException("", missing_cfg_file=f"hydra/{plugin}", options=["basic"])

    message = cli.explain(error, CONFIGS / "train.yaml", {})

    assert message.endswith(': the package is missing; pip install "repvgg[sweep]"')


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model=a", "rdrop=1", "seed=0"], "03-rdrop=1,seed=0"),
        (["model=a", "rdrop=False", "seed=0"], "03-rdrop=false,seed=0"),
        (["optim.lr=0.0312345678901", "seed=1"], "03-optim.lr=0.03123,seed=1"),
        (["+data.root=/my data/x", "seed=0"], "03-data.root=_my_data_x,seed=0"),
        (["model=a"], "03"),
    ],
)
def test_a_job_is_named_by_what_varies(overrides, expected):
    swept = ["rdrop", "seed", "optim.lr", "+data.root"]

    assert job_name(2, overrides, swept, 10) == expected


def test_a_name_is_short_and_starts_with_the_number():
    name = job_name(0, [f"key{i}={i}" for i in range(100)], None, None)

    assert name.startswith("1-key0=0,key1=1")
    assert len(name) <= LONGEST_NAME


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("val/accuracy", "maximize"),
        ("val/loss", "minimize"),
        ("val/calibration_error", "minimize"),
        ("test/accuracy_top5", "maximize"),
    ],
)
def test_a_search_knows_which_way_a_metric_improves(metric, expected):
    assert direction(metric) == expected


def test_a_metric_that_does_not_exist_is_an_error_before_training(tmp_path):
    done = run("train.py", "model=repvgg_tiny", "objective=val/acuracy", cwd=tmp_path)

    assert done.returncode == 1
    assert "did you mean val/accuracy? allowed are val/loss, val/accuracy" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@of_optuna
@pytest.mark.slow
def test_a_search_trains_and_goes_on_after_a_run_that_diverged(tmp_path):
    done = run(
        "train.py",
        *("hparams_search=optuna", "model=repvgg_tiny", "data.batch_size=128"),
        *("trainer.max_epochs=1", "hydra.sweeper.n_trials=2"),
        "optim.lr=1e30",
        cwd=tmp_path,
    )

    (table,) = tmp_path.glob("runs/*-sweep/results.csv")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert done.returncode == 1
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert "the loss is NaN or infinite" in rows[1]["message"]
    assert done.stderr.splitlines()[-1].startswith("train.py: 2 of the sweep's jobs failed")
