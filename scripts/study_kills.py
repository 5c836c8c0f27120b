"""Kill a run at random moments, resume it each time: python scripts/study_kills.py

Trains a small network on the digits, undisturbed at first. Then the same run again and again,
killed with SIGKILL at moments drawn at random and resumed with resume=auto, until it ends; as many
times as it takes for the wanted number of kills. Every end must hold the undisturbed run's tensors,
bit for bit: weights, their average, the optimizer's state. Processes are forked from this one,
which has torch imported: most of a short run would be imports.
"""

import contextlib
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning  # noqa: F401 - for the forked processes
import study
import torch
from tqdm import tqdm

import repvgg.callbacks
import repvgg.data
import repvgg.module  # noqa: F401 - likewise
from repvgg import cli, runs
from repvgg.arguments import check_integer, check_number

ROOT = Path(__file__).parents[1]
DEFAULTS: dict[str, Any] = {"kills": 100, "epochs": 6, "longest": 8.0, "seed": 0, "out": None}
RUN = ["model=repvgg_tiny", "rdrop=true", "ema=0.99", "trainer.enable_progress_bar=false"]


def main(settings: dict[str, Any]) -> None:
    kills = check_integer("kills", settings["kills"], minimum=1, example=100)
    epochs = check_integer("epochs", settings["epochs"], minimum=2, example=6)
    longest = check_number("longest", settings["longest"], example=8.0)
    arguments = [*RUN, f"trainer.max_epochs={epochs}"]
    draw = random.Random(settings["seed"]).uniform
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(settings["out"] or place):
        undisturbed = Path("undisturbed")
        if wait(start([*arguments, f"hydra.run.dir={undisturbed}"])) != 0:
            raise ValueError("the undisturbed run failed; what it said is in output.txt")
        expected = tensors(undisturbed)
        done, ended, differing, finished = 0, 0, 0, False
        bar = tqdm(total=kills, unit="kill", mininterval=5)
        while done < kills or not finished:
            folder = f"run-{ended}"
            child = start([*arguments, f"hydra.run.dir={folder}", "resume=auto"])
            status = wait(child, draw(0, longest) if done < kills else None)
            finished = status == 0
            if status == -signal.SIGKILL:
                done += 1
                bar.update()
            elif finished:
                given = tensors(Path(folder))
                same = given.keys() == expected.keys()
                differing += not (same and all(map(torch.equal, given.values(), expected.values())))
                ended += 1
            else:
                raise ValueError(f"{folder} ended with status {status}; see output.txt")
        bar.close()
    print(
        f"{done} kills at 0 to {longest:g} s, {ended} runs of {epochs} epochs brought to an end, "
        f"{differing} with a tensor that differs (of {len(expected)}); {study.machine()}"
    )
    if differing:
        raise ValueError("a resumed run does not end as an undisturbed one")


def start(arguments: list[str]) -> int:
    """Run train.py in a child; its process id."""
    if child := os.fork():
        return child
    with Path("output.txt").open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.argv = [str(ROOT / "train.py"), *arguments]
        status = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 1
        sys.stdout.flush()
        os._exit(status)


def wait(child: int, seconds: float | None = None) -> int:
    """Status of a child, killed if it takes longer; the negative of a signal."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, 0 if deadline is None else os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            deadline = None
        time.sleep(0.001)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of weights, average and optimizer in a run's last checkpoint."""
    content = torch.load(folder / runs.LAST, weights_only=True)
    found: dict[str, torch.Tensor] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict | list):
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            for key, part in parts:
                collect(f"{name}.{key}", part)

    for name in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        collect(name, content[name])
    return found


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
