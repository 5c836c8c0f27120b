"""What each branch is worth: python -m scripts.studies.branch_ablation [root=FOLDER] [ckpt=FILE]

Measures the test accuracy of a trained RepVGG without one branch (3x3, 1x1 or identity) of one
block, for every branch of every block. A branch is removed by setting its folded kernel and bias to
zero, so the block's convolution is the sum of the others. Nothing is trained again. This is done
twice: with the BatchNorm statistics of the trained network, and with those of all BatchNorms
re-estimated on training images after the removal. The share of each branch in the folded kernel
stands beside it: its Frobenius norm over the sum of the branches' norms.

Trains `seeds` networks of `model` first and saves them in `work`, on the embedded digits or on a
folder with train/CLASS/ and test/CLASS/; the same command resumes a stopped study. `ckpt` measures
one network of train.py instead, on the same images. Writes numbers, a table and a heat map.
"""

import copy
import functools
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from repvgg import checkpoint, cli, figures
from repvgg.checks import check_integer, check_number, wrong_value
from repvgg.contract import DataContract, Normalize, to_float
from repvgg.data.batches import Stored
from repvgg.models.block import RepVGGBlock
from repvgg.models.forms import switch_to_deploy
from repvgg.models.network import RepVGG
from repvgg.models.reestimate import reestimate_bn
from repvgg.models.registry import list_models
from repvgg.reparam import Affine
from scripts.studies import report, runs, training

DEFAULTS: dict[str, Any] = {
    "root": None,  # null: the digits
    "ckpt": None,  # null: networks that this study trains
    "model": "repvgg_tiny",
    "width": 1.0,  # of every stage, relative to the variant
    "strides": [1, 1, 2, 2, 1],
    "seeds": 3,
    "epochs": 24,
    "batch_size": 64,
    "lr": 0.02,
    "dropout": 0.2,
    "images": 1024,  # training images on which BatchNorm statistics are re-estimated
    "workers": 2,
    "work": "runs/branch_ablation",
    "out": "docs/studies/branch_ablation",
}
BRANCHES = {"3x3": "branch_3x3", "1x1": "branch_1x1", "identity": "branch_identity"}
BATCH = 256


class Removal(NamedTuple):
    """A branch of a block: the block's name in the network, a key of `BRANCHES`."""

    block: str
    branch: str


MAPS = {  # file -> column, title, alternative text
    "removed": (
        "accuracy",
        "branch removed",
        "Test accuracy without each branch of each block",
    ),
    "reestimated": (
        "accuracy_reestimated",
        "removed, BN re-estimated",
        "The same with BatchNorm statistics re-estimated after each removal",
    ),
}
NOTHING = Removal("", "")  # the whole network


