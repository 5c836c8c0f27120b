"""Verify a deployed folder again: every byte, and every file on the recorded images.

The recorded float64 logits are the reference. The status is 0 if every file is as it was deployed
and computes the same. model.safetensors of a network of your own needs network=mypackage.MyNet.
A .pt2 file can run code when it is opened: without trust=true its bytes are checked, its results
are not, and the status is 1.
"""

from typing import Any

from repvgg import cli
from repvgg.signals import importing

DEFAULTS: cli.Config = {"folder": None, "network": None, "trust": False}


def main() -> None:
    usage = f"    {cli.command('verify')} folder=FOLDER"
    cli.script(verify, f"{__doc__}\n{usage}", DEFAULTS)


def verify(settings: dict[str, Any]) -> None:
    folder = cli.given_path(settings, "folder", "FOLDER")
    with importing():
        from repvgg.deploy.run import verify_again  # takes seconds

    verify_again(folder, settings["network"], trust=settings["trust"])
