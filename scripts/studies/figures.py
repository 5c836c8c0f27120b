"""Draw all figures of the studies again: python -m scripts.studies.figures

Reads the recorded numbers in `docs` and writes the figures beside them, and the tables of those
studies that record all of a table. Nothing is measured.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from repvgg import cli
from scripts.studies import (
    benchmark_deploy,
    benchmark_fusion,
    branch_ablation,
    int8,
    models,
    rdrop,
)

DEFAULTS: dict[str, Any] = {"docs": "docs/studies"}
RECORDS: dict[str, Callable[[Path], None]] = {  # files of recorded numbers -> how they are drawn
    "branch_ablation/*.csv": branch_ablation.redraw,
    "deploy/*.json": benchmark_deploy.redraw,
    "fusion/benchmark.csv": benchmark_fusion.redraw,
    "int8/*.csv": int8.redraw,
    "models/models.json": models.redraw,
    "rdrop/*/results.csv": rdrop.redraw,
}


def main(settings: dict[str, Any]) -> None:
    folder = Path(settings["docs"])
    records = [(path, draw) for name, draw in RECORDS.items() for path in folder.glob(name)]
    if not records:
        raise ValueError(f"docs={folder} holds no recorded numbers: pass docs=docs/studies")
    for path, draw in sorted(records):
        draw(path)
        print(path)


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
