"""What happens around the training loop: averaging, interruption, statistics, throughput."""

import copy
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    Callback,
    ProgressBar,
    WeightAveraging,
)
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader

from repvgg import signals
from repvgg.data.batches import WorkersDied
from repvgg.models.forms import reestimate_bn
from repvgg.signals import Interrupted

ASKED_EVERY = 8  # batches, where there are several devices: whether one of them was sent a signal
AGAIN_AFTER = 0.5  # seconds


class EMA(WeightAveraging):
    """Keeps an exponential moving average of the weights and the statistics of BatchNorm.

    Validated and saved as the network is the average (Tarvainen and Valpola, 2017,
    arXiv:1703.01780); what trains is saved beside it. In update k the decay is min(decay,
    (1 + k) / (10 + k)), so that the first weights are soon forgotten.

    Args:
        decay: of the average, in (0, 1).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        super().__init__(multi_avg_fn=self._update)  # a method, since a closure cannot be pickled

    def _update(self, averages: list[Tensor], currents: list[Tensor], _: Tensor) -> None:
        if not averages[0].is_floating_point():  # how many batches BatchNorm has seen
            torch._foreach_copy_(averages, currents)
            return
        k = self._latest_update_step  # of updates so far, one a step
        torch._foreach_lerp_(averages, currents, 1 - min(self.decay, (1 + k) / (10 + k)))

    def network(self) -> Any:
        """The network with the averaged weights."""
        assert self._average_model is not None
        return self._average_model.module.net

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Whoever does not go on training wants the average, which lies where weights always lie.
        if trainer.state.fn == "fit":
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


def network_to_keep(trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
    """What is validated, saved and deployed: the average where there is one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EMA) and trainer.state.fn == "fit":
            return callback.network()
    return pl_module.net


class SelfDescribing(Callback):
    """Adds to every checkpoint the entry that makes it self-describing.

    Args:
        key: of the entry.
        describe: makes the entry from the network; without it there is none. A function that can be
            pickled, if the trainer spawns its processes.
    """

    def __init__(
        self, key: str, describe: Callable[[torch.nn.Module], dict[str, Any]] | None = None
    ) -> None:
        self.key = key
        self.describe = describe

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.describe is not None:
            checkpoint[self.key] = self.describe(network_to_keep(trainer, pl_module))


