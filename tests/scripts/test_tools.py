"""The programs run by hand, on small jobs."""

import copy
import csv
import multiprocessing
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import benchmark_deploy
import benchmark_fusion
import benchmark_rdrop
import benchmark_training
import pytest
import study_finetuning
import study_fusion
import study_int8
import study_rdrop
import torch
from PIL import Image

from repvgg import RepVGGBlock, cli, create_model
from repvgg.export.artifact import build_program
from repvgg.verify import relative_error
from tests.support.commands import ROOT, make
from tests.support.networks import settle


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    """Runs a script with arguments in an empty folder; returns what it printed."""

    def run_in_folder(script: ModuleType, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
        cli.script(script.main, script.__doc__, script.DEFAULTS)
        return capfd.readouterr().out

    return run_in_folder


def test_the_benchmark_shows_time_and_operations_of_every_way_to_step(run):
    printed = run(benchmark_rdrop, "rounds=2", "cases=[32x64x10]")

    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if "x |" in line]
    operations = {row[0]: float(row[4].rstrip("x")) for row in rows}
    assert operations["the same again (control)"] == 1
    assert 1 < operations["R-Drop, one forward"] < 1.01
    assert operations["R-Drop, every image twice in the batch"] == pytest.approx(2, abs=1e-3)
    assert operations["R-Drop, two forwards"] == pytest.approx(2, abs=1e-3)


STUDY = (
    "seeds=2",
    "alphas=[1]",
    "dropouts=[0.2]",
    "labels=[0.1]",
    "epochs=1",
    "workers=1",
    "min_steps=3",
    "out=study",
)


