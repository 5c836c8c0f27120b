"""Commands that Hydra configures.

Hydra's grammar cannot take every path, so `run` quotes them. What Hydra reports becomes one line.
Everything else stays Hydra's.
"""

import contextlib
import errno
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn, cast

from repvgg import streams
from repvgg.checks import brief, escape
from repvgg.cli.mistakes import FULL_ERROR, Config, end_if_stopped, explain, fail
from repvgg.cli.names import command, subcommand
from repvgg.signals import end_at_once, end_on_signals
from repvgg.targets import is_from_user_code, keep_users_frames

PATH_KEYS = ("ckpt", "out", "init", "resume", "verify", "data.root", "hydra.run.dir")
RUNS = Path("runs")  # the folder of all runs that are not placed elsewhere
SWEEP = {"-m", "--multirun"}

Job = Callable[[Config, Path], float | None]


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
        return [*self.overrides, *self.options]  # --info may have a value, and takes the next


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


def run(
    job: Job,
    config: Path,
    *,
    prepare: Callable[[Arguments], Plan] = Plan,
) -> None:
    """Compose a configuration from the command line and do a job with it.

    A user's mistake ends in one line on stderr and status 1. HYDRA_FULL_ERROR=1 shows a traceback
    instead. In a sweep (`-m`) the other jobs run after one fails, and a table shows them all.

    Args:
        job: called with the configuration, of plain types, and the folder of the run. Relative
            paths start from the folder of the command, also under hydra.job.chdir. A search
            optimizes what it returns.
        config: the file of the root configuration.
        prepare: plans what the command line comes to.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig, OmegaConf

    from repvgg.cli.sweeps import Record, Sweep, register_resolvers

    failures: list[Exception] = []
    settings: Config = {}
    sweep = started = False
    given, words = sys.argv[1:], subcommand()
    plan = Plan(Arguments([], []))
    show_traceback = os.environ.get(FULL_ERROR) == "1"

    @hydra.main(version_base="1.3", config_path=str(config.parent), config_name=config.stem)
    def main(composed: DictConfig) -> float | None:
        if Sweep.current is None:
            return do(composed, None)
        with Sweep.current.job() as record:
            return do(composed, record)

    def do(composed: DictConfig, record: Record | None) -> float | None:
        nonlocal sweep, started, settings
        folder = Path(HydraConfig.get().runtime.output_dir)
        sweep, started = HydraConfig.get().mode == RunMode.MULTIRUN, True
        streams.Streams.works = True
        again = plan.arguments.line() if plan.again is None else plan.again
        sys.argv[1:] = [*words, *again]  # Lightning repeats these for each device
        try:
            plain = cast(Config, OmegaConf.to_container(composed, resolve=True))
            settings = plan.complete(plain)
            if HydraConfig.get().job.chdir:
                settings = absolute(settings, Path(HydraConfig.get().runtime.cwd))
            value = job(settings, folder)
            if record is not None:
                record.status, record.value = "done", value
            return value
        except Exception as error:
            end_if_stopped(arrived)
            # Raised below: Hydra would report it in its own words.
            failures.append(error)
            if sweep:
                overrides = " ".join(HydraConfig.get().overrides.task)
                message = explain(error, config, settings)
                print(escape(f"{overrides}: {message or repr(error)}"), file=sys.stderr)
                if message is None or show_traceback:
                    if not show_traceback:
                        keep_users_frames(error)
                    traceback.print_exception(error)
                if record is not None:
                    record.status, record.message = "failed", message or repr(error)
            return None  # which no search takes for a value
        finally:
            discard_if_empty(folder)

    os.environ[FULL_ERROR] = "1"  # makes Hydra raise its errors instead of printing them
    OmegaConf.register_new_resolver("command", command, replace=True)  # for the help texts
    register_resolvers()
    Sweep.current, failed = None, 0
    arrived = end_on_signals()
    threading.excepthook = lambda failed: report_thread(failed.exc_value, failed.thread)
    try:
        plan = prepare(parse_arguments(given[len(words) :]))
        try:
            with hydra_arguments(plan.arguments):
                main()
        finally:
            if Sweep.current is not None:
                failed = sum(one.status == "failed" for one in Sweep.current.report())
        if sweep:
            failed = failed or len(failures)
        if failed:
            fail(f"{failed} of the sweep's jobs failed")
        if failures:
            raise failures[0]
        streams.end()
        end_at_once()
    except KeyboardInterrupt:
        end_if_stopped([signal.SIGINT])
    except Exception as error:
        end_if_stopped(arrived)
        message = explain(error, config, settings)
        if message is None and not show_traceback and is_from_user_code(error):
            keep_users_frames(error)
            traceback.print_exception(error)
            sys.exit(1)
        if message is None or show_traceback:
            raise
        if failed:
            message = f"{failed} of the sweep's jobs failed; {message}"
        long_key = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG  # as a group
        if isinstance(error, OSError) and error.filename and not started and not long_key:
            # By Hydra, for the run.
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
        raise ValueError(f"{message}; pass key=value without dashes, --help shows all keys")

    parser.error = reject  # type: ignore[method-assign]  # argparse has no other way not to exit
    overrides = parser.parse_intermixed_args(arguments).overrides
    options, rest = [], [*overrides]
    for argument in arguments:
        if rest and argument == rest[0]:
            del rest[0]
        else:
            options.append(argument)
    return Arguments(options, [quote_path(argument) for argument in overrides])


def report_thread(error: BaseException | None, thread: threading.Thread | None = None) -> None:
    """One line for what ended a thread.

    Nothing for one that keeps its error, as the writer of TensorBoard's events, which raises it
    in the main thread.
    """
    if error is not None and getattr(thread, "exception", None) is error:
        return
    if error is not None and is_from_user_code(error):
        traceback.print_exception(error)
    else:
        print(escape(f"a thread ended: {brief(error)}"), file=sys.stderr, flush=True)


def discard_if_empty(folder: Path) -> None:
    """Remove the folder that Hydra made for a run, and those above it in runs/, if empty."""
    start = start_folder()
    runs = start / RUNS
    for path in (folder, *(above for above in folder.parents if above.is_relative_to(runs))):
        if path == start or not path.is_dir() or any(path.iterdir()):
            return
        if path == Path.cwd():  # by hydra.job.chdir; Hydra leaves it only later
            os.chdir(start)
        path.rmdir()


def start_folder() -> Path:
    """The folder of the command; hydra.job.chdir leaves it."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.cwd) if HydraConfig.initialized() else Path.cwd()


def absolute(config: Config, folder: Path, prefix: str = "") -> Config:
    """A copy of a configuration whose relative paths start from a folder."""
    changed: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            changed[key] = absolute(value, folder, f"{prefix}{key}.")
        elif prefix + key in PATH_KEYS and isinstance(value, str) and "://" not in value:
            changed[key] = str(folder / value)
    return {**config, **changed}


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
