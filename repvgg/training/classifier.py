"""The Lightning module: a network that learns to classify, optionally with R-Drop.

R-Drop (Liang et al., 2021, arXiv:2106.14448) compares two predictions of each image that differ by
the network's stochastic layers; `repvgg.rdrop` makes both in one forward.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric, Metric

from repvgg import metrics
from repvgg.checks import check_integer, check_number, wrong_value
from repvgg.losses import Loss, at_least_float32, cross_entropy, rdrop_loss
from repvgg.rdrop import StochasticLayers, find_stochastic_layers, predict, predict_twice
from repvgg.training.groups import freeze, frozen_norms, parameter_groups
from repvgg.training.optimizers import (
    Groups,
    MakeOptimizer,
    MakeScheduler,
    follow_rates,
    for_lightning,
    step_on_plateau,
    step_scheduler,
)
from repvgg.training.settings import OPTIMIZERS

AUXILIARY_WEIGHT = 0.1  # of the loss of each auxiliary classifier, in the RepVGGplus recipe
NO_DIVERGENCE = 1e-9  # nats; below it two predictions differ by rounding alone

Batch = tuple[Tensor, Tensor]  # images (N, C, H, W) and targets, as in `repvgg.losses`


class Losses(NamedTuple):
    """What one training step computed. Scalars are means over the batch.

    Attributes:
        total: to be minimized: criterion + alpha * kl + auxiliary terms.
        criterion: the cross-entropy, or the user's loss; with two predictions the mean of both.
        kl: None with one prediction.
        logits: (N, K), of the first prediction.
        agreement: share of images on whose class the two predictions agree; None with one.
    """

    total: Tensor
    criterion: Tensor
    kl: Tensor | None
    logits: Tensor
    agreement: Tensor | None


class Classifier(L.LightningModule):
    """Trains a network with SGD or AdamW, warm-up and cosine decay.

    All arguments of plain values are hyper-parameters of the Lightning checkpoint. To build a
    module again, give the network too (and an optimizer, schedule or loss that is your own code):

        network = repvgg.checkpoint.load(path).model
        module = Classifier.load_from_checkpoint(path, network=network, weights_only=True)

    A checkpoint of version 0.1 needs `num_classes` as well.

    Args:
        network: images (N, C, H, W) -> logits (N, K).
        num_classes: K.
        lr: peak learning rate.
        optimizer: "sgd", with Nesterov's correction, "adamw", or a function that makes one from
            parameter groups, `lr` and `weight_decay`.
        momentum: of SGD; AdamW's first beta.
        weight_decay: see `parameter_groups`.
        num_steps: optimizer steps of the whole run; the rate ends at 0 after them.
        num_warmup_steps: of them, with a rate that grows linearly.
        rdrop: weight alpha of the KL divergence between two predictions; 0 is off.
        num_rdrop_warmup_steps: optimizer steps over which that weight grows linearly from 0.
        label_smoothing: in [0, 1).
        seed: of the stochastic layers; step k draws the same masks in every run, resumed or not.
        stochastic: where the network is stochastic; None finds it in the first step with R-Drop.
        scheduler: makes a schedule in place of warm-up and cosine decay.
        loss: in place of the cross-entropy: (logits (N, K), targets) -> mean over the batch. The
            targets are class indices (N,), or (N, K) with mixup or cutmix. Validation logs it
            beside the cross-entropy.
        layer_decay: see `groups.parameter_groups`; 1 is off.
        frozen: names of modules whose parameters and running statistics do not change.

    Attributes:
        net: the network.
        evaluated: what validation and test run in place of `net`; see
            `callbacks.DeployedValidation`.

    Raises:
        ValueError: a value is outside its range; or, in the first step, `rdrop` is above 0 and the
            network has no stochastic layer.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        num_classes: int,
        lr: float,
        optimizer: str | MakeOptimizer = "sgd",
        momentum: float,
        weight_decay: float,
        num_steps: int,
        num_warmup_steps: int,
        rdrop: float = 0.0,
        num_rdrop_warmup_steps: int = 0,
        label_smoothing: float = 0.0,
        seed: int = 0,
        stochastic: StochasticLayers | None = None,
        scheduler: MakeScheduler | None = None,
        loss: Loss | None = None,
        layer_decay: float = 1.0,
        frozen: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if isinstance(optimizer, str) and optimizer not in OPTIMIZERS:
            allowed = f"must be one of {', '.join(OPTIMIZERS)}"
            raise wrong_value("optimizer", optimizer, allowed, "sgd")
        self.num_classes = check_integer("num_classes", num_classes, minimum=2, example=10)
        self.lr = check_number("lr", lr, example=0.1)
        self.optimizer = optimizer
        self.momentum = check_number("momentum", momentum, below=1, example=0.9)
        self.weight_decay = check_number("weight_decay", weight_decay, example=1e-4)
        self.num_steps = int(num_steps)
        self.num_warmup_steps = int(num_warmup_steps)
        self.rdrop = check_number("rdrop", rdrop, example=1)
        self.num_rdrop_warmup_steps = int(num_rdrop_warmup_steps)
        self.label_smoothing = check_number(
            "label_smoothing", label_smoothing, below=1, example=0.1
        )
        self.seed = check_integer("seed", seed, minimum=0, example=0)
        self.layer_decay = check_number("layer_decay", layer_decay, example=0.75)
        if not 0 < self.layer_decay <= 1:
            allowed = "must be a number above 0 and at most 1"
            raise wrong_value("layer_decay", layer_decay, allowed, 0.75)
        if loss is not None and self.label_smoothing:
            allowed = "is of the cross-entropy, which loss replaces"
            raise wrong_value("label_smoothing", label_smoothing, allowed, 0)
        self.frozen = [*frozen]
        self.save_hyperparameters(  # as checked: numpy's numbers would not load as weights only
            {
                "num_classes": self.num_classes,
                "lr": self.lr,
                **({"optimizer": optimizer} if isinstance(optimizer, str) else {}),
                "momentum": self.momentum,
                "weight_decay": self.weight_decay,
                "num_steps": self.num_steps,
                "num_warmup_steps": self.num_warmup_steps,
                "rdrop": self.rdrop,
                "num_rdrop_warmup_steps": self.num_rdrop_warmup_steps,
                "label_smoothing": self.label_smoothing,
                "seed": self.seed,
                "layer_decay": self.layer_decay,
                "frozen": self.frozen,
            },
            logger=False,
        )
        freeze(network, self.frozen)
        self.net = network
        self.scheduler = scheduler
        self.loss = loss  # a module moves with this one
        self.stochastic = stochastic
        self.evaluated: Callable[[Tensor], Tensor] | None = None
        self._divergence: Tensor | None = None  # the largest of the epoch
        self.evaluation = nn.ModuleDict(
            {stage: metrics.classification(num_classes) for stage in ("val", "test")}
        )
        if loss is not None:
            for measured in self.evaluation.values():
                cast(nn.ModuleDict, measured)["criterion"] = MeanMetric(nan_strategy="disable")

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.net(images))

    def on_train_start(self) -> None:
        self.on_train_epoch_start()  # which is not called where a run resumes within an epoch

    def on_train_epoch_start(self) -> None:
        for norm in frozen_norms(self.net, self.frozen):  # after whatever switched modes
            norm.eval()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Masks are a function of (seed, epoch, batch), so no random state needs to be saved. The
        # word keeps them apart from the augmentation, a function of the same numbers. Each device
        # draws what one device would draw for this batch of the epoch.
        number = batch_idx * self.trainer.world_size + self.trainer.global_rank
        position = ("dropout", self.seed, self.current_epoch, number)
        torch.manual_seed(zlib.crc32(repr(position).encode()))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        alpha = self.rdrop * self.rdrop_factor(self.trainer.global_step)
        losses = self.losses(*batch, alpha=alpha)
        if losses.kl is not None:
            kl = losses.kl.detach()
            self._divergence = kl if self._divergence is None else self._divergence.maximum(kl)
        # What is logged in other steps Lightning drops, and it costs half a millisecond a value.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.trainer.global_step + 1) % every == 0:
            self._log(losses, batch[1], alpha)
        return losses.total * self._share_of_window(batch_idx)

    def losses(self, images: Tensor, targets: Tensor, *, alpha: float) -> Losses:
        """Compute what a training step minimizes, in one forward.

        Args:
            images: (N, C, H, W).
            targets: as in `repvgg.losses.cross_entropy`.
            alpha: weight of the KL divergence.

        Raises:
            ValueError: targets do not fit, or `rdrop` is above 0 and no layer is stochastic.
        """
        kl = agreement = None
        if self.rdrop == 0:
            logits, auxiliary = predict(self.net, images)
            total = mean = self.criterion(logits, targets)
        else:
            if self.stochastic is None:
                self.stochastic = find_stochastic_layers(self.net, images)
            logits, second, auxiliary = predict_twice(self.net, images, stochastic=self.stochastic)
            total, mean, kl = rdrop_loss(
                logits,
                second,
                targets,
                alpha=alpha,
                label_smoothing=self.label_smoothing,
                loss=self.loss,
            )
            agreement = (logits.argmax(1) == second.argmax(1)).float().mean()
        for extra in auxiliary:
            for part in torch.split(extra, len(targets)):
                share = AUXILIARY_WEIGHT * len(part) / len(extra)
                total = total + share * self.criterion(part, targets)
        return Losses(total, mean, kl, logits, agreement)

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        """What one prediction is trained with: the cross-entropy, or the user's loss."""
        if self.loss is None:
            return cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        return self.loss(at_least_float32(logits), targets)

    def on_train_epoch_end(self) -> None:
        if self.scheduler is not None:
            step_on_plateau(self.lr_schedulers(), self.trainer)
        if self.rdrop > 0 and self._divergence is not None and self._divergence < NO_DIVERGENCE:
            rank_zero_warn(
                f"train/kl was 0 in epoch {self.current_epoch}: the two predictions of an image do "
                "not differ, so R-Drop does nothing; look at model.dropout and the classifier"
            )
        self._divergence = None

    def on_validation_epoch_start(self) -> None:
        if self.trainer.world_size > 1:
            # Each device has its own BatchNorm statistics; those of the first are saved.
            for buffer in self.net.buffers():
                torch.distributed.broadcast(buffer, 0)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        return self._evaluate("val", batch)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.make_optimizer()
        if self.scheduler is None:
            # A pure function of the step: a run resumed with more epochs follows the new curve.
            schedule = LambdaLR(optimizer, self.learning_rate_factor)
            return for_lightning(optimizer, schedule, "step")
        return for_lightning(optimizer, self.scheduler.make(optimizer), self.scheduler.interval)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of this module's parameters."""
        groups = self.parameter_groups()
        if not isinstance(self.optimizer, str):
            return self.optimizer(groups, lr=self.lr, weight_decay=self.weight_decay)
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.lr, betas=(self.momentum, 0.999))
        return torch.optim.SGD(
            groups, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0
        )

    def parameter_groups(self) -> Groups:
        """What the optimizer trains; see `groups.parameter_groups`."""
        return parameter_groups(
            self.net, self.weight_decay, lr=self.lr, layer_decay=self.layer_decay
        )

    def lr_scheduler_step(self, scheduler: Any, metric: object) -> None:
        by_step = self.scheduler is None or self.scheduler.interval == "step"
        step_scheduler(scheduler, self.trainer.global_step if by_step else None, self.current_epoch)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume with the rate and the decay of this run, which may differ from the saved ones.

        The user's own schedule continues as it was saved.
        """
        step = checkpoint["global_step"]
        factor = self.learning_rate_factor(step) if self.scheduler is None else None
        follow_rates(checkpoint, self.parameter_groups(), self.lr, factor)

    def learning_rate(self, step: int) -> float:
        """The highest rate of an optimizer step; with the user's own schedule, of now."""
        if self.scheduler is None:
            return self.lr * self.learning_rate_factor(step)
        return max(float(group["lr"]) for group in self.trainer.optimizers[0].param_groups)

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

    def _log(self, losses: Losses, targets: Tensor, alpha: float) -> None:
        criterion = "cross_entropy" if self.loss is None else "criterion"
        values = {
            "loss": losses.total,
            criterion: losses.criterion,
            "accuracy": (losses.logits.argmax(1) == _classes(targets)).float().mean(),
        }
        if losses.kl is not None and losses.agreement is not None:
            values |= {
                "kl": losses.kl,
                f"kl_to_{criterion}": losses.kl / losses.criterion,
                "agreement": losses.agreement,
            }
            self.log("train/alpha", alpha)
        for name, value in values.items():  # means over the devices
            self.log(f"train/{name}", value, prog_bar=name == "loss", sync_dist=True)
        rates = [group["lr"] for group in self.trainer.optimizers[0].param_groups]
        self.log("train/learning_rate", max(rates))  # of the last layer

    def _evaluate(self, stage: str, batch: Batch) -> Tensor | None:
        """The logits (N, K), which callbacks read."""
        images, targets = batch
        if len(targets) == 0:  # the batch of a device that has no images
            return None
        logits = (self.evaluated or self.net)(images)
        measured = self.measured(stage)
        metrics.update(measured, logits, targets)
        if "criterion" in measured:
            measured["criterion"].update(self.criterion(logits, targets), len(targets))
        return logits

    def _log_evaluation(self, stage: str) -> None:
        # Once an epoch and on every device: computing a metric waits for the other devices.
        for name, metric in self.measured(stage).items():
            self.log(f"{stage}/{name}", metric, prog_bar=name == "accuracy", batch_size=1)

    def measured(self, stage: str) -> dict[str, Metric]:
        """What validation ("val") or test measures, by name."""
        return metrics.named(cast(nn.ModuleDict, self.evaluation[stage]))


def _classes(targets: Tensor) -> Tensor:
    """(N,), int64; of a mixture, the class with the largest share."""
    return targets.argmax(1) if targets.ndim == 2 else targets
