"""Try random command lines: each ends with status 0, or in one line that leaves nothing behind.

    python -m scripts.reliability.command_lines count=5000 seed=0

The lines are made of all keys of all commands and of a stock of values and options. Each runs as a
program of its own, up to where training, deployment or evaluation begin. Status 1 if one fails.
"""

import importlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

from repvgg import cli, terminal
from repvgg.checks import check_integer, escape
from scripts.studies.kills import ROOT

DEFAULTS: cli.Config = {"count": 5000, "seed": 0}


def main() -> None:
    cli.script(attempt, str(__doc__), DEFAULTS)


def attempt(settings: dict[str, object]) -> None:
    sys.path.insert(0, str(ROOT))
    generated = importlib.import_module("tests.support.hostile.command_lines")
    count = check_integer("count", settings["count"], minimum=1, example=5000)
    source = generated.lines(check_integer("seed", settings["seed"], minimum=0, example=0))
    found = []
    start = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        terminal.bar("command lines", count, sys.stderr) as advance,
    ):
        place = generated.Place(Path(folder, "place"))
        for _ in range(count):
            found.append(place.run(next(source)))
            advance(1)
            if found[-1].fault:
                shown = escape(found[-1].error[-600:])
                print(f"{found[-1].fault} | {found[-1].line} | {shown}", flush=True)
    titles = ("lines", "status 0", "refused", "faults")
    print(f"{'command':<10}" + "".join(f"{title:>10}" for title in titles) + f"{'slowest':>10}")
    for command in [*generated.VALID, "all"]:
        own = [one for one in found if command in (one.line.command, "all")]
        done = sum(one.status == 0 for one in own)
        faults = sum(bool(one.fault) for one in own)
        slowest = max((one.seconds for one in own), default=0)
        counts = (len(own), done, len(own) - done, faults)
        print(f"{command:<10}" + "".join(f"{n:>10}" for n in counts) + f"{slowest:>9.1f}s")
    median = statistics.median(one.seconds for one in found)
    print(f"{time.monotonic() - start:.0f} s, a line {median:.2f} s (median)")
    if any(one.fault for one in found):
        raise ValueError("some command lines did not end as they should")


if __name__ == "__main__":
    main()
