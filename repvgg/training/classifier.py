"""The Lightning module: a network that learns to classify, optionally with R-Drop.

R-Drop (Liang et al., 2021, arXiv:2106.14448) wants two predictions under different noise;
`repvgg.rdrop` makes them in one forward.
"""

import contextlib
import math
import zlib
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassCalibrationError

from repvgg.checks import check_integer, check_number, refusal
from repvgg.losses import cross_entropy, rdrop_loss
from repvgg.models.block import RepVGGBlock
from repvgg.models.forms import switch_to_deploy
from repvgg.models.registry import build_model
from repvgg.rdrop import Noise, find_noise, predict, predict_twice
from repvgg.training.metrics import ImageMean

AUXILIARY_WEIGHT = 0.1  # of each auxiliary cross-entropy, in the RepVGGplus recipe
NOISE_KEYS = ("dropout", "branch_drop", "drop_path")  # of a model
OPTIMIZERS = ("sgd", "adamw")
NO_DIVERGENCE = 1e-9  # nats; below it two predictions differ by rounding alone


class Losses(NamedTuple):
    """What one training step computed. Scalars are means over the batch.

    Attributes:
        total: to be minimized: cross_entropy + alpha * kl + auxiliary terms.
        cross_entropy: mean of both predictions'.
        kl: None with one prediction.
        logits: (N, K), of the first prediction.
        agreement: share of images on whose class the two predictions agree; None with one.
    """

    total: Tensor
    cross_entropy: Tensor
    kl: Tensor | None
    logits: Tensor
    agreement: Tensor | None


class Diverged(ValueError):  # noqa: N818 - as torch and the field call it
    """The loss or a weight is no finite number any more.

    Attributes:
        step: the optimizer step at which it was found.
    """

    def __init__(self, step: int, rate: float, what: str) -> None:
        super().__init__(
            f"{what} is NaN or infinite at step {step}, with a learning rate of {rate:.3g}"
        )
        self.step = step
        self._arguments = step, rate, what

    def __reduce__(self) -> tuple[type, tuple[int, float, str]]:
        return type(self), self._arguments  # exceptions are pickled by their message otherwise


