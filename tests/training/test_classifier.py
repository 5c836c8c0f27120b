import copy
import inspect
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from repvgg.data.batches import Batches, Stored
from repvgg.data.sets import digits
from repvgg.losses import rdrop_loss
from repvgg.models.registry import build_model
from repvgg.rdrop import StochasticLayers, predict_twice
from repvgg.training.callbacks import DeployedValidation
from repvgg.training.classifier import Classifier
from repvgg.training.divergence import Diverged, StopOnDivergence
from repvgg.training.groups import parameter_groups
from tests.support.trainers import quiet_trainer

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
    config = {**MODEL, **(model or {})}
    network = build_model(config)
    module = Classifier(
        network, num_classes=config["num_classes"], **{**SETTINGS, **options}
    ).double()
    module.logged = {}
    module.log = lambda name, value, **kwargs: module.logged.update({name: value})
    module._trainer = SimpleNamespace(
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0}])],
        global_step=1000,
        current_epoch=0,
        accumulate_grad_batches=1,
        log_every_n_steps=1,
        num_training_batches=10,
        world_size=1,
    )
    return module.train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6, 1, 8, 8, generator=generator).double(), torch.arange(6) % 5


def two_predictions(module: Classifier, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two predictions of a copy of the network, so that its own statistics do not change."""
    network = copy.deepcopy(module.net)
    torch.manual_seed(seed)
    first, second, _ = predict_twice(network, batch()[0], stochastic=StochasticLayers(False, True))
    return first, second


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
@pytest.mark.parametrize("soft", [False, True])
def test_a_step_minimizes_the_rdrop_loss_of_two_predictions(options, soft):
    module = classifier(rdrop=0.7, **options)
    images, targets = batch()
    targets = 0.9 * nn.functional.one_hot(targets, 5).double() + 0.02 if soft else targets
    expected = rdrop_loss(*two_predictions(module, 9), targets, alpha=0.7, **options).total

    module.stochastic = StochasticLayers(False, True)
    torch.manual_seed(9)
    loss = module.training_step((images, targets), 0)

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


NOISES = [{}, {"dropout": 0.0, "branch_drop": 0.2}, {"dropout": 0.0, "drop_path": 0.2}]


@pytest.mark.parametrize("noise", NOISES, ids=str)
def test_running_statistics_advance_once_a_step(noise):
    module = classifier(noise, rdrop=1.0)

    module.training_step(batch(), 0)

    counts = {m.num_batches_tracked.item() for m in module.modules() if hasattr(m, "running_mean")}
    assert counts == {1}


def test_without_rdrop_the_loss_is_the_cross_entropy():
    module = classifier(model={"dropout": 0.0})
    images, targets = batch()

    loss = module.training_step((images, targets), 0)

    expected = nn.functional.cross_entropy(module.net(images), targets)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_the_auxiliary_terms_of_a_doubled_batch_are_means_over_both_halves():
    module = classifier({"auxiliary_heads": True, "branch_drop": 0.2, "dropout": 0.0}, rdrop=1.0)
    images, targets = batch()
    network = copy.deepcopy(module.net)
    torch.manual_seed(4)
    features, auxiliary = network.forward_auxiliary(torch.cat([images, images]))
    logits = network.forward_head(features).chunk(2)
    expected = rdrop_loss(*logits, targets, alpha=1.0).total
    for both in auxiliary:
        expected = expected + 0.1 * nn.functional.cross_entropy(both, targets.repeat(2))

    module.stochastic = StochasticLayers(True, False)
    torch.manual_seed(4)
    loss = module.training_step((images, targets), 0)

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_the_weight_of_the_divergence_warms_up_by_the_optimizer_step():
    module = classifier(rdrop=2.0, num_rdrop_warmup_steps=4)
    used = []
    for step in (0, 1, 3, 9):
        module.trainer.global_step = step
        module.training_step(batch(), 0)
        used.append(module.logged["train/alpha"])

    assert used == [0.5, 1.0, 2.0, 2.0]


def test_the_divergence_is_shown_beside_what_it_costs():
    module = classifier(rdrop=1.0)

    module.training_step(batch(), 0)

    logged = module.logged
    assert logged["train/kl"] > 0
    assert logged["train/kl_to_cross_entropy"] == logged["train/kl"] / logged["train/cross_entropy"]
    assert 0 <= logged["train/agreement"] <= 1


def test_a_divergence_that_stays_zero_is_warned_about_at_the_end_of_the_epoch():
    module = classifier(rdrop=1.0)
    nn.init.zeros_(module.net.linear.weight)

    module.training_step(batch(), 0)

    with pytest.warns(UserWarning, match="train/kl was 0 in epoch 0.*model.dropout"):
        module.on_train_epoch_end()


def test_a_divergence_above_zero_is_not_warned_about(recwarn):
    module = classifier(rdrop=1.0)

    module.training_step(batch(), 0)
    module.on_train_epoch_end()

    assert not recwarn


def test_rdrop_pulls_the_two_predictions_together():
    def divergence(alpha: float) -> float:
        """What is left between two predictions after a few steps."""
        module = classifier(rdrop=0.1).float()  # above 0, for two predictions
        optimizer = torch.optim.SGD(module.net.parameters(), lr=0.05)
        images, targets = (part.repeat(4, *[1] * (part.ndim - 1)) for part in batch())
        for _ in range(30):
            losses = module.losses(images.float(), targets, alpha=alpha)
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()
        return losses.kl.item()

    assert 0 < divergence(3.0) < 0.7 * divergence(0.0)


def frozen(module: Classifier) -> Classifier:
    """Without BatchNorm's coupling of the images in a batch."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eval()
    return module


class SameMasks(nn.Module):
    """Dropout whose mask is a function of the image, however the batch is split."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = torch.arange(len(x)) >= len(x) // 2  # the second prediction
        bits = (x.detach()[:, :1] * 1e6).long() + torch.arange(x.shape[1]) + 7 * half[:, None]
        return x * (bits % 3 > 0) * 1.5


def repeatable() -> Classifier:
    """A module without interaction of images, whose masks are a function of the image."""
    module = frozen(classifier(rdrop=3.0))
    module.net.dropout = SameMasks()
    module.stochastic = StochasticLayers(False, True)
    return module


@pytest.mark.parametrize("sizes", [[6], [3, 3], [2, 2, 2], [1] * 6], ids=str)
def test_gradients_do_not_depend_on_how_a_batch_is_accumulated(sizes):
    def gradients(sizes: list[int]) -> list[torch.Tensor]:
        module = repeatable()
        module.trainer.accumulate_grad_batches = len(sizes)
        parts = zip(*(part.split(sizes) for part in batch()), strict=True)
        for i, part in enumerate(parts):
            # Lightning divides by the number of accumulated batches.
            (module.training_step(part, i) / len(sizes)).backward()
        assert module.logged["train/kl"] > 0
        return [p.grad for p in module.net.parameters()]

    for split, whole in zip(gradients(sizes), gradients([6]), strict=True):
        assert (split - whole).abs().max() <= 1e-12 * whole.abs().max()


class Step(nn.Module):
    """The training step as DDP sees it."""

    def __init__(self, module: Classifier) -> None:
        super().__init__()
        self.module = module

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        return self.module.training_step(batch, 0)


def train_on_one_rank(rank: int, folder: Path) -> None:
    store = (folder / "store").as_uri()
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    step = nn.parallel.DistributedDataParallel(Step(repeatable()))
    step(*(part.chunk(2)[rank] for part in batch())).backward()
    if rank == 0:
        torch.save([parameter.grad for parameter in step.parameters()], folder / "gradients.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_gradients_do_not_depend_on_the_number_of_ranks(tmp_path):
    torch.multiprocessing.start_processes(
        train_on_one_rank, (tmp_path,), nprocs=2, start_method="forkserver"
    )

    module = repeatable()
    module.training_step(batch(), 0).backward()

    ranks = torch.load(tmp_path / "gradients.pt")
    for split, whole in zip(ranks, (p.grad for p in module.net.parameters()), strict=True):
        assert (split - whole).abs().max() <= 1e-12 * whole.abs().max()


def test_a_short_last_window_of_accumulation_weighs_what_it_holds():
    module = classifier({"dropout": 0.0})
    module.trainer.accumulate_grad_batches = 4  # windows of 4, 4 and 2 batches
    loss = module.losses(*batch(), alpha=0).total.item()

    scales = [module.training_step(batch(), i).item() / loss for i in range(10)]

    assert scales == pytest.approx([1] * 8 + [2] * 2, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_finite_under_autocast_when_probabilities_underflow(dtype):
    module = classifier(rdrop=1.0).float()
    with torch.no_grad():
        module.net.linear.weight.mul_(3000)  # logits hundreds apart
    images, targets = batch()

    with torch.autocast("cpu", dtype=dtype):
        losses = module.losses(images.float(), targets, alpha=1.0)
    losses.total.backward()

    assert losses.logits.dtype == dtype
    assert losses.logits.float().std() > 200
    assert losses.kl > 10
    assert all(p.grad.isfinite().all() for p in module.net.parameters())


def test_the_step_of_a_network_of_another_family_is_the_same():
    module = classifier(rdrop=1.0)
    module.net = torchvision.models.mobilenet_v2(num_classes=5, dropout=0.3).double()
    images, targets = torch.randn(4, 3, 32, 32).double(), torch.arange(4)
    network = copy.deepcopy(module.net)
    torch.manual_seed(2)
    logits = predict_twice(network, images)[:2]

    torch.manual_seed(2)
    loss = module.training_step((images, targets), 0)

    expected = rdrop_loss(*logits, targets, alpha=1.0).total
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


def test_masks_depend_on_the_step_and_the_seed_alone():
    def drawn(seed: int, step: int) -> float:
        module = classifier(seed=seed)
        module._trainer = SimpleNamespace(current_epoch=2, world_size=1, global_rank=0)
        torch.rand(step)  # whatever was drawn before
        module.on_train_batch_start(None, step)
        return torch.rand(1).item()

    assert drawn(0, 5) == drawn(0, 5)
    assert len({drawn(0, 5), drawn(0, 6), drawn(1, 5)}) == 3


def test_dropout_and_augmentation_of_a_batch_differ():
    module = classifier(seed=1)
    module._trainer = SimpleNamespace(current_epoch=2, world_size=1, global_rank=0)
    module.on_train_batch_start(None, 5)
    source = Stored(torch.zeros(6), torch.zeros(6))
    loader = Batches(source, batch_size=1, shuffle_seed=1)
    loader.set_epoch(2)

    seed = loader._requests()[5].seed
    assert torch.rand(1) != torch.rand(1, generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({"branch_drop": 1}, {}, "branch_drop=1"),
        ({"drop_path": -0.1}, {}, "drop_path=-0.1"),
        ({}, {"rdrop": -1}, "rdrop=-1: must be a number of at least 0"),
        ({}, {"rdrop": "maybe"}, "rdrop='maybe'"),
        ({}, {"rdrop": float("nan")}, "rdrop=nan"),
        ({}, {"label_smoothing": 1}, "label_smoothing=1: must be a number of at least 0 and below"),
        ({}, {"lr": -0.1}, "lr=-0.1"),
        ({}, {"momentum": 1.5}, "momentum=1.5"),
        ({}, {"weight_decay": None}, "weight_decay=None"),
        ({"num_classes": -2}, {}, "num_classes=-2"),
        ({"num_classes": 1}, {}, "num_classes=1: must be an integer of at least 2"),
    ],
)
def test_a_bad_value_is_rejected_with_its_name(model, options, message):
    with pytest.raises(ValueError, match=message):
        classifier(model=model, **options)


def fit(module: Classifier, *callbacks, data=None, **options) -> list[torch.Tensor]:
    """Train on the digits for an epoch or two; the weights."""
    short = {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 1, **options}
    trainer = quiet_trainer(callbacks=list(callbacks), **short)
    trainer.fit(module, datamodule=data or digits(batch_size=64))
    return [value.detach().clone() for value in module.net.state_dict().values()]


def plain(**options) -> Classifier:
    torch.manual_seed(0)
    network = build_model(MODEL | {"num_classes": 10})
    return Classifier(network, num_classes=10, **{**SETTINGS, **options})


def test_training_is_bit_identical_with_and_without_folded_validation():
    without, with_it = fit(plain()), fit(plain(), DeployedValidation())

    assert all(map(torch.equal, without, with_it))


@pytest.mark.parametrize("stage", ["validation", "test"])
def test_the_folded_copy_is_evaluated_and_no_part_of_the_module(stage):
    seen = []

    class Look(L.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_):
            seen.append((pl_module.evaluated, len(list(pl_module.modules()))))

        on_test_batch_end = on_validation_batch_end

    module = plain()
    count = len(list(module.modules()))
    if stage == "validation":
        fit(module, DeployedValidation(), Look())
    else:
        trainer = quiet_trainer(callbacks=[DeployedValidation(), Look()])
        trainer.test(module, datamodule=digits(batch_size=64), verbose=False)

    evaluated, modules = seen[-1]
    folded = evaluated.__self__
    images = torch.rand(4, 1, 8, 8)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    torch.testing.assert_close(folded(images), module.net.eval()(images), rtol=1e-4, atol=1e-5)
    assert modules == count
    assert module.evaluated is None


def test_each_validation_folds_the_present_weights():
    folded = []

    class Look(L.Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            folded.append(pl_module.evaluated.__self__)

    fit(plain(), DeployedValidation(), Look(), limit_val_batches=2)

    assert [folded[0] is one for one in folded] == [True, True, False, False]


def test_folded_validation_needs_something_to_fold():
    module = Classifier(torchvision.models.resnet18(num_classes=10), num_classes=10, **SETTINGS)

    with pytest.raises(ValueError, match="DeployedValidation: ResNet has nothing to fold"):
        fit(module, DeployedValidation())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_rate(value):
    class Spoil(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 4:
                pl_module.net.linear.bias.data.fill_(value)

    with pytest.raises(
        Diverged, match=r"the loss is NaN or infinite at step 4, with a learning rate of 0\.05"
    ):
        fit(plain(), Spoil(), StopOnDivergence())


def watched(losses: list[float], *, log_every: int) -> tuple[StopOnDivergence, SimpleNamespace]:
    """A callback that saw these losses, one a step, on one of two devices; and its trainer."""
    watch = StopOnDivergence()
    trainer = SimpleNamespace(
        global_step=0,
        world_size=2,
        log_every_n_steps=log_every,
        strategy=SimpleNamespace(reduce=lambda value, reduce_op: value),
    )
    for step, loss in enumerate(losses):
        trainer.global_step = step
        watch.on_before_backward(trainer, plain(), torch.tensor(loss))
    return watch, trainer


def test_a_loss_that_is_checked_at_the_end_of_the_epoch_still_names_its_step():
    watch, trainer = watched([1.0, float("nan"), 2.0, float("inf")], log_every=0)

    with pytest.raises(Diverged, match="at step 1,"):
        watch.on_train_epoch_end(trainer, plain())


def test_a_loss_that_is_checked_when_metrics_are_logged_still_names_its_step():
    watched([1.0, float("nan"), 2.0], log_every=4)

    with pytest.raises(Diverged, match="at step 1,"):
        watched([1.0, float("nan"), 2.0, 3.0], log_every=4)


@pytest.mark.parametrize(
    ("key", "what"),
    [("conv.weight", "a weight"), ("bn.running_var", "a statistic"), ("bn.running_mean", "a stat")],
)
def test_what_is_not_finite_is_not_saved(key, what):
    module, watch = plain(), StopOnDivergence()
    trainer = SimpleNamespace(global_step=7)
    watch.on_save_checkpoint(trainer, module, {})
    module.net.state_dict()[f"stem.branch_3x3.{key}"].view(-1)[0] = float("inf")

    with pytest.raises(Diverged, match=f"{what}.* is NaN or infinite at step 7"):
        watch.on_save_checkpoint(trainer, module, {})


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_an_optimizer_is_torchs_own_with_both_groups(name, kind):
    optimizer = plain(optimizer=name).configure_optimizers()["optimizer"]

    assert type(optimizer) is kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0]


def test_an_unknown_optimizer_is_rejected():
    with pytest.raises(ValueError, match=r"optimizer='lion': must be one of sgd, adamw"):
        plain(optimizer="lion")


def test_channels_last_computes_the_same_and_is_saved_the_same():
    def losses(layout: torch.memory_format) -> list[torch.Tensor]:
        module = plain().double()
        module.net.to(memory_format=layout)
        data = digits(batch_size=64)
        images, labels = next(iter(data.train_dataloader()))
        total = module.train().losses(images.double() / 255, labels, alpha=0.0).total
        total.backward()
        return [total, *(parameter.grad for parameter in module.net.parameters())]

    pairs = zip(losses(torch.contiguous_format), losses(torch.channels_last), strict=True)
    torch.manual_seed(0)
    for expected, given in pairs:
        torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-12)


def test_a_module_is_built_again_from_a_checkpoint(tmp_path):
    module = plain(rdrop=1.0, label_smoothing=0.1, optimizer="adamw")
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=1)
    trainer.fit(module, datamodule=digits(batch_size=64))
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    network = build_model(MODEL | {"num_classes": 10})
    again = Classifier.load_from_checkpoint(
        tmp_path / "last.ckpt", network=network, weights_only=True
    )

    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(again.eval()(images), module.eval()(images))
    assert (again.rdrop, again.label_smoothing, again.optimizer) == (1.0, 0.1, "adamw")
    assert again.hparams == module.hparams


def test_hyper_parameters_are_all_arguments_but_modules_as_plain_values():
    network = build_model(MODEL)
    settings = {**SETTINGS, "lr": np.float64(0.1), "num_steps": np.int64(100)}

    stored = dict(Classifier(network, num_classes=5, **settings).hparams)

    arguments = set(inspect.signature(Classifier).parameters)
    assert set(stored) == arguments - {"network", "stochastic", "scheduler", "loss"}
    assert {type(value) for value in stored.values()} == {float, int, str, list}
