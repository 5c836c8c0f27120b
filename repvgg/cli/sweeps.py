"""Sweeps (`-m`) and searches: which job runs, what its folder is called, a table of the results.

Jobs may run in other processes, on other machines. So each job writes a record into the folder of
the sweep, and the process that the user started makes a table of the records.
"""

import csv
import json
import logging
import math
import re
import secrets
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

RESULTS = Path("results.json")  # a job may write it into its folder
SHOWN = ("val/accuracy", "test/accuracy", "test/loss")  # in the table; the CSV has all metrics
LONGEST_NAME = 100  # characters of a folder; file systems take 255 bytes
LOWER_IS_BETTER = ("loss", "error")  # how the names of such metrics end


@dataclass
class Record:
    """What one job of a sweep came to.

    Attributes:
        number: from 1.
        overrides: what the sweep varies, by key.
        folder: of the job, absolute.
        status: done, failed or stopped.
        value: what a search optimizes.
        message: why it failed.
        metrics: of a job that is done, by name.
    """

    number: int
    overrides: dict[str, str]
    folder: str
    status: str = "stopped"  # also if the process was killed
    value: float | None = None
    seconds: float = 0.0
    message: str = ""
    metrics: dict[str, float] = field(default_factory=dict)


class Sweep(Callback):
    """Numbers the jobs of a sweep and collects their results; Hydra builds and calls it.

    Attributes:
        current: the sweep that this process started or takes part in.
    """

    current: ClassVar["Sweep | None"] = None

    def __init__(self) -> None:
        self.folder = Path()
        self.records: Path | None = None  # None: not a sweep
        self.swept: list[str] = []
        self.total: int | None = None
        self.direction: str | None = None  # of a search
        self.metric = ""

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        self.folder = Path(config.hydra.sweep.dir).absolute()
        self.records = self.folder / f".jobs-{secrets.token_hex(4)}"  # folders may be used again
        with suppress(HydraException):  # the sweeper raises it again
            self.swept, self.total = _plan(config.hydra)
        sweeper = config.hydra.sweeper
        if isinstance(sweeper.get("direction"), str):
            self.direction = sweeper.direction
            self.metric = str(config.get("objective", "value"))
        register_resolvers(self.swept, self.total)
        for part in ("storages", "study"):  # each new study and each trial in a line on stderr
            logging.getLogger(f"optuna.{part}").setLevel(logging.WARNING)
        Sweep.current = self

    def on_job_start(self, config: DictConfig, **_: object) -> None:
        Sweep.current = self if self.records else None  # in the process of the job

    @contextmanager
    def job(self) -> Iterator[Record]:
        """Print which job runs, and record what it comes to."""
        hydra = HydraConfig.get()
        number = int(hydra.job.num) + 1
        overrides = _varied(hydra.overrides.task, self.swept)
        record = Record(number, overrides, str(hydra.runtime.output_dir))
        self._write(record)
        of = f" of {self.total}" if self.total else ""
        print(f"\n{number}{of}: {_shown(overrides)}", flush=True)
        begin = time.perf_counter()
        try:
            yield record
        finally:
            record.seconds = round(time.perf_counter() - begin, 1)
            path = Path(record.folder, RESULTS)
            if record.status == "done" and path.is_file():
                record.metrics = json.loads(path.read_text())["metrics"]
            self._write(record)

    def report(self) -> list[Record]:
        """Print a table of the jobs and write it as CSV; the jobs."""
        records = self._read()
        if not records:
            return []
        path = _write_csv(records, self.folder)
        print()
        print(*_table(records, self.folder, self.metric), sep="\n")
        print(*_spread(records), sep="\n", end="\n" if _spread(records) else "")
        done = [(one.value, one) for one in records if one.value is not None]
        finite = [(value, one) for value, one in done if math.isfinite(value)]
        if self.direction and finite:
            choose = max if self.direction == "maximize" else min
            value, best = choose(finite, key=lambda pair: pair[0])
            print(f"best {self.metric} {value:.4f}, job {best.number}: {_shown(best.overrides)}")
        print(f"{len(records)} jobs in {_relative(self.folder)}, table in {path.name}", flush=True)
        if self.records:
            shutil.rmtree(self.records, ignore_errors=True)
        return records

    def _write(self, record: Record) -> None:
        assert self.records is not None
        self.records.mkdir(parents=True, exist_ok=True)
        (self.records / f"{record.number}.json").write_text(json.dumps(asdict(record)))

    def _read(self) -> list[Record]:
        assert self.records is not None
        found = [Record(**json.loads(path.read_text())) for path in self.records.glob("*.json")]
        return sorted(found, key=lambda record: record.number)


def register_resolvers(swept: Sequence[str] | None = None, total: int | None = None) -> None:
    """Let configurations use ${job_name:NUMBER,OVERRIDES} and ${direction:METRIC}."""
    named = partial(job_name, swept=swept, total=total)
    OmegaConf.register_new_resolver("job_name", named, replace=True)
    OmegaConf.register_new_resolver("direction", direction, replace=True)


