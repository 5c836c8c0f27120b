"""What R-Drop gains: python -m scripts.studies.rdrop

Trains one network many times, on the embedded digits or on a folder of images (root=DIR, with
train/CLASS/ and test/CLASS/), and compares accuracy and calibration on the test images:

    seeds x (alpha x dropout, label smoothing) x shares of the labels x budgets

At the budget "epochs" every arm takes the same number of steps; at "time" as many as fit into the
time of the plain arm, by the costs measured on this machine before the first run. All arms of a
seed share the labels, the initial weights and the order of the data, so differences are paired.
The last weights are tested; nothing is selected.

The folder `out` gets results.csv, table.md, two figures and settings.json. The same command resumes
a study that was stopped. Requires scipy: pip install -e ".[study]"
"""

import functools
import itertools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from repvgg import cli, figures
from repvgg.checks import check_integer, check_number, require, wrong_value
from repvgg.data.module import ImageData
from repvgg.models.registry import create_model
from repvgg.rdrop import StochasticLayers
from repvgg.training.classifier import Classifier
from scripts.studies import report, runs, training

DEFAULTS: dict[str, Any] = {
    "root": None,  # null: the digits
    "model": "repvgg_tiny",
    "seeds": 5,
    "alphas": [0.3, 1, 3],
    "dropouts": [0.2, 0.5],
    "label_smoothing": 0.1,  # of the arm that has it; 0: no such arm
    "labels": [0.01, 0.1, 1],  # shares of the training labels
    "budgets": ["epochs", "time"],
    "epochs": 24,  # with all labels
    "min_steps": 300,  # with few
    "batch_size": 64,
    "lr": 0.02,
    "workers": os.cpu_count() or 1,  # processes of one thread each
    "out": "runs/study_rdrop",
}
# Keys that may differ when a study resumes: they add runs or leave some out.
FREE = ("seeds", "alphas", "dropouts", "label_smoothing", "budgets", "workers", "out")
MEASURED_STEPS = 30  # of each short run that measures the cost of a step
METRICS = {"accuracy": (100, "{:.2f}"), "nll": (1, "{:.3f}"), "ece": (100, "{:.2f}")}

DRAWN = {"accuracy": "accuracy, points", "ece": "calibration error (ECE), points"}


class Arm(NamedTuple):
    """One way to train.

    Attributes:
        doubled: R-Drop at the cost its authors pay, every image twice in the batch.
    """

    alpha: float = 0.0
    dropout: float = 0.0
    smoothing: float = 0.0
    doubled: bool = False

    def __str__(self) -> str:
        words = [
            f"alpha {self.alpha:g}" if self.alpha else "",
            f"dropout {self.dropout:g}" if self.dropout else "",
            f"label smoothing {self.smoothing:g}" if self.smoothing else "",
            "(at twice the cost)" if self.doubled else "",
        ]
        return ", ".join(filter(None, words)).replace(", (", " (") or "plain"

    @property
    def cost(self) -> str:
        """The kind of step, which sets its time."""
        if self.doubled:
            return "image twice"
        return "one forward" if self.alpha else "plain"

    @property
    def reference(self) -> "Arm":
        """The arm to compare with: the same without the KL term, or the plain arm."""
        return self._replace(alpha=0.0, doubled=False) if self.alpha else Arm()


class Job(NamedTuple):
    labels: float
    budget: str
    arm: Arm
    seed: int

    @classmethod
    def of(cls, labels: float, budget: str, arm: Arm, seed: int) -> "Job":
        """A run at the cost of plain training belongs to both budgets and is made once."""
        return cls(labels, "epochs" if arm.cost == "plain" else budget, arm, seed)

    @property
    def key(self) -> tuple[str, ...]:
        return f"{self.labels:g}", self.budget, str(self.arm), str(self.seed)


