import copy
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
from repvgg.rdrop import Noise, predict_twice
from repvgg.training.classifier import Classifier, Diverged, parameter_groups

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
    """What the network says of each image twice; the twin keeps the statistics of the original."""
    twin = copy.deepcopy(module.net)
    torch.manual_seed(seed)
    first, second, _ = predict_twice(twin, batch()[0], noise=Noise(False, True))
    return first, second


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
@pytest.mark.parametrize("soft", [False, True])
def test_a_step_minimizes_the_rdrop_loss_of_two_predictions(options, soft):
    module = classifier(rdrop=0.7, **options)
    images, targets = batch()
    targets = 0.9 * nn.functional.one_hot(targets, 5).double() + 0.02 if soft else targets
    expected = rdrop_loss(*two_predictions(module, 9), targets, alpha=0.7, **options).total

    module.noise = Noise(False, True)
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
    twin = copy.deepcopy(module.net)
    torch.manual_seed(4)
    features, auxiliary = twin.forward_auxiliary(torch.cat([images, images]))
    logits = twin.forward_head(features).chunk(2)
    expected = rdrop_loss(*logits, targets, alpha=1.0).total
    for both in auxiliary:
        expected = expected + 0.1 * nn.functional.cross_entropy(both, targets.repeat(2))

    module.noise = Noise(True, False)
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
    """A module whose images do not see each other, and whose noise is a function of the image."""
    module = frozen(classifier(rdrop=3.0))
    module.net.dropout = SameMasks()
    module.noise = Noise(False, True)
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


def test_gradients_do_not_depend_on_the_number_of_ranks(tmp_path):
    torch.multiprocessing.spawn(train_on_one_rank, (tmp_path,), nprocs=2)

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
    twin = copy.deepcopy(module.net)
    torch.manual_seed(2)
    logits = predict_twice(twin, images)[:2]

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


def test_noise_depends_on_the_step_and_the_seed_alone():
    def drawn(seed: int, step: int) -> float:
        module = classifier(seed=seed)
        module._trainer = SimpleNamespace(current_epoch=2, world_size=1, global_rank=0)
        torch.rand(step)  # whatever was drawn before
        module.on_train_batch_start(None, step)
        return torch.rand(1).item()

    assert drawn(0, 5) == drawn(0, 5)
    assert len({drawn(0, 5), drawn(0, 6), drawn(1, 5)}) == 3


def test_dropout_and_augmentation_of_a_batch_do_not_share_their_noise():
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


@pytest.mark.parametrize("given", [(True, 1.0), (False, 0.0), (0.3, 0.3), (2, 2.0)])
def test_rdrop_is_one_number_whose_zero_is_off(given):
    assert classifier(rdrop=given[0]).rdrop == given[1]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({"dropout": 0.0}, {"rdrop": True}, r"model.dropout=0.0: .*set rdrop=false"),
        ({"branch_drop": 1}, {}, "model.branch_drop=1"),
        ({"drop_path": -0.1}, {}, "model.drop_path=-0.1"),
        ({}, {"rdrop": -1}, "rdrop=-1: must be a number of at least 0"),
        ({}, {"rdrop": "maybe"}, "rdrop='maybe'"),
        ({}, {"rdrop": float("nan")}, "rdrop=nan"),
        ({}, {"label_smoothing": 1}, "label_smoothing=1: must be a number of at least 0 and below"),
        ({}, {"lr": -0.1}, "optim.lr=-0.1"),
        ({}, {"momentum": 1.5}, "optim.momentum=1.5"),
        ({}, {"weight_decay": None}, "optim.weight_decay=None"),
        ({"num_classes": -2}, {}, "model.num_classes=-2"),
        ({"num_classes": 1}, {}, "model.num_classes=1: must be an integer of at least 2"),
    ],
)
def test_a_bad_value_is_refused_with_its_key(model, options, message):
    with pytest.raises(ValueError, match=message):
        classifier(model=model, **options)


