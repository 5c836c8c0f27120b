"""The checkpoints of a run: the best, the last, and how either is written."""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from repvgg import whole


class BestCheckpoint(ModelCheckpoint):
    """Keeps `best.ckpt`, of the highest validation accuracy; the lower loss decides a tie.

    On a small validation set ties are common, and the first of them is an early, lucky epoch. In a
    run without validation `best.ckpt` is the last checkpoint.
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
        self.best_metrics: dict[str, float] = {}  # of that validation

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        value = trainer.callback_metrics.get("val/loss")
        loss = math.inf if value is None else value.item()
        tie = current is not None and current == self.best_model_score
        better = super().check_monitor_top_k(trainer, current) or bool(
            tie and loss < self.best_loss
        )
        if better:
            self.best_loss = loss
            self.best_metrics = {
                name: metric.item()
                for name, metric in trainer.callback_metrics.items()
                if name.startswith("val/")
            }
        return better

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        super().on_train_batch_end(trainer, *rest)
        # At max_steps within an epoch Lightning validates only if it should stop.
        if 0 <= trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor in trainer.callback_metrics:
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        disabled = trainer.fast_dev_run  # type: ignore[attr-defined]
        if not self.best_model_path and not disabled:
            self.best_model_path = self.format_checkpoint_name({})
            trainer.save_checkpoint(self.best_model_path)

    def state_dict(self) -> dict[str, Any]:
        own = {"best_loss": self.best_loss, "best_metrics": self.best_metrics}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # The paths in it are those of the saving run, whose folder may have moved since.
        assert self.dirpath is not None
        path, score = str(Path(self.dirpath) / "best.ckpt"), state_dict["best_model_score"]
        if not Path(path).exists():
            return  # the best checkpoint was not moved along
        moved = {
            "dirpath": self.dirpath,
            "best_model_path": path,
            "kth_best_model_path": path,
            "best_k_models": {} if score is None else {path: score},
        }
        super().load_state_dict({**state_dict, **moved})
        self.best_loss = state_dict["best_loss"]
        self.best_metrics = state_dict.get("best_metrics", {})  # not in version 0.1


class Best(NamedTuple):
    """The epoch of a checkpoint, and what validation measured in it; nothing if none ran."""

    epoch: int
    metrics: Mapping[str, float]


def read_best(path: Path) -> Best:
    """What `BestCheckpoint` recorded in a file; spawned processes leave nothing but files."""
    saved = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    states = [state for state in saved["callbacks"].values() if "best_loss" in state]
    score = states[0]["best_model_score"]
    metrics = states[0].get("best_metrics") or ({} if score is None else {"val/accuracy": score})
    return Best(saved["epoch"], {name: float(value) for name, value in metrics.items()})


class LastCheckpoint(ModelCheckpoint):
    """Keeps `last.ckpt`, of every epoch.

    A separate callback, because `save_last=True` on the other writes only beside a new best.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder,
            filename="last",
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignore the saved state: the next epoch is written in any case."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                _check_restored(callback)


def _check_restored(callback: ModelCheckpoint) -> None:
    """Check the paths that a resumed checkpoint gave a callback, which removes them later.

    Raises:
        ValueError: removing one would remove something outside of the callback's folder.
    """
    folder = Path(callback.dirpath or "")
    paths = [callback.best_model_path, callback.kth_best_model_path, callback.last_model_path]
    for path in filter(None, [*paths, *callback.best_k_models]):
        if "://" in path or "::" in path:  # Lightning removes these wherever they are
            wrong = not path.startswith(f"{callback.dirpath}/") or ".." in path.split("/")
        else:  # it compares names alone, where a/../../b is in a
            place = Path(path).absolute()
            inside = folder.absolute() in place.parents
            wrong = inside and folder.resolve() not in place.resolve().parents
        if wrong:
            raise ValueError(
                f"the resumed checkpoint names {path!r} as one that {type(callback).__name__} may "
                f"remove; that is outside of its folder {folder}; resume only runs that you trust"
            )


class WholeFileIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all.

    Lightning writes remote paths, such as s3://bucket/last.ckpt.

    Raises, from `save_checkpoint`:
        ValueError: `storage_options` are given, which nothing reads.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        if storage_options is not None:
            raise ValueError(
                f"storage_options={storage_options!r}: a checkpoint is written without options; "
                "leave them out"
            )
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()  # torch.save replaces the error of a full disk with another
        torch.save(checkpoint, content)
        whole.write(target, content.getbuffer())
