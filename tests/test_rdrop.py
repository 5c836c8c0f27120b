import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import repvgg
from repvgg.losses import rdrop_loss
from repvgg.rdrop import StochasticLayers, find_stochastic_layers, predict, predict_twice

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5)).double()
TARGETS = torch.tensor([0, 1, 2, 0])


def ours(**options) -> nn.Module:
    sizes = {"depths": [1, 2, 2, 1], "num_classes": 3, "strides": [1, 2, 2, 2, 2]}
    return repvgg.create_model("repvgg_tiny", **{**sizes, **options})


class FunctionalDropout(nn.Module):
    """Random in a function, where no module tells: in the backbone or in the head."""

    def __init__(self, *, in_backbone: bool) -> None:
        super().__init__()
        self.in_backbone = in_backbone
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 3)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.dropout(x, 0.3, self.training) if self.in_backbone else x

    def forward_head(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return self.linear(x if self.in_backbone else F.dropout(x, 0.3, self.training))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Bypass(nn.Module):
    """Its head, the last child, is not all that the backbone's features reach."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x)
        return x + self.head(x)


class ReadsValues(nn.Sequential):
    """Does not run on the meta device."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if x.sum().item() else 2.0)


def vgg() -> nn.Module:
    """A narrow one; the classifier of torchvision's has 120 million parameters."""
    layers = torchvision.models.vgg.make_layers([8, "M", 16, "M"], batch_norm=True)
    with torch.device("meta"):
        network = torchvision.models.VGG(nn.Identity(), init_weights=False)
    network.features = layers
    network.classifier[0] = nn.Linear(16 * 7 * 7, 32)
    network.classifier[3] = nn.Linear(32, 32)
    network.classifier[6] = nn.Linear(32, 3)
    return network


NETWORKS = {
    "dropout in the head": (lambda: ours(dropout=0.3), StochasticLayers(False, True)),
    "groups and squeeze-and-excite": (
        lambda: ours(dropout=0.3, groups=2, se_before_relu=4, auxiliary_heads=True),
        StochasticLayers(False, True),
    ),
    "branch_drop": (lambda: ours(branch_drop=0.2), StochasticLayers(True, False)),
    "drop_path": (lambda: ours(drop_path=0.2), StochasticLayers(True, False)),
    "all three": (
        lambda: ours(dropout=0.3, branch_drop=0.2, drop_path=0.2),
        StochasticLayers(True, True),
    ),
    "no stochastic layer": (lambda: ours(), StochasticLayers(False, False)),
    "dropout, in eval mode": (lambda: ours(dropout=0.3).eval(), StochasticLayers(False, False)),
    "functional, in the backbone": (
        lambda: FunctionalDropout(in_backbone=True),
        StochasticLayers(True, False),
    ),
    "functional, in the head": (
        lambda: FunctionalDropout(in_backbone=False),
        StochasticLayers(False, True),
    ),
    "a path around the head": (Bypass, StochasticLayers(True, False)),
    "no run without data": (
        lambda: ReadsValues(nn.Flatten(), nn.Linear(3 * 32 * 32, 3)),
        StochasticLayers(True, False),
    ),
    "resnet18": (lambda: torchvision.models.resnet18(), StochasticLayers(False, False)),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(), StochasticLayers(False, True)),
    "vgg": (vgg, StochasticLayers(False, True)),
    "squeezenet1_1": (lambda: torchvision.models.squeezenet1_1(), StochasticLayers(False, True)),
    "efficientnet_b0": (lambda: torchvision.models.efficientnet_b0(), StochasticLayers(True, True)),
    "densenet121": (
        lambda: torchvision.models.densenet121(drop_rate=0.1),
        StochasticLayers(True, False),
    ),
    "convnext_tiny": (lambda: torchvision.models.convnext_tiny(), StochasticLayers(True, False)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_stochastic_layers_are_found(name):
    build, expected = NETWORKS[name]

    assert find_stochastic_layers(build(), IMAGES.float()) == expected


def test_finding_stochastic_layers_changes_nothing():
    network = ours(dropout=0.3, branch_drop=0.2)
    before = copy.deepcopy(network.state_dict())
    state = torch.get_rng_state()

    find_stochastic_layers(network, IMAGES.float())

    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training
    assert all(p.device.type == "cpu" and p.grad is None for p in network.parameters())


class Recorded(nn.Module):
    """Dropout whose masks are kept, or given: in one forward of 2N rows or two of N."""

    def __init__(self, p: float, masks: list[Tensor] | None = None) -> None:
        super().__init__()
        self.p = p
        self.masks = masks
        self.drawn: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.masks is not None:
            return x * self.masks.pop(0)
        mask = F.dropout(torch.ones_like(x), self.p)
        self.drawn.append(mask)
        return x * mask


def record(network: nn.Module) -> list[Recorded]:
    """Replace every dropout of a network by one that keeps its masks."""
    recorders = []
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout):
                setattr(parent, name, Recorded(child.p))
                recorders.append(getattr(parent, name))
    return recorders


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dropout in the head", "mobilenet_v2", "vgg"])
def test_loss_and_gradients_are_those_of_two_explicit_passes_with_the_same_masks(name):
    torch.manual_seed(0)
    network = NETWORKS[name][0]().double().train()
    recorders = record(network)
    duplicate = copy.deepcopy(network)

    first, second, _ = predict_twice(network, IMAGES, stochastic=StochasticLayers(False, True))
    loss = rdrop_loss(first, second, TARGETS, alpha=0.7).total
    loss.backward()

    halves = [[mask.chunk(2)[i] for r in recorders for mask in r.drawn] for i in (0, 1)]
    passes = []
    for masks in halves:
        for module in duplicate.modules():
            if isinstance(module, Recorded):
                module.masks = masks
        passes.append(duplicate(IMAGES))
    expected = rdrop_loss(*passes, TARGETS, alpha=0.7).total
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    largest = max(p.grad.abs().max() for p in duplicate.parameters())
    for (key, mine), theirs in zip(network.named_parameters(), duplicate.parameters(), strict=True):
        # A bias in front of a BatchNorm has no gradient but rounding.
        scale = theirs.grad.abs().max().clamp_min(1e-3 * largest)
        assert (mine.grad - theirs.grad).abs().max() <= 1e-10 * scale, key


@pytest.mark.parametrize("name", ["dropout in the head", "branch_drop", "mobilenet_v2"])
def test_two_predictions_take_one_forward(name):
    network = NETWORKS[name][0]().train()

    first, second, _ = predict_twice(network, IMAGES.float())

    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {bn.num_batches_tracked.item() for bn in norms} == {1}
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("options", "rows"), [({"dropout": 0.3}, 4), ({"branch_drop": 0.3}, 8)])
def test_only_a_random_backbone_runs_twice(options, rows):
    network = ours(**options)
    found = find_stochastic_layers(network, IMAGES.float())
    seen = []
    network.stem.register_forward_hook(lambda _, __, y: seen.append(len(y)))

    predict_twice(network, IMAGES.float(), stochastic=found)

    assert seen == [rows]


