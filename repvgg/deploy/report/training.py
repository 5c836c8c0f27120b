"""The run that trained a checkpoint, as the files of its folder describe it."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch

from repvgg.deploy.report.content import Training

CHOICES = Path(".hydra", "hydra.yaml")
RESULTS = "results.json"


def find_training(checkpoint: Path) -> Training | None:
    """Read the folder of a run; None if the checkpoint does not lie in one.

    The metrics are those of best.ckpt, so another checkpoint gets none. A test on the validation
    images, which chose the checkpoint, is left out. A missing or damaged file tells nothing.
    """
    folder = checkpoint.parent.parent
    if checkpoint.parent.name != "checkpoints" or not (folder / ".hydra").is_dir():
        return None
    epoch = _epoch(checkpoint)
    results = _results(folder / RESULTS)
    overrides = results.get("overrides")
    metrics = results.get("metrics")
    recorded = results.get("best_epoch")  # None if no validation ran: the last epoch is the best
    tested = epoch == (results.get("last_epoch") if recorded is None else recorded) is not None
    tested = tested and checkpoint.name == "best.ckpt"
    has_test = results.get("tested_on") == "test"
    return Training(
        folder=str(folder),
        data=_data(folder / CHOICES),
        overrides=[str(word) for word in overrides] if isinstance(overrides, list) else [],
        epoch=epoch,
        metrics={
            str(name): float(value)
            for name, value in (metrics.items() if isinstance(metrics, dict) and tested else ())
            if isinstance(value, int | float) and (has_test or not str(name).startswith("test/"))
        },
    )


def _epoch(checkpoint: Path) -> int | None:
    """The epoch that a checkpoint of training records."""
    try:
        content = torch.load(checkpoint, weights_only=True, mmap=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError):  # it holds more than tensors and plain types
        return None
    epoch = content.get("epoch")
    return epoch if isinstance(epoch, int) else None


def _results(path: Path) -> Mapping[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _data(path: Path) -> str | None:
    """The data set that the run chose by name."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        name = found["hydra"]["runtime"]["choices"]["data"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError):
        return None
    return name if isinstance(name, str) else None
