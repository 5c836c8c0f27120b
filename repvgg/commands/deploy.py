"""Fold, export and verify a trained network, or verify a deployed folder again."""

from pathlib import Path

import repvgg
from repvgg import cli
from repvgg.checks import escape
from repvgg.deploy.settings import DeploySettings, VerifySettings, one_run
from repvgg.signals import importing


def main() -> None:
    cli.run(deploy, cli.CONFIGS / "deploy.yaml", prepare=one_run)


def deploy(config: cli.Config, _: Path) -> None:
    """Deploy a checkpoint, or verify a deployed folder again."""
    kind = DeploySettings if config.get("verify") is None else VerifySettings
    settings = kind.read(config)
    if isinstance(settings, DeploySettings):
        place = escape(settings.ckpt)
        print(f"repvgg {repvgg.__version__}: deploying {place} ...", flush=True)
    with importing():
        # Takes seconds; mistakes are reported before.
        from repvgg.deploy.run import run, verify_again

    if isinstance(settings, VerifySettings):
        verify_again(settings.folder, settings.network, trust=settings.trust)
    else:
        run(settings)
