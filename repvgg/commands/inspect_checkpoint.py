"""Show what a checkpoint holds: networks, layout, form, variant, what would load, what is missing.

Changes nothing. The status is 0 if the checkpoint would load.
"""

from typing import Any

from repvgg import cli
from repvgg.checks import check_integers
from repvgg.signals import importing

DEFAULTS: cli.Config = {"path": None, "strides": cli.Unset(list, "[2,2,2,2,2]")}


def main() -> None:
    usage = f"    {cli.command('inspect')} path=FILE"
    cli.script(inspect, f"{__doc__}\n{usage}", DEFAULTS)


def inspect(settings: dict[str, Any]) -> None:
    path, strides = cli.given_path(settings, "path", "FILE"), settings["strides"]
    if strides is not None:
        check_integers("strides", strides, length=5, example="[2,2,2,2,2]")
    with importing():
        from repvgg.commands.inspection import inspect  # takes seconds

    inspect(path, strides)
