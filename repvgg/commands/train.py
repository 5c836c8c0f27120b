"""Train a network."""

from pathlib import Path

import repvgg
from repvgg import cli
from repvgg.checks import escape
from repvgg.signals import importing
from repvgg.training import processes, resuming, runs
from repvgg.training.settings import Settings


def main() -> None:
    cli.run(train, cli.CONFIGS / "train.yaml", prepare=resuming.plan)


def train(config: cli.Config, folder: Path) -> float | None:
    """Train in the folder of a run.

    Returns:
        the metric that a search optimizes.
    """
    settings = Settings.read(config)
    announce(settings)
    with importing(lambda: cli.discard_if_empty(folder)):
        settings.check_trainer()
        from repvgg.training.run import run  # takes seconds; mistakes are reported before

    return run(settings, config, folder)


def announce(settings: Settings) -> None:
    """Print what starts, before the imports of seconds; the jobs of a sweep have such a line."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    if processes.rank() == 0 and hydra.mode != RunMode.MULTIRUN:
        name = settings.model.get("_target_") or settings.model["name"]
        data = hydra.runtime.choices.get("data") or settings.data["_target_"]
        doing = f"training {name} on {data}"
        if settings.resume is not None:
            doing = f"resuming {runs.relative(Path(settings.resume))}"
        print(f"repvgg {repvgg.__version__}: {escape(doing)} ...", flush=True)