class Classifier(L.LightningModule):
    """Trains a network with SGD or AdamW, warm-up and cosine decay.

    Args:
        model: arguments of `repvgg.models.registry.build_model`, `name` among them.
        lr: peak learning rate.
        optimizer: "sgd", with Nesterov's correction, or "adamw".
        momentum: of SGD; AdamW's first beta.
        weight_decay: see `parameter_groups`.
        num_steps: optimizer steps of the whole run; the rate ends at 0 after them.
        num_warmup_steps: of them, with a rate that grows linearly.
        rdrop: weight alpha of the KL divergence between two predictions; 0 or False is off, True
            is 1. Needs noise, else the predictions are equal: model.dropout (the trunk runs once),
            model.branch_drop or model.drop_path (every image is taken twice).
        num_rdrop_warmup_steps: optimizer steps over which the weight grows linearly from 0.
        label_smoothing: in [0, 1).
        seed: of the noise; step k draws the same masks in every run, resumed or not.
        deployed_validation: validate and test a folded copy of the network: what will be deployed.

    `Classifier.load_from_checkpoint(path)` builds it again, if the arguments are numbers, strings,
    lists and dictionaries.

    Batches are (images, targets), with targets as in `repvgg.losses.cross_entropy`.

    Attributes:
        noise: where the network is random in training; None is asked in the first step.

    Raises:
        ValueError: a value is outside its range, or `rdrop` has no noise to work on.
        Diverged: while it trains; the weights of that step are lost, no checkpoint holds them.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        *,
        lr: float,
        optimizer: str = "sgd",
        momentum: float,
        weight_decay: float,
        num_steps: int,
        num_warmup_steps: int,
        rdrop: float = 0.0,
        num_rdrop_warmup_steps: int = 0,
        label_smoothing: float = 0.0,
        seed: int = 0,
        deployed_validation: bool = False,
    ) -> None:
        super().__init__()
        if optimizer not in OPTIMIZERS:
            allowed = f"must be one of {', '.join(OPTIMIZERS)}"
            raise refusal("optim.name", optimizer, allowed, "sgd")
        if not isinstance(deployed_validation, bool):
            allowed = "must be true or false"
            raise refusal("deployed_validation", deployed_validation, allowed, "true")
        self.optimizer = optimizer
        self.deployed_validation = deployed_validation
        self._twin: list[nn.Module] = []  # the folded copy; in a list, so that it is no submodule
        self._diverged_at: Tensor | None = None  # first bad step, where looking at once is dear
        self.lr = check_number("optim.lr", lr, example=0.1)
        self.momentum = check_number("optim.momentum", momentum, below=1, example=0.9)
        self.weight_decay = check_number("optim.weight_decay", weight_decay, example=1e-4)
        self.num_steps = num_steps
        self.num_warmup_steps = num_warmup_steps
        self.rdrop = check_number("rdrop", _as_number(rdrop), example=1)
        self.num_rdrop_warmup_steps = num_rdrop_warmup_steps
        self.label_smoothing = check_number(
            "label_smoothing", label_smoothing, below=1, example=0.1
        )
        self.seed = check_integer("seed", seed, minimum=0, example=0)
        self.net = build_model(**model)
        if deployed_validation and not any(
            hasattr(module, "switch_to_deploy") for module in self.net.modules()
        ):
            allowed = f"{model.get('name')} has nothing to fold while it trains"
            raise refusal("deployed_validation", deployed_validation, allowed, "false")
        ours = model.get("library", "repvgg") == "repvgg"  # others are asked in the first step
        silent = ours and not any(model.get(key, 0) for key in NOISE_KEYS)
        if self.rdrop > 0 and silent:
            raise refusal(
                "model.dropout",
                model.get("dropout", 0.0),
                f"rdrop={self.rdrop:g} compares two predictions that differ by noise alone, so "
                f"one of model.{', model.'.join(NOISE_KEYS)} must be above 0 (or set rdrop=false)",
                0.2,
            )
        arguments = {
            "model": model,
            "lr": lr,
            "optimizer": optimizer,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "num_steps": num_steps,
            "num_warmup_steps": num_warmup_steps,
            "rdrop": rdrop,
            "num_rdrop_warmup_steps": num_rdrop_warmup_steps,
            "label_smoothing": label_smoothing,
            "seed": seed,
            "deployed_validation": deployed_validation,
        }
        with contextlib.suppress(TypeError):  # an argument that is not plain
            self.save_hyperparameters(_plain(arguments), logger=False)
        self.noise: Noise | None = None
        self._divergence: Tensor | None = None  # the largest of the epoch
        num_classes = check_integer(
            "model.num_classes", model.get("num_classes", 1000), minimum=2, example=10
        )
        self.evaluation = nn.ModuleDict(
            {
                stage: nn.ModuleDict(
                    {
                        "loss": ImageMean(),
                        "accuracy": ImageMean(),
                        "calibration_error": MulticlassCalibrationError(num_classes, n_bins=15),
                    }
                )
                for stage in ("val", "test")
            }
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Noise is a function of (seed, epoch, batch), so nothing of it needs to be saved.
        # The word keeps it apart from the noise of the data, a function of the same numbers. Each
        # device draws what one device would draw for this batch of the epoch.
        number = batch_idx * self.trainer.world_size + self.trainer.global_rank
        position = ("dropout", self.seed, self.current_epoch, number)
        torch.manual_seed(zlib.crc32(repr(position).encode()))

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        alpha = self.rdrop * self.rdrop_factor(self.trainer.global_step)
        losses = self.losses(*batch, alpha=alpha)
        self._watch(losses.total.detach())
        if losses.kl is not None:
            kl = losses.kl.detach()
            self._divergence = kl if self._divergence is None else self._divergence.maximum(kl)
        # What is logged in other steps Lightning drops, and it costs half a millisecond a value.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.trainer.global_step + 1) % every == 0:
            self._check_watch()
            self._log(losses, batch[1], alpha)
        return losses.total * self._share_of_window(batch_idx)

    def _log(self, losses: Losses, targets: Tensor, alpha: float) -> None:
        values = {
            "loss": losses.total,
            "cross_entropy": losses.cross_entropy,
            "accuracy": _hits(losses.logits, targets).mean(),
        }
        if losses.kl is not None and losses.agreement is not None:
            values |= {
                "kl": losses.kl,
                "kl_to_cross_entropy": losses.kl / losses.cross_entropy,
                "agreement": losses.agreement,
            }
            self.log("train/alpha", alpha)
        for name, value in values.items():  # means over the devices
            self.log(f"train/{name}", value, prog_bar=name == "loss", sync_dist=True)
        self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])

    def _watch(self, loss: Tensor) -> None:
        """Stop on a loss that is no number, or note it where looking at once would stall.

        On a GPU looking waits for the step; of several devices all must stop together, and the
        gradients carry a NaN from one to all.
        """
        bad = ~torch.isfinite(loss)
        step = self.trainer.global_step
        if loss.device.type == "cpu" and self.trainer.world_size == 1:
            if bad:
                raise Diverged(step, self.lr * self.learning_rate_factor(step), "the loss")
            return
        if self._diverged_at is None:
            self._diverged_at = torch.full((), torch.iinfo(torch.int64).max, device=loss.device)
        self._diverged_at = torch.where(bad, self._diverged_at.clamp(max=step), self._diverged_at)

    def _check_watch(self) -> None:
        if self._diverged_at is None:
            return
        never = torch.iinfo(torch.int64).max
        step = int(self.trainer.strategy.reduce(self._diverged_at.clone(), reduce_op="min"))
        if step < never:
            raise Diverged(step, self.lr * self.learning_rate_factor(step), "the loss")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let no weights that are no numbers replace a checkpoint that is good."""
        if not all(torch.isfinite(parameter).all() for parameter in self.net.parameters()):
            step = self.trainer.global_step
            raise Diverged(step, self.lr * self.learning_rate_factor(step), "a weight")

    def losses(self, images: Tensor, targets: Tensor, *, alpha: float) -> Losses:
        """Compute what a training step minimizes, in one forward.

        Args:
            images: (N, C, H, W).
            targets: as in `repvgg.losses.cross_entropy`.
            alpha: weight of the KL divergence.

        Raises:
            ValueError: the targets do not fit, or `rdrop` finds no noise in the network.
        """
        smoothing = self.label_smoothing
        kl = agreement = None
        if self.rdrop == 0:
            logits, auxiliary = predict(self.net, images)
            total = mean = cross_entropy(logits, targets, label_smoothing=smoothing)
        else:
            if self.noise is None:
                self.noise = find_noise(self.net, images)
            logits, second, auxiliary = predict_twice(self.net, images, noise=self.noise)
            total, mean, kl = rdrop_loss(
                logits, second, targets, alpha=alpha, label_smoothing=smoothing
            )
            agreement = (logits.argmax(1) == second.argmax(1)).float().mean()
        for extra in auxiliary:
            for part in extra.split(len(targets)):
                share = AUXILIARY_WEIGHT * len(part) / len(extra)
                term = cross_entropy(part, targets, label_smoothing=smoothing)
                total = total + share * term
        return Losses(total, mean, kl, logits, agreement)

    def on_train_epoch_end(self) -> None:
        self._check_watch()
        if self.rdrop > 0 and self._divergence is not None and self._divergence < NO_DIVERGENCE:
            rank_zero_warn(
                f"train/kl was 0 in epoch {self.current_epoch}: the two predictions of an image do "
                "not differ, so R-Drop does nothing; look at model.dropout and the classifier"
            )
        self._divergence = None

    def on_validation_epoch_start(self) -> None:
        if self.trainer.world_size > 1:
            # Devices have statistics of their own; what is saved are those of the first.
            for buffer in self.net.buffers():
                torch.distributed.broadcast(buffer, 0)
        if self.deployed_validation:
            self._twin = [switch_to_deploy(self.net)]

    def on_validation_epoch_end(self) -> None:
        self._twin = []
        self._log_evaluation("val")

    def on_test_epoch_start(self) -> None:
        if self.deployed_validation:
            self._twin = [switch_to_deploy(self.net)]

    def on_test_epoch_end(self) -> None:
        self._twin = []
        self._log_evaluation("test")

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        groups = parameter_groups(self.net, self.weight_decay)
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adamw":
            optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(self.momentum, 0.999))
        else:
            optimizer = torch.optim.SGD(
                groups, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0
            )
        # A pure function of the step: a run resumed with more epochs follows the new curve.
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the rate and the decay of this run, which may be others than were saved."""
        rate = self.lr * self.learning_rate_factor(checkpoint["global_step"])
        decays = {
            group["name"]: group["weight_decay"]
            for group in parameter_groups(self.net, self.weight_decay)
        }
        for optimizer in checkpoint.get("optimizer_states", ()):
            for group in optimizer["param_groups"]:
                group["lr"], group["initial_lr"] = rate, self.lr
                group["weight_decay"] = decays[group["name"]]
        for schedule in checkpoint.get("lr_schedulers", ()):
            schedule["base_lrs"] = [self.lr for _ in schedule["base_lrs"]]

    def learning_rate_factor(self, step: int) -> float:
        """Share of the peak rate at a step: linear warm-up, then half a cosine down to 0."""
        if step < self.num_warmup_steps:
            return (step + 1) / self.num_warmup_steps
        rest = max(1, self.num_steps - self.num_warmup_steps)
        progress = min(1.0, (step - self.num_warmup_steps) / rest)
        return (1 + math.cos(math.pi * progress)) / 2

    def rdrop_factor(self, step: int) -> float:
        """Share of alpha at an optimizer step: linear warm-up."""
        return min(1.0, (step + 1) / max(1, self.num_rdrop_warmup_steps))

    def _share_of_window(self, batch_idx: int) -> float:
        """Corrects for the last window of accumulated gradients in an epoch, if it is short.

        Lightning divides every loss by `accumulate_grad_batches`; in a shorter window that is not
        the number of batches.
        """
        length = self.trainer.accumulate_grad_batches
        rest = self.trainer.num_training_batches % length
        short = rest > 0 and batch_idx >= self.trainer.num_training_batches - rest
        return length / rest if short else 1.0

    def _evaluate(self, stage: str, batch: tuple[Tensor, ...]) -> None:
        images, targets = batch[:2]
        if len(targets) == 0:  # the batch of a device that has no images
            return
        (network,) = self._twin or [self.net]
        logits = network(images)
        metrics = self._metrics(stage)
        metrics["loss"].update(F.cross_entropy(logits, targets, reduction="none"))
        metrics["accuracy"].update(_hits(logits, targets))
        metrics["calibration_error"].update(logits.softmax(1), _classes(targets))

    def _log_evaluation(self, stage: str) -> None:
        # Once an epoch and on every device: computing a metric waits for the other devices.
        for name, metric in self._metrics(stage).items():
            self.log(f"{stage}/{name}", metric, prog_bar=name == "accuracy", batch_size=1)

    def _metrics(self, stage: str) -> dict[str, Metric]:
        return dict(cast(nn.ModuleDict, self.evaluation[stage]).items())  # type: ignore[arg-type]


def parameter_groups(net: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into those that decay and those that do not, as the RepVGG recipe does.

    Kernels, linear weights and the weights of the identity branches' BatchNorms decay; biases and
    the weights of all other BatchNorms do not.

    Returns:
        two parameter groups for an optimizer, "decay" and "no_decay".
    """
    identity_weights = {
        id(module.branch_identity.weight)
        for module in net.modules()
        if isinstance(module, RepVGGBlock) and isinstance(module.branch_identity, nn.BatchNorm2d)
    }
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for parameter in net.parameters():
        decays = parameter.ndim > 1 or id(parameter) in identity_weights
        (decay if decays else no_decay).append(parameter)
    return [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
    ]


def _plain(value: Any) -> Any:
    """A copy, of dictionaries, lists and plain values that load with `weights_only=True`.

    Raises:
        TypeError: something else is among them.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, str):
        return str(value)
    raise TypeError(f"{value!r} is not a plain value")


def _as_number(rdrop: object) -> object:
    """`rdrop=true` and `rdrop=false` are 1 and 0; anything else is checked as it is."""
    return float(rdrop) if isinstance(rdrop, bool) else rdrop


def _classes(targets: Tensor) -> Tensor:
    """(N,), int64; of a mixture, the class with the largest share."""
    return targets.argmax(1) if targets.ndim == 2 else targets


def _hits(logits: Tensor, targets: Tensor) -> Tensor:
    """(N,), float32: 1 where the class was found, else 0."""
    return (logits.argmax(1) == _classes(targets)).float()
