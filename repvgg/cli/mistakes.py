"""Mistakes of the user, in one line on stderr.

Hydra and Python report mistakes in many lines, and the library's errors name its own arguments.
Here they become one line that names keys of the command line.
"""

import contextlib
import difflib
import errno
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, cast

from repvgg.checks import ArgumentError, did_you_mean, escape, listed
from repvgg.cli import habits
from repvgg.cli.names import command, program
from repvgg.targets import is_from_user_code

FULL_ERROR = "HYDRA_FULL_ERROR"  # =1 shows tracebacks

FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk
LONGEST = 600  # characters of a message

PLUGINS = (  # of the extra `sweep`
    "hydra/sweeper=optuna",
    *(f"hydra/launcher={name}" for name in ("joblib", "submitit_local", "submitit_slurm")),
)

Config = Mapping[str, object]  # a configuration of plain types, as Hydra composed it


def explain(error: Exception, config: Path, settings: Mapping[str, object]) -> str | None:
    """One line for a mistake of the user; None for a bug, and for errors of the user's own code.

    Args:
        config: the file of the root configuration.
        settings: the composed configuration, whose keys replace the names of arguments.
    """
    from hydra.errors import (
        ConfigCompositionException,
        HydraException,
        MissingConfigException,
        OverrideParseException,
    )
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if is_from_user_code(error):
        return None
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, given = _passed_choice(str(error.missing_cfg_file), sys.argv[1:])
        if f"{group}={given}" in PLUGINS:
            return f'{group}={given}: the package is missing; pip install "repvgg[sweep]"'
        hint = did_you_mean(given.lower(), error.options)
        if hint == "" and (instead := habits.choice(group, given)):
            hint = f"{instead}; "
        return (
            f"{group}={given}: there is no such choice; {hint}"
            f"allowed are {listed(given.lower(), error.options)}"
        )
    if isinstance(error, OverrideParseException):
        given = str(error.override)
        if "=" not in given and os.path.exists(given):
            meant: str | None = f"pass ckpt={given}"
            if config.stem == "train":
                meant = f"pass init={given} or resume={given}"
                if os.path.isdir(given):
                    meant = habits.choice("data", given)
            return f"{given}: is no key=value; {meant}"
        return (
            f"cannot parse '{error.override}'; pass key=value, and quote a value that holds "
            f"spaces or any of = , ( ) [ ] {{ }}, as in \"key='a b'\""
        )
    if isinstance(error, ConfigCompositionException):
        text = str(error)
        if unknown := re.search(r"Could not override '([^']+)'", text):
            value = re.search(rf"\+{re.escape(unknown[1])}=(\S*)", text)
            return _unknown_key(unknown[1], value[1] if value else "...", config)
        if there := re.search(r"An item is already at '([^']+)'", text):
            value = re.search(rf"'\+\+({re.escape(there[1])}=.*)'", text)
            without = value[1] if value else f"{there[1]}=VALUE"
            return f"+{without}: this key exists; pass {without}, without a plus"
        if missing := re.search(r"Could not delete from config\. '([^']+)' does not exist", text):
            hint = did_you_mean(missing[1], known_keys(config))
            return f"~{missing[1]}: there is no such key; {hint}".rstrip("; ")
    if "Config group override must be a string" in str(error) or _is_of_defaults(error):
        return _not_a_choice(config, sys.argv[1:])
    if isinstance(error, YAMLError):  # of --shell-completion, which reads arguments as YAML
        return " ".join(str(error).split())
    cause = error.__cause__
    if isinstance(error, HydraException | OmegaConfBaseException):
        if "does not support sweep type" in str(error):
            return "interval(...): a sweep takes values or range(...); pass hparams_search=optuna"
        # The constructor's own error is the cause; Hydra wraps it with the name of the class.
        target = re.search(r"target '([^']+)'", str(error))
        if missing := re.search(r"Error locating target '([^']+)'", str(error)):
            return f"{missing[1]}: there is no such class or function"
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(cause))
        if isinstance(cause, TypeError) and target and unknown:
            return f"{unknown[1]}: {target[1]} takes no argument of that name"
        by_lightning = type(cause).__name__ == "MisconfigurationException"
        if cause is not None and (isinstance(cause, ValueError) or by_lightning):
            return name_keys(cause, settings)
        return name_keys(error, settings)
    if isinstance(error, ValueError | OSError):
        return name_keys(error, settings)
    return not_enough_memory(error)


def not_enough_memory(error: Exception) -> str | None:
    """One line if memory could not be allocated, on the CPU or a GPU; None for other errors."""
    text = str(error)
    of_torch = "can't allocate memory" in text or "out of memory" in text
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and of_torch):
        return None
    size = re.search(r"allocate ([\d.]+ \w+)", text)
    return (
        f"there is not enough memory{f' for {size[1]}' if size else ''}: pass a smaller "
        "batch_size, or smaller images"
    )


