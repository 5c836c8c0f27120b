"""What the command lines share: Hydra, arguments it can parse, mistakes told in one line.

Hydra's grammar cannot take every path, and Hydra and Python tell mistakes in many lines. `run`
prepares the one and shortens the other; everything else stays Hydra's.
"""

import contextlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

from repvgg import signals
from repvgg.checks import did_you_mean, refusal

PATH_KEYS = ("ckpt", "out", "init", "resume", "verify", "data.root", "hydra.run.dir")
SWEEP = {"-m", "--multirun"}
FULL_ERROR = "HYDRA_FULL_ERROR"

Job = Callable[[dict[str, Any], Path], None]


class Arguments(NamedTuple):
    """A command line.

    Attributes:
        options: of Hydra's own: -m, --config-dir DIR, --cfg job.
        overrides: key=value, with paths in quotes where Hydra's grammar needs them.
    """

    options: list[str]
    overrides: list[str]


class Plan(NamedTuple):
    """What a command line comes to.

    Attributes:
        arguments: what Hydra composes.
        complete: makes the job's configuration of the composed one.
        again: the arguments of a process that is to do the same; None takes `arguments`.
    """

    arguments: Arguments
    complete: Callable[[dict[str, Any]], dict[str, Any]] = dict
    again: list[str] | None = None


def run(
    job: Job,
    config: Path,
    *,
    prepare: Callable[[Arguments], Plan] = Plan,
) -> None:
    """Compose a configuration from the command line and do a job with it.

    A user's mistake ends in one line on stderr and status 1; with HYDRA_FULL_ERROR=1 in a
    traceback. In a sweep (`-m`) a job that fails does not keep the others from running.

    Args:
        job: called with the configuration, of plain types, and the folder of the run. Its paths are
            those of the folder in which the command was typed, whatever hydra.job.chdir says.
        config: the file of the root configuration.
        prepare: plans what the command line comes to.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig, OmegaConf

    failures: list[Exception] = []
    sweep = False
    plan = Plan(Arguments([], []))
    process = os.getpid()

    @hydra.main(version_base="1.3", config_path=str(config.parent), config_name=config.stem)
    def main(composed: DictConfig) -> None:
        nonlocal sweep
        sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        plain = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
        if not sweep and plan.again is not None:  # Lightning repeats these for each device
            sys.argv[1:] = plan.again
        try:
            complete = plan.complete(plain)
            if HydraConfig.get().job.chdir:
                make_absolute(complete, Path(HydraConfig.get().runtime.cwd))
            job(complete, Path(HydraConfig.get().runtime.output_dir))
        except Exception as error:
            # Raised below: from here, Hydra would announce it in its own words.
            failures.append(error)
            if sweep:
                overrides = " ".join(HydraConfig.get().overrides.task)
                message = explain(error, config)
                print(f"{overrides}: {message or repr(error)}", file=sys.stderr)
                if message is None:
                    traceback.print_exception(error)
            if os.getpid() != process:  # of a launcher, where `failures` is a copy
                raise

    show_traceback = os.environ.get(FULL_ERROR) == "1"
    os.environ[FULL_ERROR] = "1"  # makes Hydra raise its errors instead of printing them
    end_on_signals()
    try:
        plan = prepare(parse_arguments(sys.argv[1:]))
        sys.argv[1:] = [*plan.arguments.options, *plan.arguments.overrides]
        main()
        if failures and sweep and not show_traceback:
            fail(f"{len(failures)} of the sweep's jobs failed")
        if failures:
            raise failures[0]
    except KeyboardInterrupt:
        fail("stopped by Ctrl-C", 128 + signal.SIGINT)
    except Exception as error:
        message = explain(error, config)
        if message is None or show_traceback:
            raise
        fail(message)


def parse_arguments(arguments: list[str]) -> Arguments:
    """Part a command line into Hydra's options, wherever they stand, and key=value.

    Raises:
        ValueError: an option is unknown, or its value is missing.
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"{message}; type key=value, or --help to see what can be set")

    parser.error = refuse  # type: ignore[method-assign]
    overrides = parser.parse_intermixed_args(arguments).overrides
    options, rest = [], [*overrides]
    for argument in arguments:
        if rest and argument == rest[0]:
            del rest[0]
        else:
            options.append(argument)
    return Arguments(options, [quote_path(argument) for argument in overrides])


def start_folder() -> Path:
    """The folder in which the command was typed; hydra.job.chdir leaves it."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.cwd) if HydraConfig.initialized() else Path.cwd()


def make_absolute(config: dict[str, Any], folder: Path) -> None:
    """Make the paths of a configuration, in place, those of a folder."""
    for key in PATH_KEYS:
        *sections, leaf = key.split(".")
        held: Any = config
        for section in sections:
            held = held.get(section) if isinstance(held, dict) else None
        path = held.get(leaf) if isinstance(held, dict) else None
        if isinstance(path, str) and "://" not in path:
            held[leaf] = str(folder / path)


class Unset(NamedTuple):
    """Stands among a script's defaults for a value of some kind that is None unless it is typed."""

    kind: type
    example: str


def script(job: Callable[[dict[str, Any]], None], text: str, defaults: dict[str, Any]) -> None:
    """Do a job with settings typed as key=value, without a configuration file.

    Mistakes are told as in `run`. `--help` prints the text and the settings.

    Args:
        job: called with the settings, of plain types.
        text: what the script does.
        defaults: every key and its value; None is a path or a word that is not set.
    """
    from omegaconf import OmegaConf

    unset = {key: value for key, value in defaults.items() if isinstance(value, Unset)}
    settings = defaults | dict.fromkeys(unset)
    end_on_signals()
    try:
        for argument in sys.argv[1:]:
            if argument in ("-h", "--help"):
                print(f"{text.strip()}\n\nKeys and what they are now:\n")
                print(OmegaConf.to_yaml(OmegaConf.create(settings)).strip())
                for key, (_, example) in unset.items():
                    print(f"\n{key} is, for example, {example}", end="")
                print()
                return
            key, value = _parse(argument, defaults)
            settings[key] = value
        job(settings)
    except KeyboardInterrupt:
        fail("stopped by Ctrl-C", 128 + signal.SIGINT)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get(FULL_ERROR) == "1":
            raise
        fail(_one_line(error))