def fit(module: Classifier, *callbacks, data=None, **options) -> list[torch.Tensor]:
    """Train on the digits for an epoch or two; the weights."""
    L.Trainer(
        **{"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 1, **options},
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
    ).fit(module, datamodule=data or digits(batch_size=64))
    return [value.detach().clone() for value in module.net.state_dict().values()]


def plain(**options) -> Classifier:
    torch.manual_seed(0)
    return Classifier({**MODEL, "num_classes": 10}, **{**SETTINGS, **options})


def test_training_is_bit_identical_with_and_without_the_deployed_twin():
    without, with_it = fit(plain()), fit(plain(deployed_validation=True))

    assert all(map(torch.equal, without, with_it))


def test_the_twin_is_what_will_be_deployed_and_no_part_of_the_module():
    seen = []

    class Look(L.Callback):
        def on_validation_batch_start(self, trainer, pl_module, *_):
            seen.append((pl_module._twin, len(list(pl_module.modules()))))

    module = plain(deployed_validation=True)
    count = len(list(module.modules()))
    fit(module, Look())

    (twin,), modules = seen[-1]
    images = torch.rand(4, 1, 8, 8)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in twin.modules())
    torch.testing.assert_close(twin(images), module.net.eval()(images), rtol=1e-4, atol=1e-5)
    assert modules == count
    assert module._twin == []


def test_a_network_with_nothing_to_fold_has_no_deployed_twin():
    with pytest.raises(ValueError, match="deployed_validation=True: resnet18 has nothing to fold"):
        Classifier(
            {"name": "resnet18", "library": "torchvision", "num_classes": 10},
            deployed_validation=True,
            **SETTINGS,
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_with_the_step_and_the_rate(value):
    class Spoil(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 4:
                pl_module.net.linear.bias.data.fill_(value)

    with pytest.raises(
        Diverged, match=r"the loss is NaN or infinite at step 4, with a learning rate of 0\.05"
    ):
        fit(plain(), Spoil())


def test_a_loss_that_is_looked_at_later_still_names_its_step():
    module = plain()
    module._trainer = SimpleNamespace(
        global_step=0,
        world_size=2,
        strategy=SimpleNamespace(reduce=lambda value, reduce_op: value),
    )
    for step, loss in enumerate([1.0, float("nan"), 2.0, float("inf")]):
        module._trainer.global_step = step
        module._watch(torch.tensor(loss))

    with pytest.raises(Diverged, match="at step 1,"):
        module._check_watch()


def test_weights_that_are_no_numbers_are_not_saved():
    module = plain()
    module._trainer = SimpleNamespace(global_step=7)
    module.on_save_checkpoint({})
    module.net.stem.branch_3x3.conv.weight.data[0, 0, 0, 0] = float("nan")

    with pytest.raises(Diverged, match="a weight is NaN or infinite at step 7"):
        module.on_save_checkpoint({})


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_an_optimizer_is_torchs_own_with_both_groups(name, kind):
    optimizer = plain(optimizer=name).configure_optimizers()["optimizer"]

    assert type(optimizer) is kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0]


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"optim\.name='lion': must be one of sgd, adamw"):
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
    module = plain(rdrop=True, label_smoothing=0.1, optimizer="adamw")
    trainer = L.Trainer(
        max_epochs=1,
        limit_train_batches=2,
        limit_val_batches=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=digits(batch_size=64))
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    again = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)

    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(again.eval()(images), module.eval()(images))
    assert (again.rdrop, again.label_smoothing, again.optimizer) == (1.0, 0.1, "adamw")
    assert again.hparams == module.hparams


def test_arguments_of_other_types_are_stored_as_plain_values():
    from omegaconf import OmegaConf

    model = OmegaConf.create(MODEL | {"num_classes": 10})
    settings = {**SETTINGS, "lr": np.float64(0.1), "num_steps": np.int64(100)}

    stored = dict(Classifier(model, **settings).hparams)

    assert stored["model"] == MODEL | {"num_classes": 10}
    assert {type(stored[key]) for key in ("lr", "num_steps", "model")} == {float, int, dict}
    assert type(stored["model"]["strides"]) is list


def test_arguments_that_are_not_plain_are_not_stored():
    from repvgg.training.classifier import _plain

    with pytest.raises(TypeError, match="is not a plain value"):
        _plain({"model": {"dtype": torch.float32}})
