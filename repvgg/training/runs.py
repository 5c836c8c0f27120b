"""The folders of runs: which one is gone on from, and which process may write into it."""

import os
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from repvgg import cli
from repvgg.training import processes

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

RUNS = Path("runs")
LAST = Path("checkpoints", "last.ckpt")  # in the folder of a run
CONFIG, OVERRIDES, CHOICES = (
    Path(".hydra", name) for name in ("config.yaml", "overrides.yaml", "hydra.yaml")
)

# Keys that may be typed beside `resume`; the others are part of what is resumed.
RESUMABLE = (
    "data.root",
    "data.num_workers",
    "data.cache_size",
    "data.max_pixels",
    "data.skip_unreadable",
    "data.batch_size",
    "optim.lr",
    "trainer.max_epochs",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.accumulate_grad_batches",
    "trainer.precision",
    "trainer.gradient_clip_val",
    "trainer.check_val_every_n_epoch",
    "trainer.log_every_n_steps",
    "trainer.enable_progress_bar",
    "trainer.profiler",
    "compile",
    "channels_last",
    "activation_checkpointing",
    "keep_memory",
)
# Keys of version 0.1 that later versions lack, each with the value that changed nothing.
REMOVED = {"rdrop_views": 1, "data.repeats": 1}
# Code that a recorded configuration may name, whole: a dotted name also reaches what its module
# imports. Anything else has to be typed again.
_OWN_CODE = re.compile(
    r"repvgg\.data\.(digits|cifar10|cifar100|imagefolder)|lightning\.Trainer"
    r"|lightning\.pytorch\.(callbacks|loggers|profilers)\.[A-Z]\w*"
)


