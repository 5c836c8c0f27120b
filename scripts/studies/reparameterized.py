"""Fold timm's re-parameterizable networks: python -m scripts.studies.reparameterized

`repvgg.fuse_conv_bn`, which is not told the blocks, next to timm's own `reparameterize_model`,
which calls a method of each. Counts what is executed (convolutions, linear layers, BatchNorms,
additions) and compares with the network in float64; random weights and BatchNorm statistics.
Latency in float32 is measured in turns within one process, with the same network twice as a
control. Writes out/networks.csv, a row per network as soon as it is done, and out/networks.md.
"""

import copy
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from repvgg import cli, fuse_conv_bn, verify
from repvgg.checks import check_integer
from scripts.studies import report, runs
from scripts.studies.networks import randomize_batchnorms

DEFAULTS: dict[str, Any] = {
    "out": "docs/studies/reparameterized",
    "only": [],
    "rounds": 15,
}
NETWORKS = (
    *("repvgg_a0", "mobileone_s0", "mobileone_s1", "mobileone_s4", "repghostnet_050"),
    *("fastvit_t8", "fastvit_sa12", "repvit_m0_9", "levit_128s", "efficientvit_m0"),
    *("tiny_vit_5m_224", "shvit_s1", "ghostnetv3_050"),
)
KINDS = ("convolutions", "batchnorms", "additions")
OPERATIONS = {
    "convolution": "convolutions",
    "addmm": "convolutions",  # linear layers
    "mm": "convolutions",
    "native_batch_norm": "batchnorms",
    "_native_batch_norm_legit_no_training": "batchnorms",
    "_batch_norm_with_update": "batchnorms",
    "cudnn_batch_norm": "batchnorms",
    "add": "additions",
    "add_": "additions",
    "sub": "additions",
}
MODELS = ("trained", "ours", "again", "timm")


def main(settings: dict[str, Any]) -> None:
    check_integer("rounds", settings["rounds"], minimum=1, example=15)
    out = Path(settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    path = out / "networks.csv"
    done = {row["network"] for row in runs.read(path)}
    for name in settings["only"] or NETWORKS:
        if name not in done:
            runs.append(path, measure(name, settings["rounds"]))
    text = summary(runs.read(path), settings)
    (out / "networks.md").write_text(text)
    print(text)


def measure(name: str, rounds: int) -> runs.Row:
    """One row of the table."""
    torch.manual_seed(0)
    network = randomize_batchnorms(timm.create_model(name)).eval()
    config: Any = network.default_cfg
    images = torch.rand(1, *config["input_size"])
    wide = copy.deepcopy(network).double()
    start = time.perf_counter()
    ours, found = fuse_conv_bn(network)
    row: runs.Row = {"network": name, "seconds": round(time.perf_counter() - start, 1)}
    theirs = reparameterize_model(copy.deepcopy(network)).eval()
    models = {"trained": network, "ours": ours, "again": copy.deepcopy(ours), "timm": theirs}
    with torch.no_grad():
        expected = wide(images.double())
        folded, _ = fuse_conv_bn(wide)
        row["error_ours"] = verify.relative_error(expected, folded(images.double()))
        row["error_timm"] = verify.relative_error(expected, theirs.double()(images.double()))
        theirs.float()
        for key in ("trained", "ours", "timm"):
            counted = Count()
            with counted:
                models[key](images)
            row |= {f"{kind}_{key}": counted.found[kind] for kind in KINDS}
            row[f"trains_{key}"] = sum(p.requires_grad for p in models[key].parameters())
        row |= {f"ms_{key}": value for key, value in latency(models, images, rounds).items()}
    row["kept"] = "; ".join(sorted(set(found.kept.values())))
    return row


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not type it
    """Counts the operations that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.found = dict.fromkeys(KINDS, 0)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kind = OPERATIONS.get(str(func).split(".")[1])
        if kind is not None:
            self.found[kind] += 1
        return func(*args, **(kwargs or {}))


def latency(models: dict[str, nn.Module], images: Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of each network; a new order in each round, after three that warm up."""
    times: dict[str, list[float]] = {key: [] for key in models}
    draw = random.Random(0)
    for number in range(rounds + 3):
        for key in draw.sample(MODELS, len(MODELS)):
            start = time.perf_counter()
            models[key](images)
            if number >= 3:
                times[key].append(1000 * (time.perf_counter() - start))
    return {key: round(statistics.median(values), 2) for key, values in times.items()}


def summary(rows: list[dict[str, str]], settings: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# timm's re-parameterizable networks",
        "",
        "Convolutions and linear layers / BatchNorms / additions that run, as trained, folded by "
        "`repvgg.fuse_conv_bn`, which is not told the blocks, and by timm's "
        "`reparameterize_model`. Errors against the network in float64, ours folded in float64, "
        "timm's in float32, as it does. Parameters that still train.",
        "",
        "| network | trained | ours | timm | error: ours, timm | train: ours, timm | ms: trained, "
        "ours, again, timm |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        counts = [" / ".join(row[f"{kind}_{key}"] for kind in KINDS) for key in MODELS[:2]]
        counts.append(" / ".join(row[f"{kind}_timm"] for kind in KINDS))
        errors = ", ".join(f"{float(row[f'error_{key}']):.1e}" for key in ("ours", "timm"))
        trains = ", ".join(row[f"trains_{key}"] for key in ("ours", "timm"))
        times = ", ".join(row[f"ms_{key}"] for key in MODELS)
        lines.append(f"| {row['network']} | {' | '.join(counts)} | {errors} | {trains} | {times} |")
    lines += [
        "",
        f"`{report.command('reparameterized', settings, DEFAULTS)}`, {report.machine()}, "
        f"{report.versions('timm')}; one image, one thread, medians of {settings['rounds']} turns; "
        '"again" is a copy of ours, the control.',
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.script(main, str(__doc__), DEFAULTS)
