"""What the command lines share: Hydra, mistakes in one line, the names of the commands.

Hydra's grammar cannot take every path, and Hydra and Python report mistakes in many lines. `run`
quotes the paths and shortens the reports. Everything else stays Hydra's.
"""

import contextlib
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn, cast

from repvgg import signals
from repvgg.checks import ArgumentError, did_you_mean, wrong_value

COMMANDS = {
    "train": "train a network",
    "deploy": "fold, export and verify a trained network",
    "verify": "verify a deployed folder again",
    "predict": "label images with a deployed file",
    "inspect": "show what a checkpoint holds and whether it loads",
    "import": "convert a third-party checkpoint",
}
SCRIPTS = {"train": "train.py", "deploy": "deploy.py"}  # of a clone
PATH_KEYS = ("ckpt", "out", "init", "resume", "verify", "data.root", "hydra.run.dir")
SWEEP = {"-m", "--multirun"}
FULL_ERROR = "HYDRA_FULL_ERROR"

CONFIGS = Path(__file__).absolute().with_name("configs")  # in a wheel
if not CONFIGS.is_dir():  # in a clone
    CONFIGS = CONFIGS.parents[1] / "configs"

Config = dict[str, object]  # a configuration of plain types, as Hydra composed it
Job = Callable[[Config, Path], None]


class Arguments(NamedTuple):
    """A command line, without the name of the command.

    Attributes:
        options: of Hydra's own: -m, --config-dir DIR, --cfg job.
        overrides: key=value, with paths in quotes where Hydra's grammar needs them.
    """

    options: list[str]
    overrides: list[str]

    def line(self) -> list[str]:
        """All of them, as Hydra reads them."""
        return [*self.options, *self.overrides]


class Plan(NamedTuple):
    """What a command line comes to.

    Attributes:
        arguments: what Hydra composes.
        complete: makes the job's configuration of the composed one.
        again: the arguments of a process that is to do the same; None takes `arguments`.
    """

    arguments: Arguments
    complete: Callable[[Config], Config] = dict
    again: list[str] | None = None


def command(name: str) -> str:
    """What to call for a command, in the way in which this process was started.

    "deploy" is `python deploy.py` after `python train.py`, `python -m repvgg deploy` after
    `python -m repvgg train`, and `repvgg deploy` otherwise.
    """
    started = Path(sys.argv[0])
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


def run(
    job: Job,
    config: Path,
    *,
    prepare: Callable[[Arguments], Plan] = Plan,
) -> None:
    """Compose a configuration from the command line and do a job with it.

    A user's mistake ends in one line on stderr and status 1. HYDRA_FULL_ERROR=1 shows a traceback
    instead. In a sweep (`-m`) the other jobs run after one fails.

    Args:
        job: called with the configuration, of plain types, and the folder of the run. Relative
            paths start from the folder of the command, also under hydra.job.chdir.
        config: the file of the root configuration.
        prepare: plans what the command line comes to.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig, OmegaConf

    failures: list[Exception] = []
    settings: Mapping[str, object] = {}
    sweep = started = False
    given, words = sys.argv[1:], subcommand()
    plan = Plan(Arguments([], []))
    process = os.getpid()

    @hydra.main(version_base="1.3", config_path=str(config.parent), config_name=config.stem)
    def main(composed: DictConfig) -> None:
        nonlocal sweep, started, settings
        sweep, started = HydraConfig.get().mode == RunMode.MULTIRUN, True
        plain = cast(Config, OmegaConf.to_container(composed, resolve=True))
        again = plan.arguments.line() if plan.again is None else plan.again
        sys.argv[1:] = [*words, *again]  # Lightning repeats these for each device
        try:
            settings = complete = plan.complete(plain)
            if HydraConfig.get().job.chdir:
                make_absolute(complete, Path(HydraConfig.get().runtime.cwd))
            job(complete, Path(HydraConfig.get().runtime.output_dir))
        except Exception as error:
            # Raised below: Hydra would report it in its own words.
            failures.append(error)
            if sweep:
                overrides = " ".join(HydraConfig.get().overrides.task)
                message = explain(error, config, settings)
                print(f"{overrides}: {message or repr(error)}", file=sys.stderr)
                if message is None:
                    traceback.print_exception(error)
            if os.getpid() != process:  # of a launcher, where `failures` is a copy
                raise

    show_traceback = os.environ.get(FULL_ERROR) == "1"
    os.environ[FULL_ERROR] = "1"  # makes Hydra raise its errors instead of printing them
    OmegaConf.register_new_resolver("command", command, replace=True)  # for the help texts
    end_on_signals()
    try:
        plan = prepare(parse_arguments(given[len(words) :]))
        with hydra_arguments(plan.arguments):
            main()
        if failures and sweep and not show_traceback:
            fail(f"{len(failures)} of the sweep's jobs failed")
        if failures:
            raise failures[0]
    except KeyboardInterrupt:
        fail("stopped by Ctrl-C", 128 + signal.SIGINT)
    except Exception as error:
        message = explain(error, config, settings)
        if message is None or show_traceback:
            raise
        if isinstance(error, OSError) and error.filename and not started:  # by Hydra, for the run
            message += "; change to a folder that you can write to, or pass hydra.run.dir=FOLDER"
        fail(message)


@contextlib.contextmanager
def hydra_arguments(arguments: Arguments) -> Iterator[None]:
    """Put arguments where Hydra reads them, in sys.argv, and the user's own there afterwards."""
    given = sys.argv[1:]
    sys.argv[1:] = arguments.line()
    try:
        yield
    finally:
        sys.argv[1:] = given


