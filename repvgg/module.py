"""The Lightning module: a RepVGG that learns to classify, optionally with R-Drop.

R-Drop (Liang et al., 2021, arXiv:2106.14448) wants two predictions under different noise. All
noise of RepVGG is the dropout in front of the classifier, so the trunk runs once and the head
twice: loss and gradients are those of two full passes, at about the price of one.
"""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from repvgg.arguments import check_integer, check_number, refusal
from repvgg.block import RepVGGBlock
from repvgg.losses import rdrop_loss
from repvgg.zoo import create_model

AUXILIARY_WEIGHT = 0.1  # of each auxiliary cross-entropy, in the RepVGGplus recipe


class Classifier(L.LightningModule):
    """Trains a network of the family with SGD, warm-up and cosine decay.

    Args:
        model: arguments of `create_model`, `name` among them.
        lr: peak learning rate.
        momentum: of SGD, with Nesterov's correction.
        weight_decay: see `parameter_groups`.
        num_steps: optimizer steps of the whole run; the rate ends at 0 after them.
        num_warmup_steps: of them, with a rate that grows linearly.
        rdrop: weight alpha of the KL divergence between two predictions; 0 or False is off, True
            is 1. Needs model.dropout above 0, else the predictions are equal.
        label_smoothing: in [0, 1).
        seed: of the noise; step k draws the same masks in every run, resumed or not.

    Raises:
        ValueError: a value is outside its range, or `rdrop` has no noise to work on.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        num_steps: int,
        num_warmup_steps: int,
        rdrop: float = 0.0,
        label_smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.lr = check_number("optim.lr", lr, example=0.1)
        self.momentum = check_number("optim.momentum", momentum, below=1, example=0.9)
        self.weight_decay = check_number("optim.weight_decay", weight_decay, example=1e-4)
        self.num_steps = num_steps
        self.num_warmup_steps = num_warmup_steps
        self.rdrop = check_number("rdrop", _as_number(rdrop), example=1)
        self.label_smoothing = check_number(
            "label_smoothing", label_smoothing, below=1, example=0.1
        )
        self.seed = check_integer("seed", seed, minimum=0, example=0)
        self.net = create_model(**model)
        if self.rdrop > 0 and self.net.dropout.p == 0:
            raise refusal(
                "model.dropout",
                self.net.dropout.p,
                f"rdrop={self.rdrop:g} compares two predictions that differ by dropout alone, "
                "so dropout must be above 0 (or set rdrop=false)",
                0.2,
            )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Noise is a function of (seed, epoch, batch), so nothing of it needs to be saved.
        # The word keeps it apart from the noise of the data, a function of the same numbers.
        position = ("dropout", self.seed, self.current_epoch, batch_idx)
        torch.manual_seed(zlib.crc32(repr(position).encode()))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        features, auxiliary = self.net.forward_auxiliary(images)
        logits = self.net.forward_head(features)
        if self.rdrop > 0:
            loss, cross_entropy, kl = rdrop_loss(
                logits,
                self.net.forward_head(features),
                targets,
                alpha=self.rdrop,
                label_smoothing=self.label_smoothing,
            )
            self.log("train/kl", kl)
        else:
            loss = cross_entropy = self._cross_entropy(logits, targets)
        for extra in auxiliary:
            loss = loss + AUXILIARY_WEIGHT * self._cross_entropy(extra, targets)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/cross_entropy", cross_entropy)
        self.log("train/accuracy", _accuracy(logits, targets))
        self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.SGD(
            parameter_groups(self.net, self.weight_decay),
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.momentum > 0,
        )
        # A pure function of the step: a run resumed with more epochs follows the new curve.
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def learning_rate_factor(self, step: int) -> float:
        """Share of the peak rate at a step: linear warm-up, then half a cosine down to 0."""
        if step < self.num_warmup_steps:
            return (step + 1) / self.num_warmup_steps
        rest = max(1, self.num_steps - self.num_warmup_steps)
        progress = min(1.0, (step - self.num_warmup_steps) / rest)
        return (1 + math.cos(math.pi * progress)) / 2

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        images, targets = batch
        logits = self.net(images)
        size = len(targets)
        self.log(f"{stage}/loss", F.cross_entropy(logits, targets), batch_size=size)
        self.log(
            f"{stage}/accuracy",
            _accuracy(logits, targets),
            batch_size=size,
            prog_bar=True,
        )


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


def _as_number(rdrop: object) -> object:
    """`rdrop=true` and `rdrop=false` are 1 and 0; anything else is checked as it is."""
    return float(rdrop) if isinstance(rdrop, bool) else rdrop


def _accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(1) == targets).float().mean()
