"""Random command lines end with status 0, or in one line that leaves nothing behind."""

import itertools

import pytest

from tests.support.hostile.command_lines import Line, Place, lines

TINY = ["model=repvgg_tiny", "trainer.max_epochs=1"]
SCHEDULES = "torch.optim.lr_scheduler"
LONG = "a." * 500 + "b"  # longer than the name of a file may be
# What went wrong once.
FOUND = [
    Line("train", ["trainer.deterministic=${oc.env:NOT_THERE}"]),
    Line("train", ["model=repvgg_tiny", "--info"]),
    Line("deploy", ["verify=deployed", "hydra.mode=MULTIRUN"]),
    Line("deploy", ["ckpt=x.ckpt", f"out={'x' * 100_000}"]),
    Line("predict", ["model=deployed/model.safetensors", f"images={'[' * 5000}"]),
    Line("train", ["hydra.job.chdir=true", "deployed_validation=[null]"]),
    Line("train", [*TINY, "objective=null"]),
    Line("train", [*TINY, f"rdrop_warmup={10**400}"]),
    Line("train", [*TINY, "debug=profiler", "+trainer.profiler.row_limit=1"]),
    Line("train", [*TINY, "+trainer.profiler=1"]),
    Line("train", ["+model.name=[null]"]),
    Line("evaluate", [f"data={LONG}"]),
    Line("evaluate", ["ckpt=x.ckpt", "data=[[1]]"]),
    Line("train", ["model=[null]"]),
    Line("train", [*TINY, "debug=profiler_advanced", "++trainer.profiler.dirpath=-1"]),
    Line("train", [*TINY, "callbacks=early_stopping", "++callbacks.early_stopping.min_delta=[]"]),
    Line("train", ["logger=[null]", "callbacks=[[1]]"]),
    Line("train", [*TINY, "trainer._target_=a\tb", "hydra.run.dir=."]),
    Line("deploy", ["ckpt=x.ckpt", "--shell-completion", "int8_float_layers=\x1b[2J"]),
    Line("train", [f"model.{LONG}=1"]),
    Line("train", [*TINY, "+logger.tensorboard.x=1"]),
    Line("train", [*TINY, "+logger.tensorboard.name=true"]),
    Line("train", [*TINY, "+logger.tensorboard.max_queue=[]"]),
    Line("train", [*TINY, f"scheduler._target_={SCHEDULES}.ExponentialLR", "+scheduler.gamma=[]"]),
    Line("train", [*TINY, f"scheduler._target_={SCHEDULES}.PolynomialLR", "+scheduler.power=x"]),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("lines") / "place")


@pytest.mark.slow
def test_a_mistake_is_one_line_and_leaves_nothing(place):
    tried = [place.run(line) for line in [*FOUND, *itertools.islice(lines(seed=0), 40)]]

    assert [f"{one.fault}: {one.line}: {one.error[-500:]}" for one in tried if one.fault] == []
    assert all(one.status for one in tried[: len(FOUND)] if one.line.arguments[-1] != "--info")
    assert sum(one.status == 0 for one in tried) >= 3


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
