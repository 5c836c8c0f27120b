"""Checkpoints that lie: one line, in bounded time and memory, and never a network that is wrong."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from repvgg import checkpoint
from repvgg.training.compatibility import check_resumed
from tests.support.commands import run
from tests.support.hostile.checkpoints import (
    ABSURD,
    CONFIG,
    DATA,
    HARMLESS,
    OTHERS,
    UNRESUMABLE,
    WRONG,
    damaged,
    ours,
    replaced,
    resumable,
    write_ours,
)
from tests.support.hostile.limits import measure

SECONDS = 10  # of CPU on any machine; measured: at most 1.7
MEMORY = 80_000_000  # bytes, of what is imported on the way, beside twice the size of the file


def refused(path) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        checkpoint.load(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 900
    return message


def limited(path) -> None:
    found = measure(checkpoint.load, path)

    assert found.error.startswith(("ValueError: '", "ArgumentError: '")), found.error
    assert found.error.isprintable()
    assert len(found.error) < 900
    assert found.seconds < SECONDS
    assert found.memory < MEMORY + 2 * path.stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("kind", ABSURD)
def test_a_size_that_a_checkpoint_claims_is_not_built(kind, tmp_path):
    write_ours(ABSURD[kind], tmp_path / "x.ckpt")

    limited(tmp_path / "x.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_that_claims_more_than_it_holds_is_not_opened(kind, tmp_path):
    OTHERS[kind](tmp_path / "x.pth")

    limited(tmp_path / "x.pth")


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
@pytest.mark.parametrize("kind", WRONG)
def test_a_checkpoint_that_contradicts_itself_is_refused(kind, tmp_path):
    write_ours(WRONG[kind], tmp_path / "x.ckpt")

    refused(tmp_path / "x.ckpt")


def resume(change, tmp_path) -> list[str]:
    """Check a changed checkpoint as `resume=` does."""
    content = resumable()
    change(content)
    torch.save(content, tmp_path / "last.ckpt")
    data = SimpleNamespace(contract=DATA)
    images = content["repvgg"]["probe"]["images"]
    return check_resumed(str(tmp_path / "last.ckpt"), CONFIG, data, images, None)


def test_a_training_state_is_resumed(tmp_path):
    assert resume(lambda content: None, tmp_path) == []


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("kind", UNRESUMABLE)
def test_a_training_state_that_cannot_be_restored_is_refused(kind, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be resumed; start a new run .* with init="):
        resume(UNRESUMABLE[kind], tmp_path)


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_does_not_belong_to_a_checkpoint_changes_nothing(kind, tmp_path):
    write_ours(HARMLESS[kind], tmp_path / "x.ckpt")

    opened = checkpoint.load(tmp_path / "x.ckpt")

    images = opened.probe.images / 255
    assert torch.equal(opened.predictor(images), opened.probe.logits)


def test_any_value_of_another_type_is_refused_or_changes_nothing(tmp_path):
    path = tmp_path / "x.ckpt"
    logits = ours()["repvgg"]["probe"]["logits"]
    tried = 0
    for kind, change in replaced():
        write_ours(change, path)
        message = "x"
        try:
            opened = checkpoint.load(path)
            scores = opened.predictor(opened.probe.images / 255)
            assert torch.equal(scores, logits), kind
        except ValueError as error:
            message = str(error)
        assert message.isprintable(), kind
        assert len(message) < 900, kind
        tried += 1
    assert tried > 130


def _save_arrays(weights: dict[str, torch.Tensor], path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **{key: value.numpy() for key, value in weights.items()})


# Ours, and files of others that hold checksums; torch's old format and safetensors hold none.
WRITERS: dict[str, Callable[[dict[str, torch.Tensor], Path], object]] = {
    "ours": lambda weights, path: write_ours(lambda content: None, path),
    "torch": torch.save,
    "numpy": _save_arrays,
}


@pytest.mark.parametrize("write", WRITERS)
def test_a_damaged_archive_is_refused_or_changes_nothing(write, tmp_path):
    path = tmp_path / "x.ckpt"
    weights = ours()["state_dict"]
    WRITERS[write]({key.removeprefix("net."): value for key, value in weights.items()}, path)
    for kind, content in damaged(path.read_bytes(), 60):
        path.write_bytes(content)
        with contextlib.suppress(ValueError):
            opened = checkpoint.open_network(path).model.state_dict()
            changed = [key for key in opened if not torch.equal(opened[key], weights[f"net.{key}"])]
            assert not changed, kind


COMMANDS = [
    ("inspect", "path=x.ckpt"),
    ("import", "path=x.ckpt"),
    ("predict", "model=x.ckpt", "images=x.png"),
    ("evaluate", "ckpt=x.ckpt", "data=digits"),
    ("deploy.py", "ckpt=x.ckpt"),
    ("train.py", "init=x.ckpt", "model=repvgg_tiny"),
]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("kind", ["1e9 blocks", "images of 1e6 pixels a side", "1e12 logits"])
def test_every_command_says_so_in_one_line(command, kind, tmp_path):
    write_ours(ABSURD[kind], tmp_path / "x.ckpt")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")

    done = run(*command, cwd=tmp_path)

    assert done.returncode == 1
    assert "'x.ckpt'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.ckpt", "x.png"]
