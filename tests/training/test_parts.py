"""The user's own optimizer, schedule and loss; layer-wise rates; frozen modules."""

import copy
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from repvgg import targets
from repvgg.checks import ArgumentError
from repvgg.data.sets import digits
from repvgg.losses import rdrop_loss, symmetric_kl
from repvgg.models.forms import switch_to_deploy
from repvgg.models.registry import build_model
from repvgg.training.callbacks import EMA, ReestimateBN
from repvgg.training.checkpoints import LastCheckpoint
from repvgg.training.classifier import Classifier
from repvgg.training.criterion import build_loss, check_loss
from repvgg.training.divergence import Diverged, StopOnDivergence
from repvgg.training.groups import freeze, layers, parameter_groups
from repvgg.training.optimizers import optimizer_maker, scheduler_maker
from repvgg.training.parts import Part, move_from_trainer, read_part, read_parts
from repvgg.training.schedule import Steps
from tests.support.trainers import quiet_trainer

MODEL = {
    "name": "repvgg_tiny",
    "num_classes": 10,
    "in_channels": 1,
    "strides": [1, 1, 2, 2, 1],
    "dropout": 0.2,
}
EPOCHS, BATCHES = 4, 3
STEPS = Steps(EPOCHS * BATCHES, BATCHES, 0, 0, 64, BATCHES)
LR_SCHEDULER = "torch.optim.lr_scheduler"


def network(**options) -> nn.Module:
    torch.manual_seed(0)
    return build_model(MODEL | options)


def classifier(model: nn.Module | None = None, **options) -> Classifier:
    settings = {
        "lr": 0.05,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "num_steps": STEPS.total,
        "num_warmup_steps": 2,
    }
    return Classifier(model or network(), num_classes=10, **{**settings, **options})


def fit(module: Classifier, folder: Path, *callbacks: L.Callback, **options) -> L.Trainer:
    """Train on the digits, with `last.ckpt` of every epoch in the folder."""
    resume = options.pop("resume", None)
    trainer = quiet_trainer(
        **{"max_epochs": EPOCHS, "limit_train_batches": BATCHES, "limit_val_batches": 1, **options},
        callbacks=[*callbacks, LastCheckpoint(folder)],
        enable_checkpointing=True,
    )
    trainer.fit(module, datamodule=digits(batch_size=64), ckpt_path=resume, weights_only=True)
    return trainer


def state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


def optimizer(name: str, **arguments) -> Callable:
    return optimizer_maker(Part("optimizer._target_", name, arguments))


def scheduler(name: str, interval: str | None = None, **arguments):
    return scheduler_maker(Part("scheduler._target_", name, arguments), interval, STEPS)


def five(groups: object, lr: float, weight_decay: float) -> int:
    return 5


