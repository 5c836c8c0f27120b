"""Run many jobs in parallel processes and append each result to a CSV file."""

import concurrent.futures
import csv
import logging
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from repvgg import terminal

Row = dict[str, Any]


def run(
    job: Callable[..., Row], calls: Sequence[tuple[Any, ...]], path: Path, *, workers: int
) -> None:
    """Call a job in single-threaded processes; append each row to a CSV file when it is ready.

    Finished rows stay when the study is stopped. The caller skips those that `read` returns.

    Args:
        workers: number of processes; 0 calls the job in this process.
    """
    if workers == 0:
        silence_lightning()
        for call in calls:
            append(path, job(*call))
        return
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=start_worker
    )
    try:
        futures = [pool.submit(job, *call) for call in calls]
        ended = concurrent.futures.as_completed(futures)
        with terminal.bar("runs", len(calls), sys.stderr) as advance:
            for future in ended:
                append(path, future.result())
                advance(1)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; an incomplete last line is removed from it."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    return list(csv.DictReader(whole.decode().splitlines()))


def append(path: Path, row: Row) -> None:
    """Append a row to a CSV file; a new file gets a header first."""
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def start_worker() -> None:
    """Set a process up for single-threaded runs without Lightning's messages."""
    torch.set_num_threads(1)
    silence_lightning()


def silence_lightning() -> None:
    """Hide what Lightning logs and warns about in every run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=r"You defined a `validation_step` but have no")
