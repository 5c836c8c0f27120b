import pytest
import torch
from torch import nn

import repvgg
from repvgg.models.reestimate import reestimate_bn
from tests.support.networks import relative_error, settle

SMALL = {"depths": (1, 2, 2, 1), "widths": (8, 16, 16, 24), "num_classes": 5}


@pytest.mark.parametrize("name", repvgg.list_models())
def test_every_variant_computes_the_same_after_the_switch(name):
    torch.manual_seed(0)
    model = settle(repvgg.create_model(name, **SMALL)).double()
    images = torch.randn(2, 3, 64, 64).double()

    deployed = repvgg.switch_to_deploy(model)

    assert relative_error(model(images), deployed(images)) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_a0_folds_within_the_documented_error(dtype, tolerance):
    torch.manual_seed(0)
    model = settle(repvgg.create_model("repvgg_a0")).double()
    images = torch.randn(2, 3, 64, 64)
    expected = model(images.double())

    deployed = repvgg.switch_to_deploy(model.to(dtype))

    assert relative_error(expected, deployed(images.to(dtype)).double()) < tolerance


def test_the_original_model_does_not_change():
    model = settle(repvgg.create_model("repvgg_a0", **SMALL))
    before = {key: value.clone() for key, value in model.state_dict().items()}

    repvgg.switch_to_deploy(model)

    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_blocks_inside_another_network_are_switched():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), repvgg.RepVGGBlock(8, 8), nn.Flatten())

    deployed = repvgg.switch_to_deploy(network)

    assert deployed[1].reparam is not None
    assert not deployed.training


def test_a_deployed_network_has_convolutions_relus_and_a_linear_layer_alone():
    deployed = repvgg.switch_to_deploy(settle(repvgg.create_model("repvgg_a0")))

    kinds = [type(m) for m in deployed.modules() if not list(m.children())]

    assert {kind: kinds.count(kind) for kind in (nn.Conv2d, nn.ReLU, nn.Linear)} == {
        nn.Conv2d: 22,
        nn.ReLU: 22,
        nn.Linear: 1,
    }
    assert set(kinds) <= {nn.Conv2d, nn.ReLU, nn.Linear, nn.Identity, nn.Dropout, nn.ModuleDict}


def test_switching_a_switched_network_changes_nothing():
    once = repvgg.switch_to_deploy(settle(repvgg.create_model("repvgg_a0", **SMALL)))
    images = torch.randn(2, 3, 32, 32)

    assert torch.equal(repvgg.switch_to_deploy(once)(images), once(images))


def test_a_network_without_blocks_is_an_error():
    with pytest.raises(ValueError, match="Linear has no block to switch"):
        repvgg.switch_to_deploy(nn.Linear(2, 2))


def test_a_block_that_cannot_be_folded_is_named():
    model = settle(repvgg.create_model("repvgg_a0", **SMALL))
    model.stages[1][0].branch_1x1.bn = nn.BatchNorm2d(16, track_running_stats=False)

    with pytest.raises(ValueError, match=r"stages\.1\.0: branch_1x1\.bn.* running statistics"):
        repvgg.switch_to_deploy(model)


def trained(iterations: int = 5, **stochastic) -> nn.Module:
    """A small network after a few iterations of training with stochastic layers."""
    torch.manual_seed(0)
    model = repvgg.create_model("repvgg_a0", **SMALL, **stochastic).double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(iterations):
        loss = nn.functional.cross_entropy(
            model(torch.randn(8, 3, 32, 32).double()), torch.arange(8) % 5
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


STOCHASTIC = [{"dropout": 0.3}, {"branch_drop": 0.3}, {"drop_path": 0.3}]


@pytest.mark.parametrize("stochastic", STOCHASTIC, ids=str)
def test_a_network_trained_with_stochastic_layers_deploys_exactly(stochastic):
    model = trained(**stochastic)
    images = torch.randn(16, 3, 32, 32).double()
    reestimate_bn(model, [images])

    deployed = repvgg.switch_to_deploy(model)

    assert relative_error(model.eval()(images), deployed(images)) < 1e-12


def test_reestimated_statistics_are_those_without_stochastic_layers():
    model, plain = trained(branch_drop=0.3), trained(branch_drop=0.3)
    images = torch.randn(16, 3, 32, 32).double()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of the last batch
        if isinstance(module, repvgg.RepVGGBlock):
            module.branch_drop = nn.Identity()
    plain(images)

    reestimate_bn(model, [images])

    found, expected = model.state_dict(), plain.state_dict()
    for key in (key for key in found if "running" in key):
        assert relative_error(expected[key], found[key]) < 1e-12, key


def test_reestimated_statistics_average_the_batches():
    model = trained(drop_path=0.3)
    batches = [torch.randn(8, 3, 32, 32).double() for _ in range(3)]
    single = []
    for images in batches:
        reestimate_bn(model, [images])
        single.append(model.stem.branch_3x3.bn.running_var.clone())

    reestimate_bn(model, batches)

    torch.testing.assert_close(model.stem.branch_3x3.bn.running_var, torch.stack(single).mean(0))


def test_reestimating_leaves_modes_and_momenta_as_they_were():
    model = trained(branch_drop=0.3)
    model.stages[0].eval()
    before = [(m.training, getattr(m, "momentum", None)) for m in model.modules()]

    reestimate_bn(model, [torch.randn(4, 3, 32, 32).double()])

    assert [(m.training, getattr(m, "momentum", None)) for m in model.modules()] == before


def failing():
    yield torch.randn(4, 3, 32, 32).double()
    raise OSError("the disk is gone")


@pytest.mark.parametrize(("batches", "error"), [([], ValueError), (failing(), OSError)])
def test_a_failed_reestimate_keeps_the_old_statistics(batches, error):
    model = trained()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    with pytest.raises(error):
        reestimate_bn(model, batches)

    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore:a plain forward in training mode:UserWarning")
def test_statistics_that_no_image_reaches_are_kept():
    model = trained(auxiliary_heads=True, drop_path=0.1)
    settle(model)
    before = model.auxiliary["stage1"].bn.running_var.clone()

    reestimate_bn(model, [torch.randn(4, 3, 32, 32).double()])

    assert torch.equal(model.auxiliary["stage1"].bn.running_var, before)
