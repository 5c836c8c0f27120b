"""Stops a run whose loss, weights or statistics are NaN or infinite, before they are saved."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from repvgg.training.classifier import Classifier

NEVER = torch.iinfo(torch.int64).max


class Diverged(ValueError):  # noqa: N818 - as torch and the field call it
    """The loss, a weight or a running statistic is NaN or infinite.

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


class StopOnDivergence(Callback):
    """Raises `Diverged` on a loss that is NaN or infinite, and before such weights are saved.

    No file with such weights or running statistics could be loaded.

    One process on a CPU checks every step. On a GPU a check would wait for the step, and several
    devices must stop together. There the first bad step is noted, and checked when metrics are
    logged and at the end of the epoch.

    Raises, while a `Classifier` trains:
        Diverged: the weights of that step are lost; no checkpoint holds them.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None  # bad step, on the device

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        assert isinstance(pl_module, Classifier)
        step = trainer.global_step
        bad = ~torch.isfinite(loss.detach())
        if loss.device.type == "cpu" and trainer.world_size == 1:
            if bad:
                raise Diverged(step, pl_module.learning_rate(step), "the loss")
            return
        if self._first is None:
            self._first = torch.full((), NEVER, device=loss.device)
        self._first = torch.where(bad, self._first.clamp(max=step), self._first)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (step + 1) % every == 0:
            self._check(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        self._check(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        assert isinstance(pl_module, Classifier)
        net, step = pl_module.net, trainer.global_step
        for what, tensors in (("a weight", net.parameters()), ("a statistic", net.buffers())):
            if not all(torch.isfinite(tensor).all() for tensor in tensors):
                raise Diverged(step, pl_module.learning_rate(step), what)

    def _check(self, trainer: L.Trainer, pl_module: Classifier) -> None:
        if self._first is None:
            return
        step = int(trainer.strategy.reduce(self._first.clone(), reduce_op="min"))
        if step < NEVER:
            raise Diverged(step, pl_module.learning_rate(step), "the loss")