def test_halves_of_a_doubled_batch_differ_in_masks_and_share_batchnorm():
    torch.manual_seed(1)
    network = ours(branch_drop=0.5).double()
    duplicate = copy.deepcopy(network)

    torch.manual_seed(2)
    first, second, _ = predict_twice(network, IMAGES)
    torch.manual_seed(2)
    both = duplicate(torch.cat([IMAGES, IMAGES]))

    assert torch.equal(torch.cat([first, second]), both)


def test_auxiliary_classifiers_follow_the_backbone():
    shared, doubled = (
        predict_twice(ours(auxiliary_heads=True, **options), IMAGES.float()).auxiliary
        for options in ({"dropout": 0.3}, {"branch_drop": 0.3})
    )

    assert [len(logits) for logits in (*shared, *doubled)] == [4, 4, 4, 8, 8, 8]


def test_no_stochastic_layer_is_an_error():
    with pytest.raises(ValueError, match=r"RepVGG has no stochastic layer.*dropout=0\.2"):
        predict_twice(ours(), IMAGES.float())


def test_a_network_that_returns_more_than_logits_is_an_error():
    network = torchvision.models.inception_v3(num_classes=3, init_weights=False)

    with pytest.raises(ValueError, match="Inception3 returns InceptionOutputs"):
        predict(network, torch.randn(2, 3, 299, 299))
