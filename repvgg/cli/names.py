"""The names of the commands, in the way in which this process was started."""

import shlex
import sys
from pathlib import Path

COMMANDS = {
    "train": "train a network",
    "deploy": "fold, export and verify a trained network",
    "verify": "verify a deployed folder again",
    "predict": "label images with a checkpoint or a deployed file",
    "evaluate": "measure a checkpoint or a deployed file on a data set",
    "inspect": "show what a checkpoint holds and whether it loads",
    "import": "convert a third-party checkpoint",
}
SCRIPTS = {"train": "train.py", "deploy": "deploy.py"}  # of a clone

CONFIGS = Path(__file__).absolute().parents[1] / "configs"  # in a wheel
if not CONFIGS.is_dir():  # in a clone
    CONFIGS = CONFIGS.parents[1] / "configs"


def command(name: str) -> str:
    """What to call for a command, in the way in which this process was started.

    "deploy" is `python deploy.py` after `python train.py`, `python -m repvgg deploy` after
    `python -m repvgg train`, and `repvgg deploy` otherwise.
    """
    started = Path(sys.argv[0])
    if started.name == f"{name}.py":
        return f"python {shlex.quote(str(started))}"
    if started.name in SCRIPTS.values() and name in SCRIPTS:
        return f"python {shlex.quote(str(started.with_name(SCRIPTS[name])))}"
    if started.parts[-2:] == ("repvgg", "__main__.py"):
        return f"python -m repvgg {name}"
    return f"repvgg {name}"


def subcommand() -> list[str]:
    """The word of the command line that names the command; nothing in `python train.py`."""
    started = Path(sys.argv[0])
    if started.suffix == ".py" and started.name != "__main__.py":
        return []
    return [word for word in sys.argv[1:2] if word in COMMANDS]


def program() -> str:
    """How error messages begin: `train.py`, or `repvgg train`."""
    started = Path(sys.argv[0])
    if started.suffix == ".py" and started.name != "__main__.py":
        return started.name
    return " ".join(["repvgg", *subcommand()])


def command_line() -> str:
    """The command line of this process, to be run again."""
    arguments, words = sys.orig_argv[1:], subcommand()
    if not words:
        return shlex.join(["python", *arguments])
    rest = arguments[arguments.index(words[0]) + 1 :]
    return f"{command(words[0])} {shlex.join(rest)}"
