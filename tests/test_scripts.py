"""The programs run by hand, on small jobs."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPTS = Path(__file__).parents[1] / "scripts"


def run(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPTS / script, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_benchmark_shows_time_and_operations_of_every_way_to_step(tmp_path):
    done = run("benchmark_rdrop.py", "rounds=2", "cases=[32x64x10]", cwd=tmp_path)

    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "x |" in line]
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
    "views=false",
    "epochs=1",
    "min_steps=3",
    "out=study",
)


def rows(folder: Path) -> list[list[str]]:
    with (folder / "study" / "results.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_a_study_that_was_stopped_goes_on_and_ends_in_a_table_and_a_figure(tmp_path):
    done = run("study_rdrop.py", *STUDY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole = rows(tmp_path)
    table = (tmp_path / "study" / "table.md").read_text()
    path = tmp_path / "study" / "results.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]) + "0.1,epo")

    again = run("study_rdrop.py", *STUDY, cwd=tmp_path)

    assert again.returncode == 0, again.stderr
    assert "3 runs are done" in again.stdout
    assert "| alpha 1, dropout 0.2 |" in table
    assert (tmp_path / "study" / "figure.png").stat().st_size > 10_000
    deterministic = [row[:5] + row[6:] for row in sorted(whole)]  # all but the seconds
    assert sorted(row[:5] + row[6:] for row in rows(tmp_path)) == deterministic


def test_a_study_reads_a_folder_of_images(tmp_path):
    for part in ("train", "test"):
        for label, shade in (("dark", 40), ("light", 200)):
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (16, 16), (shade, shade + 5 * i, 90)).save(folder / f"{i}.png")

    done = run("study_rdrop.py", *STUDY, "labels=[0.5]", "root=images", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "# R-Drop on images" in done.stdout
    assert {row[0] for row in rows(tmp_path)[1:]} == {"0.5"}


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("study_rdrop.py", ["seed=3"], "seed=3: there is no such key; did you mean seeds?"),
        ("study_rdrop.py", ["alphas=[-1]"], "alphas=-1: must be a number of at least 0"),
        ("study_rdrop.py", ["seeds=1"], "seeds=1: must be an integer of at least 2"),
        ("study_rdrop.py", ["root=nowhere"], "there is no folder nowhere/train"),
        ("benchmark_rdrop.py", ["cases=[224]"], "'224' is not SIZExBATCHxCLASSES"),
        ("benchmark_rdrop.py", ["device=abacus"], "device='abacus'"),
    ],
)
def test_a_mistake_is_told_in_one_line(script, arguments, message, tmp_path):
    done = run(script, *arguments, cwd=tmp_path)

    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