def rows(folder: Path) -> list[list[str]]:
    with (folder / "study" / "results.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_a_study_that_was_stopped_goes_on_and_ends_in_a_table_and_a_figure(run, tmp_path):
    run(study_rdrop, *STUDY)
    whole = rows(tmp_path)
    table = (tmp_path / "study" / "table.md").read_text()
    path = tmp_path / "study" / "results.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]) + "0.1,epo")

    again = run(study_rdrop, *STUDY)

    assert "3 runs are done" in again
    assert "| alpha 1, dropout 0.2 |" in table
    assert (tmp_path / "study" / "figure.png").stat().st_size > 10_000
    deterministic = [row[:5] + row[6:] for row in sorted(whole)]  # all but the seconds
    assert sorted(row[:5] + row[6:] for row in rows(tmp_path)) == deterministic


def test_a_study_reads_a_folder_of_images(run, tmp_path):
    for part in ("train", "test"):
        for label, shade in (("dark", 40), ("light", 200)):
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (16, 16), (shade, shade + 5 * i, 90)).save(folder / f"{i}.png")

    printed = run(study_rdrop, *STUDY, "labels=[0.5]", "budgets=[epochs]", "root=images")

    assert "# R-Drop on images" in printed
    assert {row[0] for row in rows(tmp_path)[1:]} == {"0.5"}


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (study_rdrop, ["seed=3"], "seed=3: there is no such key; did you mean seeds?"),
        (study_rdrop, ["alphas=[-1]"], "alphas=-1: must be a number of at least 0"),
        (study_rdrop, ["seeds=1"], "seeds=1: must be an integer of at least 2"),
        (study_rdrop, ["root=nowhere"], "there is no folder nowhere/train"),
        (study_rdrop, ["views=false"], "views=false: there is no such key"),
        (study_rdrop, ["alphas=[1"], "alphas='[1': must be a list; type for example alphas=[0.3"),
        (study_rdrop, ["lr=true"], "lr='true': must be a number"),
        (study_rdrop, ["budgets=[[time]]"], "must be of epochs, time"),
        (benchmark_rdrop, ["cases=5"], "cases='5': must be a list"),
        (benchmark_rdrop, ["cases=[224]"], "'224' is not SIZExBATCHxCLASSES"),
        (benchmark_rdrop, ["device=abacus"], "device='abacus'"),
    ],
)
def test_a_mistake_is_told_in_one_line(script, arguments, message, run, tmp_path, capfd):
    with pytest.raises(SystemExit) as stopped:
        run(script, *arguments)

    told = capfd.readouterr().err
    assert stopped.value.code == 1
    assert message in told
    assert len(told.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", [benchmark_rdrop, study_rdrop])
def test_help_shows_the_keys(script, run):
    printed = run(script, "--help")

    assert all(f"{key}:" in printed for key in script.DEFAULTS)


def test_the_study_of_fusing_measures_a_network():
    row = study_fusion.measure("torchvision", "classification", "shufflenet_v2_x0_5")

    assert row["left"] == 0 < row["batchnorms"]
    assert max(row["error_float64"], row["worst_module"]) < 1e-10
    assert row["error_float32"] < 1e-4
    text = study_fusion.summary([{key: "" if v is None else str(v) for key, v in row.items()}])
    assert f"| torchvision, classification | 1 | {row['batchnorms']} | 0 |" in text


def test_the_benchmark_of_fusing_writes_a_table_and_a_figure(run, tmp_path):
    out = run(
        benchmark_fusion,
        "networks=[resnet18]",
        "compile=false",
        "rounds=2",
        "size=32",
        f"out={tmp_path}",
    )

    assert "| resnet18 | fused |" in out
    assert (tmp_path / "benchmark.md").read_text() in out
    assert (tmp_path / "benchmark.png").stat().st_size > 5_000
    assert len((tmp_path / "benchmark.csv").read_text().splitlines()) == 4


def test_the_benchmark_of_fusing_refuses_an_unknown_network(run, tmp_path, capfd):
    with pytest.raises(SystemExit):
        run(benchmark_fusion, "networks=[resnet19]", f"out={tmp_path}")

    assert "networks=['resnet19']: must be some of resnet18" in capfd.readouterr().err


def test_the_study_of_8_bits_trains_rounds_and_compares(run, tmp_path):
    models = "models=[repvgg_tiny,qarepvgg_tiny]"

    printed = run(study_int8, models, "seeds=2", "epochs=1", "images=16", "workers=1", "out=study")

    rows = (tmp_path / "study" / "digits.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2 * 8
    assert "| float32 |" in printed
    assert "| minmax, weights by tensor |" in printed
    assert (tmp_path / "study" / "digits.png").stat().st_size > 10_000
    assert len(list((tmp_path / "runs" / "int8").glob("*.ckpt"))) == 4


DEPLOYMENT = {**benchmark_deploy.DEFAULTS, "size": 32, "compile": False}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    benchmark_deploy.prepare(folder, DEPLOYMENT)
    return folder, benchmark_deploy.build(DEPLOYMENT)


@pytest.mark.parametrize("name", benchmark_deploy.candidates(DEPLOYMENT))
@torch.no_grad()
def test_what_is_timed_computes_the_network(name, prepared):
    folder, (trained, deployed, description) = prepared
    program = build_program(copy.deepcopy(trained), description)
    images = torch.rand(2, 3, 32, 32)
    expected = copy.deepcopy(program).double()(images.double())

    call = benchmark_deploy.candidate(name, folder, program, copy.deepcopy(deployed), description)

    allowed = {"int8": 0.3, "bf16": 0.05}.get(name.rpartition(", ")[2], 1e-5)
    assert relative_error(expected, call(images).float()) < allowed


@pytest.mark.parametrize(("again", "noisy"), [(11.0, False), (20.0, True)])
def test_ratios_are_told_only_where_the_control_is_quiet(again, noisy, monkeypatch):
    monkeypatch.setattr(benchmark_deploy, "measure_peak", lambda _: None)
    names = (benchmark_deploy.TRAINED, benchmark_deploy.BASE, benchmark_deploy.AGAIN)
    times = {name: [value] * 4 for name, value in zip(names, (30.0, 11.0, again), strict=True)}

    record = benchmark_deploy.summarize(
        {1: times}, dict.fromkeys(names, 0.0), DEPLOYMENT | {"model": "repvgg_tiny"}
    )

    text = benchmark_deploy.table(record)
    assert ("Too noisy" in text) == noisy
    assert ("2.73x" in text) != noisy


@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b1g4"])
def test_the_reference_that_training_is_timed_against_is_the_same_network(name):
    options = {"num_classes": 7, "depths": [1, 2, 3, 1], "widths": [8, 16, 24, 32]}
    ours = settle(create_model(name, **options)).double()
    theirs = benchmark_training.reference(ours).double().eval()
    blocks = [block for block in ours.modules() if isinstance(block, RepVGGBlock)]
    for block, other in zip(blocks, theirs, strict=False):
        for branch, layers in ((block.branch_3x3, other.dense), (block.branch_1x1, other.point)):
            layers[0].load_state_dict(branch.conv.state_dict())
            layers[1].load_state_dict(branch.bn.state_dict())
        if other.identity is not None:
            other.identity.load_state_dict(block.branch_identity.state_dict())
    theirs[-1].load_state_dict(ours.linear.state_dict())
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)

    assert relative_error(ours(images), theirs(images)) < 1e-12


def test_steps_are_timed_from_the_first_batch_to_the_request_for_the_next():
    here, there = multiprocessing.Pipe()
    batch = (torch.zeros(1), torch.zeros(1))
    here.send((None,))
    here.send((None,))
    here.send(None)

    count = sum(1 for _ in benchmark_training.on_demand(there, batch, 5, 3))

    assert count == 2 + 2 * 3
    assert here.recv() == 5
    assert all(here.recv() >= 0 for _ in range(2))


def test_the_data_is_timed_alone_and_in_whole_steps(tmp_path, capsys):
    for part, count in (("train", 40), ("val", 2)):
        make(tmp_path / part, count=count)
    settings = benchmark_training.DEFAULTS | {"model": "repvgg_tiny", "photos": str(tmp_path)}

    benchmark_training.measure_data(settings)

    *_, row = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\| files, cut to 224 pixels \| \d+ \(\d+, \d+\) \| \d+\.\d \|", row)


def test_a_run_that_is_killed_at_random_ends_as_it_should(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "study_kills.py", "kills=2", "epochs=2", "longest=4"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr
    assert "2 times SIGKILL" in done.stdout
    assert "0 with a tensor that differs" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_study_of_finetuning_compares_every_start(run):
    printed = run(
        study_finetuning,
        "seeds=1",
        "steps=3",
        "finetuning_steps=2",
        "workers=1",
        "model=repvgg_tiny",
    )

    row = next(line for line in printed.splitlines() if line.startswith("| 0 |"))
    scores = [float(score) for score in row.strip("| ").split(" | ")]
    assert len(scores) == 1 + len(study_finetuning.STARTS) + 1
    assert scores[4] == pytest.approx(scores[3] - scores[2], abs=0.02)
