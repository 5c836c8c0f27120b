"""Interrupt commands at every moment: each ends at once, with its status and at most one line.

    python -m scripts.reliability.interrupts count=20

Starts fresh processes, as a user does, and sends Ctrl-C after times that are spread evenly from the
start to the end of each command. Python's own start, before it reads the first line of the program,
can show a traceback of its own; those are counted apart.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from repvgg import cli
from repvgg.checks import check_integer
from scripts.studies.kills import ROOT
from scripts.studies.report import machine

DEFAULTS: cli.Config = {"count": 20, "signal": "INT"}
TRAIN = ["train.py", "model=repvgg_tiny", "rdrop=true", "trainer.max_epochs=2"]
COMMANDS = {
    "train": [*TRAIN, "hydra.run.dir=new"],
    "deploy": ["deploy.py", "ckpt=run/checkpoints/best.ckpt", "out=new", "benchmark=false"],
    "verify": ["-m", "repvgg", "verify", "folder=run/deploy"],
    "inspect": ["-m", "repvgg", "inspect", "path=run/checkpoints/best.ckpt"],
    "--help": ["-m", "repvgg", "train", "--help"],
}


class Outcome(NamedTuple):
    """What came of one interrupt.

    Attributes:
        after: seconds from the start to the signal.
        took: seconds from the signal to the end.
    """

    after: float
    took: float
    status: int
    error: str


def main() -> None:
    cli.script(interrupt, str(__doc__), DEFAULTS)


def interrupt(settings: dict[str, object]) -> None:
    count = check_integer("count", settings["count"], minimum=2, example=20)
    sent = signal.Signals[f"SIG{settings['signal']}"]
    faults = []
    print(
        f"{'command':<10}{'whole':>8}{'sent':>6}{'done':>6}{'ended':>7}{'before':>8}{'faults':>8}"
        f"{'slowest':>9}"
    )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for words in ([*TRAIN, "hydra.run.dir=run"], [*COMMANDS["deploy"][:2], "benchmark=false"]):
            subprocess.run(command(words), cwd=folder, check=True, capture_output=True)
        for name, words in COMMANDS.items():
            subprocess.run(["rm", "-rf", folder / "new"], check=True)
            start = time.monotonic()
            subprocess.run(command(words), cwd=folder, check=True, capture_output=True)
            whole = time.monotonic() - start
            found = []
            for number in range(count):
                subprocess.run(["rm", "-rf", folder / "new"], check=True)
                found.append(attempt(words, folder, sent, 0.02 + number * whole / count))
            done = sum(one.status == 0 for one in found)
            ended = [one for one in found if one.status in (128 + sent, -sent)]
            right = [one for one in ended if len(one.error.splitlines()) <= 2]
            early = [
                one for one in found if one.status != 0 and one not in right and one.after < 0.1
            ]
            wrong = [
                one for one in found if one.status != 0 and one not in right and one not in early
            ]
            faults += [(name, one) for one in wrong]
            slowest = max(one.took for one in found if one.status != 0)
            print(
                f"{name:<10}{whole:>7.1f}s{count:>6}{done:>6}{len(right):>7}{len(early):>8}"
                f"{len(wrong):>8}{slowest:>8.2f}s",
                flush=True,
            )
    print(machine())
    for name, one in faults:
        print(f"{name} after {one.after:.2f} s: status {one.status}: {one.error[-1500:]}")
    if faults:
        raise ValueError("some commands did not end as they should")


def command(words: list[str]) -> list[str]:
    program = [str(ROOT / words[0])] if words[0].endswith(".py") else [words[0]]
    return [sys.executable, *program, *words[1:]]


def attempt(words: list[str], folder: Path, sent: int, after: float) -> Outcome:
    process = subprocess.Popen(
        command(words),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(after)
    signalled = time.monotonic()
    if process.poll() is None:
        process.send_signal(sent)
    error = process.communicate(timeout=120)[1]
    return Outcome(after, time.monotonic() - signalled, process.returncode, error)


if __name__ == "__main__":
    main()
