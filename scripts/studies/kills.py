"""Stop a run at random moments, resume it each time: python -m scripts.studies.kills

Trains a small network on the digits without interruption. Then repeats that run, stopped by a
signal at random moments and resumed with resume=auto until it ends, until there were `kills` stops.
The last checkpoint of every run must hold the tensors of the uninterrupted run, bit for bit:
weights, their average, the optimizer's state. With `signal=term` or `hup` the whole process group
gets the signal, as from a cluster or a closed terminal, and each run must end with that signal's
status. With `workers=2` the digits are files that worker processes decode. Runs are forked from
this process, which has imported torch already: most of a short run would be imports.
"""

import contextlib
import os
import random
import runpy
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import lightning  # noqa: F401 - for the forked processes
import torch
from PIL import Image

import repvgg.data.sets
import repvgg.training.callbacks
import repvgg.training.classifier
from repvgg import cli, terminal
from repvgg.checks import check_integer, check_number, wrong_value
from repvgg.training import runs
from scripts.studies import report

ROOT = Path(__file__).parents[2]
DEFAULTS: dict[str, Any] = {
    "kills": 100,
    "signal": "kill",
    "workers": 0,
    "epochs": 6,
    "longest": 8.0,
    "seed": 0,
    "out": None,
}
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "hup": signal.SIGHUP}
RUN = ["model=repvgg_tiny", "rdrop=true", "ema=0.99", "trainer.enable_progress_bar=false"]


def main(settings: dict[str, Any]) -> None:
    kills = check_integer("kills", settings["kills"], minimum=1, example=100)
    epochs = check_integer("epochs", settings["epochs"], minimum=2, example=6)
    longest = check_number("longest", settings["longest"], example=8.0)
    workers = check_integer("workers", settings["workers"], minimum=0, example=2)
    if settings["signal"] not in SIGNALS:
        raise wrong_value("signal", settings["signal"], "must be kill, term or hup", "kill")
    sent = SIGNALS[settings["signal"]]
    arguments = [*RUN, f"trainer.max_epochs={epochs}"]
    draw = random.Random(settings["seed"]).uniform
    with (
        tempfile.TemporaryDirectory() as place,
        contextlib.chdir(settings["out"] or place),
        terminal.bar("kills", kills, sys.stderr) as advance,
    ):
        if workers:
            arguments += [*write_digits(Path("digits")), f"data.num_workers={workers}"]
        uninterrupted = Path("uninterrupted")
        if wait(start(["train.py", *arguments, f"hydra.run.dir={uninterrupted}"])) != 0:
            raise ValueError("the uninterrupted run failed; its output is in output.txt")
        expected = tensors(uninterrupted)
        done, ended, differing, at_once, finished = 0, 0, 0, 0, False
        while done < kills or not finished:
            folder = f"run-{ended}"
            child = start(["train.py", *arguments, f"hydra.run.dir={folder}", "resume=auto"])
            status = wait(child, draw(0, longest) if done < kills else None, sent)
            finished = status == 0
            if status in (-sent, 128 + sent):
                done += 1
                at_once += status == -sent and sent != signal.SIGKILL
                advance(1)
            elif finished:
                given = tensors(Path(folder))
                same = given.keys() == expected.keys()
                differing += not (same and all(map(torch.equal, given.values(), expected.values())))
                ended += 1
            else:
                raise ValueError(f"{folder} ended with status {status}; see output.txt")
    print(
        f"{done} times {sent.name} after 0 to {longest:g} s, {workers} workers: {ended} runs of "
        f"{epochs} epochs finished, {differing} with a tensor that differs (of {len(expected)}); "
        f"{at_once} ended by the signal before its handler was installed; {report.machine()}"
    )
    if differing:
        raise ValueError("a resumed run differs from the uninterrupted one")


def start(words: list[str]) -> int:
    """Run `python WORDS` in a child process; returns its process id.

    Args:
        words: a script of the clone and its arguments, or -m, a module and its arguments.
    """
    if child := os.fork():
        with contextlib.suppress(PermissionError, ProcessLookupError):  # the child was first
            os.setpgid(child, child)
        return child
    os.setpgid(0, 0)
    with Path("output.txt").open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        status = 0
        try:
            if words[0] == "-m":
                sys.argv = words[1:]
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = [str(ROOT / words[0]), *words[1:]]
                runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 1
        except BaseException:
            traceback.print_exc()
            status = 70
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(child: int, seconds: float | None = None, sent: int = signal.SIGKILL) -> int:
    """Send a signal to a child's group after some seconds; returns its exit status.

    The status is negative if a signal ended the child.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, 0 if deadline is None else os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() > deadline:
            os.killpg(child, sent)
            deadline = None
        time.sleep(0.001)


def write_digits(root: Path) -> list[str]:
    """Write the digits as files, for workers to decode; returns the arguments to train on them."""
    data = repvgg.data.digits()
    for part, source in (("train", data.train), ("val", data.val), ("test", data.test)):
        images, labels = data.read(source, torch.arange(len(source.labels)))
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            folder = root / part / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(folder / f"{i}.png")
    small = ["data.image_size=16", "data.resize_size=16", "++model.strides=[1,1,2,2,1]"]
    return ["data=imagefolder", f"data.root={root}", *small, "optim.lr=0.02"]


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
