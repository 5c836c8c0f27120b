import copy

import pytest
import torch
from torch import nn

from repvgg.data import Batches
from repvgg.losses import rdrop_loss
from repvgg.module import Classifier, parameter_groups

MODEL = {
    "name": "repvgg_tiny",
    "num_classes": 5,
    "in_channels": 1,
    "strides": [1, 1, 2, 2, 1],
    "dropout": 0.3,
}
SETTINGS = {
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "num_steps": 100,
    "num_warmup_steps": 10,
}


def classifier(model: dict | None = None, **options) -> Classifier:
    torch.manual_seed(0)
    module = Classifier({**MODEL, **(model or {})}, **{**SETTINGS, **options}).double()
    module.log = lambda *args, **kwargs: None
    module._trainer = type("T", (), {"optimizers": [type("O", (), {"param_groups": [{"lr": 0}]})]})
    return module.train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6, 1, 8, 8, generator=generator).double(), torch.arange(6) % 5


def test_one_forward_gives_loss_and_gradients_of_two_full_passes():
    module = classifier(rdrop=0.7)
    twin = copy.deepcopy(module.net)
    images, targets = batch()

    torch.manual_seed(9)  # the dropout masks of the head are the step's only random numbers
    loss = module.training_step((images, targets), 0)
    loss.backward()

    torch.manual_seed(9)
    first, second = twin(images), twin(images)
    expected = rdrop_loss(first, second, targets, alpha=0.7).total
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for (name, ours), (_, theirs) in zip(
        module.net.named_parameters(), twin.named_parameters(), strict=True
    ):
        scale = theirs.grad.abs().max()
        assert (ours.grad - theirs.grad).abs().max() <= 1e-10 * scale.clamp_min(1e-3), name


def test_running_statistics_advance_once_a_step():
    module = classifier(rdrop=1.0)

    module.training_step(batch(), 0)

    counts = {m.num_batches_tracked.item() for m in module.modules() if hasattr(m, "running_mean")}
    assert counts == {1}


def test_without_rdrop_the_loss_is_the_cross_entropy():
    module = classifier(model={"dropout": 0.0})
    images, targets = batch()

    loss = module.training_step((images, targets), 0)

    expected = nn.functional.cross_entropy(module.net(images), targets)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_auxiliary_classifiers_add_a_tenth_of_their_cross_entropies():
    module = classifier(model={"dropout": 0.0, "auxiliary_heads": True})
    images, targets = batch()

    loss = module.training_step((images, targets), 0)

    features, auxiliary = module.net.forward_auxiliary(images)
    expected = nn.functional.cross_entropy(module.net.forward_head(features), targets)
    for logits in auxiliary:
        expected = expected + 0.1 * nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_noise_depends_on_the_step_and_the_seed_alone():
    def drawn(seed: int, step: int) -> float:
        module = classifier(seed=seed)
        module._trainer = type("T", (), {"current_epoch": 2})
        torch.rand(step)  # whatever was drawn before
        module.on_train_batch_start(None, step)
        return torch.rand(1).item()

    assert drawn(0, 5) == drawn(0, 5)
    assert len({drawn(0, 5), drawn(0, 6), drawn(1, 5)}) == 3


def test_dropout_and_augmentation_of_a_batch_do_not_share_their_noise():
    module = classifier(seed=1)
    module._trainer = type("T", (), {"current_epoch": 2})
    module.on_train_batch_start(None, 5)
    loader = Batches(torch.zeros(1), torch.zeros(1), batch_size=1, shuffle_seed=1)
    loader.set_epoch(2)

    assert torch.rand(1) != torch.rand(1, generator=loader._generator(5))


def test_weight_decay_follows_the_papers_recipe():
    net = classifier().net
    decay, no_decay = parameter_groups(net, 0.5)
    names = {id(parameter): name for name, parameter in net.named_parameters()}

    decayed = {names[id(p)] for p in decay["params"]}
    spared = {names[id(p)] for p in no_decay["params"]}

    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.5, 0.0)
    assert decayed | spared == set(names.values())
    assert all(name.endswith("bias") or ".bn.weight" in name for name in spared)
    assert all(
        name.endswith(("conv.weight", "branch_identity.weight")) or name == "linear.weight"
        for name in decayed
    )


def test_the_rate_warms_up_linearly_then_falls_as_a_cosine_to_zero():
    factor = classifier().learning_rate_factor

    assert [factor(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert [factor(step) for step in (10, 55, 100, 130)] == pytest.approx([1.0, 0.5, 0.0, 0.0])


@pytest.mark.parametrize("given", [(True, 1.0), (False, 0.0), (0.3, 0.3), (2, 2.0)])
def test_rdrop_is_one_number_whose_zero_is_off(given):
    assert classifier(rdrop=given[0]).rdrop == given[1]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({"dropout": 0.0}, {"rdrop": True}, r"model.dropout=0.0: .*set rdrop=false"),
        ({}, {"rdrop": -1}, "rdrop=-1: must be a number of at least 0"),
        ({}, {"rdrop": "maybe"}, "rdrop='maybe'"),
        ({}, {"rdrop": float("nan")}, "rdrop=nan"),
        ({}, {"label_smoothing": 1}, "label_smoothing=1: must be a number of at least 0 and below"),
        ({}, {"lr": -0.1}, "optim.lr=-0.1"),
        ({}, {"momentum": 1.5}, "optim.momentum=1.5"),
        ({}, {"weight_decay": None}, "optim.weight_decay=None"),
        ({"num_classes": -2}, {}, "model.num_classes=-2"),
    ],
)
def test_a_bad_value_is_refused_with_its_key(model, options, message):
    with pytest.raises(ValueError, match=message):
        classifier(model=model, **options)
