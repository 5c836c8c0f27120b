"""The `repvgg` command, also as `python -m repvgg`: finds the command that its first word names."""

import importlib
import sys

import repvgg
from repvgg import cli
from repvgg.checks import did_you_mean
from repvgg.cli import habits

MODULES = {name: f"repvgg.commands.{name}" for name in cli.COMMANDS} | {
    "import": "repvgg.commands.import_checkpoint",  # `import` is a keyword
    "inspect": "repvgg.commands.inspect_checkpoint",
}


def main() -> None:
    """Run a command; status 2 if there is none of that name."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(help_text())
    elif name == "--version":
        print(f"repvgg {repvgg.__version__}")
    elif name in MODULES:
        importlib.import_module(MODULES[name]).main()
    else:
        given = f"{name}: there is no such command; " if name else "the command is missing; "
        meant = habits.command(name)
        hint = f"did you mean {meant}? " if meant else did_you_mean(name, MODULES)
        cli.fail(f"{given}{hint}allowed are {', '.join(MODULES)}, --help, --version", status=2)


def help_text() -> str:
    lines = [f"  {name:<9}{text}" for name, text in cli.COMMANDS.items()]
    return "\n".join(
        [
            f"Usage: {cli.command('COMMAND')} [KEY=VALUE ...]",
            "",
            *lines,
            "",
            f"{cli.command('COMMAND')} --help lists the keys of a command.",
            f"{cli.command('--version')} prints the version.",
        ]
    )


if __name__ == "__main__":
    main()
