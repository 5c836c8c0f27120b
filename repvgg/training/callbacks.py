"""Callbacks of a run: averaged weights, BatchNorm statistics, folded validation, signals, speed."""

import copy
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import DataLoader

from repvgg import signals
from repvgg.data.batches import WorkersDied
from repvgg.models.forms import switch_to_deploy
from repvgg.models.reestimate import reestimate_bn
from repvgg.reparam import is_reparameterizable
from repvgg.signals import Interrupted
from repvgg.training.classifier import Classifier
from repvgg.training.groups import frozen_norms

Describe = Callable[[nn.Module], dict[str, Any]]

SYNC_EVERY = 8  # batches between two exchanges of signals among several devices
REPEAT_WITHIN = 0.5  # seconds in which a second signal counts as a repeat


class EMA(WeightAveraging):
    """Keeps an exponential moving average of the weights and the statistics of BatchNorm.

    The average is validated and saved as the network (Tarvainen and Valpola, 2017,
    arXiv:1703.01780). The weights that train are saved beside it. In update k the decay is
    min(decay, (1 + k) / (10 + k)), so that the first weights are soon forgotten.

    Args:
        decay: of the average, in (0, 1).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        super().__init__(multi_avg_fn=self._update)  # a method, since a closure cannot be pickled

    def _update(self, averages: list[Tensor], currents: list[Tensor], _: Tensor) -> None:
        if not averages[0].is_floating_point():  # BatchNorm's count of batches
            torch._foreach_copy_(averages, currents)
            return
        k = self._latest_update_step  # of updates so far, one a step
        torch._foreach_lerp_(averages, currents, 1 - min(self.decay, (1 + k) / (10 + k)))

    def network(self) -> nn.Module:
        """The network with the averaged weights."""
        assert self._average_model is not None
        return cast(Classifier, self._average_model.module).net

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Validation and test read the average, which is saved in the place of the weights.
        if trainer.state.fn == "fit":
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


def network_to_keep(trainer: L.Trainer, pl_module: L.LightningModule) -> nn.Module:
    """The network that is validated, saved and deployed: the average if there is one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EMA) and trainer.state.fn == "fit":
            return callback.network()
    return cast(Classifier, pl_module).net


class SelfDescribing(Callback):
    """Adds to every checkpoint the entry that makes it self-describing.

    Args:
        key: of the entry.
        describe: makes the entry from the network. It must be picklable if the trainer spawns its
            processes.
    """

    def __init__(self, key: str, describe: Describe) -> None:
        self.key = key
        self.describe = describe

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[self.key] = self.describe(network_to_keep(trainer, pl_module))


def is_foldable(network: nn.Module) -> bool:
    """Whether a network has layers that `switch_to_deploy` folds."""
    return any(is_reparameterizable(module) for module in network.modules())


class DeployedValidation(Callback):
    """Validates and tests a folded copy of the network, which is what will be deployed.

    Raises, from `setup`:
        ValueError: the network has nothing to fold.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        network = cast(Classifier, pl_module).net
        if not is_foldable(network):
            raise ValueError(
                f"DeployedValidation: {type(network).__name__} has nothing to fold while it trains"
            )

    # The first batch comes after the hooks that exchange weights (EMA) and statistics.
    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0:
            module = cast(Classifier, pl_module)
            # A bound method: a module would become a submodule, and be trained and saved.
            module.evaluated = switch_to_deploy(module.net).__call__

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        cast(Classifier, pl_module).evaluated = None

    on_test_batch_start = on_validation_batch_start
    on_test_epoch_end = on_validation_epoch_end


class SaveOnSignal(Callback):
    """On a signal, finishes the step, saves `last.ckpt` and raises `Interrupted`.

    The signals are Ctrl-C, SIGTERM, SIGHUP (unless it is ignored, as under nohup) and SIGUSR1. A
    step ends with the optimizer's, so accumulated gradients are not lost. In the last step of an
    epoch a signal waits for validation and the epoch's own save. A second Ctrl-C stops at once and
    saves nothing. Launchers send a signal twice, so a repeat within `REPEAT_WITHIN` seconds does
    not count.

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
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        # An exchange waits for all devices, so it does not happen in every step.
        turn = trainer.world_size == 1 or (batch_idx + 1) % SYNC_EVERY == 0
        if not stepped or not turn or trainer.is_last_batch:
            return
        if signum := self._received(trainer):
            trainer.save_checkpoint(self.path)
            raise Interrupted(signum)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if signum := self._received(trainer):  # after the last step of the epoch, which was saved
            raise Interrupted(signum)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()
        if signum := self._received(trainer):
            raise Interrupted(signum)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._restore()
        # A signal to the process group also ends the workers that read the images.
        died = isinstance(exception, WorkersDied) or "DataLoader worker" in str(exception)
        if self._signum is not None and died:
            raise Interrupted(self._signum) from exception

    def _received(self, trainer: L.Trainer) -> int:
        """The signal that any device received, or 0; all devices stop at the same step."""
        signum = self._signum or 0
        if trainer.world_size == 1:
            return signum
        device = trainer.strategy.root_device
        return int(trainer.strategy.reduce(torch.tensor(signum, device=device), reduce_op="max"))

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signum is None:
            self._signum, self._noted_at = signum, now
        elif signum == signal.SIGINT and now - self._noted_at >= REPEAT_WITHIN:
            raise Interrupted(signum)

    def _restore(self) -> None:
        signals.restore(self._previous)
        self._previous = {}


class ReestimateBN(Callback):
    """Re-estimates BatchNorm's running statistics, with stochastic layers off.

    For networks with a stochastic layer in front of a BatchNorm. The validated and the saved
    network then have the statistics of the deployed one. Training itself does not read them. Put
    this callback before those that exchange or save the weights.

    Args:
        num_images: of the training data, with their augmentation, at most.
    """

    def __init__(self, num_images: int = 2048) -> None:
        self.num_images = num_images
        self._done = False  # since the last step

    def on_train_batch_end(self, *_: object) -> None:
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
            network = network_to_keep(trainer, pl_module)
            frozen = frozen_norms(network, cast(Classifier, pl_module).frozen)
            reestimate_bn(network, images(), keep=[*frozen])
        self._done = True


def training_data(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterable[object]:
    """The training batches again; the loader that training reads is left alone."""
    datamodule: L.LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
    if datamodule is not None:
        return cast(Iterable[object], datamodule.train_dataloader())
    if is_overridden("train_dataloader", pl_module):
        return cast(Iterable[object], pl_module.train_dataloader())
    loader = trainer.train_dataloader
    if isinstance(loader, DataLoader):
        loader = copy.copy(loader)
        loader._iterator = None  # its persistent workers read for training
    return cast(Iterable[object], loader)


class Throughput(Callback):
    """Logs `train/images_per_second` of all devices, a mean over the epoch so far.

    The time includes loading and excludes validation. On a GPU the first steps of an epoch read
    high: they are queued, not done. Lightning's ThroughputMonitor waits for the GPU in every step,
    warns if the module does not count its FLOPs, and names its values "train|samples_per_sec".
    """

    def __init__(self) -> None:
        self._images = 0
        self._start: float | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if self._start is None or batch_idx == 0:  # a resumed run starts anywhere
            self._images, self._start = 0, time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Any,
        *_: object,
    ) -> None:
        assert self._start is not None
        self._images += extract_batch_size(batch) * trainer.world_size
        seconds = time.perf_counter() - self._start
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:  # the others would be dropped
            pl_module.log("train/images_per_second", self._images / seconds)
