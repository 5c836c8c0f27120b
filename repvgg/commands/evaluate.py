"""Measure a checkpoint, a deployed file or third-party weights on a data set."""

import functools
from pathlib import Path

from repvgg import cli
from repvgg.deploy.evaluate_settings import KEYS, EvaluateSettings
from repvgg.deploy.settings import one_run
from repvgg.signals import importing


def main() -> None:
    plan = functools.partial(one_run, command="evaluate", keys=KEYS)
    cli.run(evaluate, cli.CONFIGS / "evaluate.yaml", prepare=plan)


def evaluate(config: cli.Config, _: Path) -> None:
    """Evaluate, print the results and write them into a folder."""
    from hydra.core.hydra_config import HydraConfig

    settings = EvaluateSettings.read(config, HydraConfig.get().overrides.task)
    with importing():
        from repvgg.deploy.evaluate import run  # takes seconds; mistakes are reported before

    run(settings, print)