def main(settings: dict[str, Any]) -> None:
    check(settings)
    require("scipy")
    out = Path(settings["out"])
    record = prepare(settings, out)
    results = out / "results.csv"
    done = {key(row) for row in runs.read(results)}
    calls = [(job, settings, record["costs"]) for job in plan(settings) if job.key not in done]
    print(f"{len(done)} runs are done, {len(calls)} to go, into {out}")
    if calls:
        runs.run(train, calls, results, workers=settings["workers"])
    rows = runs.read(results)
    (out / "table.md").write_text(table(rows, settings, record))
    redraw(results)
    print((out / "table.md").read_text())


def redraw(path: Path) -> None:
    """Draw the figures again from the recorded numbers."""
    draw(runs.read(path), path.parent)


def check(settings: dict[str, Any]) -> None:
    check_integer("seeds", settings["seeds"], minimum=2, example=5)
    for name in ("epochs", "min_steps", "batch_size"):
        check_integer(name, settings[name], minimum=1, example=DEFAULTS[name])
    check_integer("workers", settings["workers"], minimum=0, example=2)
    check_number("label_smoothing", settings["label_smoothing"], below=1, example=0.1)
    for name in ("alphas", "dropouts", "labels", "budgets"):
        if not settings[name]:
            example = str(DEFAULTS[name]).replace(" ", "").replace("'", "")
            raise wrong_value(name, settings[name], "must not be empty", example)
    for alpha in settings["alphas"]:
        if check_number("alphas", alpha, example=1) == 0:
            raise wrong_value("alphas", alpha, "0 is always there, as the reference", "[0.3,1]")
    for dropout in settings["dropouts"]:
        if check_number("dropouts", dropout, below=1, example=0.2) == 0:
            raise wrong_value(
                "dropouts", dropout, "R-Drop needs dropout; 0 is the plain arm", "[0.2]"
            )
    for share in settings["labels"]:
        if not 0 < check_number("labels", share, example=1) <= 1:
            raise wrong_value("labels", share, "must be shares above 0 and at most 1", "[0.1,1]")
    if any(budget not in ("epochs", "time") for budget in settings["budgets"]):
        raise wrong_value("budgets", settings["budgets"], "must be of epochs, time", "[epochs]")


def arms_of(settings: dict[str, Any], budget: str) -> list[Arm]:
    smoothing = settings["label_smoothing"]
    arms = [Arm(), *([Arm(smoothing=smoothing)] if smoothing else [])]
    for dropout in settings["dropouts"]:
        arms += [Arm(alpha, dropout) for alpha in (0.0, *map(float, settings["alphas"]))]
    if budget == "time":
        arms.append(Arm(1.0, settings["dropouts"][0], doubled=True))
    return arms


def plan(settings: dict[str, Any]) -> list[Job]:
    """All runs; a seed is finished over all arms before the next one starts."""
    jobs = [
        Job.of(labels, budget, arm, seed)
        for seed in range(settings["seeds"])
        for labels in sorted(settings["labels"])
        for budget in settings["budgets"]
        for arm in arms_of(settings, budget)
    ]
    return list(dict.fromkeys(jobs))


def describe_data(root: str | None) -> str:
    """Identify a data set without its path, which may change."""
    if root is None:
        return "the digits"
    files = sum(path.is_file() for path in Path(root).rglob("*"))
    return f"{Path(root).resolve().name}, {files} files"


