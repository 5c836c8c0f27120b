"""The study of branches, on small networks."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from repvgg import create_model, switch_to_deploy
from scripts.studies import branch_ablation, runs
from scripts.studies.branch_ablation import BRANCHES, NOTHING, Removal
from tests.support.figures import assert_drawn
from tests.support.networks import relative_error, settle

SMALL = {"num_classes": 5, "depths": [1, 2, 2, 1], "widths": [8, 8, 12, 16]}
MODELS = ["repvgg_tiny", "qarepvgg_tiny", "repvgg_b1g4", "repvgg_d2se"]


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(9, 3, 17, 17, generator=generator, dtype=torch.float64)


def small(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return settle(create_model(name, **SMALL)).double()


@contextmanager
def silenced(block: torch.nn.Module, branch: str) -> Iterator[None]:
    """Multiply a branch's output by zero."""
    module = getattr(block, BRANCHES[branch])
    hook = module.register_forward_hook(lambda _module, _inputs, output: 0 * output)
    yield
    hook.remove()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_removing_a_branch_equals_zeroing_it(name):
    network = small(name)
    folded = switch_to_deploy(network)
    blocks, convolutions = (branch_ablation.blocks_of(one) for one in (network, folded))
    for name, branch in branch_ablation.removals_of(network):
        x = torch.rand(2, blocks[name].in_channels, 9, 9, dtype=torch.float64)
        kernel, bias = branch_ablation.without(blocks[name], branch)
        convolutions[name].reparam.weight.copy_(kernel)
        convolutions[name].reparam.bias.copy_(bias)

        with silenced(blocks[name], branch):
            expected = blocks[name](x)

        assert relative_error(expected, convolutions[name](x)) < 1e-12


@pytest.mark.parametrize("name", ["repvgg_tiny", "qarepvgg_tiny"])
@torch.no_grad()
def test_every_removal_is_measured_on_the_whole_network(name, images):
    network = small(name)
    network.linear.bias -= network(images).mean(0)  # more than one class is predicted
    labels = network(images).argmax(1)
    expected = {NOTHING: 1.0}
    for removal in branch_ablation.removals_of(network):
        with silenced(branch_ablation.blocks_of(network)[removal.block], removal.branch):
            same = network(images).argmax(1) == labels
        expected[removal] = same.double().mean().item()

    assert branch_ablation.ablate(network, images, labels) == expected
    assert min(expected.values()) < 1


@torch.no_grad()
def test_shares_of_the_branches_add_up_to_the_kernel():
    block = branch_ablation.blocks_of(small("repvgg_tiny"))["stages.1.1"]

    shares = branch_ablation.kernel_shares(block)

    point = block.equivalent_kernel_bias().kernel - branch_ablation.without(block, "1x1").kernel
    identity = (
        block.equivalent_kernel_bias().kernel - branch_ablation.without(block, "identity").kernel
    )
    assert list(shares) == ["3x3", "1x1", "identity"]
    assert sum(shares.values()) == pytest.approx(1)
    assert (point.norm() / identity.norm()).item() == pytest.approx(
        shares["1x1"] / shares["identity"]
    )


def test_statistics_are_estimated_after_the_removal(images):
    network = small("repvgg_tiny")
    with torch.no_grad():
        network.linear.bias -= network(images).mean(0)
    labels = network(images).argmax(1)
    before = copy.deepcopy(network.state_dict())

    found = dict(branch_ablation.ablate_reestimated(network, images, labels, [images]))

    assert list(found) == [NOTHING, *branch_ablation.removals_of(network)]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert found != branch_ablation.ablate(network, images, labels)


def test_table_and_figures_are_made_from_the_records(tmp_path):
    path = tmp_path / "digits-repvgg_tiny.csv"
    cells = [
        (NOTHING, 0.99, ""),
        (Removal("stem", "3x3"), 0.4, 0.7),
        (Removal("stem", "1x1"), 0.6, 0.3),
    ]
    for network in ("seed 0", "seed 1"):
        for removal, accuracy, share in cells:
            row = {"network": network, **removal._asdict(), "accuracy": accuracy}
            runs.append(path, row | {"accuracy_reestimated": accuracy, "kernel_share": share})
    record = {"title": "digits", "command": "c", "networks": 2, "recipe": {"epochs": 1}}
    record |= {"bn_images": 3, "test_images": 4, "machine": "m"}
    path.with_suffix(".json").write_text(json.dumps(record))

    branch_ablation.redraw(path)

    page = path.with_suffix(".md").read_text()
    assert "| stem | 40.00 (sd 0.00) | 60.00 (sd 0.00) |  |" in page
    for name in ("removed", "reestimated", "kernels"):
        stem = Path(f"{path.with_suffix('')}-{name}")
        assert_drawn(stem)
        assert f"{stem.name}-dark.svg" in page


@pytest.mark.slow
def test_the_study_trains_and_measures(run, tmp_path):
    printed = run(
        branch_ablation, "seeds=1", "epochs=1", "images=32", "workers=0", "width=0.5", "out=study"
    )

    assert "| stages.3.0 |" in printed
    (ckpt,) = (tmp_path / "runs" / "branch_ablation").glob("*.ckpt")
    again = run(branch_ablation, f"ckpt={ckpt}", "images=32", "out=again")
    assert [line for line in again.splitlines() if line[:5] == "| ste"] == [
        line for line in printed.splitlines() if line[:5] == "| ste"
    ]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model=resnet18", "model='resnet18': must be of the family"),
        ("seeds=0", "seeds=0: must be an integer of at least 1"),
        ("ckpt=nowhere.ckpt", "nowhere.ckpt"),
    ],
)
def test_a_mistake_ends_in_one_line(argument, message, run, capfd):
    with pytest.raises(SystemExit):
        run(branch_ablation, argument)

    error = capfd.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
