"""Fold, export and verify a trained network, or verify a deployed folder again."""

from pathlib import Path

from repvgg import cli
from repvgg.deploy.settings import DeploySettings, VerifySettings, one_run


def main() -> None:
    cli.run(deploy, cli.CONFIGS / "deploy.yaml", prepare=one_run)


def deploy(config: cli.Config, _: Path) -> None:
    """Deploy a checkpoint, or verify a deployed folder again."""
    kind = DeploySettings if config.get("verify") is None else VerifySettings
    settings = kind.read(config)
    from repvgg.deploy.run import run, verify_again  # takes seconds; mistakes are reported before

    if isinstance(settings, VerifySettings):
        verify_again(settings.folder, settings.network)
    else:
        run(settings)