def main(settings: dict[str, Any]) -> None:
    check(settings)
    out = Path(settings["out"])
    data = "digits" if settings["root"] is None else Path(settings["root"]).resolve().name
    networks = trained_networks(settings)
    name = f"{data}-{settings['model'] if settings['ckpt'] is None else networks[0][0]}"
    out.mkdir(parents=True, exist_ok=True)
    results = out / f"{name}.csv"
    results.unlink(missing_ok=True)
    train, test, _, _ = training.loaded(settings["root"])
    for title, network, contract in networks:
        for row in examine(network, contract, train, test, settings["images"]):
            runs.append(results, {"network": title, **row})
    count = min(settings["images"], len(train.labels))
    record = {
        "title": name.replace("-", ", "),
        "command": report.command("branch_ablation", settings, DEFAULTS),
        "networks": len(networks),
        "recipe": None if settings["ckpt"] else {key: settings[key] for key in training.RECIPE},
        "bn_images": count if count < BATCH else count - count % BATCH,  # whole batches
        "test_images": len(test.labels),
        "machine": report.machine(),
    }
    (out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    redraw(results)
    print(results.with_suffix(".md").read_text())


def redraw(results: Path) -> None:
    """Write table and figure again from the recorded numbers."""
    rows, record = runs.read(results), json.loads(results.with_suffix(".json").read_text())
    results.with_suffix(".md").write_text(table(rows, record, results.stem))
    draw(rows, results.with_suffix(""))


def check(settings: dict[str, Any]) -> None:
    for key in ("seeds", "epochs", "batch_size"):
        check_integer(key, settings[key], minimum=1, example=DEFAULTS[key])
    check_integer("images", settings["images"], minimum=2, example=1024)
    check_integer("workers", settings["workers"], minimum=0, example=2)
    check_number("lr", settings["lr"], example=0.02)
    check_number("width", settings["width"], minimum=0.05, example=1.0)
    check_number("dropout", settings["dropout"], below=1, example=0.2)
    if settings["model"] not in list_models():
        raise wrong_value("model", settings["model"], "must be of the family", "repvgg_a0")


def trained_networks(settings: dict[str, Any]) -> list[tuple[str, RepVGG, DataContract]]:
    """The networks to measure, multi-branch: a title, the network, its preprocessing."""
    if settings["ckpt"] is None:
        jobs = training.train_missing([settings["model"]], settings)
        files = {f"seed {job.seed}": job.path(settings) for job in jobs}
    else:
        path = Path(settings["ckpt"])
        files = {path.stem: path}
    contract = training.loaded(settings["root"])[2]
    found: list[tuple[str, RepVGG, DataContract]] = []
    for title, path in files.items():
        restored = checkpoint.load(path)
        network = restored.model
        if not isinstance(network, RepVGG) or network.stem.reparam is not None:
            raise ValueError(f"{path}: not a multi-branch RepVGG; pass a checkpoint of train.py")
        if list(restored.data.classes) != list(contract.classes):
            raise ValueError(
                f"{path} was trained on other classes than the images show: pass root=FOLDER with "
                "train/CLASS/ and test/CLASS/ of the same classes"
            )
        found.append((title, network, restored.data))
    return found


def blocks_of(network: RepVGG) -> dict[str, RepVGGBlock]:
    """The blocks of a network by name, in the order in which they run."""
    return {
        name: module for name, module in network.named_modules() if isinstance(module, RepVGGBlock)
    }


def branches_of(block: RepVGGBlock) -> list[str]:
    return [name for name, key in BRANCHES.items() if getattr(block, key) is not None]


def removals_of(network: RepVGG) -> list[Removal]:
    """Every branch of every block."""
    return [
        Removal(name, branch)
        for name, block in blocks_of(network).items()
        for branch in branches_of(block)
    ]


@torch.no_grad()
def remove(block: RepVGGBlock, branch: str) -> None:
    """Let a branch of a multi-branch block give zeros, in place, in both modes."""
    if branch == "identity":
        block.branch_identity = None
        return
    layers = getattr(block, BRANCHES[branch])
    last = layers.conv if layers.bn is None else layers.bn
    for parameter in (last.weight, last.bias):
        if parameter is not None:
            parameter.zero_()


def without(block: RepVGGBlock, branch: str) -> Affine:
    """The folded convolution of a block without one of its branches, in float64."""
    rest = copy.deepcopy(block).double()
    remove(rest, branch)
    with torch.no_grad():
        return rest.equivalent_kernel_bias()


def kernel_shares(block: RepVGGBlock) -> dict[str, float]:
    """Frobenius norm of each branch's folded kernel, over the sum of these norms."""
    with torch.no_grad():
        norms = {
            branch: part.kernel.norm().item() for branch, part in block.branch_affines().items()
        }
    return {branch: norm / sum(norms.values()) for branch, norm in norms.items()}


@torch.no_grad()
def ablate(network: RepVGG, images: Tensor, labels: Tensor) -> dict[Removal, float]:
    """Accuracy of a network, whole and without each branch of each block.

    Every removal is one forward of the folded network; blocks in front of it run once for all.

    Args:
        images: (N, C, H, W), preprocessed.
    """
    blocks = blocks_of(network)
    rest: dict[str, dict[str, Affine]] = {name: {} for name in blocks}
    for removal in removals_of(network):
        kernel, bias = without(blocks[removal.block], removal.branch)
        rest[removal.block][removal.branch] = Affine(kernel.to(images), bias.to(images))
    folded = switch_to_deploy(network)
    chain = list(blocks_of(folded).values())
    correct = dict.fromkeys([NOTHING, *removals_of(network)], 0)
    for x, answers in zip(torch.split(images, BATCH), torch.split(labels, BATCH), strict=True):
        for place, name in enumerate(blocks):
            for branch, (kernel, bias) in rest[name].items():
                weights = {"reparam.weight": kernel, "reparam.bias": bias}
                y = functional_call(chain[place], weights, (x,))
                for block in chain[place + 1 :]:
                    y = block(y)
                found = folded.forward_head(y).argmax(1)
                correct[Removal(name, branch)] += int((found == answers).sum())
            x = chain[place](x)
        correct[NOTHING] += int((folded.forward_head(x).argmax(1) == answers).sum())
    return {removal: count / len(labels) for removal, count in correct.items()}


@torch.no_grad()
def ablate_reestimated(
    network: RepVGG, images: Tensor, labels: Tensor, batches: Sequence[Tensor]
) -> Iterator[tuple[Removal, float]]:
    """As `ablate`, with all BatchNorm statistics re-estimated after each removal."""
    for removal in [NOTHING, *removals_of(network)]:
        rest = copy.deepcopy(network)
        if removal != NOTHING:
            remove(blocks_of(rest)[removal.block], removal.branch)
        reestimate_bn(rest, batches)
        folded = switch_to_deploy(rest)
        found = torch.cat([folded(part).argmax(1) for part in torch.split(images, BATCH)])
        yield removal, (found == labels).double().mean().item()


def examine(
    network: RepVGG, contract: DataContract, train: Stored, test: Stored, count: int
) -> list[runs.Row]:
    """One row per branch, and one for the whole network."""
    normalize = Normalize(contract.mean, contract.std)
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))[:count]
    batches = list(torch.split(normalize(to_float(train.images[order])), BATCH))
    if len(batches) > 1 and len(batches[-1]) < BATCH:  # each counts alike
        batches.pop()
    images = normalize(to_float(test.images))
    measured = ablate(network, images, test.labels)
    again = dict(ablate_reestimated(network, images, test.labels, batches))
    shares = {name: kernel_shares(block) for name, block in blocks_of(network).items()}
    return [
        {
            **removal._asdict(),
            "accuracy": measured[removal],
            "accuracy_reestimated": again[removal],
            "kernel_share": "" if removal == NOTHING else shares[removal.block][removal.branch],
        }
        for removal in measured
    ]


