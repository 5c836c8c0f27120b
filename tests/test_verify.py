import math

import pytest
import torch
from networks import settle
from torch import nn

import repvgg
from repvgg.verify import compare, compare_blocks, relative_error

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


@pytest.mark.parametrize("name", ["stem", "stages.0.0", "stages.1.1", "stages.2.1", "stages.3.0"])
@pytest.mark.parametrize("branch", ["branch_3x3", "branch_1x1", "branch_identity"])
def test_a_lost_branch_is_caught_and_its_block_named(name, branch):
    reference = network()
    block = dict(reference.named_modules())[name]
    if getattr(block, branch) is None:
        # Such a block never had the branch; a fault in the bias stands for it.
        branch = None
    faulty = repvgg.switch_to_deploy(reference)
    target = dict(faulty.named_modules())[name].reparam
    with torch.no_grad():
        if branch == "branch_3x3":
            target.weight -= fold(block.branch_3x3)[0]
        elif branch == "branch_1x1":
            target.weight[:, :, 1:2, 1:2] -= fold(block.branch_1x1)[0]
        else:
            target.bias.zero_()

    errors = compare_blocks(reference, faulty, IMAGES)

    assert [block for block, error in errors.items() if not error <= 1e-10] == [name]
    assert not compare(reference, faulty, IMAGES.double()).passed


def fold(branch: nn.Sequential) -> tuple[torch.Tensor, torch.Tensor]:
    return repvgg.reparam.fold_bn(branch.conv.weight, None, branch.bn)


def test_every_block_is_measured():
    reference = network()

    errors = compare_blocks(reference, repvgg.switch_to_deploy(reference), IMAGES)

    assert len(errors) == 7
    assert max(errors.values()) < 1e-12


def test_measuring_blocks_leaves_no_hook_behind():
    reference = network()

    compare_blocks(reference, repvgg.switch_to_deploy(reference), IMAGES)

    assert not any(module._forward_hooks for module in reference.modules())