def parse_arguments(arguments: list[str]) -> Arguments:
    """Split a command line into Hydra's options, wherever they stand, and key=value.

    Raises:
        ValueError: an option is unknown, or its value is missing.
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()

    def reject(message: str) -> NoReturn:
        raise ValueError(f"{message}; pass key=value, or --help to see all keys")

    parser.error = reject  # type: ignore[method-assign]  # argparse has no other way not to exit
    overrides = parser.parse_intermixed_args(arguments).overrides
    options, rest = [], [*overrides]
    for argument in arguments:
        if rest and argument == rest[0]:
            del rest[0]
        else:
            options.append(argument)
    return Arguments(options, [quote_path(argument) for argument in overrides])


def start_folder() -> Path:
    """The folder of the command; hydra.job.chdir leaves it."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.cwd) if HydraConfig.initialized() else Path.cwd()


def make_absolute(config: Config, folder: Path) -> None:
    """Make the relative paths of a configuration, in place, start from a folder."""
    for key in PATH_KEYS:
        *sections, leaf = key.split(".")
        held: object = config
        for section in sections:
            held = held.get(section) if isinstance(held, dict) else None
        if not isinstance(held, dict):
            continue
        path = held.get(leaf)
        if isinstance(path, str) and "://" not in path:
            held[leaf] = str(folder / path)


class Unset(NamedTuple):
    """A default that is None unless a value of the kind is passed on the command line."""

    kind: type
    example: str


def script(job: Callable[[Config], None], text: str, defaults: Config) -> None:
    """Do a job with settings passed as key=value, without a configuration file.

    Mistakes end as in `run`. `--help` prints the text and the settings.

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
    except KeyboardInterrupt:
        fail("stopped by Ctrl-C", 128 + signal.SIGINT)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get(FULL_ERROR) == "1":
            raise
        fail(_one_line(error))


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
        raise ValueError(
            f"{argument}: there is no such key; {did_you_mean(key, defaults)}"
            f"pass key=value, allowed are {', '.join(defaults)}"
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


def end_on_signals() -> None:
    """Clean up and exit with status 128 + number on a signal; Ctrl-C stays with Python."""
    for number in signals.stopping():
        if number != signal.SIGINT:
            signal.signal(number, lambda signum, _: sys.exit(128 + signum))


def fail(message: str, status: int = 1) -> NoReturn:
    """Print one line on stderr and exit."""
    with contextlib.suppress(OSError):  # the terminal was closed
        print(f"{program()}: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def quote_path(argument: str) -> str:
    """Quote the value of `key=path` for Hydra's grammar, and expand `~` in it."""
    key, equals, value = argument.partition("=")
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if not equals or key.lstrip("+") not in PATH_KEYS or value in ("", "null") or quoted:
        return argument
    # Hydra takes a backslash literally, except before a quote, before ${ and at the end.
    value = os.path.expanduser(value)
    value = re.sub(r"(\\*)('|\$\{|$)", _escape, value)
    return f"{key}='{value}'"


def _escape(match: re.Match[str]) -> str:
    slashes, special = match.groups()
    return 2 * slashes + (f"\\{special}" if special else "")


def explain(error: Exception, config: Path, settings: Mapping[str, object]) -> str | None:
    """One line for a mistake of the user; None for a bug.

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

    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, given = str(error.missing_cfg_file).rpartition("/")
        return (
            f"{group}={given}: there is no such choice; {did_you_mean(given, error.options)}"
            f"allowed are {', '.join(error.options)}"
        )
    if isinstance(error, OverrideParseException):
        return (
            f"cannot parse '{error.override}'; pass key=value, and quote a value that holds "
            f"spaces or any of = , ( ) [ ] {{ }}, as in \"key='a b'\""
        )
    if isinstance(error, ConfigCompositionException):
        text = str(error)
        if unknown := re.search(r"Could not override '([^']+)'", text):
            if "/" in unknown[1]:
                return (
                    f"{unknown[1]}: the chosen configs have no such group; --help lists the groups"
                )
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
    return None


def name_keys(error: BaseException, config: Mapping[str, object]) -> str:
    """The message of an error in one line; an argument becomes its key: root -> data.root."""
    text = _one_line(error)
    for name in error.names if isinstance(error, ArgumentError) else ():
        keys = [
            f"{section}.{name}"
            for section, held in config.items()
            if isinstance(held, dict) and name in held
        ]
        if len(keys) == 1 and name not in config:
            text = re.sub(rf"(?<![\w./]){re.escape(name)}(?==|:| is missing)", keys[0], text)
    return text


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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