class SaveOnSignal(Callback):
    """On a signal, finishes the step, saves `last.ckpt` and raises `Interrupted`.

    The signals are Ctrl-C, SIGTERM, SIGHUP (unless it is ignored, as under nohup) and SIGUSR1. A
    step ends with the optimizer's, so a signal waits for the gradients that are accumulated; in the
    last step of an epoch it waits for validation and the epoch's own save. A second Ctrl-C stops at
    once, with what the last save holds. Launchers send a signal twice, so a repeat within
    `AGAIN_AFTER` seconds does not count.

    Args:
        path: of the checkpoint.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._signum: int | None = None
        self._noted_at = 0.0
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Here and not earlier: Lightning installs its own SIGTERM handler before this hook.
        self._signum = None
        self._previous = signals.install(self._note)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        # Asking other devices waits for them: not in every step.
        turn = trainer.world_size == 1 or (batch_idx + 1) % ASKED_EVERY == 0
        if not stepped or not turn or trainer.is_last_batch:
            return
        if signum := self._asked(trainer):
            trainer.save_checkpoint(self.path)
            raise Interrupted(signum)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if signum := self._asked(trainer):  # since the last step of the epoch that was just saved
            raise Interrupted(signum)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()
        if signum := self._asked(trainer):
            raise Interrupted(signum)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._restore()
        # A signal to the process group may also end the workers that read the images.
        died = isinstance(exception, WorkersDied) or "DataLoader worker" in str(exception)
        if self._signum is not None and died:
            raise Interrupted(self._signum) from exception

    def _asked(self, trainer: L.Trainer) -> int:
        """The signal that this or another device was sent, or 0; all stop at the same step."""
        signum = self._signum or 0
        if trainer.world_size == 1:
            return signum
        device = trainer.strategy.root_device
        return int(trainer.strategy.reduce(torch.tensor(signum, device=device), reduce_op="max"))

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signum is None:
            self._signum, self._noted_at = signum, now
        elif signum == signal.SIGINT and now - self._noted_at >= AGAIN_AFTER:
            raise Interrupted(signum)

    def _restore(self) -> None:
        signals.restore(self._previous)
        self._previous = {}


class ReestimateBN(Callback):
    """Re-estimates BatchNorm's running statistics, without training noise, for all that reads them.

    For networks trained with noise in front of a BatchNorm: what is validated and what is saved has
    the statistics of the network as it will be deployed. Training itself does not read them. Stands
    before the callbacks that read the network on a save or exchange its weights.

    Args:
        num_images: of the training data, with their augmentation, at most.
    """

    def __init__(self, num_images: int = 2048) -> None:
        self.num_images = num_images
        self._done = False  # since the last step

    def on_train_batch_end(self, *_: Any) -> None:
        self._done = False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._reestimate(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._reestimate(trainer, pl_module)
        checkpoint["state_dict"].update(pl_module.state_dict())

    def _reestimate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._done:
            return

        def images() -> Iterator[Tensor]:
            left = self.num_images
            for batch in training_data(trainer, pl_module):
                prepared = trainer.strategy.batch_to_device(batch)  # and the data's own hooks
                yield prepared[0]
                left -= len(prepared[0])
                if left <= 0:
                    return

        with torch.random.fork_rng(devices=[]):  # a loader may draw its order
            reestimate_bn(network_to_keep(trainer, pl_module), images())
        self._done = True


def training_data(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterable[Any]:
    """The training batches once more, without a change to the loader that is read in training."""
    if trainer.datamodule is not None:  # type: ignore[attr-defined]
        return trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
    if is_overridden("train_dataloader", pl_module):
        return pl_module.train_dataloader()
    loader = trainer.train_dataloader
    if isinstance(loader, DataLoader):
        loader = copy.copy(loader)
        loader._iterator = None  # of persistent workers, which read for the training
    return cast(Iterable[Any], loader)


class EpochLines(ProgressBar):
    """Prints a line an epoch: for a file or a pipe, where a bar would leave a dozen of them."""

    def __init__(self) -> None:
        super().__init__()
        self._begin = 0.0
        self._enabled = True

    def disable(self) -> None:
        """Print nothing; Lightning disables it in all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def on_train_start(self, *_: Any) -> None:
        self._begin = time.perf_counter()  # a resumed run begins within an epoch

    def on_train_epoch_start(self, *_: Any) -> None:
        self._begin = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._enabled and trainer.is_global_zero:
            metrics = self.get_metrics(trainer, pl_module)
            shown = ", ".join(
                f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)
            )
            seconds = time.perf_counter() - self._begin
            self.print(f"Epoch {trainer.current_epoch}: {seconds:.1f} s, {shown}", flush=True)


class Throughput(Callback):
    """Logs `train/images_per_second` of all devices, a mean over the epoch so far, with loading.

    Validation does not count. On a GPU the first steps of an epoch read high: they are queued, not
    done.
    """

    def __init__(self) -> None:
        self._images = 0
        self._start: float | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._start is None or batch_idx == 0:  # a resumed run starts anywhere
            self._images, self._start = 0, time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert self._start is not None
        self._images += num_images(batch) * trainer.world_size
        seconds = time.perf_counter() - self._start
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:  # the others would be dropped
            pl_module.log("train/images_per_second", self._images / seconds)


def num_images(batch: Any) -> int:
    """Length of the first tensor of a batch: a tensor, or a sequence or a mapping of them."""
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    return len(batch)
