"""Resume a run with the configuration that it recorded."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from repvgg import cli
from repvgg.checks import listed
from repvgg.cli import Config
from repvgg.training.parts import move_from_trainer
from repvgg.training.settings import section

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

from repvgg.training.runs import CHOICES, CONFIG, LAST, OVERRIDES, read_record, relative

# Keys that may be passed beside `resume`; a resumed run keeps all others.
RESUMABLE = (
    "data.root",
    "data.num_workers",
    "data.cache_size",
    "data.cache",
    "data.max_pixels",
    "data.skip_unreadable",
    "data.download",
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
    "logger.tensorboard.pictures",
)
# Keys of version 0.1 that later versions lack, each with the value that changed nothing.
REMOVED = {"rdrop_views": 1, "data.repeats": 1, "data.erase": 0.0}
# Sections whose parts write files or send what they log.
WRITING = ("logger.", "callbacks.", "trainer.")
# data.augment of version 0.1 -> of later versions.
AUGMENT: dict[str, object] = {"basic": [], "none": None}
# The code that a recorded configuration may name. Names are matched whole, because a dotted name
# also reaches what its module imports. Any other name must be passed again.
_OWN_CODE = re.compile(
    r"repvgg\.data\.(digits|cifar10|cifar100|imagefolder|csv|torchvision)|lightning\.Trainer"
    r"|torchvision\.transforms\.v2\.[A-Z]\w*"
    r"|lightning\.pytorch\.(callbacks|loggers|profilers)\.[A-Z]\w*"
    r"|torch\.optim\.[A-Z]\w*|torch\.optim\.lr_scheduler\.[A-Z]\w*(LR|Restarts|LROnPlateau)"
    r"|torch\.nn\.[A-Z]\w*Loss|repvgg\.training\.tensorboard\.TensorBoard"
)


def plan(arguments: cli.Arguments) -> cli.Plan:
    """Resume a run for `resume=PATH`, with its recorded configuration and in its folder.

    `resume=auto` resumes the run in `hydra.run.dir`. If that was never saved, the run starts: a
    cluster may start the same command again and again. Without `hydra.run.dir` the newest run in
    runs/ is resumed.

    Today's configurations and defaults do not count. Each value that is passed beside `resume` is
    compared with the recorded one. Only the RESUMABLE may differ.

    Raises:
        ValueError: there is nothing to resume, or an argument would change what is resumed.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    passed = OverridesParser.create().parse_overrides(arguments.overrides)
    given = next((one.value() for one in reversed(passed) if one.key_or_group == "resume"), None)
    if given is None:
        return cli.Plan(arguments)
    if cli.SWEEP & set(arguments.options):
        raise ValueError("-m: a sweep starts new runs; pass resume= without -m, a run at a time")
    folders = [str(one.value()) for one in passed if one.key_or_group == "hydra.run.dir"]
    if given == "auto":
        path = _newest(folders)
        if path is None:
            others = [one.input_line for one in passed if one.key_or_group != "resume"]
            return cli.Plan(cli.Arguments(arguments.options, [str(line) for line in others]))
    else:
        path = Path(str(given)).expanduser()
    if not path.is_file():
        inside = path / LAST
        advice = f"pass resume={inside}" if inside.is_file() else "pass a run's last.ckpt"
        raise ValueError(f"resume={path}: there is no such file; {advice}")
    folder = path.absolute().parent.parent
    if not (folder / CONFIG).is_file():
        raise ValueError(f"resume={path}: not in the folder of a run, which holds {CONFIG}")
    if {"--cfg", "-c", "--info", "-i"} & {one.partition("=")[0] for one in arguments.options}:
        raise ValueError(f"resume={path}: its configuration is in {folder / CONFIG}; look there")
    if folders and Path(folders[-1]).expanduser().absolute() != folder:
        raise ValueError(
            f"hydra.run.dir={folders[-1]}: a resumed run stays in its own folder, {folder}; "
            "leave hydra.run.dir out"
        )
    recorded = read_config(folder)
    changed = _changes(passed, recorded, folder)

    def complete(composed: Config) -> Config:
        _require_own_code(recorded, composed, passed, folder)
        config = _with_missing(recorded, composed)
        for key, value in changed.items():
            config = _replaced(config, key, value)
        return config | {"resume": str(path)}

    place = cli.quote_path(f"hydra.run.dir={folder}")
    composing = [str(one.input_line) for one in passed if _is_composed(one, arguments.options)]
    again = [
        cli.quote_path(f"resume={path}") if one.key_or_group == "resume" else str(one.input_line)
        for one in passed
    ]
    return cli.Plan(
        cli.Arguments(arguments.options, [*composing, place]),
        complete,
        [*arguments.options, *again],
    )


