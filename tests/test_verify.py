import copy
import math

import pytest
import torch
from torch import nn

import repvgg
from repvgg.verify import (
    Verdict,
    agreement,
    compare,
    compare_blocks,
    compare_modules,
    first_difference,
    float32_bound,
    relative_error,
)
from tests.support.networks import settle

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network() -> repvgg.RepVGG:
    torch.manual_seed(0)
    sizes = {"depths": (1, 2, 2, 1), "widths": (8, 16, 16, 24), "num_classes": 5}
    return settle(repvgg.create_model("repvgg_a0", **sizes)).double()


def test_the_error_is_relative_to_the_largest_value_of_the_reference():
    reference = torch.tensor([[1.0, -4.0]])

    assert relative_error(reference, torch.tensor([[1.0, -3.0]])) == 0.25


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_an_infinite_error(bad):
    assert relative_error(torch.ones(1, 2), torch.tensor([[1.0, bad]])) == math.inf


def test_another_shape_is_an_infinite_error_that_fails():
    verdict = compare(lambda x: torch.ones(4, 2), lambda x: torch.ones(4, 3), IMAGES)

    assert (verdict.error, verdict.passed, verdict.agreement) == (math.inf, False, 0.0)


def test_agreement_counts_rows_of_the_same_top_class():
    reference = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [2.0, 1.0]])
    candidate = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [2.0, 1.0]])

    assert compare(lambda x: reference, lambda x: candidate, IMAGES).agreement == 0.75


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_faithful_fold_passes(dtype):
    reference = network()

    verdict = compare(reference, repvgg.switch_to_deploy(reference).to(dtype), IMAGES.to(dtype))

    assert verdict.passed


BRANCHES = [
    (name, branch)
    for name, block in network().named_modules()
    for branch in ("branch_3x3", "branch_1x1", "branch_identity")
    if getattr(block, branch, None) is not None
]


@pytest.mark.parametrize(("name", "branch"), BRANCHES)
def test_a_lost_branch_is_caught_and_its_block_named(name, branch):
    reference = network()
    damaged = copy.deepcopy(reference)
    lost = dict(damaged.named_modules())[name]
    with torch.no_grad():
        # A branch whose last BatchNorm gives zero is as good as gone.
        bn = lost.branch_identity if branch == "branch_identity" else getattr(lost, branch).bn
        bn.weight.zero_()
        bn.bias.zero_()

    errors = compare_blocks(reference, repvgg.switch_to_deploy(damaged), IMAGES)
    verdict = compare(reference, repvgg.switch_to_deploy(damaged), IMAGES.double())

    assert [block for block, error in errors.items() if not error <= 1e-10] == [name]
    assert not verdict.passed


def test_every_block_is_measured():
    reference = network()

    errors = compare_blocks(reference, repvgg.switch_to_deploy(reference), IMAGES)

    assert len(errors) == 7
    assert max(errors.values()) < 1e-12


def test_measuring_blocks_leaves_no_hook_behind():
    reference = network()

    compare_blocks(reference, repvgg.switch_to_deploy(reference), IMAGES)

    assert not any(module._forward_hooks for module in reference.modules())


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    return nn.Sequential(inner, nn.ReLU(), nn.Linear(3, 2)).double()


def test_outputs_are_compared_as_they_were_before_somebody_overwrote_them():
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)).double()
    changed = nn.Sequential(copy.deepcopy(network[0]), nn.ReLU())
    images = torch.linspace(-1, 1, 12).double().reshape(4, 3)

    assert compare_modules(network, changed, [images]) == {"": 0, "0": 0, "1": 0}


def test_every_module_is_compared_by_name():
    network = chain()
    changed = copy.deepcopy(network)
    changed[0][1].bias.data.add_(0.1)

    errors = compare_modules(network, changed, [torch.ones(1, 3).double()])

    assert set(errors) == {"", "0", "0.0", "0.1", "1", "2"}
    assert {name for name, error in errors.items() if error == 0} == {"0.0"}


def test_modules_that_moved_are_left_out_and_those_that_pass_them_on():
    network = chain()

    errors = compare_modules(
        network, copy.deepcopy(network), [torch.ones(1, 3).double()], moved={"0.1"}
    )

    assert errors == {"": 0, "0.0": 0, "1": 0, "2": 0}


def test_a_module_that_is_called_less_often_is_not_compared():
    network = chain()
    shorter = copy.deepcopy(network)
    shorter[1] = nn.Identity()
    shorter[0] = shorter[0][:1]

    errors = compare_modules(network, shorter, [torch.ones(1, 3).double()])

    assert set(errors) == {"", "0", "0.0", "1", "2"}


def test_nothing_equals_nothing():
    assert relative_error(torch.empty(0, 4), torch.empty(0, 4)) == 0


@pytest.mark.parametrize(
    ("own", "bound"),
    [
        (0.0, 1e-5),
        (2e-6, 1e-5),  # four times that is less than is usual
        (1e-4, 4e-4),
        (1.0, 1e-2),  # no more than this
        (float("nan"), 1e-5),
        (float("inf"), 1e-5),
    ],
)
def test_the_bound_is_four_times_the_own_error_between_two_limits(own, bound):
    assert float32_bound(own) == pytest.approx(bound, rel=1e-12)


def test_a_verdict_on_what_are_no_logits_has_no_agreement():
    assert Verdict(0.0, 0.0).agreement is None
    assert Verdict(0.0, 0.0).passed


def test_agreement_is_by_rows():
    expected = torch.tensor([[0.0, 1.0, 2.0], [5.0, 1.0, 2.0]])

    assert agreement(expected, torch.tensor([[0.0, 1.0, 2.0], [1.0, 5.0, 2.0]])) == 0.5


def test_the_first_difference_is_the_first_beyond_the_tolerance():
    network = chain()
    changed = copy.deepcopy(network)
    changed[2].bias.data.add_(0.25)
    images = torch.ones(1, 3).double()
    error = compare_modules(network, changed, [images])["2"]

    def first(tolerance: float) -> object:
        return first_difference(network, changed, images, tolerance=tolerance, among=["0", "2"])

    assert first(0.0) == ("2", error)
    assert first(error) is None  # what is allowed is no difference


def test_networks_of_other_outputs_differ_without_end():
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    found = first_difference(
        nn.Identity(), nn.Sequential(Two()), torch.ones(1, 3), tolerance=1.0, among=[]
    )

    assert found == ("", float("inf"))
