"""Tests of the verifier: known faults of fusion, each put into one block of a folded network.

The verifier must find the fault and name that block alone. It must pass networks that were folded
correctly.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import repvgg
from repvgg import RepVGGBlock
from repvgg.reparam import fold_bn, identity_kernel, pad_kernel
from repvgg.verify import TOLERANCE, compare, compare_blocks
from tests.support.networks import settle

SMALL = {"depths": (1, 2, 2, 1), "widths": (8, 16, 16, 24), "num_classes": 5}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
# Blocks of three stages that have an identity branch, one of them grouped in a grouped network.
PLACES = ("stages.1.1", "stages.2.1")

Fault = Callable[[RepVGGBlock, RepVGGBlock], None]


def bns(block: RepVGGBlock) -> list[nn.BatchNorm2d]:
    return [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]


def refold(change: Callable[[RepVGGBlock], None]) -> Fault:
    """Fold a changed copy of the trained block."""

    def fault(trained: RepVGGBlock, folded: RepVGGBlock) -> None:
        wrong = copy.deepcopy(trained)
        with torch.no_grad():
            change(wrong)
            kernel, bias = wrong.equivalent_kernel_bias()
            folded.reparam.weight.copy_(kernel)
            folded.reparam.bias.copy_(bias)

    return fault


def edit(change: Callable[[nn.Conv2d, RepVGGBlock], None]) -> Fault:
    """Change the folded convolution itself."""

    def fault(trained: RepVGGBlock, folded: RepVGGBlock) -> None:
        with torch.no_grad():
            change(folded.reparam, trained)

    return fault


def silence(bn: nn.BatchNorm2d) -> None:
    bn.weight.zero_()
    bn.bias.zero_()


def set_all(block: RepVGGBlock, key: str, value: float) -> None:
    for bn in bns(block):
        if key == "eps":
            bn.eps = value
        else:
            getattr(bn, key).fill_(value)


def scale_variance(block: RepVGGBlock, factor: float) -> None:
    for bn in bns(block):
        bn.running_var.mul_(factor)


def square_variance(block: RepVGGBlock) -> None:
    """As if the square root were forgotten."""
    for bn in bns(block):
        bn.running_var.copy_((bn.running_var + bn.eps) ** 2 - bn.eps)


def swap_bns(block: RepVGGBlock) -> None:
    block.branch_3x3.bn, block.branch_1x1.bn = block.branch_1x1.bn, block.branch_3x3.bn


def point_in_the_corner(conv: nn.Conv2d, trained: RepVGGBlock) -> None:
    point = trained.branch_1x1
    kernel = fold_bn(point.conv.weight, point.conv.bias, point.bn).kernel.to(conv.weight.dtype)
    conv.weight -= pad_kernel(kernel, 3)
    conv.weight[:, :, :1, :1] += kernel


def identity_without_groups(conv: nn.Conv2d, trained: RepVGGBlock) -> None:
    """Every output reads the first input of its group, not the input with its own index."""
    right = identity_kernel(trained.in_channels, trained.groups, device=conv.weight.device)
    wrong = torch.zeros_like(right)
    wrong[:, 0] = 1
    for eye, sign in ((right, -1), (wrong, 1)):
        kernel = fold_bn(eye, None, trained.branch_identity).kernel.to(conv.weight.dtype)
        conv.weight += sign * pad_kernel(kernel, 3)


def identity_twice(conv: nn.Conv2d, trained: RepVGGBlock) -> None:
    eye = identity_kernel(trained.in_channels, trained.groups)
    kernel, bias = fold_bn(eye, None, trained.branch_identity)
    conv.weight += pad_kernel(kernel, 3).to(conv.weight.dtype)
    conv.bias += bias.to(conv.bias.dtype)


def half_precision(conv: nn.Conv2d, _: RepVGGBlock) -> None:
    conv.weight.copy_(conv.weight.half())


def one_weight(conv: nn.Conv2d, _: RepVGGBlock) -> None:
    conv.weight[:, 0, 1, 1] *= 1.01


def negated_channel(conv: nn.Conv2d, _: RepVGGBlock) -> None:
    conv.weight[0].neg_()


def replaced(attribute: str, module: Callable[[], nn.Module]) -> Fault:
    def fault(_: RepVGGBlock, folded: RepVGGBlock) -> None:
        setattr(folded, attribute, module())

    return fault


FAULTS: dict[str, Fault] = {
    "3x3 branch dropped": refold(lambda block: silence(block.branch_3x3.bn)),
    "1x1 branch dropped": refold(lambda block: silence(block.branch_1x1.bn)),
    "identity dropped": refold(lambda block: silence(block.branch_identity)),
    "identity added twice": edit(identity_twice),
    "identity without groups": edit(identity_without_groups),
    "eps of another framework": refold(lambda block: set_all(block, "eps", 1e-3)),
    "eps forgotten": refold(lambda block: set_all(block, "eps", 0.0)),
    "bias lost": edit(lambda conv, _: conv.bias.zero_()),
    "mean not subtracted": refold(lambda block: set_all(block, "running_mean", 0.0)),
    "beta lost": refold(lambda block: set_all(block, "bias", 0.0)),
    "gamma lost": refold(lambda block: set_all(block, "weight", 1.0)),
    "statistics never loaded": refold(lambda block: set_all(block, "running_var", 1.0)),
    "square root forgotten": refold(square_variance),
    "another estimate of the variance": refold(lambda block: scale_variance(block, 64 / 63)),
    "BatchNorms of two branches swapped": refold(swap_bns),
    "1x1 kernel in the corner": edit(point_in_the_corner),
    "height and width swapped": edit(lambda conv, _: conv.weight.copy_(conv.weight.mT.clone())),
    "kernel flipped": edit(lambda conv, _: conv.weight.copy_(conv.weight.flip(2, 3))),
    "kernel rounded to float16": edit(half_precision),
    "one weight of each output off by a hundredth": edit(one_weight),
    "one channel negated": edit(negated_channel),
    "outputs in another order": edit(lambda conv, _: conv.weight.copy_(conv.weight.flip(0))),
    "padding lost": edit(lambda conv, _: setattr(conv, "padding", (0, 0))),
    "stride doubled": edit(lambda conv, _: setattr(conv, "stride", (2, 2))),
    "another dilation": edit(lambda conv, _: setattr(conv, "dilation", (2, 2))),
    "kernel with a NaN": edit(lambda conv, _: conv.weight[0, 0, 0, 0].fill_(float("nan"))),
    "ReLU lost": replaced("relu", nn.Identity),
    "squeeze-and-excite lost": replaced("se_before_relu", nn.Identity),
}
# Below the float32 bound at the end of a network. That is why blocks are compared, in float64.
SUBTLE = {
    "eps forgotten",
    "kernel rounded to float16",
    "one weight of each output off by a hundredth",
}
CASES = {
    "plain": {},
    "grouped": {"groups": 2},
    "squeeze-and-excite": {"se_before_relu": 4},
}


def pairs() -> list[tuple[str, str, str]]:
    """Fault, network, block: every fault where it can exist, in a grouped stage and another."""
    needs = {"squeeze-and-excite lost": "squeeze-and-excite", "identity without groups": "grouped"}
    return [
        (fault, needs.get(fault, "plain"), place)
        for fault in FAULTS
        for place in PLACES
        if not (fault == "identity without groups" and place == "stages.2.1")
    ]


def network(case: str) -> repvgg.RepVGG:
    torch.manual_seed(0)
    return settle(repvgg.create_model("repvgg_tiny", **{**SMALL, **CASES[case]})).double()


@pytest.mark.parametrize(("fault", "case", "place"), pairs())
def test_a_fault_is_caught_and_its_block_named(fault, case, place):
    reference = network(case)
    folded = repvgg.switch_to_deploy(reference)
    FAULTS[fault](reference.get_submodule(place), folded.get_submodule(place))

    errors = compare_blocks(reference, folded, IMAGES)

    wrong = [name for name, error in errors.items() if not error <= TOLERANCE[torch.float64]]
    assert wrong == [place]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in SUBTLE])
def test_a_fault_fails_the_whole_network_in_float32_too(fault):
    case = next(case for name, case, _ in pairs() if name == fault)
    reference = network(case)
    folded = repvgg.switch_to_deploy(reference)
    FAULTS[fault](reference.get_submodule(PLACES[0]), folded.get_submodule(PLACES[0]))

    try:
        verdict = compare(reference, folded.float(), IMAGES)
    except RuntimeError:  # the next layer cannot take these outputs
        return

    assert not verdict.passed


def test_a_lost_padding_mode_is_caught():
    torch.manual_seed(0)
    block = settle(RepVGGBlock(4, 4, padding_mode="reflect")).double()
    reference = nn.Sequential(block)
    folded = repvgg.switch_to_deploy(reference)
    folded[0].reparam.padding_mode = "zeros"

    errors = compare_blocks(reference, folded, torch.randn(2, 4, 9, 9))

    assert errors["0"] > 1e-3


def test_a_stage_folded_from_other_weights_is_caught():
    reference, other = network("plain"), network("plain")
    settle(other, seed=1)
    folded = repvgg.switch_to_deploy(reference)
    folded.stages[1] = repvgg.switch_to_deploy(other).stages[1]

    errors = compare_blocks(reference, folded, IMAGES)

    assert [name for name, error in errors.items() if error > 1e-10] == ["stages.1.0", "stages.1.1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", repvgg.list_models())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_variant_that_was_folded_correctly_passes(name, dtype):
    torch.manual_seed(0)
    reference = settle(repvgg.create_model(name, **SMALL)).double()
    folded = repvgg.switch_to_deploy(copy.deepcopy(reference).to(dtype))

    errors: dict[str, float] = compare_blocks(reference, folded, IMAGES)
    verdict = compare(reference, folded, IMAGES.to(dtype))

    assert len(errors) == 7
    assert max(errors.values()) <= TOLERANCE[dtype]
    assert verdict.passed
