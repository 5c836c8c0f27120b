"""TensorBoard's event files of a run: one file, its layout of charts, texts, hyper-parameters.

`pictures` adds what is drawn.
"""

import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from repvgg import cli
from repvgg.checks import escape
from repvgg.cli import Config
from repvgg.contract import DataContract
from repvgg.training import anatomy, resuming, runs
from repvgg.training.classifier import Classifier
from repvgg.training.schedule import Steps
from repvgg.training.settings import Settings

METRICS = ("val/accuracy", "test/accuracy", "val/loss")  # columns of the page "HParams"
COLUMNS = ("model", "epochs", "lr", "rdrop", "overrides")  # beside these; the rest at a click
# Overrides that have a column of their own, or change nothing of what is trained.
NAMED = ("model", "data", "trainer.max_epochs", "data.batch_size", "optim.lr", "rdrop", "seed")
UNTOLD = ("hydra.", "logger", "data.root", "resume", "data.num_workers", "objective")
LONGEST_OVERRIDES = 200  # characters
MOST_CLASSES = 1000  # whose names are listed

Layout = dict[str, dict[str, list[Any]]]


class TensorBoard(TensorBoardLogger):
    """Lightning's logger, with one event file for training and test, in the folder of the run.

    Args:
        save_dir: the folder.
        name, version: of folders in it; none by default.
        pictures: draw pictures, measure branches and trace the graph; see `pictures`.
        arguments: further ones of `torch.utils.tensorboard.SummaryWriter`.
    """

    def __init__(
        self,
        save_dir: str | Path,
        name: str = "",
        version: str = "",
        *,
        pictures: bool = True,
        **arguments: Any,
    ) -> None:
        super().__init__(save_dir, name, version, default_hp_metric=False, **arguments)
        os.fspath(self.log_dir)  # raises if name or version are no names
        if self._kwargs:  # the writer is made when the run has started: they are tried before
            with TemporaryDirectory() as folder, SummaryWriter(folder, **self._kwargs):
                pass
        self.pictures = pictures

    @rank_zero_only
    def save(self) -> None:
        """Write what is pending. No hparams.yaml: the configuration is in .hydra/config.yaml."""
        if self._experiment is not None:
            self._experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is pending. A closed file could not take the test, which comes later."""
        self.save()

    def close(self) -> None:
        """Close the file."""
        if self._experiment is not None:
            self._experiment.close()
            self._experiment = None


def writers(loggers: Sequence[Logger], *, pictures: bool = False) -> list[SummaryWriter]:
    """The writers of TensorBoard's event files.

    Args:
        pictures: only of those that take pictures.
    """
    return [
        logger.experiment
        for logger in loggers
        if isinstance(logger, TensorBoardLogger)
        and (not pictures or getattr(logger, "pictures", True))  # Lightning's own takes them too
    ]


@dataclass(frozen=True)
class Start:
    """What is written when a run starts.

    Attributes:
        contract: of the images.
        texts: by name, plain text.
        hyperparameters: by name, one column each.
    """

    contract: DataContract
    texts: Mapping[str, str]
    hyperparameters: Mapping[str, str | float]


def describe_start(
    settings: Settings,
    config: Config,
    facts: Iterable[tuple[str, str]],
    module: Classifier,
    contract: DataContract,
    steps: Steps,
    folder: Path,
) -> Start:
    """What TensorBoard shows of a run from its first second on.

    Args:
        config: as composed.
        facts: as printed, names and values.
    """
    from omegaconf import OmegaConf

    machine = f"python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} CPUs"
    lines = [*facts, ("machine", machine), ("command", cli.command_line())]
    names = contract.classes[:MOST_CLASSES]
    texts = {
        "run": "\n".join(f"{name:<14}{value}" for name, value in lines),
        "configuration": OmegaConf.to_yaml(OmegaConf.create(dict(config))),
        "classes": "\n".join(f"{k}  {escape(name)}" for k, name in enumerate(names)),
    }
    return Start(contract, texts, choose_hyperparameters(settings, module, steps, folder))


def choose_hyperparameters(
    settings: Settings, module: Classifier, steps: Steps, folder: Path
) -> dict[str, str | float]:
    """The eight columns of a run: seven that matter, and everything else that was passed."""
    from hydra.core.hydra_config import HydraConfig

    resumed = settings.resume is not None
    choices = resuming.recorded_choices(folder) if resumed else HydraConfig.get().runtime.choices
    model, data = settings.model, settings.data
    return {
        "model": str(model.get("_target_") or model["name"]),
        "data": str(choices.get("data") or data["_target_"]),
        "epochs": settings.trainer.max_epochs,
        "batch_size": steps.images,
        "lr": module.lr,
        "rdrop": module.rdrop,
        "seed": settings.seed,
        "overrides": join_overrides(_read_overrides(folder)),
    }


def join_overrides(overrides: Iterable[str]) -> str:
    """The overrides that have no column of their own, in one line."""
    kept = [
        escape(line)
        for line in overrides
        if (key := line.lstrip("+~").partition("=")[0]) not in NAMED and not key.startswith(UNTOLD)
    ]
    text = " ".join(kept)
    return text if len(text) <= LONGEST_OVERRIDES else f"{text[: LONGEST_OVERRIDES - 1]}…"


def log_start(writer: SummaryWriter, start: Start, module: Classifier, step: int) -> None:
    """Write texts, layout and hyper-parameters; a run that is stopped has them too."""
    for name, text in start.texts.items():
        writer.add_text(name, as_code(text), step)
    writer.add_custom_scalars(make_layout(module.net, rdrop=module.rdrop > 0))
    for summary in make_hyperparameters(start.hyperparameters):
        add_event(writer, Event(summary=summary))
    writer.flush()


def make_hyperparameters(values: Mapping[str, str | float]) -> list[Summary]:
    """The row of a run on the page "HParams", and its columns.

    The page shows five hyper-parameters at first: those that differ between runs, in the order of
    the alphabet. So COLUMNS are said to differ.
    """
    metrics = dict.fromkeys(METRICS, 0.0)  # only the names count; values are those of the scalars
    experiment, session, _ = _hparams(dict(values), metrics)
    content = experiment.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(content.content)
    for info in data.experiment.hparam_infos:
        info.differs = info.name in COLUMNS
    content.content = data.SerializeToString()
    return [experiment, session]


def log_end(writer: SummaryWriter) -> None:
    """Mark the run as successful."""
    _, _, end = _hparams({}, {})
    add_event(writer, Event(summary=end))


def add_event(writer: SummaryWriter, event: Event, step: int | None = None) -> None:
    """Write what SummaryWriter has no method for."""
    file: Any = writer  # torch has no types for what follows
    file._get_file_writer().add_event(event, step)


def make_layout(network: nn.Module, *, rdrop: bool) -> Layout:
    """The page "Custom Scalars": train and validation of one quantity in one chart.

    Args:
        network: its stages get the charts of the branches.
        rdrop: whether there is a KL divergence.
    """

    def chart(*tags: str) -> list[Any]:
        return ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]]

    criteria = ["train/cross_entropy", "train/criterion"]  # the one that the run has
    layout: Layout = {
        "train and validation": {
            "loss": chart(*criteria, "val/loss", "val/criterion"),
            "accuracy": chart("train/accuracy", "val/accuracy"),
            "calibration error (ECE)": chart("val/calibration_error"),
        },
        "schedule and speed": {
            "learning rate": chart("train/learning_rate"),
            "images per second": chart("train/images_per_second"),
        },
    }
    if rdrop:
        layout["R-Drop"] = {
            "cross-entropy and KL divergence": chart(*criteria, "train/kl"),
            "KL / cross-entropy": chart("train/kl_to_cross_entropy", "train/kl_to_criterion"),
            "agreement of the two predictions": chart("train/agreement"),
            "weight of the KL divergence": chart("train/alpha"),
        }
    if stages := [*dict.fromkeys(map(anatomy.stage_of, anatomy.multi_branch_blocks(network)))]:
        layout["branches"] = {
            **{
                f"share of the {branch} branch": chart(*(f"branches/{s}/{branch}" for s in stages))
                for branch in anatomy.BRANCHES
            },
            "outlier ratio": chart(*(f"outliers/{s}" for s in stages), "outliers/largest"),
            "fold error": chart("fold/error"),
        }
    return layout


def _hparams(values: dict[str, Any], metrics: dict[str, Any]) -> list[Any]:
    make: Any = hparams  # torch has no types for it
    return [*make(values, metrics)]


def as_code(text: str) -> str:
    """A text as Markdown that TensorBoard shows letter by letter.

    Indented lines are code in Markdown; nothing in them ends it, as a fence would.
    """
    return "\n".join(f"    {escape(line)}" for line in text.split("\n"))


def _read_overrides(folder: Path) -> list[str]:
    from omegaconf import OmegaConf

    path = folder / runs.OVERRIDES
    if not path.exists():
        return []
    return [str(line) for line in OmegaConf.load(path)]