def one_group(groups: list[dict], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    trained = [parameter for group in groups for parameter in group["params"]]
    return torch.optim.SGD(trained, lr=2 * lr, weight_decay=weight_decay)


def focal(logits: torch.Tensor, targets: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    log_p = F.log_softmax(logits, 1).gather(1, targets[:, None])
    return -((1 - log_p.exp()) ** gamma * log_p).mean()


class Buffered(nn.Module):
    """A cross-entropy with weights of the classes in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.arange(1.0, 11.0))

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, targets, self.weights)


class Trained(Buffered):
    """A loss with a parameter, which nothing would train."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


def rates(trainer_options: dict | None = None, **options) -> list[float]:
    """The rate of every optimizer step."""
    seen: list[float] = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, *_) -> None:
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer = quiet_trainer(
        max_epochs=EPOCHS,
        limit_train_batches=BATCHES,
        limit_val_batches=1,
        callbacks=[Look()],
        **(trainer_options or {}),
    )
    trainer.fit(classifier(**options), datamodule=digits(batch_size=64))
    return seen


# Optimizers


def test_an_optimizer_gets_groups_rate_and_decay():
    module = classifier(optimizer=optimizer("torch.optim.RMSprop", alpha=0.9))

    made = module.make_optimizer()

    assert type(made) is torch.optim.RMSprop
    assert [group["weight_decay"] for group in made.param_groups] == [1e-4, 0.0]
    assert {(group["lr"], group["alpha"]) for group in made.param_groups} == {(0.05, 0.9)}


def test_an_optimizer_of_timm_trains(tmp_path):
    module = classifier(optimizer=optimizer("timm.optim.Lion"), lr=1e-3)
    before = copy.deepcopy(module.net.state_dict())

    fit(module, tmp_path)

    assert not torch.equal(before["linear.weight"], module.net.linear.weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "torch.optim.LBFGS",
            r"unexpected keyword argument 'weight_decay'; its signature is LBFGS",
        ),
        ("torch.optim.RMSpro", "torch.optim has no RMSpro; did you mean RMSprop?"),
        (f"{__name__}.five", "five: returns int, not a torch.optim.Optimizer"),
    ],
)
def test_an_optimizer_that_cannot_be_made_is_an_error(name, message):
    with pytest.raises(ValueError, match=message):
        classifier(optimizer=optimizer(name)).make_optimizer()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("torch.optim.RMSprop", {"alpha": "abc"}, "'<=' not supported"),
        ("torch.optim.Adam", {"betas": 3}, "'int' object is not subscriptable"),
    ],
)
def test_a_value_that_an_optimizer_of_torch_rejects_is_a_mistake(name, arguments, message):
    with pytest.raises(ArgumentError, match=rf"{name}: rejects its arguments: {message}"):
        classifier(optimizer=optimizer(name, **arguments)).make_optimizer()


def test_an_error_of_the_users_own_code_within_a_library_passes_through(tmp_path, monkeypatch):
    (tmp_path / "own_rate.py").write_text("def rate(step):\n    raise KeyError('own')\n")
    monkeypatch.syspath_prepend(tmp_path)
    arguments = {"lr_lambda": targets.locate("own_rate.rate", "scheduler.lr_lambda")}
    made = scheduler(f"{LR_SCHEDULER}.LambdaLR", **arguments)

    with pytest.raises(KeyError, match="own"):
        made.make(classifier().make_optimizer())


# Schedules


def test_one_cycle_spans_the_steps_of_the_run_and_peaks_at_the_rate():
    seen = rates(scheduler=scheduler(f"{LR_SCHEDULER}.OneCycleLR"))

    assert len(set(seen)) == STEPS.total
    assert max(seen) == pytest.approx(0.05, rel=0.05)
    assert seen[-1] < 1e-2 * max(seen)


def test_a_step_schedule_changes_the_rate_by_epoch():
    seen = rates(scheduler=scheduler(f"{LR_SCHEDULER}.StepLR", step_size=1, gamma=0.5))

    expected = [0.05 * 0.5**epoch for epoch in range(EPOCHS) for _ in range(BATCHES)]
    assert seen == pytest.approx(expected)


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize(
    "name", [f"{LR_SCHEDULER}.CosineAnnealingLR", "timm.scheduler.CosineLRScheduler"]
)
def test_a_cosine_ends_with_the_run_by_either_interval(name, interval):
    seen = rates(scheduler=scheduler(name, interval))

    every = 1 if interval == "step" else BATCHES
    length = STEPS.total // every
    cosine = [
        0.025 * (1 + torch.pi * 0 + float(torch.cos(torch.tensor(torch.pi * k / length))))
        for k in range(length)
    ]
    assert seen[::every] == pytest.approx(cosine, rel=1e-5)
    assert len(set(seen)) == length


def test_a_plateau_lowers_the_rate_after_validated_epochs():
    plateau = scheduler(
        f"{LR_SCHEDULER}.ReduceLROnPlateau", mode="max", patience=0, threshold=10.0, factor=0.1
    )

    seen = rates({"check_val_every_n_epoch": 2}, scheduler=plateau)

    # The first validation is the best so far; no later one improves by the threshold.
    assert seen == pytest.approx([0.05] * len(seen))
    assert rates(scheduler=plateau)[-1] == pytest.approx(0.05 * 0.1**2)


OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {"scheduler": scheduler(f"{LR_SCHEDULER}.OneCycleLR")},
        {"scheduler": scheduler(f"{LR_SCHEDULER}.StepLR", step_size=1)},
        {
            "scheduler": scheduler(
                f"{LR_SCHEDULER}.ReduceLROnPlateau", patience=0, threshold=10.0, factor=0.5
            )
        },
        {"scheduler": scheduler("timm.scheduler.CosineLRScheduler", warmup_t=1)},
        {"optimizer": optimizer("torch.optim.RMSprop", alpha=0.9)},
        {"optimizer": one_group},
        {"layer_decay": 0.75},
        {"frozen": ["stem", "stages.0"], "rdrop": 1.0},
        {"loss": focal, "rdrop": 1.0},
    ],
    ids=[
        "one_cycle",
        "step",
        "plateau",
        "timm",
        "optimizer",
        "own",
        "layer_decay",
        "frozen",
        "loss",
    ],
)


@OPTIONS
def test_a_resumed_run_ends_bit_identical(options, tmp_path):
    fit(classifier(**options), tmp_path / "whole")
    fit(classifier(**options), tmp_path / "half", max_epochs=2)

    fit(classifier(**options), tmp_path / "rest", resume=tmp_path / "half" / "last.ckpt")

    whole, resumed = state(tmp_path / "whole"), state(tmp_path / "rest")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


