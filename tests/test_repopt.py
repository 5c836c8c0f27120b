import pytest
import torch
from torch import nn

from repvgg.reparam import Geometry
from repvgg.repopt import ScaledBranch, merge_branches, train_as_branches
from tests.support.networks import relative_error

DENSE = Geometry((3, 3), (1, 1), (1, 1), (1, 1), (1, 1))
SIZES = {  # of the branches, and their padding
    "RepVGG": [((3, 3), (1, 1)), ((1, 1), (0, 0))],
    "ACB": [((3, 3), (1, 1)), ((1, 3), (0, 1)), ((3, 1), (1, 0))],
    "MobileOne": [((3, 3), (1, 1))] * 4,
}


class Branches(nn.Module):
    """s_1 (W_1 * x) + s_2 (W_2 * x) + ... + v x, with constant scales."""

    def __init__(self, sizes, groups: int, identity: bool, trained: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(8, 8, size, padding=padding, groups=groups, bias=False)
            for size, padding in sizes
        )
        self.scales = [torch.rand(8, dtype=torch.float64) + 0.5 for _ in sizes]
        v = torch.randn(8, dtype=torch.float64) if trained else torch.ones(8, dtype=torch.float64)
        self.v = nn.Parameter(v, trained) if identity else None
        self.double()

    def forward(self, x):
        scaled = [s[:, None, None] * c(x) for s, c in zip(self.scales, self.layers, strict=True)]
        y = sum(scaled)
        return y if self.v is None else y + self.v[:, None, None] * x

    def merged(self, groups: int):
        branches = [
            ScaledBranch(
                layer.weight.detach(),
                Geometry(layer.kernel_size, (1, 1), (1, 1), layer.padding, layer.padding),
                scale,
            )
            for layer, scale in zip(self.layers, self.scales, strict=True)
        ]
        trained = self.v is not None and self.v.requires_grad
        v = None if self.v is None else self.v.detach()
        return merge_branches(branches, DENSE, groups, identity=v, trained=trained)


@pytest.mark.parametrize("identity", ["none", "trained", "constant"])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
        {"weight_decay": 1e-2, "foreach": True},
    ],
    ids=["plain", "momentum", "nesterov", "decay", "foreach"],
)
@pytest.mark.parametrize("block", SIZES)
def test_training_one_kernel_is_training_its_branches(block, options, groups, identity):
    torch.manual_seed(0)
    branches = Branches(SIZES[block], groups, identity != "none", identity == "trained")
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False).double()
    train_as_branches(
        conv.weight, branches.merged(groups), weight_decay=options.get("weight_decay", 0.0)
    )
    trained = [p for p in branches.parameters() if p.requires_grad]
    optimizers = [torch.optim.SGD(p, lr=0.01, **options) for p in (trained, conv.parameters())]
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64)

    for step in range(30):
        batch = torch.randn(4, 8, 6, 6, dtype=torch.float64)
        for network, optimizer in zip((branches, conv), optimizers, strict=True):
            optimizer.zero_grad()
            (network(batch).tanh() - batch.roll(step, 1)).square().mean().backward()
            optimizer.step()

    assert relative_error(branches(x), conv(x)) < 1e-12


def test_a_constant_identity_needs_its_centre():
    torch.manual_seed(0)
    branches = Branches(SIZES["RepVGG"], 1, True, False)
    merged = branches.merged(1)

    assert merged.centre[0, 0, 1, 1] == 1
    assert merged.centre.sum() == 8
    assert Branches(SIZES["RepVGG"], 1, True, True).merged(1).centre.abs().sum() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identity": torch.ones(4)}, "no identity from 8 to 4 channels"),
        ({"geometry": DENSE._replace(stride=(2, 2))}, "does not fit into"),
    ],
)
def test_branches_that_do_not_fit_are_an_error(change, message):
    branch = ScaledBranch(torch.randn(4, 8, 3, 3), DENSE, torch.ones(4))
    given = {"geometry": DENSE, "identity": None} | change

    with pytest.raises(ValueError, match=message):
        merge_branches([branch], given["geometry"], 1, identity=given["identity"])


def test_a_weight_of_another_shape_is_an_error():
    merged = Branches(SIZES["RepVGG"], 1, False, False).merged(1)

    with pytest.raises(ValueError, match=r"shape \(8, 8, 1, 1\), the branches \(8, 8, 3, 3\)"):
        train_as_branches(nn.Parameter(torch.zeros(8, 8, 1, 1)), merged)


def test_the_hook_can_be_removed():
    conv = nn.Conv2d(8, 8, 3, bias=False).double()
    handle = train_as_branches(conv.weight, Branches(SIZES["ACB"], 1, False, False).merged(1))
    handle.remove()
    x = torch.randn(1, 8, 5, 5, dtype=torch.float64)
    plain = torch.autograd.grad(conv(x).sum(), conv.weight)

    conv(x).sum().backward()

    assert torch.equal(conv.weight.grad, plain[0])
