"""The `repvgg` command, also as `python -m repvgg`: finds the command that its first word names."""

import importlib
import sys

from repvgg import signals, streams

MODULES = {  # whose names are no modules: `import` is a keyword
    "import": "repvgg.commands.import_checkpoint",
    "inspect": "repvgg.commands.inspect_checkpoint",
}


def main() -> None:
    """Run a command; status 2 if there is none of that name."""
    signals.end_at_once()
    streams.open_closed()
    import repvgg
    from repvgg import cli
    from repvgg.checks import did_you_mean
    from repvgg.cli import habits

    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(help_text())
    elif name == "--version":
        print(f"repvgg {repvgg.__version__}")
    elif name in cli.COMMANDS:
        importlib.import_module(MODULES.get(name, f"repvgg.commands.{name}")).main()
    else:
        given = f"{name}: there is no such command; " if name else "the command is missing; "
        meant = habits.command(name)
        hint = f"did you mean {meant}? " if meant else did_you_mean(name, cli.COMMANDS)
        cli.fail(f"{given}{hint}allowed are {', '.join(cli.COMMANDS)}, --help, --version", status=2)


def help_text() -> str:
    from repvgg import cli

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
