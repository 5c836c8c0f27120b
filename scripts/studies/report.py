"""What tables and figures of studies share: the machine, the command, a paired test, matplotlib."""

import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch


class Comparison(NamedTuple):
    """Difference of paired runs: mean, half-width of its 95 % interval, p of the paired t-test.

    Interval and p are NaN if the differences do not vary: no test is possible.
    """

    mean: float
    half_width: float
    p: float


def compare(ours: dict[str, float], theirs: dict[str, float]) -> Comparison:
    """Test the difference of two methods over the seeds that both have."""
    from scipy import stats

    seeds = [seed for seed in ours if seed in theirs]
    first, second = (np.array([runs[seed] for seed in seeds]) for runs in (ours, theirs))
    mean = float((first - second).mean())
    if np.ptp(first - second) == 0:
        return Comparison(mean, math.nan, math.nan)
    test = stats.ttest_rel(first, second)
    return Comparison(mean, float(test.confidence_interval().high) - mean, float(test.pvalue))


def require_packages() -> None:
    """Check for scipy and matplotlib before the study starts, not after hours.

    Raises:
        ImportError: one is missing; the message says what to install.
    """
    try:
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{error.name} is missing: pip install -e ".[study]"') from error


def pyplot() -> ModuleType:
    """matplotlib.pyplot, drawing to files only."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def command(name: str, settings: Mapping[str, object], defaults: Mapping[str, object]) -> str:
    """The command that repeats a study, without what depends on the machine.

    Shows the settings that differ from their defaults, and `root=...` in place of a path.
    """
    shown = {key: value for key, value in settings.items() if value != defaults[key]}
    if "root" in shown:
        shown["root"] = "..."
    changed = [
        f" {key}={str(value).replace(' ', '')}"
        for key, value in shown.items()
        if key not in ("out", "work", "workers")
    ]
    return f"python -m scripts.studies.{name}{''.join(changed)}"


def machine() -> str:
    """CPU and versions, for the text beside a table."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor()}, {os.cpu_count()} CPUs, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def versions(*packages: str) -> str:
    """Versions of those packages that are installed."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