def build(
    job: Job, settings: dict[str, Any], costs: dict[str, dict[str, float]]
) -> tuple[Classifier, ImageData, int]:
    """The module, its data and the number of steps."""
    train, test, contract, augment = training.loaded(settings["root"])
    train = training.subset(train, job.labels, job.seed)
    arm = job.arm
    data = ImageData(
        train,
        test,
        test,
        contract,
        batch_size=min(settings["batch_size"], len(train[0])),
        augment=augment,
        seed=job.seed,
    )
    steps = max(settings["epochs"] * len(data.train_dataloader()), settings["min_steps"])
    if job.budget == "time":
        cost = costs[f"{job.labels:g}"]
        steps = round(steps * cost["plain"] / cost[arm.cost])
    torch.manual_seed(job.seed)
    network = create_model(
        settings["model"],
        num_classes=len(contract.classes),
        in_channels=contract.in_channels,
        strides=[1, 1, 2, 2, 1] if max(contract.image_size) < 16 else [1, 2, 2, 2, 2],
        dropout=arm.dropout,
    )
    module = training.classifier(
        network,
        num_classes=len(contract.classes),
        lr=settings["lr"],
        steps=steps,
        warmup=steps // 20,
        seed=job.seed,
        rdrop=arm.alpha,
        label_smoothing=arm.smoothing,
    )
    if arm.doubled:
        module.stochastic = StochasticLayers(backbone=True, head=True)
    return module, data, steps