def describe_changes(config: Config, folder: Path) -> list[str]:
    """A line that says what is resumed, and one for each value that differs from the recorded."""
    recorded = read_config(folder)
    lines = [
        f"resumes {relative(folder / LAST)}, with the configuration {relative(folder / CONFIG)}"
    ]
    for key, before in _leaves(recorded):
        value = _get(config, key)
        if key != "resume" and value != before:
            lines.append(f"{key}={value}, before {before}")
    for key, value in _leaves(config):
        if _get(recorded, key, missing=...) is ... and key in RESUMABLE:
            lines.append(f"{key}={value}, before not set")
    return lines


def read_config(folder: Path) -> dict[str, object]:
    """The configuration of the run in a folder, as it was recorded, without REMOVED keys.

    Raises:
        ValueError: a removed key has a value that this version cannot honour; or a value is an
            interpolation, which Hydra would resolve, to code too. `record` writes none.
    """
    config = read_record(folder / CONFIG)
    if (
        not isinstance(config, dict)
        or any(
            not isinstance(config.get(key), dict) for key in ("data", "model", "optim", "trainer")
        )
        or any(
            not isinstance(key, str)  # arguments of a callback may have numbers as keys
            for part in (config, *config.values())
            if isinstance(part, dict)
            for key in part
        )
    ):
        raise ValueError(
            f"resume={relative(folder / LAST)}: {relative(folder / CONFIG)} is damaged: it is not "
            "a configuration of a run"
        )
    if "hydra" in config:
        raise ValueError(
            f"resume={relative(folder / LAST)}: {relative(folder / CONFIG)} holds hydra, which "
            "could run code; a run records none"
        )
    if "${" in repr(config):
        raise ValueError(
            f"resume={relative(folder / LAST)}: {relative(folder / CONFIG)} holds ${{...}}, "
            "which would be resolved to code; a recorded configuration holds plain values alone"
        )
    for key in REMOVED:
        *sections, leaf = key.split(".")
        holder = _get(config, ".".join(sections)) if sections else config
        if isinstance(holder, dict) and leaf in holder:
            _check_removed(key, holder.pop(leaf), folder)
    data = config.get("data")
    if isinstance(data, dict) and str(data.get("_target_")).startswith("repvgg.data."):
        augment = data.get("augment")
        if isinstance(augment, str):
            if augment not in AUGMENT:
                _fail_removed("data.augment", augment, folder)
            data["augment"] = AUGMENT[augment]
    return move_from_trainer(config)


def _changes(passed: list["Override"], recorded: Config, folder: Path) -> dict[str, object]:
    """What was passed beside `resume` and differs from what was recorded."""
    from omegaconf import OmegaConf

    choices = recorded_choices(folder)
    changes: dict[str, object] = {}
    for one in passed:
        key, line = one.key_or_group, one.input_line
        if key == "resume" or key.startswith(("hydra.", "hydra/")):
            continue
        if key in REMOVED:
            _check_removed(key, one.value(), folder)
            continue
        if one.is_sweep_override() or one.is_delete():
            raise ValueError(f"{line}: beside resume pass key=value, with one value")
        if key in ("data.augment", "data/augment"):  # of version 0.1, in its words or in these
            held = _get(recorded, "data.augment")
            if any(one.value() == name and held == same for name, same in AUGMENT.items()):
                continue
        before = _get(recorded, key)
        if key in choices or "/" in key or (isinstance(before, dict) and one.value() != before):
            before, same = choices.get(key), str(one.value()) == choices.get(key)
        else:
            draft = OmegaConf.create(dict(recorded))
            OmegaConf.update(draft, key, one.value(), force_add=True)
            value = _get(OmegaConf.to_container(draft, resolve=True), key)
            same = value == before and _get(recorded, key, missing=...) is not ...
            if not same and key in RESUMABLE:
                changes[key] = value
                same = True
        if not same:
            raise ValueError(
                f"{line}: the run was started with {key}={before}, and a resumed run keeps what it "
                f"was started with; allowed beside resume are {listed(key, RESUMABLE)}"
            )
    return changes


def _check_removed(key: str, value: object, folder: Path) -> None:
    if value != REMOVED[key]:
        _fail_removed(key, value, folder)


def _fail_removed(key: str, value: object, folder: Path) -> NoReturn:
    raise ValueError(
        f"resume={relative(folder / LAST)}: {key}={value} needs version 0.1; later versions have "
        "no such setting"
    )


