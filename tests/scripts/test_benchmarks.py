"""Benchmarks on small networks."""

import copy
import functools
import multiprocessing
import re

import pytest
import torch

from repvgg import RepVGGBlock, create_model
from repvgg.export.artifact import build_program
from repvgg.verify import relative_error
from scripts.studies import (
    benchmark_deploy,
    benchmark_fusion,
    benchmark_rdrop,
    benchmark_training,
    timing,
)
from tests.support.commands import make
from tests.support.figures import assert_drawn
from tests.support.networks import settle


@pytest.mark.slow
def test_rdrop_in_one_forward_costs_few_operations():
    flops = {}
    for way in benchmark_rdrop.WAYS:
        step = benchmark_rdrop.training_step(way, "repvgg_a0", "32x8x10", torch.device("cpu"))
        step()  # detects stochastic layers
        flops[way] = timing.count_flops(step)

    ratios = {way: count / flops[benchmark_rdrop.PLAIN] for way, count in flops.items()}
    assert ratios[benchmark_rdrop.CONTROL] == 1
    assert 1 < ratios[benchmark_rdrop.ONE_FORWARD] < 1.01
    assert ratios[benchmark_rdrop.IMAGE_TWICE] == pytest.approx(2, abs=1e-3)
    assert ratios[benchmark_rdrop.TWO_FORWARDS] == pytest.approx(2, abs=1e-3)


@pytest.mark.slow
def test_the_rdrop_benchmark_prints_a_row_per_way(run, monkeypatch, in_threads):
    ways = (benchmark_rdrop.PLAIN, benchmark_rdrop.ONE_FORWARD)
    monkeypatch.setattr(benchmark_rdrop, "WAYS", ways)

    printed = run(benchmark_rdrop, "rounds=2", "model=repvgg_tiny", "cases=[32x8x10]")

    rows = [line.split(" | ")[0] for line in printed.splitlines() if "x |" in line]
    assert rows == [f"| {way}" for way in ways]


@pytest.mark.slow
def test_the_fusion_benchmark_writes_table_and_figure(run, tmp_path, in_threads):
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
    assert_drawn(tmp_path / "benchmark")
    assert len((tmp_path / "benchmark.csv").read_text().splitlines()) == 4


def test_the_fusion_benchmark_rejects_an_unknown_network(run, tmp_path, capfd):
    with pytest.raises(SystemExit):
        run(benchmark_fusion, "networks=[resnet19]", f"out={tmp_path}")

    assert "networks=['resnet19']: must be some of resnet18" in capfd.readouterr().err


DEPLOYMENT = {**benchmark_deploy.DEFAULTS, "size": 32, "compile": False}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    benchmark_deploy.prepare(folder, DEPLOYMENT)
    return folder, benchmark_deploy.build(DEPLOYMENT)


@pytest.mark.slow
@pytest.mark.parametrize("name", benchmark_deploy.candidates(DEPLOYMENT))
@torch.no_grad()
def test_every_timed_candidate_computes_the_network(name, prepared):
    folder, (multi_branch, folded, description) = prepared
    program = build_program(copy.deepcopy(multi_branch), description)
    images = torch.rand(2, 3, 32, 32)
    expected = copy.deepcopy(program).double()(images.double())

    call = benchmark_deploy.candidate(name, folder, program, copy.deepcopy(folded), description)

    allowed = {"int8": 0.3, "bf16": 0.05}.get(name.rpartition(", ")[2], 1e-5)
    assert relative_error(expected, call(images).float()) < allowed


@pytest.mark.parametrize(("control", "noisy"), [(11.0, False), (20.0, True)])
def test_ratios_are_printed_only_if_the_control_is_quiet(control, noisy, monkeypatch):
    monkeypatch.setattr(timing, "measure_peak", lambda _: None)
    names = (benchmark_deploy.MULTI_BRANCH, benchmark_deploy.BASE, benchmark_deploy.AGAIN)
    times = {name: [value] * 4 for name, value in zip(names, (30.0, 11.0, control), strict=True)}

    record = benchmark_deploy.summarize(
        {1: times}, dict.fromkeys(names, 0.0), DEPLOYMENT | {"model": "repvgg_tiny"}
    )

    text = benchmark_deploy.table(record)
    assert ("Too noisy" in text) == noisy
    assert ("2.73x" in text) != noisy


@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b1g4"])
def test_the_reference_of_the_training_benchmark_is_the_same_network(name):
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


def test_steps_are_timed_from_a_batch_to_the_next_request():
    here, there = multiprocessing.Pipe()
    batch = (torch.zeros(1), torch.zeros(1))
    here.send((None,))
    here.send((None,))
    here.send(None)

    count = sum(1 for _ in benchmark_training.on_demand(there, batch, 5))

    assert count == 2 + 2
    assert here.recv() == 5
    assert all(here.recv() >= 0 for _ in range(2))


@pytest.mark.slow
def test_loading_is_timed_alone_and_in_training(tmp_path, capsys, monkeypatch):
    six_steps = functools.partial(benchmark_training.train_on, steps=6)
    monkeypatch.setattr(benchmark_training, "train_on", six_steps)
    for part, count in (("train", 40), ("val", 2)):
        make(tmp_path / part, count=count)
    settings = benchmark_training.DEFAULTS | {"model": "repvgg_tiny", "photos": str(tmp_path)}

    benchmark_training.measure_data(settings)

    *_, row = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\| files, cropped to 224 pixels \| \d+ \(\d+, \d+\) \| \d+\.\d \|", row)
