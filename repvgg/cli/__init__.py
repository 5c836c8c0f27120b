"""The command line: what the commands share.

`names` has the commands, `mistakes` reports errors in one line, `composed` runs a command that
Hydra configures, `keys` one whose settings are key=value. Importing it imports nothing heavy.
"""

from repvgg.cli import habits
from repvgg.cli.composed import (
    RUNS,
    SWEEP,
    Arguments,
    Plan,
    discard_if_empty,
    parse_arguments,
    quote_path,
    run,
    start_folder,
)
from repvgg.cli.keys import Unset, given_path, script
from repvgg.cli.mistakes import FULL_ERROR, Config, explain, fail, suggest_import
from repvgg.cli.names import COMMANDS, CONFIGS, command, command_line, program

__all__ = [
    "COMMANDS",
    "CONFIGS",
    "FULL_ERROR",
    "RUNS",
    "SWEEP",
    "Arguments",
    "Config",
    "Plan",
    "Unset",
    "command",
    "command_line",
    "discard_if_empty",
    "explain",
    "fail",
    "given_path",
    "habits",
    "parse_arguments",
    "program",
    "quote_path",
    "run",
    "script",
    "start_folder",
    "suggest_import",
]