def _parse(argument: str, defaults: dict[str, Any]) -> tuple[str, Any]:
    """A setting typed as key=value; a default of a kind keeps its kind, None is a path."""
    from omegaconf import OmegaConf

    key, equals, typed = argument.partition("=")
    if not equals or key not in defaults:
        raise ValueError(
            f"{argument}: there is no such key; {did_you_mean(key, defaults)}"
            f"type key=value, allowed are {', '.join(defaults)}"
        )
    default = defaults[key]
    if default is None or isinstance(default, str) or (typed, type(default)) == ("null", Unset):
        return key, None if typed == "null" else os.path.expanduser(typed)
    try:
        parsed = OmegaConf.from_dotlist([argument])
        value = cast(dict[str, Any], OmegaConf.to_container(parsed, resolve=True))[key]
    except Exception:  # the parser of YAML has its own, and so has that of interpolations
        value = None
    shown = str(default).replace(" ", "").replace("'", "").lower()
    kind, example = default if isinstance(default, Unset) else (type(default), shown)
    kinds = {bool: "true or false", list: "a list", int: "a number", float: "a number"}
    allowed = int | float if kind in (int, float) else kind
    if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
        raise refusal(key, typed, f"must be {kinds[kind]}", example)
    return key, value


def end_on_signals() -> None:
    """End with 128 + the number of a signal, with what has to be tidied up; Ctrl-C is Python's."""
    for number in signals.stopping():
        if number != signal.SIGINT:
            signal.signal(number, lambda signum, _: sys.exit(128 + signum))


def fail(message: str, status: int = 1) -> NoReturn:
    """Print one line on stderr and exit."""
    with contextlib.suppress(OSError):  # of a terminal that was closed
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def quote_path(argument: str) -> str:
    """Quote the value of `key=path`, and expand `~` in it, so that Hydra takes it as it is."""
    key, equals, value = argument.partition("=")
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if not equals or key.lstrip("+") not in PATH_KEYS or value in ("", "null") or quoted:
        return argument
    # A backslash means itself, but in front of a quote, of ${ or at the end.
    value = os.path.expanduser(value)
    value = re.sub(r"(\\*)('|\$\{|$)", _escape, value)
    return f"{key}='{value}'"


def _escape(match: re.Match[str]) -> str:
    slashes, special = match.groups()
    return 2 * slashes + (f"\\{special}" if special else "")


def explain(error: Exception, config: Path) -> str | None:
    """One line for a mistake of the user, None for an error that is not one."""
    from hydra.errors import (
        ConfigCompositionException,
        HydraException,
        MissingConfigException,
        OverrideParseException,
    )
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, given = str(error.missing_cfg_file).rpartition("/")
        return (
            f"{group}={given}: there is no such choice; {did_you_mean(given, error.options)}"
            f"allowed are {', '.join(error.options)}"
        )
    if isinstance(error, OverrideParseException):
        return (
            f"cannot parse '{error.override}'; type key=value, and quote a value that holds "
            f"spaces or any of = , ( ) [ ] {{ }}, as in \"key='a b'\""
        )
    if isinstance(error, ConfigCompositionException):
        text = str(error)
        if unknown := re.search(r"Could not override '([^']+)'", text):
            given, keys = unknown[1], known_keys(config)
            if given in keys:
                return f"{given}: these choices do not set it; +{given}=... adds it"
            siblings = [key for key in keys if key.rpartition(".")[0] == given.rpartition(".")[0]]
            adds = f"; +{given}=... adds a key" if "." in given else ""
            return (
                f"{given}: there is no such key; {did_you_mean(given, keys)}"
                f"allowed beside it are {', '.join(siblings or keys)}{adds}"
            )
        if missing := re.search(r"Could not delete from config\. '([^']+)' does not exist", text):
            hint = did_you_mean(missing[1], known_keys(config))
            return f"~{missing[1]}: there is no such key; {hint}".rstrip("; ")
    cause = error.__cause__
    if isinstance(error, HydraException | OmegaConfBaseException):
        # A constructor's own refusal is the cause; Hydra wraps it with the name of the class.
        target = re.search(r"target '([^']+)'", str(error))
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(cause))
        if isinstance(cause, TypeError) and target and unknown:
            return f"{unknown[1]}: {target[1]} takes no argument of that name"
        by_lightning = type(cause).__name__ == "MisconfigurationException"
        if cause is not None and (isinstance(cause, ValueError) or by_lightning):
            return _one_line(cause)
        return _one_line(error)
    if isinstance(error, ValueError | OSError):
        return _one_line(error)
    return None


def known_keys(config: Path) -> list[str]:
    """Every key of a root configuration, dotted, and its groups."""
    import hydra
    from omegaconf import OmegaConf

    with hydra.initialize_config_dir(str(config.parent), version_base="1.3"):
        composed = hydra.compose(config.stem)
    keys: list[str] = []

    def collect(node: Any, prefix: str) -> None:
        for key, value in node.items():
            keys.append(prefix + key)
            if isinstance(value, dict):
                collect(value, f"{prefix}{key}.")

    collect(OmegaConf.to_container(composed, resolve=False), "")
    return keys


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
