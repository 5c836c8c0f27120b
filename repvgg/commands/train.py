"""Train a network."""

from pathlib import Path
from typing import Any

from repvgg import cli
from repvgg.training import runs
from repvgg.training.settings import Settings


def main() -> None:
    cli.run(train, cli.CONFIGS / "train.yaml", prepare=runs.plan)


def train(config: dict[str, Any], folder: Path) -> None:
    """Train in the folder of a run; leave no empty folder where the settings are wrong."""
    try:
        settings = Settings.read(config)
        from repvgg.training.run import run  # takes seconds; mistakes are reported before

        run(settings, config, folder)
    finally:
        runs.discard_if_empty(folder)
