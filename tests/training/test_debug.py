"""debug=...: each runs from the command line and does what its first line says."""

import json

import pytest

from tests.support.commands import CONFIGS, compose, run

TINY = ("model=repvgg_tiny", "data.batch_size=32", "hydra.run.dir=run")
DEBUG = sorted(path.stem for path in (CONFIGS / "debug").glob("*.yaml"))


@pytest.mark.parametrize("debug", DEBUG)
@pytest.mark.parametrize("data", ["digits", "imagefolder"])
def test_a_debug_config_says_its_command_and_composes(debug, data):
    first, second, *_ = (CONFIGS / "debug" / f"{debug}.yaml").read_text().splitlines()

    config = compose("train", f"debug={debug}", f"data={data}")

    assert first == "# @package _global_"
    assert second.endswith(f": python train.py debug={debug}")
    assert set(config) == set(compose("train"))


@pytest.mark.slow
def test_one_batch_of_each_part_runs_and_nothing_is_saved(tmp_path):
    done = run("train.py", *TINY, "debug=fdr", "rdrop=true", cwd=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    assert "1 epoch, 1 step of 32 images" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_limited_run_is_a_whole_one(tmp_path):
    done = run("train.py", *TINY, "debug=limit", "rdrop=true", cwd=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    assert "3 epochs, 24 steps of 32 images" in done.stdout
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.slow
def test_a_few_batches_are_learned_by_heart(tmp_path):
    done = run("train.py", *TINY, "debug=overfit", "trainer.max_epochs=12", cwd=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    losses = [
        float(line.split("train/loss ")[1].split(",")[0])
        for line in done.stdout.splitlines()
        if line.startswith("Epoch")
    ]
    assert losses[-1] < losses[0] / 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("debug", "named"),
    [
        ("profiler", "run_training_epoch"),
        ("profiler_advanced", "function calls"),
        ("profiler_pytorch", "Self CPU"),
    ],
)
def test_a_profile_is_written_into_the_folder_of_the_run(debug, named, tmp_path):
    done = run("train.py", *TINY, f"debug={debug}", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert named in (tmp_path / "run" / "fit-profile.txt").read_text()
    traces = list((tmp_path / "run").glob("*.trace.json"))
    assert bool(traces) == (debug == "profiler_pytorch")
    assert all(json.loads(trace.read_text())["traceEvents"] for trace in traces)
