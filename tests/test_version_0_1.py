"""Files that version 0.1 wrote: they load, resume and verify in every later version."""

import shutil
from pathlib import Path

import pytest
import torch

import repvgg
from repvgg.contract import to_float
from repvgg.export.formats import open_artifact
from tests.support.commands import run
from tests.support.networks import relative_error

HELD = Path(__file__).parent / "support" / "version_0_1"


@pytest.mark.parametrize("name", ["run/checkpoints/best.ckpt", "run/checkpoints/last.ckpt"])
def test_a_checkpoint_gives_the_logits_it_recorded(name):
    held = repvgg.checkpoint.load(HELD / name)

    assert held.config["name"] == "repvgg_tiny"
    assert relative_error(held.probe.logits, held.predictor(to_float(held.probe.images))) < 1e-5


@pytest.mark.slow
def test_a_run_that_stopped_within_an_epoch_is_resumed(tmp_path):
    shutil.copytree(HELD / "run", tmp_path / "run")

    done = run("train.py", "resume=run/checkpoints/last.ckpt", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "Epoch 1:" in done.stdout
    assert "Epoch 0:" not in done.stdout
    expected, given = (
        torch.load(path, weights_only=True)
        for path in (HELD / "ended.ckpt", tmp_path / "run" / "checkpoints" / "last.ckpt")
    )
    assert given["global_step"] == expected["global_step"] == 60
    for key, value in expected["state_dict"].items():  # another processor rounds in another way
        torch.testing.assert_close(given["state_dict"][key], value, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_deployed_folder_is_verified_and_deployed_again(tmp_path):
    shutil.copytree(HELD / "deployed", tmp_path / "deployed")

    verified = run("deploy.py", "verify=deployed", cwd=tmp_path)
    again = run(
        "deploy.py",
        f"ckpt={HELD / 'run' / 'checkpoints' / 'best.ckpt'}",
        "out=again",
        "benchmark=false",
        cwd=tmp_path,
    )

    assert verified.returncode == 0, verified.stderr
    assert again.returncode == 0, again.stderr
    probe = repvgg.checkpoint.load(HELD / "run" / "checkpoints" / "best.ckpt").probe
    images = to_float(probe.images)
    for folder in (HELD / "deployed", tmp_path / "again"):
        for name in ("model.safetensors", "model.onnx"):
            predict = open_artifact(folder / name)
            assert relative_error(probe.logits, predict(images)) < 1e-5