class Clock(L.Callback):
    """Seconds of a training but its first step, which detects stochastic layers and warms up."""

    def on_train_start(self, *_: object) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == 1:
            self.start = time.perf_counter()

    def on_train_end(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.start


def fit(module: Classifier, data: ImageData, steps: int) -> float:
    """Train; returns the seconds of all steps but the first."""
    clock = Clock()
    training.fit(module, data, steps, clock)
    return clock.seconds


def train(job: Job, settings: dict[str, Any], costs: dict[str, dict[str, float]]) -> runs.Row:
    """Train and test once."""
    module, data, steps = build(job, settings, costs)
    seconds = fit(module, data, steps)
    module.eval()
    with torch.no_grad():
        batches = (data.on_after_batch_transfer(b, 0) for b in data.test_dataloader())
        parts = [(module(images), labels) for images, labels in batches]
    logits, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    kl = module.trainer.callback_metrics.get("train/kl")
    return dict(zip(KEYS, job.key, strict=True)) | {
        "steps": steps,
        "seconds": round(seconds, 2),
        "accuracy": (logits.argmax(1) == labels).double().mean().item(),
        "nll": F.cross_entropy(logits, labels).item(),
        "ece": multiclass_calibration_error(
            logits.softmax(1), labels, num_classes=logits.shape[1], n_bins=15
        ).item(),
        "kl": "" if kl is None else kl.item(),
    }


def measure_costs(settings: dict[str, Any], *, rounds: int = 5) -> dict[str, dict[str, float]]:
    """Milliseconds of a training step, by share of the labels and kind of step.

    Medians over rounds of short, interleaved runs.
    """
    dropout = settings["dropouts"][0]
    arms = [Arm(), Arm(1.0, dropout), Arm(1.0, dropout, doubled=True)]
    costs: dict[str, dict[str, float]] = {}
    for labels in settings["labels"]:
        times: dict[str, list[float]] = {arm.cost: [] for arm in arms}
        for _ in range(1 + rounds):
            for arm in arms:
                module, data, _ = build(Job(labels, "epochs", arm, 0), settings, {})
                seconds = fit(module, data, 1 + MEASURED_STEPS)
                times[arm.cost].append(1000 * seconds / MEASURED_STEPS)
        costs[f"{labels:g}"] = {
            name: statistics.median(values[1:]) for name, values in times.items()
        }
    return costs


KEYS = ("labels", "budget", "arm", "seed")


def prepare(settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """Measure the costs once for a study; raise if the folder holds another study."""
    path = out / "settings.json"
    fixed = {name: value for name, value in settings.items() if name not in FREE}
    fixed["root"] = describe_data(settings["root"])
    if path.exists():
        record: dict[str, Any] = json.loads(path.read_text())
        if record["fixed"] != fixed:
            raise ValueError(
                f"out={out} holds a study with {record['fixed']}, this one has {fixed}: pass "
                "another out"
            )
        return record
    runs.start_worker()
    record = {
        "fixed": fixed,
        "costs": measure_costs(settings),
        "machine": report.machine(),
    }
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    return record


def key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEYS)


def values(
    rows: list[dict[str, str]], labels: float, budget: str, arm: Arm, metric: str
) -> dict[str, float]:
    """A metric by seed."""
    wanted = Job.of(labels, budget, arm, 0)
    return column(rows, f"{labels:g}", wanted.budget, str(arm), metric)


def column(
    rows: list[dict[str, str]], labels: str, budget: str, arm: str, metric: str
) -> dict[str, float]:
    """A metric by seed, of an arm as it is recorded."""
    return {
        row["seed"]: METRICS[metric][0] * float(row[metric])
        for row in rows
        if key(row)[:3] == (labels, budget, arm)
    }


def table(rows: list[dict[str, str]], settings: dict[str, Any], record: dict[str, Any]) -> str:
    lines = [
        f"# R-Drop on {record['fixed']['root'].partition(',')[0]}, {settings['model']}",
        "",
        f"{settings['seeds']} seeds; {settings['epochs']} epochs with all labels, at least "
        f"{settings['min_steps']} steps; batches of {settings['batch_size']}, learning rate "
        f"{settings['lr']:g}. {record['machine']}, one thread a run.",
        "",
        "Mean and (standard deviation) over the seeds. Differences are paired by seed, with a 95 % "
        "interval; p is of the paired t-test, not corrected for the number of comparisons. An arm "
        "with alpha is compared with the same arm without it, any other with the plain arm.",
    ]
    for metric, unit in DRAWN.items():
        caption = f"{unit.capitalize()}, against plain training: mean and 95 % interval"
        lines += ["", report.picture(metric, caption)]
    for labels, budget in itertools.product(sorted(settings["labels"]), settings["budgets"]):
        costs = record["costs"][f"{labels:g}"]
        relative = ", ".join(f"{name} {costs[name] / costs['plain']:.2f}" for name in costs)
        lines += [
            "",
            f"## {100 * labels:g} % of the labels, equal {budget}",
            "",
            f"Cost of a step: {relative}.",
            "",
            "| arm | steps | accuracy, % | difference | p | NLL | p | ECE, % | p |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for arm in arms_of(settings, budget):
            wanted = Job.of(labels, budget, arm, 0).key
            cells = [str(arm), next(row["steps"] for row in rows if key(row) == wanted)]
            for metric, (_, form) in METRICS.items():
                ours = values(rows, labels, budget, arm, metric)
                own = np.array(list(ours.values()))
                cells.append(f"{form} ({form})".format(own.mean(), own.std(ddof=1)))
                if arm == arm.reference:
                    cells += ["", ""] if metric == "accuracy" else [""]
                    continue
                found = report.compare(ours, values(rows, labels, budget, arm.reference, metric))
                if metric == "accuracy":
                    cells.append(f"{found.mean:+.2f} ± {found.half_width:.2f}")
                cells.append(f"{found.p:.3f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, str]], folder: Path) -> None:
    """Accuracy and calibration error against the plain arm, by share of labels and budget."""
    for metric, unit in DRAWN.items():
        panels = []
        arms = sorted(
            {row["arm"] for row in rows} - {str(Arm())}, key=lambda arm: ("alpha" in arm, arm)
        )
        for labels in sorted({float(row["labels"]) for row in rows}):
            share, series = f"{labels:g}", {}
            for budget in dict.fromkeys(row["budget"] for row in rows):
                plain = column(rows, share, "epochs", str(Arm()), metric)
                found = {arm: column(rows, share, budget, arm, metric) for arm in arms}
                series[f"equal {budget}"] = {
                    arm: report.compare(own, plain).interval for arm, own in found.items() if own
                }
            panels.append(report.Panel(f"{100 * labels:g} % of the labels", series))
        chart = functools.partial(
            report.intervals,
            panels=panels,
            unit=f"{unit}, against plain training",
            reference=0.0,
            width=3.2 + 2.4 * len(panels),
        )
        figures.save_svgs(chart, folder / metric)


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