def job_name(
    number: int, overrides: Sequence[str], swept: Sequence[str] | None, total: int | None
) -> str:
    """The folder of a job: its number, and what the sweep varies; safe in any file system."""
    width = len(str(total or 1))
    pairs = (f"{key}={value}" for key, value in _varied(overrides, swept).items())
    text = re.sub(r"[^\w.=,-]+", "_", ",".join(map(_shorten, pairs)))
    return f"{number + 1:0{width}}-{text}"[:LONGEST_NAME].rstrip("-.")


def direction(metric: str) -> str:
    """Whether a search maximizes or minimizes a metric."""
    return "minimize" if metric.endswith(LOWER_IS_BETTER) else "maximize"


def _plan(hydra: DictConfig) -> tuple[list[str], int | None]:
    """The keys that a sweep varies, and its number of jobs; None if that is not known."""
    sweeper = hydra.sweeper
    params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    parsed = parser.parse_overrides([*params, *hydra.overrides.task])
    held = {override.get_key_element(): override for override in parsed}  # a later one wins
    swept = {key: override for key, override in held.items() if override.is_sweep_override()}
    if "n_trials" in sweeper:
        grid = "GridSampler" in str(sweeper.sampler.get("_target_"))
        return list(swept), None if grid else int(sweeper.n_trials)
    counted = all(override.is_discrete_sweep() for override in swept.values())
    if not counted or not str(sweeper.get("_target_")).endswith("BasicSweeper"):
        return list(swept), None
    counts = (len(list(override.sweep_string_iterator())) for override in swept.values())
    return list(swept), math.prod(counts)


def _varied(overrides: Iterable[str], swept: Sequence[str] | None) -> dict[str, str]:
    """The overrides that a sweep varies; all, if that is not known."""
    pairs = (override.partition("=") for override in overrides)
    typed = {"True": "true", "False": "false"}  # Hydra's sweeper writes Python's words
    return {
        key.lstrip("+"): typed.get(value, value)
        for key, _, value in pairs
        if swept is None or key in swept
    }


def _shorten(pair: str) -> str:
    """Four digits of a number that a search drew: optim.lr=0.0312345678 -> optim.lr=0.03123."""
    key, equals, value = pair.partition("=")
    with suppress(ValueError):
        if len(value) > 8:
            return f"{key}{equals}{float(value):.4g}"
    return pair


def _shown(overrides: Mapping[str, str]) -> str:
    return " ".join(_shorten(f"{key}={value}") for key, value in overrides.items())


def _relative(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _table(records: Sequence[Record], folder: Path, metric: str) -> list[str]:
    keys = list(dict.fromkeys(key for record in records for key in record.overrides))
    named = dict.fromkeys((*SHOWN, metric))
    metrics = [name for name in named if any(name in record.metrics for record in records)]
    with_status = any(record.status != "done" for record in records)
    status = ["status"] if with_status else []
    rows = [["job", *keys, *metrics, "seconds", *status, "folder"]]
    for record in records:
        values = [_shorten(f"={record.overrides.get(key, '')}")[1:] for key in keys]
        measured = [f"{record.metrics[m]:.4f}" if m in record.metrics else "-" for m in metrics]
        place = Path(record.folder)
        shown = place.name if place.parent == folder else str(place)
        if not place.exists():  # it was empty
            shown = "-"
        now = [record.status] if with_status else []
        rows.append([str(record.number), *values, *measured, f"{record.seconds:.1f}", *now, shown])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _spread(records: Sequence[Record]) -> list[str]:
    """Mean and standard deviation over the seeds of otherwise equal jobs."""
    groups: dict[str, list[dict[str, float]]] = {}
    for record in records:
        if record.metrics and "seed" in record.overrides:
            others = {key: value for key, value in record.overrides.items() if key != "seed"}
            groups.setdefault(_shown(others) or "all", []).append(record.metrics)
    lines = []
    for name, held in groups.items():
        for metric in SHOWN[:2]:
            values = [metrics[metric] for metrics in held if metric in metrics]
            if len(values) > 1:
                spread = f"standard deviation {statistics.stdev(values):.4f}, n = {len(values)}"
                lines.append(f"{name}: {metric} {statistics.mean(values):.4f}, {spread}")
    return lines


def _write_csv(records: Sequence[Record], folder: Path) -> Path:
    """Write all that is known of the jobs into a new file."""
    keys = list(dict.fromkeys(key for record in records for key in record.overrides))
    metrics = list(dict.fromkeys(name for record in records for name in record.metrics))
    path, number = folder / "results.csv", 1
    while path.exists():
        number += 1
        path = folder / f"results-{number}.csv"
    with path.open("x", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["job", *keys, *metrics, "seconds", "status", "folder", "message"])
        for record in records:
            values = [record.overrides.get(key, "") for key in keys]
            measured = [record.metrics.get(name, "") for name in metrics]
            ends = [record.seconds, record.status, record.folder, record.message]
            writer.writerow([record.number, *values, *measured, *ends])
    return path
