import copy
import pickle

import pytest
import torch
from torch import nn

from repvgg import QARepVGGBlock, RepVGGBlock
from repvgg.models.block import compile_blocks
from tests.support.networks import relative_error, settle
from tests.support.processes import Process

CASES = {
    "identity": {"in_channels": 8, "out_channels": 8},
    "stride 2": {"in_channels": 8, "out_channels": 8, "stride": 2},
    "stride 3": {"in_channels": 8, "out_channels": 8, "stride": 3},
    "wider": {"in_channels": 8, "out_channels": 12},
    "groups 2": {"in_channels": 8, "out_channels": 8, "groups": 2},
    "groups 4, wider": {"in_channels": 8, "out_channels": 16, "groups": 4},
    "depthwise": {"in_channels": 8, "out_channels": 8, "groups": 8},
    "dilation": {"in_channels": 8, "out_channels": 8, "dilation": 2},
    "dilation, stride": {"in_channels": 8, "out_channels": 8, "dilation": 2, "stride": 2},
    "reflect": {"in_channels": 8, "out_channels": 8, "padding_mode": "reflect"},
    "replicate": {"in_channels": 8, "out_channels": 8, "padding_mode": "replicate"},
    "circular, stride": {
        "in_channels": 8,
        "out_channels": 8,
        "padding_mode": "circular",
        "stride": 2,
    },
    "no bn": {"in_channels": 8, "out_channels": 8, "bn": False},
    "no bn, bias": {"in_channels": 8, "out_channels": 8, "bn": False, "bias": True},
    "no bn, groups": {"in_channels": 8, "out_channels": 8, "bn": False, "groups": 4},
    "bn and bias": {"in_channels": 8, "out_channels": 8, "bias": True},
    "eps": {"in_channels": 8, "out_channels": 8, "bn_eps": 1e-1},
    "se before": {"in_channels": 8, "out_channels": 8, "se_before_relu": 4},
    "se after": {"in_channels": 8, "out_channels": 8, "se_after_relu": 4},
    "branch_drop": {"in_channels": 8, "out_channels": 8, "branch_drop": 0.3},
    "branch_drop, stride": {"in_channels": 8, "out_channels": 8, "branch_drop": 0.3, "stride": 2},
    "drop_path": {"in_channels": 8, "out_channels": 8, "drop_path": 0.3},
    "both drops": {"in_channels": 8, "out_channels": 8, "branch_drop": 0.3, "drop_path": 0.3},
    "both se": {"in_channels": 8, "out_channels": 8, "se_before_relu": 2, "se_after_relu": 2},
}
QA = "quantization-friendly, "
CASES |= {
    QA + name: options for name, options in CASES.items() if not {"bn", "bias"} & options.keys()
}


def build(case: str = "identity", seed: int = 0) -> RepVGGBlock:
    torch.manual_seed(seed)
    block = QARepVGGBlock if case.startswith(QA) else RepVGGBlock
    return settle(block(**CASES[case]), seed)


def images(height: int = 9, width: int = 7) -> torch.Tensor:
    return torch.randn(2, 8, height, width, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("size", [(8, 8), (9, 7)], ids=["even", "odd"])
@pytest.mark.parametrize("case", CASES)
def test_switching_does_not_change_the_function(case, size):
    block, x = build(case).double(), images(*size)
    expected = block(x)

    block.switch_to_deploy()

    assert relative_error(expected, block(x)) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_the_parts_of_the_branches_add_up_to_the_folded_convolution(case):
    block = build(case).double()

    parts = block.branch_affines()

    kernel, bias = block.equivalent_kernel_bias()
    assert relative_error(kernel, sum(part.kernel for part in parts.values())) < 1e-12
    torch.testing.assert_close(bias, sum(part.bias for part in parts.values()))
    kept = copy.deepcopy(block)
    kept.branch_1x1.conv.weight.data.zero_()
    without = kept.equivalent_kernel_bias().kernel  # the 1x1 branch gives a bias alone
    assert relative_error(kernel - parts["1x1"].kernel, without) < 1e-12
    with pytest.raises(ValueError, match="the block is folded"):
        block.switch_to_deploy() or block.branch_affines()


@pytest.mark.parametrize("case", CASES)
def test_a_switched_block_has_one_3x3_convolution(case):
    block = build(case)

    block.switch_to_deploy()

    gates = {m for gate in (block.se_before_relu, block.se_after_relu) for m in gate.modules()}
    heavy = [
        m for m in block.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d) and m not in gates
    ]
    assert heavy == [block.reparam]
    assert block.reparam.kernel_size == (3, 3)


