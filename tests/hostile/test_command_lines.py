"""Random command lines end with status 0, or in one line that leaves nothing behind."""

import itertools

import pytest

from tests.support.hostile.command_lines import Line, Place, lines

# What went wrong once.
FOUND = [
    Line("train", ["trainer.deterministic=${oc.env:NOT_THERE}"]),
    Line("train", ["model=repvgg_tiny", "--info"]),
    Line("deploy", ["verify=deployed", "hydra.mode=MULTIRUN"]),
    Line("deploy", ["ckpt=x.ckpt", f"out={'x' * 100_000}"]),
    Line("train", ["hydra.job.chdir=true", "deployed_validation=[null]"]),
    Line("train", ["objective=null", "logger=csv", "model=repvgg_tiny"]),
    Line("predict", ["model=deployed/model.safetensors", f"images={'[' * 5000}"]),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("lines") / "place")


@pytest.mark.slow
def test_a_mistake_is_one_line_and_leaves_nothing(place):
    tried = [place.run(line) for line in [*FOUND, *itertools.islice(lines(seed=0), 80)]]

    assert [f"{one.fault}: {one.line}: {one.error[-500:]}" for one in tried if one.fault] == []
    assert sum(one.status == 0 for one in tried) >= 5


@pytest.mark.slow
def test_a_fault_is_noticed(place):
    for status, error, fault in (
        (1, "Traceback (most recent call last):\nValueError", "a traceback"),
        (1, "repvgg train: a\nb", "2 lines"),
        (1, "", "0 lines"),
        (1, "repvgg train: \x1b[2J", "control characters"),
        (1, "repvgg train: " + "x" * 800, "814 characters"),
        (-9, "", "ended by 9"),
    ):
        assert place._fault(status, error).startswith(fault)
    (place.folder / "left").touch()
    assert place._fault(1, "repvgg train: x") == "left behind: left"
    (place.folder / "left").unlink()
    assert place._fault(1, "repvgg train: x") == ""