def column(
    rows: list[dict[str, str]], removal: Removal, key: str, scale: float = 100
) -> list[float]:
    """A number of every network; empty if no network has the branch."""
    return [scale * float(row[key]) for row in rows if (row["block"], row["branch"]) == removal]


def table(rows: list[dict[str, str]], record: dict[str, Any], name: str) -> str:
    whole = column(rows, NOTHING, "accuracy")
    whole_again = column(rows, NOTHING, "accuracy_reestimated")
    recipe = record["recipe"]
    trained = f" Recipe: {', '.join(f'{k} {v}' for k, v in recipe.items())}." if recipe else ""
    lines = [
        f"# Accuracy without one branch: {record['title']}",
        "",
        f"`{record['command']}`; n = {record['networks']} networks, {record['test_images']} test "
        f"images; {record['machine']}.{trained}",
        "",
        "A branch is removed by setting its folded kernel and bias to zero; nothing is trained "
        f"again. Whole network: {shown(whole)} % test accuracy, {shown(whole_again)} % with "
        f"BatchNorm statistics re-estimated on {record['bn_images']} training images. Mean and "
        "standard deviation over networks.",
        "",
        *(report.picture(f"{name}-{kind}", alt) for kind, (_, _, alt) in MAPS.items()),
        "",
        report.picture(f"{name}-kernels", "Share of each branch in the folded kernel"),
        "",
        "| block | "
        + " | ".join(f"without {branch}" for branch in BRANCHES)
        + " | "
        + " | ".join(f"without {branch}, BN re-estimated" for branch in BRANCHES)
        + " | "
        + " | ".join(f"kernel share {branch}" for branch in BRANCHES)
        + " |",
        "|---" * (1 + 3 * len(BRANCHES)) + "|",
    ]
    for block in dict.fromkeys(row["block"] for row in rows if row["block"]):
        cells = [
            shown(column(rows, Removal(block, branch), key))
            for key in ("accuracy", "accuracy_reestimated", "kernel_share")
            for branch in BRANCHES
        ]
        lines.append(f"| {block} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shown(values: list[float]) -> str:
    """Mean and standard deviation; nothing of no values."""
    if not values:
        return ""
    deviation = f" (sd {statistics.stdev(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def draw(rows: list[dict[str, str]], stem: Path) -> None:
    """Heat maps of the accuracy, a cell for every branch, and the shares of the folded kernels."""
    blocks = list(dict.fromkeys(row["block"] for row in rows if row["block"]))
    for kind, (key, title, _) in MAPS.items():
        whole = statistics.mean(column(rows, NOTHING, key))
        cells = [
            [mean_or_nan(column(rows, Removal(block, branch), key)) for branch in BRANCHES]
            for block in blocks
        ]
        chart = functools.partial(
            figures.heat_map,
            values=torch.tensor(cells, dtype=torch.float64),
            rows=blocks,
            columns=list(BRANCHES),
            label="test accuracy, %",
            title=f"{title} (whole: {whole:.1f} %)",
            limits=(0.0, 100.0),
        )
        figures.save_svgs(chart, stem.with_name(f"{stem.name}-{kind}"))
    shares = {
        branch: [
            statistics.mean(column(rows, Removal(block, branch), "kernel_share") or [0.0])
            for block in blocks
        ]
        for branch in BRANCHES
    }
    chart = functools.partial(
        figures.stacked_bars,
        shares=shares,
        rows=blocks,
        unit="share of the folded kernel's norms, %",
    )
    figures.save_svgs(chart, stem.with_name(f"{stem.name}-kernels"))


def mean_or_nan(values: list[float]) -> float:
    return statistics.mean(values) if values else math.nan


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