def plan(arguments: cli.Arguments) -> cli.Plan:
    """Go on from a run for `resume=PATH`: with its recorded configuration, in its folder.

    `resume=auto` takes the run in `hydra.run.dir`, or starts it where it was never saved: what a
    job types that a cluster may start again. Without that key it takes the newest run in runs/.
    Configurations and defaults of today do not count. What is typed beside `resume` is compared
    with what was recorded, value by value; only RESUMABLE may differ.

    Raises:
        ValueError: there is nothing to go on from, or an argument would change what is resumed.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    typed = OverridesParser.create().parse_overrides(arguments.overrides)
    given = next((one.value() for one in reversed(typed) if one.key_or_group == "resume"), None)
    if given is None:
        return cli.Plan(arguments)
    if cli.SWEEP & set(arguments.options):
        raise ValueError("-m: a sweep starts new runs; type resume= without -m, a run at a time")
    folders = [str(one.value()) for one in typed if one.key_or_group == "hydra.run.dir"]
    if given == "auto":
        path = _newest(folders)
        if path is None:
            others = [one.input_line for one in typed if one.key_or_group != "resume"]
            return cli.Plan(cli.Arguments(arguments.options, [str(line) for line in others]))
    else:
        path = Path(str(given)).expanduser()
    if not path.is_file():
        raise ValueError(f"resume={path}: there is no such file; give a run's last.ckpt")
    folder = path.absolute().parent.parent
    if not (folder / CONFIG).is_file():
        raise ValueError(f"resume={path}: not in the folder of a run, which holds {CONFIG}")
    if {"--cfg", "-c", "--info", "-i"} & {one.partition("=")[0] for one in arguments.options}:
        raise ValueError(f"resume={path}: it goes on as {folder / CONFIG} says; look there")
    if folders and Path(folders[-1]).expanduser().absolute() != folder:
        raise ValueError(
            f"hydra.run.dir={folders[-1]}: a resumed run goes on in its own folder, {folder}; "
            "leave hydra.run.dir out"
        )
    recorded = read_config(folder)
    changed = _changes(typed, recorded, folder)

    def complete(composed: dict[str, Any]) -> dict[str, Any]:
        _require_own_code(recorded, composed, typed, folder)
        config = _with_missing(recorded, composed)
        for key, value in changed.items():
            _set(config, key, value)
        config["resume"] = str(path)
        return config

    place = cli.quote_path(f"hydra.run.dir={folder}")
    composing = [str(one.input_line) for one in typed if _is_composed(one, arguments.options)]
    again = [
        cli.quote_path(f"resume={path}") if one.key_or_group == "resume" else str(one.input_line)
        for one in typed
    ]
    return cli.Plan(
        cli.Arguments(arguments.options, [*composing, place]),
        complete,
        [*arguments.options, *again],
    )


def describe_changes(config: dict[str, Any], folder: Path) -> list[str]:
    """A line for what a resumed run takes over, and one for each value that is another now."""
    recorded = read_config(folder)
    lines = [f"goes on from {relative(folder / LAST)}, as {relative(folder / CONFIG)} says"]
    for key, before in _leaves(recorded):
        value = _get(config, key)
        if key != "resume" and value != before:
            lines.append(f"{key}={value}, before {before}")
    for key, value in _leaves(config):
        if _get(recorded, key, missing=...) is ... and key in RESUMABLE:
            lines.append(f"{key}={value}, before not set")
    return lines


def record(config: dict[str, Any], folder: Path) -> None:
    """Write down what a run was given: the truth for `resume`, and for the reader."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    (folder / CONFIG).parent.mkdir(exist_ok=True)
    resumed = config["resume"] is not None
    if not resumed:  # a resumed run's are those of its first start
        hydra = HydraConfig.get()
        choices = {"hydra": {"runtime": {"choices": hydra.runtime.choices}}}
        write_whole(folder / OVERRIDES, OmegaConf.to_yaml(hydra.overrides.task))
        write_whole(folder / CHOICES, OmegaConf.to_yaml(OmegaConf.create(choices)))
    write_whole(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(config | {"resume": None})))


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of the run in a folder, as it was recorded, without REMOVED keys.

    Raises:
        ValueError: a removed key has a value that this version cannot honour.
    """
    from omegaconf import OmegaConf

    config = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(folder / CONFIG)))
    for key in REMOVED:
        *sections, leaf = key.split(".")
        section = _get(config, ".".join(sections)) if sections else config
        if isinstance(section, dict) and leaf in section:
            _check_removed(key, section.pop(leaf), folder)
    return config


def _changes(typed: list["Override"], recorded: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What was typed beside `resume` that is not what was recorded."""
    from omegaconf import OmegaConf

    choices = _recorded_choices(folder)
    changes: dict[str, Any] = {}
    for one in typed:
        key, line = one.key_or_group, one.input_line
        if key == "resume" or key.startswith(("hydra.", "hydra/")):
            continue
        if key in REMOVED:
            _check_removed(key, one.value(), folder)
            continue
        if one.is_sweep_override() or one.is_delete():
            raise ValueError(f"{line}: beside resume type key=value, with one value")
        before = _get(recorded, key)
        if key in choices or "/" in key or (isinstance(before, dict) and one.value() != before):
            before, same = choices.get(key), str(one.value()) == choices.get(key)
        else:
            draft = OmegaConf.create(recorded)
            OmegaConf.update(draft, key, one.value(), force_add=True)
            value = _get(cast(dict[str, Any], OmegaConf.to_container(draft, resolve=True)), key)
            same = value == before and _get(recorded, key, missing=...) is not ...
            if not same and key in RESUMABLE:
                changes[key] = value
                same = True
        if not same:
            raise ValueError(
                f"{line}: the run was started with {key}={before}, and a resumed run keeps what it "
                f"was started with; allowed beside resume are {', '.join(RESUMABLE)}"
            )
    return changes


def _check_removed(key: str, value: object, folder: Path) -> None:
    if value != REMOVED[key]:
        raise ValueError(
            f"resume={relative(folder / LAST)}: {key}={value} needs version 0.1; later versions "
            f"have no {key}"
        )


def _recorded_choices(folder: Path) -> dict[str, str]:
    """The file that was chosen of each group; runs of 0.1 noted those that were typed."""
    from omegaconf import OmegaConf

    if (folder / CHOICES).is_file():
        found = OmegaConf.select(OmegaConf.load(folder / CHOICES), "hydra.runtime.choices")
        return {str(key): str(value) for key, value in (found or {}).items()}
    lines: Any = OmegaConf.load(folder / OVERRIDES) if (folder / OVERRIDES).is_file() else []
    pairs = (str(line).partition("=") for line in lines)
    defaults = {"model": "repvgg_a0", "data": "digits", "experiment": "None"}
    return defaults | {key: value for key, _, value in pairs if key in defaults}


