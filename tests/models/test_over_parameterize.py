import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn

import repvgg
from repvgg.models.forms import deployed_form
from repvgg.models.over_parameterize import RepVGGConv
from tests.support.networks import relative_error, settle


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def blocks(network: nn.Module) -> int:
    return sum(isinstance(module, RepVGGConv) for module in network.modules())


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in network.state_dict().items()}


def stirred(network: nn.Module) -> nn.Module:
    """With every parameter and statistic away from where it started, as after training."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise.to(parameter))
    return settle(network)


def conv_bn(bn: bool = True, **options) -> nn.Sequential:
    conv = nn.Conv2d(8, options.pop("out", 8), 3, **{"padding": 1, **options})
    layers = [nn.Conv2d(3, 8, 1), conv, nn.BatchNorm2d(conv.out_channels)]
    return nn.Sequential(*layers[: 3 if bn else 2], nn.ReLU())


CASES = [
    {},
    {"bias": False},
    {"stride": 2},
    {"out": 12},
    {"groups": 4},
    {"groups": 8},
    {"dilation": 2, "padding": 2},
    {"padding": "same"},
    {"padding_mode": "reflect"},
    {"bn": False},
    {"bn": False, "bias": False, "stride": 2},
    {"bn": False, "groups": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_pretrained_network_computes_the_same_at_first(case):
    network = settle(conv_bn(**case)).double()

    expanded = repvgg.over_parameterize(network)

    assert blocks(expanded) == 1
    assert relative_error(network(images(2, 3, 9, 8)), expanded(images(2, 3, 9, 8))) < 1e-12


def test_a_pretrained_network_computes_the_same_in_training_mode_too():
    network = settle(conv_bn()).double().train()

    expanded = repvgg.over_parameterize(network)

    assert expanded.training
    assert relative_error(network(images(2, 3, 9, 8)), expanded(images(2, 3, 9, 8))) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_switch_gives_the_original_layers_back(case):
    network = settle(conv_bn(**case)).double()
    expanded = stirred(repvgg.over_parameterize(network))
    x = images(2, 3, 9, 8)

    deployed = repvgg.switch_to_deploy(expanded)

    assert relative_error(expanded(x), deployed(x)) < 1e-12
    assert [(n, type(m)) for n, m in deployed.named_modules()] == [
        (n, type(m)) for n, m in network.named_modules()
    ]
    assert shapes(deployed) == shapes(network)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_networks_of_torchvision_come_back_with_their_names_and_shapes(name):
    torch.manual_seed(0)
    network = settle(torchvision.models.get_model(name, num_classes=5)).double()
    expanded = stirred(repvgg.over_parameterize(network))
    x = images(2, 3, 64, 64)

    deployed = repvgg.switch_to_deploy(expanded)

    assert blocks(expanded) > 3
    assert relative_error(expanded(x), deployed(x)) < 1e-10
    assert shapes(deployed) == shapes(network)
    plain = torchvision.models.get_model(name, num_classes=5).double()
    plain.load_state_dict(deployed.state_dict())
    assert relative_error(expanded(x), plain.eval()(x)) < 1e-10


@pytest.mark.slow
def test_fused_it_equals_the_fused_original():
    network = settle(torchvision.models.resnet18(num_classes=5))

    plain, _ = repvgg.fuse_conv_bn(network)
    expanded = stirred(repvgg.over_parameterize(network)).double()
    deployed, report = deployed_form(expanded)

    assert shapes(deployed) == shapes(plain)
    assert report.kept == {}
    x = images(2, 3, 64, 64)
    assert relative_error(expanded(x), deployed(x)) < 1e-10


@pytest.mark.slow
def test_a_fresh_network_starts_with_all_branches():
    expanded = repvgg.over_parameterize(torchvision.models.resnet18())

    norms = [m for m in expanded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((norm.weight == 1).all() for norm in norms)


def test_every_branch_learns():
    network = settle(conv_bn()).train()
    expanded = repvgg.over_parameterize(network)
    optimizer = torch.optim.SGD(expanded.parameters(), lr=0.1)
    before = {key: value.clone() for key, value in expanded.named_parameters()}

    for _ in range(3):
        optimizer.zero_grad()
        expanded(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()

    same = [key for key, value in expanded.named_parameters() if torch.equal(value, before[key])]
    # In front of a BatchNorm a bias has no effect.
    assert [key for key in same if not key.endswith("conv.bias")] == []


@pytest.mark.slow
def test_a_normalization_with_its_activation_comes_back():
    import timm

    network = settle(timm.create_model("resnet26d", num_classes=5, layers=(1, 1, 1, 1))).double()
    activated = settle(timm.create_model("regnety_002", num_classes=5)).double()
    x = images(2, 3, 64, 64)

    for original in (network, activated):
        expanded = stirred(repvgg.over_parameterize(original))
        deployed = repvgg.switch_to_deploy(expanded)
        assert relative_error(expanded(x), deployed(x)) < 1e-10
        assert [type(m) for m in deployed.modules()] == [type(m) for m in original.modules()]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(x)) + self.conv(x.flip(3))


def test_a_convolution_that_is_also_used_without_its_batchnorm_keeps_it():
    network = settle(nn.Sequential(Twice())).double()

    expanded = repvgg.over_parameterize(network)

    assert type(expanded[0].bn) is nn.BatchNorm2d
    x = images(2, 3, 9, 8)
    deployed = repvgg.switch_to_deploy(stirred(expanded))
    assert shapes(deployed) == shapes(network)
    assert relative_error(expanded(x), deployed(x)) < 1e-12


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Conv2d(3, 3, 1)),
        nn.Sequential(nn.Conv2d(3, 3, 3)),
        nn.Sequential(nn.ConvTranspose2d(3, 3, 3, padding=1)),
        nn.Sequential(nn.Conv2d(3, 3, 5, padding=2)),
        repvgg.create_model("repvgg_tiny"),
        nn.Conv2d(3, 3, 3, padding=1),
    ],
    ids=lambda network: type(network).__name__,
)
def test_a_network_without_such_convolutions_is_an_error(network):
    with pytest.raises(ValueError, match="has no convolution to over-parameterize"):
        repvgg.over_parameterize(network)


@pytest.mark.slow
def test_the_network_given_is_not_changed():
    network = settle(torchvision.models.resnet18()).train()
    before = shapes(network), copy.deepcopy(network.state_dict())

    repvgg.over_parameterize(network)

    assert shapes(network) == before[0]
    assert all(torch.equal(value, before[1][key]) for key, value in network.state_dict().items())
    assert network.training


@pytest.mark.parametrize("transfer", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_an_expanded_network_can_be_copied_and_pickled(transfer):
    expanded = stirred(repvgg.over_parameterize(settle(conv_bn()))).double()
    x = images(2, 3, 9, 8)

    moved = transfer(expanded)

    assert torch.equal(moved(x), expanded(x))
    assert relative_error(expanded(x), repvgg.switch_to_deploy(moved)(x)) < 1e-12


def test_branches_can_be_dropped_in_training():
    expanded = repvgg.over_parameterize(settle(conv_bn()), branch_drop=0.5).train()
    expanded[1].branch_1x1.bn.weight.data.fill_(1)

    assert not torch.equal(expanded(torch.ones(64, 3, 8, 8)), expanded(torch.ones(64, 3, 8, 8)))


class TrainingSkip(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y if self.training else self.bn(y)


def test_the_forward_of_both_modes_counts():
    network = settle(nn.Sequential(TrainingSkip())).double().train()

    expanded = repvgg.over_parameterize(network)

    assert type(expanded[0].bn) is nn.BatchNorm2d
    assert relative_error(network(images(2, 3, 9, 8)), expanded(images(2, 3, 9, 8))) < 1e-12


def test_a_batchnorm_that_is_frozen_while_the_rest_trains_stays():
    network = settle(conv_bn()).double().train()
    network[2].eval()

    expanded = repvgg.over_parameterize(network)

    assert relative_error(network(images(2, 3, 9, 8)), expanded(images(2, 3, 9, 8))) < 1e-12


def test_tied_weights_stay_tied():
    network = settle(nn.Sequential(*conv_bn(), nn.Conv2d(8, 8, 3, padding=1)))
    network.append(nn.Conv2d(8, 8, 3, padding=1))
    network[-1].weight = network[-2].weight

    expanded = repvgg.over_parameterize(network)

    assert blocks(expanded) == 1
    assert expanded[-1].weight is expanded[-2].weight


class AsksForClass(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = layer(x).relu() if isinstance(layer, nn.Conv2d) else layer(x)
        return x


class AsksForKernel(nn.Sequential):
    def forward(self, x):
        return self[0](x) * self[0].kernel_size[0]


@pytest.mark.parametrize("network", [AsksForClass, AsksForKernel])
def test_a_forward_that_reads_its_layers_classes_is_an_error(network):
    with pytest.raises(ValueError, match="cannot be over-parameterized: some forward depends"):
        repvgg.over_parameterize(network(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)))
