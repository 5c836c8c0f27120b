"""The loggers of a run: those of the settings, and always `metrics.csv`."""

import csv
import importlib.util
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from repvgg import whole
from repvgg.cli import Config
from repvgg.targets import signature_of
from repvgg.training.parts import Part
from repvgg.training.tensorboard import TensorBoard

METRICS = Path("metrics.csv")  # in the folder of a run
PACKAGES = {  # that a logger of Lightning needs
    "WandbLogger": "wandb",
    "MLFlowLogger": "mlflow",
    "CometLogger": "comet-ml",
}


class MetricsFile(Logger):
    """Writes every metric into `metrics.csv`, a row each time that some are logged.

    A row is on disk as soon as it is logged. A resumed run appends; Lightning's CSVLogger would
    delete the file.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / METRICS
        self._columns: list[str] | None = None  # None before the first row

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, *_: object, **__: object) -> None:
        """Write nothing: they are in .hydra/config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row; a metric that is new becomes a column of the whole file."""
        row: dict[str, object] = {"epoch": metrics.get("epoch"), "step": step, **metrics}
        if self._columns is None:
            self._columns = self._recover()
        new = [name for name in row if name not in self._columns]
        self._columns += new
        if new or not self.path.exists():  # deleted meanwhile
            rows = _read(self.path) if self.path.exists() else []
            header: dict[str, object] = {name: name for name in self._columns}
            text = "".join(_line(self._columns, held) for held in [header, *rows, row])
            whole.write(self.path, text.encode())
            return
        with whole.named(self.path), self.path.open("a", newline="") as file:
            file.write(_line(self._columns, row))

    def _recover(self) -> list[str]:
        """The columns of the file, without a last line that a killed run left unfinished."""
        if not self.path.exists():
            return []
        text = self.path.read_text()
        if not text.endswith("\n"):
            whole.write(self.path, text[: text.rfind("\n") + 1].encode())
        with self.path.open(newline="") as file:
            return next(csv.reader(file), [])


def check_loggers(parts: Mapping[str, Part]) -> None:
    """Check that the packages of the loggers are installed, before data is read.

    Raises:
        ValueError: one is missing.
    """
    for name, part in parts.items():
        part.function()
        package = PACKAGES.get(part.name.rpartition(".")[2])
        if package and importlib.util.find_spec(package.replace("-", "_")) is None:
            what = f"logger={name}" if name == package else f"{part.key}={part.name}"
            raise ValueError(f"{what} needs {package}: pip install {package}")


def build_loggers(parts: Mapping[str, Part], folder: Path) -> list[Logger]:
    """The loggers of the settings, and the one of `metrics.csv`.

    Those that save into a folder save into the run's, unless the settings name another.

    Raises:
        ValueError: an argument is unknown, or a part is not a logger.
    """
    made: list[Logger] = []
    for part in parts.values():
        signature = signature_of(part.function())
        saves = signature is not None and "save_dir" in signature.parameters
        logger = part.call(**({"save_dir": folder} if saves else {}))
        if not isinstance(logger, Logger):
            raise part.wrong_result(logger, "a lightning.pytorch.loggers.Logger")
        made.append(logger)
    return [*made, MetricsFile(folder)]


def log_hyperparameters(loggers: Sequence[Logger], settings: Config) -> None:
    """Log the settings when a run starts; `pictures` writes those that TensorBoard shows."""
    for logger in loggers:
        if not isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(dict(settings))


def finish(loggers: Sequence[Logger]) -> None:
    """Close the loggers of a run that ended."""
    for logger in loggers:
        logger.finalize("success")
        if isinstance(logger, TensorBoard):
            logger.close()


def finish_wandb() -> None:
    """End a run of Weights & Biases, or the next run of a sweep would write into it.

    While an exception passes, the run counts as failed.
    """
    wandb: Any = sys.modules.get("wandb")
    if wandb is not None and hasattr(wandb, "finish"):
        wandb.finish(exit_code=0 if sys.exception() is None else 1)


def _read(path: Path) -> list[dict[str, object]]:
    with path.open(newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]


def _line(columns: Sequence[str], row: Mapping[str, object]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerow(row)
    return text.getvalue()
