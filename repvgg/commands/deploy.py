"""Fold, export and verify a trained network, or verify a deployed folder again."""

from pathlib import Path
from typing import Any

from repvgg import cli
from repvgg.deploy.settings import check_arguments, check_verify, one_run


def main() -> None:
    cli.run(deploy, cli.CONFIGS / "deploy.yaml", prepare=one_run)


def deploy(config: dict[str, Any], _: Path) -> None:
    """Deploy a checkpoint, or verify a deployed folder again."""
    if config["verify"] is not None:
        folder = check_verify(config)
        from repvgg.deploy.run import verify_again  # takes seconds; mistakes are reported before

        verify_again(folder)
        return
    path, out = check_arguments(config)
    from repvgg.deploy.run import run

    run(path, out, config)
