"""Train, kill, resume, deploy, verify and predict, again and again: does anything grow?

    python -m scripts.reliability.soak minutes=30 out=soak.json

A cycle trains a small network on the digits, stops it once or twice at random moments by a random
signal, resumes it until it ends, deploys it, verifies the folder and labels images. Its programs
are forked from this process, which has imported torch already. Its weights must be those of a run
that nothing stopped. Then this process itself trains some steps, folds, writes, opens and runs
files. After each cycle these are counted: memory, open files and threads of this process, files
left in the temporary folder, in /dev/shm and in the run, and processes left. Status 1 if a cycle
fails, or if one of these is larger in the last quarter of the cycles than in the second.
"""

import contextlib
import gc
import json
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from PIL import Image

import repvgg
from repvgg import cli, losses
from repvgg.checks import check_integer
from repvgg.contract import Description, Plain
from repvgg.export.formats import FORMATS
from scripts.studies import report
from scripts.studies.kills import RUN, start, tensors, wait

DEFAULTS: cli.Config = {"minutes": 30, "seed": 0, "out": None}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TRAIN = [*RUN, "trainer.max_epochs=4", "logger.tensorboard.pictures=false"]
SLACK = {"memory": 30e6, "shm": 0.0}  # that a count may grow by; else 0


def main() -> None:
    cli.script(soak, str(__doc__), DEFAULTS)


def soak(settings: dict[str, object]) -> None:
    minutes = check_integer("minutes", settings["minutes"], minimum=1, example=30)
    out = None if settings["out"] is None else Path(str(settings["out"])).absolute()
    draw = random.Random(str(settings["seed"]))
    stops: Counter[str] = Counter()
    gauges: list[dict[str, float]] = []
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        temporary = Path(place, "tmp")
        temporary.mkdir()
        os.environ["TMPDIR"], tempfile.tempdir = str(temporary), str(temporary)
        run_once(["train.py", *TRAIN, "hydra.run.dir=whole"])
        expected = tensors(Path("whole"))
        while time.monotonic() < end:
            folder = Path("run")
            stops += cycle(folder, draw, expected)
            stray = [path for path in folder.rglob("*") if path.name.startswith(".")]
            stray = [path for path in stray if path.name != ".hydra"]
            in_process(Path("files"))
            gauges.append(counted(temporary) | {"stray": float(len(stray))})
            shutil.rmtree(folder)
            shown = ", ".join(f"{name} {value:,.0f}" for name, value in gauges[-1].items())
            print(f"{len(gauges)}: {shown}", flush=True)
    summary = {name: growth([one[name] for one in gauges]) for name in gauges[0]}
    print(f"\n{len(gauges)} cycles, {sum(stops.values())} stops: {dict(stops)}; {report.machine()}")
    print(f"{'':<14}{'first':>14}{'second quarter':>16}{'last quarter':>14}")
    for name, (first, second, last) in summary.items():
        print(f"{name:<14}{first:>14,.0f}{second:>16,.0f}{last:>14,.0f}")
    if out is not None:
        content = {"minutes": minutes, "stops": dict(stops), "gauges": gauges}
        out.write_text(json.dumps(content | {"machine": report.machine()}, indent=1) + "\n")
    grown = [
        name for name, (_, second, last) in summary.items() if last > second + SLACK.get(name, 0)
    ]
    if grown:
        raise ValueError(f"more after than before: {', '.join(grown)}")


def cycle(folder: Path, draw: random.Random, expected: dict[str, torch.Tensor]) -> Counter[str]:
    """Train with stops, deploy, verify and predict; what stopped the training.

    Raises:
        ValueError: a program failed, or the weights are others.
    """
    stops: Counter[str] = Counter()
    left = draw.randint(1, 2)
    while True:
        child = start(["train.py", *TRAIN, f"hydra.run.dir={folder}", "resume=auto"])
        sent = draw.choice(SIGNALS)
        status = wait(child, draw.uniform(0.2, 4.0) if left else None, sent)
        if status == 0:
            break
        if status not in (-sent, 128 + sent):
            text = Path("output.txt").read_text()[-1000:]
            raise ValueError(f"training ended with status {status} after {sent.name}: {text}")
        stops[sent.name] += 1
        left = max(0, left - 1)
    given = tensors(folder)
    if given.keys() != expected.keys() or not all(
        torch.equal(value, expected[key]) for key, value in given.items()
    ):
        raise ValueError("the weights are not those of a run that nothing stopped")
    deployed = folder / "deploy"
    run_once(["deploy.py", f"ckpt={folder / 'checkpoints' / 'best.ckpt'}", "benchmark=false"])
    run_once(["-m", "repvgg", "verify", f"folder={deployed}"])
    data = repvgg.data.digits()
    pixels, _ = data.read(data.test, torch.arange(1))
    Image.fromarray(pixels[0, 0].numpy()).save("digit.png")
    run_once(["-m", "repvgg", "predict", f"model={deployed / 'model.onnx'}", "images=digit.png"])
    return stops


def run_once(words: list[str]) -> None:
    """Run a program to its end.

    Raises:
        ValueError: its status is not 0.
    """
    if status := wait(start(words)):
        text = Path("output.txt").read_text()[-500:]
        raise ValueError(f"{' '.join(words)} ended with status {status}: {text}")


def in_process(folder: Path) -> None:
    """Train some steps, fold, write, open and run files in this process."""
    folder.mkdir(exist_ok=True)
    data = repvgg.data.digits()
    images, labels = data.read(data.train, torch.arange(64))
    config: dict[str, Plain] = {"name": "repvgg_tiny", "num_classes": 10, "in_channels": 1}
    model = repvgg.create_model("repvgg_tiny", num_classes=10, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        losses.cross_entropy(model(images / 255), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    folded = repvgg.switch_to_deploy(model)
    description = Description(config, data.contract)
    for name in ("safetensors", "onnx"):
        path = folder / FORMATS[name].filename
        if name == "safetensors" or not path.exists():  # torch.export keeps 0.6 MB of each export
            FORMATS[name].save(folded, path, description)
        repvgg.export.open_artifact(path)(images / 255)


def counted(temporary: Path) -> dict[str, float]:
    """What must not grow."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    values = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "memory": 1024.0 * int(values["VmRSS"].split()[0]),
        "open files": float(len(os.listdir("/proc/self/fd"))),
        "threads": float(values["Threads"]),
        "temporary": float(sum(1 for _ in temporary.rglob("*"))),
        "shm": float(len(os.listdir("/dev/shm"))),
        "processes": float(len(children())),
    }


def children() -> list[int]:
    """The processes that this one started, or their children, and that still run."""
    found = []
    for task in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(task.name)) == os.getsid(0) and int(task.name) != os.getpid():
                command = (task / "cmdline").read_bytes()
                if b"scripts.reliability.soak" in command:
                    found.append(int(task.name))
    return found


def growth(values: list[float]) -> tuple[float, float, float]:
    """The first value, and the medians of the second and of the last quarter."""
    quarter = max(1, len(values) // 4)
    second = values[quarter : 2 * quarter] or values
    return values[0], statistics.median(second), statistics.median(values[-quarter:])


if __name__ == "__main__":
    main()