def recorded_choices(folder: Path) -> dict[str, str]:
    """The choice of each group; runs of version 0.1 recorded only those that were passed."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    path = folder / OVERRIDES
    held = read_record(path) if path.is_file() else []
    lines = [str(line) for line in held] if isinstance(held, list) else []
    if (folder / CHOICES).is_file():
        found = _get(read_record(folder / CHOICES), "hydra.runtime.choices")
        if not isinstance(found, dict):
            raise ValueError(f"'{relative(folder / CHOICES)}' is damaged: it holds no choices")
        choices = {str(key): str(value) for key, value in found.items()}
        # Hydra does not list choices of several.
        several = OverridesParser.create().parse_overrides(
            [line for line in lines if line.startswith(("logger=[", "callbacks=["))]
        )
        return choices | {one.key_or_group: str(one.value()) for one in several}
    pairs = (line.partition("=") for line in lines)
    defaults = {"model": "repvgg_a0", "data": "digits", "experiment": "None"}
    return defaults | {key: value for key, _, value in pairs if key in defaults}


def _require_own_code(
    recorded: Config, composed: Config, passed: list["Override"], folder: Path
) -> None:
    """Reject code and places that only a file in the run's folder names: it may be third-party.

    Raises:
        ValueError: a recorded `_target_` is neither ours nor passed on the command line, or a
            logger or callback would write to a place outside of the run's folder.
    """
    typed = {one.key_or_group.lstrip("+"): str(one.value()) for one in passed}
    for key, value in _leaves(recorded):
        if key.startswith(WRITING) and _is_elsewhere(value) and typed.get(key) != str(value):
            raise ValueError(
                f"resume={relative(folder / LAST)}: {relative(folder / CONFIG)} names a place "
                f"outside of the run's folder; if you trust it, pass {key}={value} too"
            )
    sources = [composed, *({one.key_or_group: one.value()} for one in passed)]
    named = {
        str(value)
        for source in sources
        for key, value in _leaves(source)
        if key.endswith("_target_")
    }
    for key, target in _leaves(recorded):
        if not key.endswith("_target_") or target is None or str(target) in named:
            continue
        if _OWN_CODE.fullmatch(str(target)):
            continue
        raise ValueError(
            f"resume={relative(folder / LAST)}: {relative(folder / CONFIG)} names code that is not "
            f"this project's; if you trust it, pass {key}={target} too"
        )


def _is_elsewhere(value: object) -> bool:
    """Whether a value, or one of a list, is an address, or a path that leaves the folder."""
    if isinstance(value, list):
        return any(map(_is_elsewhere, value))
    text = value.removeprefix("sqlite:///") if isinstance(value, str) else ""
    scheme = re.match(r"[\w+.-]+:", text)  # file:/etc, simplecache::/etc
    return bool(scheme) or text.startswith(("/", "~")) or ".." in Path(text).parts


def _with_missing(recorded: Config, composed: Config) -> dict[str, object]:
    """What was recorded, with today's default for keys that did not exist then."""
    sections = {
        key: section(composed, key) | section(recorded, key) for key in ("optim", "trainer")
    }
    return {**composed, **recorded, **sections}


def _is_composed(override: "Override", options: list[str]) -> bool:
    """Whether Hydra composes an argument of a resumed run: all do with a user's own configs."""
    key = override.key_or_group
    own_configs = any(option.lstrip("-").startswith("c") for option in options)
    return key not in ("resume", "hydra.run.dir") and (key.startswith("hydra") or own_configs)


def _leaves(config: Config, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list) and any(isinstance(part, dict | list) for part in value):
            yield from _leaves({str(i): part for i, part in enumerate(value)}, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value  # YAML has keys that are numbers


def _get(config: object, key: str, missing: object = None) -> object:
    for part in key.split("."):
        if isinstance(config, list) and part.isdigit() and int(part) < len(config):
            config = config[int(part)]
        elif isinstance(config, dict) and part in (named := {str(key): key for key in config}):
            config = config[named[part]]
        else:
            return missing
    return config


def _replaced(config: Config, key: str, value: object) -> dict[str, object]:
    """A copy of a configuration with another value for a dotted key."""
    first, _, rest = key.partition(".")
    inner = config.get(first)
    if rest:
        value = _replaced(inner if isinstance(inner, dict) else {}, rest, value)
    return {**config, first: value}


def _newest(folders: Iterable[str]) -> Path | None:
    """The checkpoint of `resume=auto`; None if the chosen folder has none yet."""
    for folder in folders:
        path = Path(folder).expanduser() / LAST
        return path if path.exists() else None
    found = cli.RUNS.rglob(str(LAST))
    if newest := max(found, key=lambda path: path.stat().st_mtime, default=None):
        return newest
    raise ValueError(
        "resume=auto: there is no checkpoints/last.ckpt in runs/; start a run without resume, or "
        "pass the folder as hydra.run.dir=runs/NAME"
    )
