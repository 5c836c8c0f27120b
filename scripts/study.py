"""What studies share: many runs in parallel, written down as they end, and compared in pairs."""

import concurrent.futures
import csv
import math
import multiprocessing
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

Row = dict[str, Any]


def run(job: Callable[..., Row], calls: Sequence[tuple], path: Path, *, workers: int) -> None:
    """Make every call in processes of one thread, and append its row to a CSV file when it ends.

    What was written stays when the study is stopped; the caller leaves out what `read` finds.
    """
    if path.exists():  # end at the last whole line
        content = path.read_bytes()
        path.write_bytes(content[: content.rfind(b"\n") + 1])
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker
    )
    try:
        futures = [pool.submit(job, *call) for call in calls]
        ended = concurrent.futures.as_completed(futures)
        for future in tqdm(ended, total=len(calls), unit="run", smoothing=0.05):
            _append(path, future.result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def read(path: Path) -> list[dict[str, str]]:
    """The rows that are there; a last line that was cut short is none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


class Comparison(NamedTuple):
    """Difference of paired runs: mean, half-width of its 95 % interval, p of the paired t-test."""

    mean: float
    half_width: float
    p: float


def compare(ours: dict[str, float], theirs: dict[str, float]) -> Comparison:
    """Compare two ways by the seeds that both have."""
    from scipy import stats

    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    mean = float(np.mean(differences))
    error = float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
    if error == 0:
        return Comparison(mean, 0.0, 1.0 if mean == 0 else 0.0)
    degrees = len(differences) - 1
    half_width = float(stats.t.ppf(0.975, degrees)) * error
    return Comparison(mean, half_width, float(2 * stats.t.sf(abs(mean) / error, degrees)))


def require_packages() -> None:
    """Say what to install now and not after hours."""
    try:
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{error.name} is missing: type pip install -e ".[study]"') from error


def machine() -> str:
    """Processor and versions, for the reader of a table."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor()}, {os.cpu_count()} processors, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def _start_worker() -> None:
    import logging
    import warnings

    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*")


def _append(path: Path, row: Row) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())
