"""Studies on small jobs."""

import csv
from pathlib import Path

import pytest
from PIL import Image

from scripts.studies import benchmark_rdrop, finetuning, fusion, int8, rdrop
from tests.support.figures import assert_drawn
from tests.support.processes import Process

STUDY = (
    "seeds=2",
    "alphas=[1]",
    "dropouts=[0.2]",
    "labels=[0.1]",
    "epochs=1",
    "workers=0",
    "min_steps=3",
    "out=study",
)


def rows(folder: Path) -> list[list[str]]:
    with (folder / "study" / "results.csv").open(newline="") as file:
        return list(csv.reader(file))


@pytest.fixture
def short_costs(monkeypatch):
    """The cost of a step is measured over two steps."""
    monkeypatch.setattr(rdrop, "MEASURED_STEPS", 2)


@pytest.mark.slow
def test_a_stopped_study_resumes_and_ends_in_table_and_figure(run, tmp_path, short_costs):
    run(rdrop, *STUDY)
    whole = rows(tmp_path)
    table = (tmp_path / "study" / "table.md").read_text()
    path = tmp_path / "study" / "results.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]) + "0.1,epo")

    again = run(rdrop, *STUDY)

    assert "3 runs are done" in again
    assert "| alpha 1, dropout 0.2 |" in table
    for name in ("accuracy", "ece"):
        assert_drawn(tmp_path / "study" / name)
    deterministic = [row[:5] + row[6:] for row in sorted(whole)]  # without the seconds
    assert sorted(row[:5] + row[6:] for row in rows(tmp_path)) == deterministic


@pytest.mark.slow
def test_a_study_reads_a_folder_of_images(run, tmp_path, short_costs):
    for part in ("train", "test"):
        for label, shade in (("dark", 40), ("light", 200)):
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (16, 16), (shade, shade + 5 * i, 90)).save(folder / f"{i}.png")

    printed = run(rdrop, *STUDY, "labels=[0.5]", "budgets=[epochs]", "root=images")

    assert "# R-Drop on images" in printed
    assert {row[0] for row in rows(tmp_path)[1:]} == {"0.5"}


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (rdrop, ["seed=3"], "seed=3: there is no such key; did you mean seeds?"),
        (rdrop, ["alphas=[-1]"], "alphas=-1: must be a number of at least 0"),
        (rdrop, ["seeds=1"], "seeds=1: must be an integer of at least 2"),
        (rdrop, ["root=nowhere"], "there is no folder nowhere/train"),
        (rdrop, ["views=false"], "views=false: there is no such key"),
        (rdrop, ["alphas=[1"], "alphas='[1': must be a list; for example alphas=[0.3"),
        (rdrop, ["lr=true"], "lr='true': must be a number"),
        (rdrop, ["budgets=[[time]]"], "must be of epochs, time"),
        (benchmark_rdrop, ["cases=5"], "cases='5': must be a list"),
        (benchmark_rdrop, ["cases=[224]"], "'224' is not SIZExBATCHxCLASSES"),
        (benchmark_rdrop, ["device=abacus"], "device='abacus'"),
    ],
)
def test_a_mistake_ends_in_one_line(script, arguments, message, run, tmp_path, capfd):
    with pytest.raises(SystemExit) as stopped:
        run(script, *arguments)

    printed = capfd.readouterr().err
    assert stopped.value.code == 1
    assert message in printed
    assert len(printed.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", [benchmark_rdrop, rdrop])
def test_help_shows_the_keys(script, run):
    printed = run(script, "--help")

    assert all(f"{key}:" in printed for key in script.DEFAULTS)


@pytest.mark.slow
def test_the_fusion_study_measures_a_network():
    row = fusion.measure("torchvision", "classification", "shufflenet_v2_x0_5")

    assert row["left"] == 0 < row["batchnorms"]
    assert max(row["error_float64"], row["worst_module"]) < 1e-10
    assert row["error_float32"] < 1e-4
    text = fusion.summary([{key: "" if v is None else str(v) for key, v in row.items()}])
    assert f"| torchvision, classification | 1 | {row['batchnorms']} | 0 |" in text


@pytest.mark.slow
def test_the_int8_study_trains_rounds_and_compares(run, tmp_path):
    models = "models=[qarepvgg_tiny]"

    printed = run(int8, models, "seeds=1", "epochs=1", "images=16", "workers=0", "out=study")

    rows = (tmp_path / "study" / "digits.csv").read_text().splitlines()
    assert len(rows) == 1 + 8
    assert "| float32 |" in printed
    assert "| minmax, weights per tensor |" in printed
    assert_drawn(tmp_path / "study" / "digits")
    assert len(list((tmp_path / "runs" / "int8").glob("*.ckpt"))) == 1


@pytest.mark.slow
def test_a_run_killed_at_random_equals_the_uninterrupted_one(tmp_path):
    short = (
        "from scripts.studies import kills\n"
        "kills.RUN.append('data.batch_size=256')\n"
        "kills.main({**kills.DEFAULTS, 'kills': 1, 'epochs': 2, 'longest': 1.5})"
    )
    done = Process("-c", short, cwd=tmp_path).completed()

    assert done.returncode == 0, done.stderr
    assert "1 times SIGKILL" in done.stdout
    assert "0 with a tensor that differs" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_finetuning_study_compares_every_start(run):
    printed = run(
        finetuning,
        "seeds=1",
        "steps=3",
        "finetuning_steps=2",
        "workers=0",
        "model=repvgg_tiny",
    )

    row = next(line for line in printed.splitlines() if line.startswith("| 0 |"))
    scores = [float(score) for score in row.strip("| ").split(" | ")]
    assert len(scores) == 1 + len(finetuning.STARTS) + 1
    assert scores[4] == pytest.approx(scores[3] - scores[2], abs=0.02)