def _unknown_key(given: str, value: str, config: Path) -> str:
    """The line for a key that the composed configuration lacks."""
    if "@" in given:  # model@experiment.model
        return f"{given}: the file that overrides it must begin with # @package _global_"
    if "/" in given:
        return f"{given}: the chosen configs have no such group; --help lists the groups"
    keys = known_keys(config)
    groups = unchosen_groups(config, keys)
    if instead := habits.key(given, value, [*keys, *groups]):
        return f"{given}: there is no such key; {instead}"
    if given in keys:
        return f"{given}: these choices do not set it; +{given}=... adds it"
    section, _, name = given.rpartition(".")
    group, _, choice = section.partition(".")
    if group in groups:
        choices = sorted(path.stem for path in (config.parent / group).glob("*.yaml"))
        return f"{given}: pass {group}=NAME too, one of {listed(choice, choices)}"
    if choice and os.path.isfile(config.parent / group / f"{choice}.yaml"):
        return f"{given}: pass {group}={choice} too, which sets it"
    siblings = [key for key in keys if key.rpartition(".")[0] == section]
    near = difflib.get_close_matches(name, [key.rpartition(".")[2] for key in siblings], n=1)
    hint = f"did you mean {section}.{near[0]}? " if section and near else ""
    if not section or not siblings:
        hint = did_you_mean(given, keys)
    beside = siblings or [key for key in keys if "." not in key]
    adds = f"; +{given}={value} adds a key" if section else ""
    shown = listed(given, beside)
    return f"{given}: there is no such key; {hint}allowed beside it are {shown}{adds}"


def _passed_choice(missing: str, arguments: Iterable[str]) -> tuple[str, str]:
    """The group and the choice of a config that Hydra did not find; the choice may be a path."""
    for argument in arguments:
        group, _, given = argument.lstrip("+").partition("=")
        if f"{group}/{given}" == missing:
            return group, given
    group, _, given = missing.rpartition("/")
    return group, given


def _not_a_choice(config: Path, arguments: Iterable[str]) -> str:
    """The line for what is no name in the place of a group's choice, which Hydra rejects."""
    for argument in arguments:
        group, _, given = argument.partition("=")
        choices = sorted(path.stem for path in (config.parent / group).glob("*.yaml"))
        if given.lower() in ("true", "false", "null") and choices:
            return f"{argument}: must be one of {', '.join(choices)}; ~{group} leaves the group out"
        if given.startswith("[") and choices:
            return f"{argument}: must be names; allowed are {listed('', choices)}"
    return "true, false, null and lists of lists are no choices of a group; pass names"


def _is_of_defaults(error: Exception) -> bool:
    """Whether Hydra failed while it looked for the chosen configurations."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, TypeError | AttributeError) and any(
        frame.filename.endswith("defaults_list.py") for frame in frames[-2:]
    )


def name_keys(error: BaseException, config: Mapping[str, object]) -> str:
    """The message of an error in one line; an argument becomes its key: root -> data.root."""
    text = one_line(error)
    for name in error.names if isinstance(error, ArgumentError) else ():
        keys = [
            f"{section}.{name}"
            for section, held in config.items()
            if isinstance(held, dict) and name in held
        ]
        if len(keys) > 1:  # model.name and optim.name: the one that has the value
            keys = [key for key in keys if f"{name}={_value(config, key)}:" in text]
        if len(keys) == 1 and name not in config:
            text = re.sub(rf"(?<![\w./]){re.escape(name)}(?==|:| is missing)", keys[0], text)
    return text


def _value(config: Mapping[str, object], key: str) -> object:
    section, _, name = key.partition(".")
    return cast(Config, config[section])[name]


@contextlib.contextmanager
def suggest_import(path: str | Path) -> Iterator[None]:
    """Name `repvgg import` where opening a checkpoint needs arguments that only it takes."""
    try:
        yield
    except ArgumentError as error:
        if not {*error.names} <= {"weights", "strides", "bn_eps", "mean", "std"}:
            raise
        convert = f"{command('import')} path={shlex.quote(str(path))}"
        given = " ".join(f"{name}=..." for name in error.names)
        raise ValueError(f"{error}; {convert} {given} converts the file") from error


def known_keys(config: Path) -> list[str]:
    """Every key of a root configuration, dotted, and its groups."""
    import hydra
    from omegaconf import OmegaConf

    with hydra.initialize_config_dir(str(config.parent), version_base="1.3"):
        composed = hydra.compose(config.stem)
    keys: list[str] = []

    def collect(node: Config, prefix: str) -> None:
        for key, value in node.items():
            keys.append(prefix + key)
            if isinstance(value, dict):
                collect(value, f"{prefix}{key}.")

    collect(cast(Config, OmegaConf.to_container(composed, resolve=False)), "")
    return keys


def unchosen_groups(config: Path, keys: Container[str]) -> list[str]:
    """The groups of a root configuration whose choice is null, and which are in no key."""
    from omegaconf import OmegaConf

    defaults = cast(list[object], OmegaConf.select(OmegaConf.load(config), "defaults") or [])
    chosen = [cast(Config, entry) for entry in defaults if not isinstance(entry, str)]
    groups = [str(name) for entry in chosen for name in entry]
    return [name for name in groups if name.isidentifier() and name not in keys]


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    if isinstance(error, OSError) and error.errno in FULL:
        place = f" for {error.filename}" if error.filename else ""
        return (
            f"the disk is full{place} ({error.strerror}): what was whole before is kept; free some "
            "space, or pass another folder, and run it again"
        )
    return " ".join(str(error).split())


def end_if_stopped(arrived: Sequence[int]) -> None:
    """Exit as a signal asks, if one arrived: what it raised may have become another error."""
    if arrived and arrived[0] == signal.SIGINT:
        fail("stopped by Ctrl-C", 128 + signal.SIGINT)
    if arrived:
        sys.exit(128 + arrived[0])


def fail(message: str, status: int = 1) -> NoReturn:
    """Print one line on stderr and exit; the middle of a very long one is left out."""
    message = escape(message)
    if len(message) > LONGEST:
        message = f"{message[: LONGEST * 3 // 4]} ... {message[-LONGEST // 5 :]}"
    over = "\r" if sys.stderr.isatty() else ""  # the ^C that a terminal echoes
    with contextlib.suppress(OSError):  # the terminal was closed
        print(f"{over}{program()}: {message}", file=sys.stderr, flush=True)
    sys.exit(status)