def _require_own_code(
    recorded: dict[str, Any], composed: dict[str, Any], typed: list["Override"], folder: Path
) -> None:
    """Run no code that only a file in the run's folder names: it may be somebody else's."""
    named = {str(one.value()) for one in typed if one.key_or_group.endswith("_target_")}
    named |= {str(value) for key, value in _leaves(composed) if key.endswith("_target_")}
    for key, target in _leaves(recorded):
        if not key.endswith("_target_") or _OWN_CODE.fullmatch(str(target)) or target in named:
            continue
        raise ValueError(
            f"resume={relative(folder / LAST)}: {relative(folder / CONFIG)} names code that is not "
            f"this project's; if you know it, type {key}={target} too"
        )


def _with_missing(recorded: dict[str, Any], composed: dict[str, Any]) -> dict[str, Any]:
    """What was recorded, with today's default for keys that were not there yet."""
    config = composed | recorded
    for section in ("optim", "trainer"):
        config[section] = composed[section] | recorded[section]
    return {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}


def _is_composed(override: "Override", options: list[str]) -> bool:
    """Whether Hydra is to see an argument of a resumed run: all where the user names configs."""
    key = override.key_or_group
    own_configs = any(option.lstrip("-").startswith("c") for option in options)
    return key not in ("resume", "hydra.run.dir") and (key.startswith("hydra") or own_configs)


def _leaves(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list) and any(isinstance(part, dict | list) for part in value):
            yield from _leaves({str(i): part for i, part in enumerate(value)}, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _get(config: Any, key: str, missing: Any = None) -> Any:
    for part in key.split("."):
        if isinstance(config, list) and part.isdigit() and int(part) < len(config):
            config = config[int(part)]
        elif isinstance(config, dict) and part in config:
            config = config[part]
        else:
            return missing
    return config


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config[leaf] = value


def check_folder(folder: Path, *, resumed: bool, chosen: bool) -> None:
    """Refuse to write into another run's folder, or into one for each of several processes.

    Args:
        folder: of this run.
        resumed: it goes on from a checkpoint there.
        chosen: the user typed it.

    Raises:
        ValueError: likewise.
    """
    if processes.started_together() and not (chosen or resumed):
        raise ValueError(
            "hydra.run.dir is missing: processes that are started together need one folder; type "
            "hydra.run.dir=runs/NAME"
        )
    last = folder / LAST
    if processes.rank() == 0 and not resumed and last.exists():
        raise ValueError(
            f"{relative(folder)} belongs to another run: type resume={shlex.quote(relative(last))} "
            "to go on from it, or give another hydra.run.dir"
        )


def discard_if_empty(folder: Path) -> None:
    """Remove the folder Hydra made for a run that was refused, and empty ones above it in runs/."""
    runs = cli.start_folder() / RUNS
    for path in (folder, *(above for above in folder.parents if above.is_relative_to(runs))):
        if path in (Path.cwd(), cli.start_folder()) or not path.is_dir() or any(path.iterdir()):
            return
        path.rmdir()


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is old or new, whenever the process is killed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def relative(path: Path) -> str:
    """A path as the user would type it from where the command was typed."""
    start = cli.start_folder()
    path = start / path
    return os.path.relpath(path, start) if path.is_relative_to(start) else str(path)


def _newest(folders: Iterable[str]) -> Path | None:
    """The checkpoint that `resume=auto` means; None where a chosen folder has none yet."""
    for folder in folders:
        path = Path(folder).expanduser() / LAST
        return path if path.exists() else None
    found = RUNS.rglob(str(LAST))
    if newest := max(found, key=lambda path: path.stat().st_mtime, default=None):
        return newest
    raise ValueError(
        "resume=auto: there is no checkpoints/last.ckpt in runs/; start a run without resume, or "
        "name the folder with hydra.run.dir=runs/NAME"
    )
