"""What happens around the training loop: checkpoints, interruption, statistics, throughput."""

import contextlib
import io
import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from repvgg.fuse import reestimate_bn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class BestCheckpoint(ModelCheckpoint):
    """Keeps `best.ckpt`, of the highest validation accuracy; the lower loss decides a tie.

    On a small validation set ties are the rule, and the first of them is an early, lucky epoch.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder,
            filename="best",
            monitor="val/accuracy",
            mode="max",
            enable_version_counter=False,
        )
        self.best_loss = math.inf

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        loss = trainer.callback_metrics["val/loss"].item()
        tie = current is not None and current == self.best_model_score
        better = super().check_monitor_top_k(trainer, current) or bool(
            tie and loss < self.best_loss
        )
        if better:
            self.best_loss = loss
        return better

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # The paths in it are those of the saving run, whose folder may have moved since.
        assert self.dirpath is not None
        path, score = str(Path(self.dirpath) / "best.ckpt"), state_dict["best_model_score"]
        if not Path(path).exists():
            return  # what was best stayed behind
        moved = {
            "dirpath": self.dirpath,
            "best_model_path": path,
            "kth_best_model_path": path,
            "best_k_models": {} if score is None else {path: score},
        }
        super().load_state_dict({**state_dict, **moved})
        self.best_loss = state_dict["best_loss"]


class LastCheckpoint(ModelCheckpoint):
    """Keeps `last.ckpt`, of every epoch.

    By a callback of its own: `save_last=True` on the other would write it beside a new best only.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder,
            filename="last",
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing of it is needed: the next epoch is written in any case."""


class WholeFileIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all: beside its place, then renamed into it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        content = io.BytesIO()  # torch.save hides what goes wrong with a file behind its own error
        torch.save(checkpoint, content)
        try:
            with temporary.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


class SelfDescribing(Callback):
    """Adds to every checkpoint the entry that makes it self-describing.

    Args:
        key: of the entry.
        describe: makes the entry from the network.
    """

    def __init__(self, key: str, describe: Callable[[torch.nn.Module], dict[str, Any]]) -> None:
        self.key = key
        self.describe = describe

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[self.key] = self.describe(pl_module.net)  # type: ignore[arg-type]


class Interrupted(Exception):  # noqa: N818 - it is not an error
    """Training stopped at the end of a step because a signal asked for it.

    Attributes:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` on Ctrl-C or SIGTERM, where Lightning would exit in its own way."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    previous = {signum: signal.signal(signum, stop) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


class SaveOnSignal(Callback):
    """On Ctrl-C or SIGTERM, finishes the step, saves `last.ckpt` and raises `Interrupted`.

    A step ends with the optimizer's, so a signal waits for the gradients that are accumulated;
    in the last step of an epoch it waits for validation and the epoch's own save. A second signal
    stops at once, with what the last save holds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._signum: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Here and not earlier: Lightning installs its own SIGTERM handler before this hook.
        for signum in SIGNALS:
            self._previous[signum] = signal.signal(signum, self._note)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if self._signum is not None and stepped and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)
            raise Interrupted(self._signum)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._signum is not None:  # since the last step of the epoch that was just saved
            raise Interrupted(self._signum)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()
        if self._signum is not None:
            raise Interrupted(self._signum)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None:
            raise Interrupted(signum)
        self._signum = signum

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}


class ReestimateBN(Callback):
    """Re-estimates BatchNorm's running statistics, without training noise, for all that reads them.

    For networks trained with noise in front of a BatchNorm: what is validated and what is saved has
    the statistics of the network as it will be deployed. Training itself does not read them. Stands
    before the callbacks that read the network on a save.

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
        loader = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        count = math.ceil(self.num_images / loader.batch_size)

        def images() -> Iterator[Tensor]:
            for batch in itertools.islice(loader, count):
                prepared = trainer.strategy.batch_to_device(batch)  # and the data's own hooks
                yield prepared[0].flatten(0, -4)  # two views: one below the other

        reestimate_bn(pl_module.net, images())  # type: ignore[arg-type]
        self._done = True


class Throughput(Callback):
    """Logs `train/images_per_second`, a mean over the epoch so far, loading between steps included.

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
        self._images += len(batch[0])
        seconds = time.perf_counter() - self._start
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:  # the others would be dropped
            pl_module.log("train/images_per_second", self._images / seconds)
