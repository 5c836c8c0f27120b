"""Commands whose settings are key=value, without a configuration file."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

from repvgg.checks import did_you_mean, wrong_value
from repvgg.cli import habits
from repvgg.cli.mistakes import (
    FULL_ERROR,
    Config,
    end_if_stopped,
    fail,
    not_enough_memory,
    one_line,
)
from repvgg.cli.names import subcommand
from repvgg.signals import end_at_once, end_on_signals
from repvgg.targets import is_from_user_code


class Unset(NamedTuple):
    """A default that is None unless a value of the kind is passed on the command line."""

    kind: type
    example: str


def script(job: Callable[[dict[str, object]], None], text: str, defaults: Config) -> None:
    """Do a job with settings passed as key=value, without a configuration file.

    Mistakes end as in `run`. `--help` prints the text and the settings.

    Args:
        job: called with the settings, of plain types.
        text: what the script does.
        defaults: every key and its value; None is a path or a word that is not set.
    """
    from omegaconf import OmegaConf

    unset = {key: value for key, value in defaults.items() if isinstance(value, Unset)}
    settings: dict[str, object] = {**defaults, **dict.fromkeys(unset)}
    arrived = end_on_signals()
    try:
        for argument in sys.argv[1 + len(subcommand()) :]:
            if argument in ("-h", "--help"):
                print(f"{text.strip()}\n\nKeys and their values:\n")
                print(OmegaConf.to_yaml(OmegaConf.create(settings)).strip())
                for key, (_, example) in unset.items():
                    print(f"\n{key} is, for example, {example}", end="")
                print()
                return
            key, value = _parse(argument, defaults)
            settings[key] = value
        job(settings)
        sys.stdout.flush()
        end_at_once()
    except KeyboardInterrupt:
        end_if_stopped([signal.SIGINT])
    except Exception as error:
        end_if_stopped(arrived)
        message = not_enough_memory(error)
        if isinstance(error, ValueError | OSError | ImportError):
            message = one_line(error)
        if message is None or os.environ.get(FULL_ERROR) == "1" or is_from_user_code(error):
            raise
        fail(message)


def given_path(settings: Config, key: str, example: str) -> Path:
    """A path that a script cannot do without.

    Raises:
        ValueError: it was not passed.
    """
    if settings[key] is None:
        raise ValueError(f"{key} is missing: pass {key}={example}")
    return Path(str(settings[key]))


def _parse(argument: str, defaults: Config) -> tuple[str, object]:
    """Parse key=value. The value must be of the default's kind; for None it is a path."""
    from omegaconf import OmegaConf

    key, equals, given = argument.partition("=")
    if not equals or key not in defaults:
        first = f"pass {next(iter(defaults))}={argument}"  # repvgg inspect best.ckpt
        instead = habits.key(key, given, defaults) if equals else first
        hint = f"{instead}; " if instead else f"{did_you_mean(key, defaults)}pass key=value, "
        raise ValueError(
            f"{argument}: there is no such key; {hint}allowed are {', '.join(defaults)}"
        )
    default = defaults[key]
    if default is None or isinstance(default, str) or (given, type(default)) == ("null", Unset):
        return key, None if given == "null" else os.path.expanduser(given)
    value: object
    try:
        value = cast(
            Config, OmegaConf.to_container(OmegaConf.from_dotlist([argument]), resolve=True)
        )[key]
    except Exception:  # YAML and interpolations each have their own
        value = None
    shown = str(default).replace(" ", "").replace("'", "").lower()
    kind, example = default if isinstance(default, Unset) else (type(default), shown)
    kinds = {bool: "true or false", list: "a list", int: "a number", float: "a number"}
    allowed = int | float if kind in (int, float) else kind
    if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
        raise wrong_value(key, given, f"must be {kinds[kind]}", example)
    return key, value
