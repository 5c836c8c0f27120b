"""Train a network."""

from pathlib import Path

from repvgg import cli
from repvgg.training import resuming, runs
from repvgg.training.settings import Settings


def main() -> None:
    cli.run(train, cli.CONFIGS / "train.yaml", prepare=resuming.plan)


def train(config: cli.Config, folder: Path) -> float | None:
    """Train in the folder of a run; leave no empty folder where the settings are wrong.

    Returns:
        the metric that a search optimizes.
    """
    try:
        settings = Settings.read(config)
        from repvgg.training.run import run  # takes seconds; mistakes are reported before

        return run(settings, config, folder)
    finally:
        runs.discard_if_empty(folder)