@pytest.mark.parametrize("case", CASES)
def test_float32_folds_to_the_nearest_float32(case):
    block = build(case)
    exact = copy.deepcopy(block).double().equivalent_kernel_bias()

    folded = block.equivalent_kernel_bias()

    assert torch.equal(folded.kernel, exact.kernel.float())
    assert torch.equal(folded.bias, exact.bias.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_switched_block_keeps_dtype(dtype):
    block = build().to(dtype)

    block.switch_to_deploy()

    assert {p.dtype for p in block.parameters()} == {dtype}


def test_a_switched_block_keeps_its_device():
    with torch.device("meta"):
        block = RepVGGBlock(8, 8)

    block.switch_to_deploy()

    assert {p.device.type for p in block.parameters()} == {"meta"}


def test_switching_twice_changes_nothing():
    block = build()
    block.switch_to_deploy()
    convolution, kernel = block.reparam, block.reparam.weight.clone()

    block.switch_to_deploy()

    assert block.reparam is convolution
    assert torch.equal(block.reparam.weight, kernel)


def test_the_equivalent_kernel_is_the_same_after_the_switch():
    block = build()
    before = block.equivalent_kernel_bias()

    block.switch_to_deploy()

    assert torch.equal(block.equivalent_kernel_bias().kernel, before.kernel)
    assert torch.equal(block.equivalent_kernel_bias().bias, before.bias)


def test_switching_consumes_no_random_numbers():
    block = build()
    state = torch.get_rng_state()

    block.switch_to_deploy()

    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("case", CASES)
def test_a_switched_block_computes_the_same_in_training_mode(case):
    block, x = build(case).double(), images()
    block.switch_to_deploy()
    expected = block(x)

    assert torch.equal(block.train()(x), expected)


def test_a_block_in_training_mode_is_folded_with_its_running_statistics():
    block, x = build(), images().float()
    expected = block(x)

    block.train().switch_to_deploy()

    assert relative_error(expected, block(x)) < 1e-5


def test_a_block_without_running_statistics_stays_as_it_was():
    block = build()
    block.branch_1x1.bn = nn.BatchNorm2d(8, track_running_stats=False)

    with pytest.raises(ValueError, match="running statistics"):
        block.switch_to_deploy()

    assert block.reparam is None
    assert block.branch_3x3 is not None


@pytest.mark.parametrize("case", ["identity", "groups 2", "no bn, bias"])
def test_gradients_reach_every_branch_through_the_equivalent_kernel(case):
    block, x = build(case).double(), images()
    parameters = [p for name, p in block.named_parameters() if "branch" in name]

    branches = torch.autograd.grad(block._sum_of_branches(x).square().sum(), parameters)
    kernel, bias = block.equivalent_kernel_bias()
    merged = nn.functional.conv2d(x, kernel, bias, padding=1, groups=block.groups)
    folded = torch.autograd.grad(merged.square().sum(), parameters)

    assert max(relative_error(a, b) for a, b in zip(branches, folded, strict=True)) < 1e-10


@pytest.mark.parametrize("switched", [False, True])
def test_a_block_survives_copying_and_pickling(switched):
    block, x = build("se after"), images().float()
    if switched:
        block.switch_to_deploy()

    restored = pickle.loads(pickle.dumps(copy.deepcopy(block)))

    assert torch.equal(restored(x), block(x))


def test_an_identity_branch_exists_only_where_shapes_stay():
    branches = [build(case).branch_identity is not None for case in ("identity", "wider")]

    assert (branches, build("stride 2").branch_identity) == ([True, False], None)


@pytest.mark.slow
def test_training_in_channels_last_does_not_corrupt_memory(tmp_path):
    # torch's own 1x1 convolution of stride 2 does so here, in its weight gradient on CPU.
    program = """
import torch
from repvgg import QARepVGGBlock, RepVGGBlock
for seed in range(3):
    torch.manual_seed(seed)
    block = RepVGGBlock(3, 48, stride=2).to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 224, 224).to(memory_format=torch.channels_last)
    block(x).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())
"""
    done = Process("-c", program, cwd=tmp_path).completed()

    assert (done.returncode, done.stderr) == (0, "")


def shares_of_branches(case: str, rows: int) -> list[torch.Tensor]:
    """How much of each branch (3x3, 1x1, identity) is in each image of a block that trains."""
    block = build(case).double().train()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    x = torch.randn(rows, 8, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    parts = [block.branch_3x3(x), block.branch_1x1(x), block.branch_identity(x)]
    columns = torch.stack([part.flatten(1) for part in parts], dim=2)  # (N, CHW, 3)
    torch.manual_seed(0)
    y = block._sum_of_branches(x).flatten(1).unsqueeze(2)
    return list(torch.linalg.lstsq(columns, y).solution[:, :, 0].detach().T.round(decimals=6))


SCALED = round(1 / 0.7, 6)


@pytest.mark.parametrize(
    ("case", "allowed"),
    [
        ("identity", [{1.0}, {1.0}, {1.0}]),
        ("branch_drop", [{1.0}, {0.0, SCALED}, {0.0, SCALED}]),
        ("drop_path", [{0.0, SCALED}, {0.0, SCALED}, {1.0}]),
        ("both drops", [{0.0, SCALED}, {0.0, SCALED**2}, {0.0, SCALED}]),
    ],
)
def test_branches_of_single_images_are_dropped_and_others_scaled(case, allowed):
    shares = shares_of_branches(case, 200)

    found = [{abs(round(share, 4)) for share in branch.tolist()} for branch in shares]
    assert found == [{round(share, 4) for share in branch} for branch in allowed]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["branch_drop", "drop_path", "both drops"])
def test_the_folded_convolution_is_the_expectation_over_dropped_branches(case):
    rows = 20_000
    shares = torch.stack(shares_of_branches(case, rows))

    # Each share has mean 1 and a deviation of at most 1.1: 5 standard errors.
    assert (shares.mean(1) - 1).abs().max() < 5 * 1.1 / rows**0.5


@pytest.mark.slow
def test_the_two_branches_are_dropped_independently():
    _, point, same = shares_of_branches("branch_drop", 20_000)

    joint = ((point == 0) & (same == 0)).double().mean()
    assert abs(joint - 0.09) < 5 * (0.09 * 0.91 / 20_000) ** 0.5


def test_drop_path_drops_both_convolutions_together():
    dense, point, _ = shares_of_branches("drop_path", 200)

    assert torch.equal(dense == 0, point == 0)


def test_a_block_in_eval_mode_drops_nothing():
    block, x = build("both drops").double(), images()

    assert torch.equal(block(x), block(x))


@pytest.mark.parametrize("key", ["branch_drop", "drop_path"])
@pytest.mark.parametrize("value", [1, 1.5, -0.1, "often"])
def test_a_probability_outside_its_range_is_an_error(key, value):
    with pytest.raises(ValueError, match=f"{key}='?{value}'?: must be a number of at least 0"):
        RepVGGBlock(8, 8, **{key: value})


@pytest.mark.parametrize("options", [{"stride": 2}, {"out_channels": 12}])
def test_drop_path_without_an_identity_branch_is_an_error(options):
    with pytest.raises(ValueError, match=r"drop_path=0\.1: .*no identity branch"):
        RepVGGBlock(**{"in_channels": 8, "out_channels": 8, "drop_path": 0.1, **options})


@pytest.mark.parametrize("kind", [RepVGGBlock, QARepVGGBlock])
def test_recomputing_changes_no_gradient_and_no_statistics(kind):
    def step(recompute: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        block = nn.Sequential(
            kind(6, 6, branch_drop=0.3), kind(6, 8, stride=2, se_after_relu=2)
        ).double()
        for part in block:
            part.recompute = recompute
        x = torch.randn(5, 6, 8, 8, dtype=torch.float64, requires_grad=True)
        block(x).square().sum().backward()
        gradients = [parameter.grad for parameter in block.parameters()]
        return [x.grad, *gradients, *block.buffers()]

    assert all(map(torch.equal, step(False), step(True)))


def test_recomputing_keeps_only_the_input_of_a_block():
    def saved(recompute: bool) -> int:
        block, sizes = RepVGGBlock(8, 8), []
        block.recompute = recompute
        x = torch.randn(4, 8, 16, 16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            block(x)
        return sum(size for size in sizes if size >= x.numel())

    assert saved(True) < saved(False) / 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about torch's own code
@pytest.mark.parametrize(("wider", "compiled"), [(0, 2), (1, 10)], ids=["same", "different"])
def test_compiled_blocks_compute_the_same_and_share_code_by_shape(wider, compiled):
    from torch._dynamo.testing import CompileCounter

    torch.manual_seed(0)
    network = nn.Sequential(*(RepVGGBlock(4 + wider * i, 4 + wider * (i + 1)) for i in range(10)))
    images, counter, names = torch.rand(2, 4, 6, 6), CompileCounter(), list(network.state_dict())
    expected = copy.deepcopy(network)(images)

    count = compile_blocks(network, backend=counter)

    torch.testing.assert_close(network(images), expected)
    assert count == 10
    assert counter.frame_count == compiled  # of equal blocks the first has no gradient to pass on
    assert list(network.state_dict()) == names