class SaveWithin(L.Callback):
    """Saves within the second epoch, as a signal does."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == BATCHES + 2:
            trainer.save_checkpoint(self.path)


@OPTIONS
def test_a_run_resumed_within_an_epoch_ends_bit_identical(options, tmp_path):
    within = tmp_path / "within.ckpt"
    fit(classifier(**options), tmp_path / "whole", SaveWithin(within))

    fit(classifier(**options), tmp_path / "rest", resume=within)

    whole, resumed = state(tmp_path / "whole"), state(tmp_path / "rest")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (f"{LR_SCHEDULER}.StepLR", {}, "missing a required argument: 'step_size'"),
        (f"{LR_SCHEDULER}.StepLR", {"gama": 1}, "its signature is StepLR"),
        ("builtins.id", {}, "returns int, not a torch.optim.lr_scheduler.LRScheduler"),
    ],
)
def test_a_schedule_that_cannot_be_made_is_an_error(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        classifier(scheduler=scheduler(name, **arguments)).configure_optimizers()


# Losses


def test_a_loss_takes_the_place_of_the_cross_entropy():
    module = classifier(loss=focal).eval()
    images, targets = torch.rand(4, 1, 8, 8), torch.arange(4)

    total = module.losses(images, targets, alpha=0.0).total

    torch.testing.assert_close(total, focal(module.net(images), targets), rtol=0, atol=0)


def test_rdrop_adds_its_divergence_to_the_mean_of_the_users_loss():
    first, second, targets = torch.randn(6, 5), torch.randn(6, 5), torch.arange(6) % 5

    found = rdrop_loss(first, second, targets, alpha=0.7, loss=focal)

    mean = (focal(first, targets) + focal(second, targets)) / 2
    torch.testing.assert_close(found.total, mean + 0.7 * symmetric_kl(first, second))
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1: is of the cross-entropy"):
        rdrop_loss(first, second, targets, alpha=0.7, loss=focal, label_smoothing=0.1)


def test_auxiliary_classifiers_take_the_users_loss():
    module = classifier(network(auxiliary_heads=True, dropout=0.0), loss=focal).eval()
    images, targets = torch.rand(4, 1, 8, 8), torch.arange(4)

    total = module.losses(images, targets, alpha=0.0).total

    features, auxiliary = module.net.forward_auxiliary(images)
    expected = focal(module.net.forward_head(features), targets)
    expected = expected + 0.1 * sum(focal(logits, targets) for logits in auxiliary)
    torch.testing.assert_close(total, expected)


def test_a_loss_gets_single_precision_under_autocast():
    dtypes = []

    def look(logits, targets):
        dtypes.append(logits.dtype)
        return F.cross_entropy(logits, targets)

    module = classifier(loss=look, rdrop=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module.losses(torch.rand(4, 1, 8, 8), torch.arange(4), alpha=1.0)
        module.criterion(torch.rand(4, 10).bfloat16(), torch.arange(4))

    assert dtypes == [torch.float32] * 3


def test_buffers_of_a_loss_move_with_the_module_and_stay_out_of_the_network():
    module = classifier(loss=build_loss(Part("loss._target_", f"{__name__}.Buffered", {})))

    module.double()

    assert module.loss.weights.dtype == torch.float64
    assert not any("weights" in key for key in module.net.state_dict())


def test_the_users_loss_is_logged_beside_the_cross_entropy(tmp_path):
    trainer = fit(classifier(loss=focal), tmp_path, log_every_n_steps=1)

    metrics = trainer.callback_metrics
    assert {"train/criterion", "val/criterion", "val/loss"} <= set(metrics)
    assert "train/cross_entropy" not in metrics
    assert metrics["val/criterion"] < metrics["val/loss"]  # focal weighs every term below 1


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (
            lambda logits, targets: F.cross_entropy(logits, targets, reduction="none"),
            r"a tensor of shape \(4,\)",
        ),
        (lambda logits, targets: 1.0, "float"),
        (lambda logits, targets: None, "None"),
        (lambda logits, targets: logits.detach().mean(), "a tensor without gradient"),
    ],
)
def test_a_loss_that_is_no_scalar_with_gradient_is_an_error(loss, got):
    part = Part("loss._target_", "mine.loss", {})

    with pytest.raises(ValueError, match=rf"^loss\._target_=mine\.loss: returns {got}, must"):
        check_loss(part, loss, network(), torch.rand(4, 1, 8, 8), torch.arange(4))


def test_the_check_of_a_loss_draws_no_random_number_and_keeps_modes():
    model = network()
    torch.manual_seed(1)
    expected = torch.rand(1)
    statistics = model.stem.branch_1x1.bn.running_mean.clone()

    torch.manual_seed(1)
    part = Part("loss._target_", "mine.loss", {})
    noisy = lambda logits, targets: (logits + torch.rand(1)).mean()  # noqa: E731
    check_loss(
        part, noisy, model, torch.rand(4, 1, 8, 8, generator=torch.Generator()), torch.arange(4)
    )

    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert torch.equal(model.stem.branch_1x1.bn.running_mean, statistics)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (f"{__name__}.Trained", {}, "has parameters, which the optimizer does not train"),
        ("torch.nn.GaussianNLLLoss", {}, "missing a required argument: 'var'"),
        ("torch.nn.MultiMarginLoss", {"margn": 1}, "did you mean margin?"),
        (f"{__name__}.focal", {"gama": 1}, "did you mean gamma?"),
    ],
)
def test_a_loss_that_cannot_be_made_is_an_error(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_loss(Part("loss._target_", name, arguments))


def test_an_argument_of_a_loss_may_be_an_object():
    weight = {"_target_": "torch.ones", "size": [10]}
    made = build_loss(Part("loss._target_", "torch.nn.CrossEntropyLoss", {"weight": weight}))

    assert torch.equal(made.weight, torch.ones(10))


def test_a_loss_that_diverges_stops_with_the_rate_of_the_users_schedule(tmp_path):
    halved = scheduler(f"{LR_SCHEDULER}.LinearLR", start_factor=0.5)
    module = classifier(loss=lambda logits, targets: logits.mean() * torch.nan, scheduler=halved)

    with pytest.raises(Diverged, match=r"at step 0, with a learning rate of 0\.025"):
        fit(module, tmp_path, StopOnDivergence())


def test_label_smoothing_with_a_loss_is_an_error():
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1: is of the cross-entropy, which"):
        classifier(loss=focal, label_smoothing=0.1)


# Layers


def test_the_layers_of_repvgg_are_the_stem_each_block_and_the_head():
    found = layers(network(auxiliary_heads=True))

    blocks = ["0.0", "1.0", "1.1", "2.0", "2.1", "3.0"]
    assert [name for name, _ in found] == ["stem", *(f"stages.{b}" for b in blocks), "linear"]


@pytest.mark.parametrize(
    ("build", "first", "last", "count"),
    [
        (lambda: torchvision.models.resnet18(), "conv1", "fc", 11),
        (lambda: torchvision.models.vit_b_16(), "conv_proj", "heads.head", 3),
        (lambda: timm.create_model("vit_tiny_patch16_224"), "patch_embed", "head", 15),
        (lambda: timm.create_model("resnet18"), "conv1", "fc", 11),
    ],
)
def test_the_layers_of_other_networks_hold_every_parameter_once(build, first, last, count):
    with torch.device("meta"):
        model = build()

    found = layers(model)

    held = [id(parameter) for _, parameters in found for parameter in parameters]
    assert sorted(held) == sorted(map(id, model.parameters()))
    assert (found[0][0], found[-1][0], len(found)) == (first, last, count)


def test_the_rate_falls_by_the_layer_from_the_head_to_the_stem():
    groups = parameter_groups(network(), 1e-4, lr=0.1, layer_decay=0.5)

    named = {group["name"]: group["lr"] for group in groups}
    assert named["linear/decay"] == named["linear/no_decay"] == 0.1
    assert named["stages.3.0/decay"] == 0.05
    assert named["stem/decay"] == pytest.approx(0.1 * 0.5**7)


def test_layer_decay_changes_rates_alone():
    plain, layered = network(), network()

    groups = parameter_groups(layered, 1e-4, lr=0.1, layer_decay=0.5)

    def decays(model: nn.Module, groups: list) -> list[float]:
        held = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        return [held[id(parameter)] for parameter in model.parameters()]

    assert decays(layered, groups) == decays(plain, parameter_groups(plain, 1e-4))


def test_the_schedule_multiplies_the_rate_of_every_layer(tmp_path):
    module = classifier(layer_decay=0.5)
    trainer = fit(module, tmp_path, max_steps=4, max_epochs=2)

    group = {group["name"]: group for group in trainer.optimizers[0].param_groups}
    factor = module.learning_rate_factor(4)
    assert group["linear/decay"]["lr"] == pytest.approx(0.05 * factor)
    assert group["stages.3.0/decay"]["lr"] == pytest.approx(0.025 * factor)


def test_a_resumed_run_takes_a_new_rate_in_every_layer(tmp_path):
    fit(classifier(layer_decay=0.5), tmp_path / "first", max_epochs=1)
    module = classifier(layer_decay=0.5, lr=0.01)

    last = tmp_path / "first" / "last.ckpt"
    trainer = fit(module, tmp_path / "second", max_epochs=2, resume=last)

    group = {group["name"]: group for group in trainer.optimizers[0].param_groups}
    factor = module.learning_rate_factor(2 * BATCHES)
    assert group["linear/decay"]["lr"] == pytest.approx(0.01 * factor)
    assert group["stages.3.0/decay"]["lr"] == pytest.approx(0.005 * factor)


def test_an_optimizer_may_make_its_own_groups_and_resumes_with_a_new_rate(tmp_path):
    fit(classifier(optimizer=one_group), tmp_path / "first", max_epochs=1)
    module = classifier(optimizer=one_group, lr=0.01)

    last = tmp_path / "first" / "last.ckpt"
    trainer = fit(module, tmp_path / "second", max_epochs=2, resume=last)

    (group,) = trainer.optimizers[0].param_groups
    assert group["lr"] == pytest.approx(0.02 * module.learning_rate_factor(2 * BATCHES))


@pytest.mark.parametrize("given", [0, -1, 1.5, "x", None])
def test_a_layer_decay_outside_its_range_is_an_error(given):
    with pytest.raises(ValueError, match="layer_decay="):
        classifier(layer_decay=given)


# Frozen modules

NETWORKS = {
    "plain": ({}, {}, []),
    "rdrop": ({}, {"rdrop": 1.0}, []),
    "branch_drop": ({"branch_drop": 0.2}, {"rdrop": 1.0}, [ReestimateBN(64)]),
    "ema": ({}, {"rdrop": 1.0}, [EMA(0.9)]),
    "auxiliary": ({"auxiliary_heads": True}, {}, []),
    "qarepvgg": ({"name": "qarepvgg_tiny"}, {}, []),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kind", NETWORKS)
def test_frozen_tensors_are_bit_identical_after_training(kind, layout, tmp_path):
    model, options, callbacks = NETWORKS[kind]
    module = classifier(network(**model), frozen=["stem", "stages.0"], **options)
    module.net.to(memory_format=layout)
    before = copy.deepcopy(module.net.state_dict())

    fit(module, tmp_path, *copy.deepcopy(callbacks))

    after = {key.removeprefix("net."): value for key, value in state(tmp_path).items()}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert not any(key.startswith(("stem.", "stages.0.")) for key in changed)
    assert any(key.startswith("stages.1.") for key in changed)
    assert "linear.weight" in changed


@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_blocks_of_other_kinds_stay(recompute, tmp_path):
    if recompute:
        model = network()
        for block in model.blocks():
            block.recompute = True
        frozen = ["stages.0"]
    else:
        resnet = {"library": "torchvision", "name": "resnet18", "over_parameterize": True}
        model = build_model({**resnet, "num_classes": 10, "in_channels": 1})
        frozen = ["conv1", "bn1", "layer1"]
    module = classifier(model, frozen=frozen)
    before = copy.deepcopy(model.state_dict())

    fit(module, tmp_path, max_epochs=1)

    prefixes = tuple(f"{name}." for name in frozen)
    kept = [key for key in before if key.startswith(prefixes)]
    assert kept
    assert all(torch.equal(before[key], model.state_dict()[key]) for key in kept)


def test_a_partly_frozen_network_is_folded(tmp_path):
    module = classifier(frozen=["stem", "stages.0"])
    fit(module, tmp_path, max_epochs=1)
    images = torch.rand(4, 1, 8, 8)

    model = module.net.eval()

    torch.testing.assert_close(switch_to_deploy(model)(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        (["stm"], "freeze=stm: there is no module of that name; did you mean stem?"),
        (["stages.9"], r"freeze=stages\.9: there is no module of that name; did you mean stages"),
        (["stem", "stages", "linear"], "freezes every parameter, so nothing trains"),
    ],
)
def test_what_cannot_be_frozen_is_an_error(prefixes, message):
    with pytest.raises(ValueError, match=message):
        freeze(network(), prefixes)


# Sections


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"_target_": None}, None),
        ({"_target_": "a.B", "_partial_": True, "x": 1}, Part("loss._target_", "a.B", {"x": 1})),
    ],
)
def test_a_section_names_one_part_or_none(given, expected):
    assert read_part("loss", given) == expected


def test_a_part_that_is_null_is_left_out():
    found = read_parts("callbacks", {"a": None, "b": {"_target_": "c.D"}})

    assert found == {"b": Part("callbacks.b._target_", "c.D", {})}


@pytest.mark.parametrize(
    ("held", "moved"),
    [
        ({"logger": False}, {"logger": {}}),
        ({"logger": True}, {}),
        ({"logger": None}, {}),
        ({"logger": {"_target_": "a.B"}}, {"logger": {"own": {"_target_": "a.B"}}}),
        ({"callbacks": {"a": {"_target_": "a.B"}}}, {"callbacks": {"a": {"_target_": "a.B"}}}),
        ({"callbacks": [{"_target_": "a.B"}]}, {"callbacks": {"own0": {"_target_": "a.B"}}}),
    ],
)
def test_loggers_and_callbacks_of_earlier_runs_are_found(held, moved):
    recorded = {"seed": 1, "trainer": {"max_epochs": 2, **held}}

    assert move_from_trainer(recorded) == {"seed": 1, "trainer": {"max_epochs": 2}, **moved}
