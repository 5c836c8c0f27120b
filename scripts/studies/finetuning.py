"""Fine-tune from a multi-branch checkpoint and a folded file: python -m scripts.studies.finetuning

Trains a network on half of the classes and saves it in both forms. Then fine-tunes on all classes
with few labels and a new classifier: from the multi-branch checkpoint, from the folded file, and
from random weights. Prints the test accuracies by seed and their differences.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import repvgg
from repvgg import checkpoint, cli
from repvgg.checkpoint.native import Checkpoint, Probe
from repvgg.checks import check_integer, check_number
from repvgg.contract import DataContract, Description, Normalize, to_float
from repvgg.data.batches import Stored
from repvgg.data.module import ImageData
from repvgg.deploy.verification import accuracy
from repvgg.export.formats import save_safetensors
from scripts.studies import report, runs, training

DEFAULTS: dict[str, Any] = {
    "model": "repvgg_tiny",
    "root": None,  # a folder with train/CLASS/ and test/CLASS/; null: the digits
    "strides": [1, 1, 2, 2, 1],
    "seeds": 3,
    "labels": 0.1,
    "steps": 300,
    "lr": 0.1,
    "finetuning_steps": 150,
    "finetuning_lr": 0.02,
    "workers": 2,
}
STARTS = ("random weights", "multi-branch checkpoint", "folded file")


def main(settings: dict[str, Any]) -> None:
    for key in ("seeds", "steps", "finetuning_steps"):
        check_integer(key, settings[key], minimum=1, example=DEFAULTS[key])
    check_integer("workers", settings["workers"], minimum=0, example=2)
    for key in ("labels", "lr", "finetuning_lr"):
        check_number(key, settings[key], example=DEFAULTS[key])
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.csv"
        calls = [(seed, settings) for seed in range(settings["seeds"])]
        runs.run(compare, calls, results, workers=settings["workers"])
        rows = sorted(runs.read(results), key=lambda row: int(row["seed"]))
    print(f"{settings['model']}, {report.machine()}\n")
    print(f"| seed | {' | '.join(STARTS)} | folded minus multi-branch |")
    print("|---|---|---|---|---|")
    apart = []
    for row in rows:
        scores = [100 * float(row[start]) for start in STARTS]
        apart.append(scores[2] - scores[1])
        shown = " | ".join(f"{score:.2f}" for score in scores)
        print(f"| {row['seed']} | {shown} | {apart[-1]:+.2f} |")
    spread = f", sd {statistics.stdev(apart):.2f}" if len(apart) > 1 else ""
    print(f"\nmean difference {statistics.mean(apart):+.2f} points{spread}")


def compare(seed: int, settings: dict[str, Any]) -> runs.Row:
    """One row: the accuracy from every start."""
    train, test, contract, _ = training.load_images(settings["root"])
    half = train.labels < (len(contract.classes) + 1) // 2
    seen = Stored(train.images[half], train.labels[half])
    classes = list(contract.classes)[: int(seen.labels.max()) + 1]
    known = DataContract(**{**vars(contract), "classes": classes})
    first = build(settings, known, seed)
    fit(first, seen, known, settings["steps"], settings["lr"], seed)

    few = training.subset(train, settings["labels"], seed)
    row: runs.Row = {"seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        places = write(first, known, seen, settings, Path(folder))
        for start in STARTS:
            network = build(settings, contract, seed + 1)
            if start in places:
                images = normalized(few.images, contract)
                checkpoint.initialize(network, checkpoint.open_network(places[start]), images)
            fit(
                network,
                few,
                contract,
                settings["finetuning_steps"],
                settings["finetuning_lr"],
                seed,
            )
            row[start] = evaluate(network, test, contract)
    return row


def write(
    network: nn.Module, known: DataContract, seen: Stored, settings: dict[str, Any], folder: Path
) -> dict[str, Path]:
    """Save a trained network in both forms."""
    places = {
        "multi-branch checkpoint": folder / "best.ckpt",
        "folded file": folder / "model.safetensors",
    }
    config = arguments(settings, known)
    probe = Probe(seen.images[:8], seen.labels[:8], torch.empty(0))
    checkpoint.save(places["multi-branch checkpoint"], Checkpoint(network, config, known, probe))
    deployed = repvgg.switch_to_deploy(network)
    save_safetensors(deployed, places["folded file"], Description(config, known))
    return places


def arguments(settings: dict[str, Any], contract: DataContract) -> dict[str, Any]:
    return {
        "name": settings["model"],
        "num_classes": len(contract.classes),
        "in_channels": contract.in_channels,
        "strides": settings["strides"],
    }


def build(settings: dict[str, Any], contract: DataContract, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network: nn.Module = repvgg.create_model(**arguments(settings, contract))
    return network


def fit(
    network: nn.Module,
    images: Stored,
    contract: DataContract,
    steps: int,
    lr: float,
    seed: int,
) -> None:
    data = ImageData(
        images, images, images, contract, batch_size=min(64, len(images.labels)), seed=seed
    )
    module = training.classifier(
        network, num_classes=len(contract.classes), lr=lr, steps=steps, warmup=steps // 10
    )
    training.fit(module, data, steps)


@torch.no_grad()
def evaluate(network: nn.Module, test: Stored, contract: DataContract) -> float:
    """Accuracy on the test images."""
    network.eval()
    parts = torch.split(normalized(test.images, contract), 256)
    return accuracy(torch.cat([network(part) for part in parts]), test.labels)


def normalized(images: torch.Tensor, contract: DataContract) -> torch.Tensor:
    return Normalize(contract.mean, contract.std).forward(to_float(images))


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
