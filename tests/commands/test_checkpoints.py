"""`repvgg import` and `repvgg inspect`, on checkpoints of other projects and of ours."""

import re
import signal
import sys
from dataclasses import replace

import pytest
import torch

import repvgg
from repvgg import __main__, checkpoint, create_model
from repvgg.contract import DataContract, Description
from repvgg.export.formats import save_safetensors
from tests.support import commands, foreign
from tests.support.networks import settle


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    """Runs a command with arguments in an empty folder; returns what it printed."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)

    def run_in_folder(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["repvgg", *arguments])
        __main__.main()
        return capfd.readouterr().out

    yield run_in_folder
    signal.signal(signal.SIGTERM, handler)


def weights_of(naming, **overrides) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    network = create_model("repvgg_tiny", **{"num_classes": 3, "in_channels": 1} | overrides)
    return foreign.renamed(settle(network), naming)


def test_a_file_of_the_field_becomes_a_checkpoint_that_knows_its_classes(run, tmp_path):
    torch.save({"state_dict": weights_of(foreign.timm)}, tmp_path / "weights.pth")
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")

    printed = run(
        "import",
        "path=weights.pth",
        "classes=names.txt",
        "image_size=40",
        "mean=[0.5]",
        "std=[0.3]",
    )

    opened = checkpoint.load(tmp_path / "weights.ckpt")
    assert opened.data.classes == ["cat", "dog", "owl"]
    assert (opened.data.image_size, opened.data.resize_size) == ([40, 40], 40)
    assert (opened.data.mean, opened.data.std) == ([0.5], [0.3])
    assert "repvgg_tiny in timm's layout, multi-branch, 3 classes, at 'state_dict'" in printed
    assert "all 96 tensors loaded" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "exists: pass overwrite=true"),
        (["out=new.ckpt"], "the network takes 1 channels; pass a number for each"),
        (["out=gone/new.ckpt"], "there is no folder gone"),
        (["out=."], "out=.: is a folder"),
        (["out=new.ckpt", "bn_eps=0"], "bn_eps=0: must be a number of at least"),
        (["out=new.ckpt", "mean=[0.5]", "std=[0]"], "std=0: must be a number of at least 1e-06"),
        (
            ["out=new.ckpt", "mean=[0.5]", "std=[0.3]", "interpolation=x"],
            "of bilinear, bicubic",
        ),
        (["out=new.ckpt", "mean=[0.5]", "std=[0.3]", "weights=ema"], "weights=ema: there is no"),
        (["out=new.ckpt", "image_size=big"], "image_size='big': must be a number"),
        (["out=new.ckpt", "mean=[0.5]", "std=[0.3]", "strides=[1]"], "strides=\\[1\\]: must be 5"),
        (
            ["out=new.ckpt", "mean=[0.5]", "std=[0.3]", "classes=weights.pth"],
            "classes=weights.pth: is no text in UTF-8",
        ),
    ],
)
def test_an_import_that_is_refused_writes_nothing(arguments, message, run, tmp_path, capfd):
    torch.save(weights_of(foreign.timm), tmp_path / "weights.pth")
    (tmp_path / "weights.ckpt").touch()

    with pytest.raises(SystemExit):
        run("import", "path=weights.pth", *arguments)

    assert re.search(message, capfd.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights.ckpt", "weights.pth"]


def test_a_deployed_file_of_ours_is_imported_as_it_says(run, tmp_path):
    config = {"name": "repvgg_tiny", "num_classes": 3, "in_channels": 1, "strides": [1, 1, 2, 2, 2]}
    data = DataContract(["a", "b", "c"], 1, [16, 16], [0.1], [0.2], "bicubic")
    network = repvgg.switch_to_deploy(settle(create_model(**config)))
    save_safetensors(network, tmp_path / "model.safetensors", Description(config, data))

    printed = run("import", "path=model.safetensors", "image_size=24")

    opened = checkpoint.load(tmp_path / "model.ckpt")
    assert opened.config == config
    assert opened.data == replace(data, image_size=[24, 24], resize_size=24)
    assert "model=repvgg_tiny ++model.strides=[1,1,2,2,2] data=..." in printed
    with pytest.raises(SystemExit):
        run("import", "path=model.ckpt", "out=other.ckpt")
    assert not (tmp_path / "other.ckpt").exists()


def test_the_doctor_tells_what_is_there_and_that_it_would_load(run, tmp_path):
    weights = weights_of(foreign.authors, in_channels=3)
    torch.save({"model": weights, "epoch": 2}, tmp_path / "whole.pth")

    whole = run("inspect", "path=whole.pth")

    assert "looks like repvgg_tiny, 3 classes" in whole
    assert "complete: nothing missing, nothing unknown" in whole
    assert "would load: repvgg deploy ckpt=whole.pth" in whole


def test_a_backbone_is_for_training_and_an_import_says_so(run, tmp_path, capfd):
    weights = weights_of(foreign.authors, in_channels=3, num_classes=0)
    torch.save({"model": weights, "out": tmp_path}, tmp_path / "backbone.pth")

    printed = run("inspect", "path=backbone.pth")
    with pytest.raises(SystemExit):
        run("import", "path=backbone.pth")

    assert "out (pathlib.PosixPath, not opened)" in printed
    assert "looks like repvgg_tiny, without a classifier" in printed
    assert "would load: repvgg train init=backbone.pth" in printed
    assert re.fullmatch(
        r"repvgg import: it holds repvgg_tiny without a classifier.*\n",
        capfd.readouterr().err,
    )


def test_the_doctor_names_what_keeps_a_file_from_loading(run, tmp_path, capfd):
    weights = weights_of(foreign.authors)
    del weights["stage2.1.rbr_1x1.bn.bias"]
    torch.save(weights | {"stage2.1.scale": torch.ones(1)}, tmp_path / "part.pth")

    with pytest.raises(SystemExit) as stopped:
        run("inspect", "path=part.pth")

    assert stopped.value.code == 1
    printed, refused = capfd.readouterr()
    assert re.match(r"repvgg inspect: 'part\.pth': .*1 missing.*1 unknown.*\n$", refused)
    assert "missing: stage2.1.rbr_1x1.bn.bias" in printed
    assert "unknown: stage2.1.scale" in printed
    assert "would load" not in printed


def test_the_doctor_says_which_keys_a_file_needs(run, tmp_path):
    weights = weights_of(foreign.authors, strides=[1, 1, 2, 2, 2])
    torch.save(weights, tmp_path / "gray.pth")

    printed = run("inspect", "path=gray.pth", "strides=[1,1,2,2,2]")

    assert (
        "would load: repvgg import path=gray.pth 'strides=[1,1,2,2,2]' 'mean=[0.5]' 'std=[0.5]'"
    ) in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["deploy", "ckpt=two.pth"], "path=two.pth weights=... converts the file"),
        (["train", "init=two.pth"], "path=two.pth weights=... converts the file"),
        (["deploy", "ckpt=gray.pth"], "path=gray.pth mean=... std=... converts the file"),
    ],
)
def test_a_file_that_needs_arguments_names_the_command_that_takes_them(arguments, hint, tmp_path):
    weights = weights_of(foreign.timm)
    other = {key: 2 * value for key, value in weights.items()}
    torch.save({"net": weights, "ema": other}, tmp_path / "two.pth")
    torch.save(weights, tmp_path / "gray.pth")

    done = commands.run(*arguments, cwd=tmp_path)

    assert done.returncode == 1
    assert f"python -m repvgg import {hint}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gray.pth", "two.pth"]
