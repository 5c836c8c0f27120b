"""Fold networks of four families: python -m scripts.studies.fold_networks

Each network gets random weights and BatchNorm statistics, is folded by `repvgg.fuse_conv_bn` in
float64, and is compared with the unfolded network on one input. A second fold must change nothing.
Writes out/networks.csv, a row per network as soon as it is done, and out/networks.md with the
tables. Each network may take `seconds`. Networks without a BatchNorm or with more than 60 million
parameters are skipped.

    python -m scripts.studies.fold_networks families=[papers] only=[acnet,densenet]
"""

import copy
import gc
import math
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from repvgg import cli, fuse_conv_bn, verify
from repvgg.checks import check_integer, wrong_value
from scripts.studies import library_networks, paper_networks, report, runs
from scripts.studies.library_networks import Family, Inputs, UnfitError
from scripts.studies.networks import count_batchnorms, largest_error, randomize_batchnorms

DEFAULTS: dict[str, Any] = {
    "out": "docs/studies/fold_networks",
    "only": [],
    "families": ["timm", "transformers", "ultralytics", "papers"],
    "workers": 2,
    "seconds": 180,
}
FAMILIES: dict[str, type[Family]] = {
    "timm": library_networks.Timm,
    "transformers": library_networks.Transformers,
    "ultralytics": library_networks.Ultralytics,
    "papers": paper_networks.Papers,
}
MAX_PARAMETERS = 60e6
TOLERANCE = 1e-9
NARROW_TOLERANCE = 1e-4  # for a network that casts to float32 internally
COLUMNS = (
    *("family", "network", "outcome", "input", "parameters", "batchnorms", "left", "why"),
    *("fused", "merged", "untraced", "why_untraced", "seconds", "error", "narrow"),
    *("again_fused", "again_merged", "sensitivity", "note"),
)

Fold = Callable[[nn.Module], tuple[nn.Module, Any]]


def main(settings: dict[str, Any]) -> None:
    for family in settings["families"]:
        if family not in FAMILIES:
            raise wrong_value(
                "families", family, f"must be some of {', '.join(FAMILIES)}", "[papers]"
            )
    check_integer("workers", settings["workers"], minimum=1, example=2)
    if settings["seconds"] <= 0:
        raise wrong_value("seconds", settings["seconds"], "must be above 0", 180)
    families = {name: FAMILIES[name]() for name in settings["families"]}
    names = [(key, name) for key, family in families.items() for name in family.names() if name]
    for name in settings["only"]:
        if name not in [known for _, known in names]:
            raise wrong_value(
                "only", name, "there is no such network in the families", "[resnet18]"
            )
    out = Path(settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    path = out / "networks.csv"
    done = {(row["family"], row["network"]) for row in runs.read(path)}
    calls = [
        (key, name, settings["seconds"])
        for key, name in names
        if (key, name) not in done and (not settings["only"] or name in settings["only"])
    ]
    runs.run(measure_apart, calls, path, workers=settings["workers"])
    _drop_left_out(path)
    text = summary(runs.read(path))
    (out / "networks.md").write_text(text)
    print(text)


def _drop_left_out(path: Path) -> None:
    """Keep the rows of what was measured; the file is replaced whole."""
    rows = runs.read(path)
    kept = [row for row in rows if row["outcome"] != "left out"]
    if kept == rows:
        return
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for row in kept:
            runs.append(Path(folder) / path.name, row)
        (Path(folder) / path.name).replace(path) if kept else path.unlink()


def measure_apart(family: str, name: str, seconds: float) -> runs.Row:
    """The row of a network, measured in its own process, which may time out or die.

    The process is forked, so libraries are imported only once.
    """
    FAMILIES[family]()  # imports
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, family, name))
    process.start()
    sender.close()
    row = None
    note = ""
    try:
        if receiver.poll(seconds):
            row = receiver.recv()
        else:
            note = f"took more than {seconds:g} seconds"
    except EOFError:
        process.join(10)
        note = f"the process died, status {process.exitcode}"
    process.kill()
    process.join()
    if row is None:
        outcome = "died" if note.startswith("the") else "timeout"
        row = _row(family, name, outcome=outcome, note=note)
    return row


def _send(sender: Connection, family: str, name: str) -> None:
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere  # libraries print what they build
        sender.send(measure(family, name))


def measure(family: str, name: str, *, fold: Fold = fuse_conv_bn) -> runs.Row:
    """One row of the table.

    The outcome is `right`, `wrong`, `crash` if the fold or the folded network raises, `unfit` if
    the network itself does not run on the input, or `left out` if it is too large or has no
    BatchNorm.
    """
    row = _row(family, name)
    source = FAMILIES[family]()
    torch.manual_seed(0)
    try:
        with torch.device("meta") if source.on_meta else torch.device("cpu"):
            network = source.build(name)
        row["parameters"] = sum(parameter.numel() for parameter in network.parameters())
        row["batchnorms"] = count_batchnorms(network)
        if not row["batchnorms"] or row["parameters"] > MAX_PARAMETERS:
            return row | {"outcome": "left out"}
        if source.on_meta:
            torch.manual_seed(0)
            network = source.build(name)
        network = randomize_batchnorms(network).double()
        inputs, expected, narrow = _first_that_runs(network, source.inputs(name, network))
    except Exception as failure:
        return row | {"outcome": "unfit", "note": _describe(failure)}
    row["input"] = " ".join(
        "x".join(map(str, leaf.shape)) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)
    )
    row["narrow"] = narrow

    try:
        start = time.perf_counter()
        folded, report = fold(network)
        row["seconds"] = round(time.perf_counter() - start, 3)
        row |= {
            "left": count_batchnorms(folded),
            "why": reasons(report.kept, network),
            "fused": len(report.fused),
            "merged": len(report.merged),
            "untraced": len(report.untraced),
            "why_untraced": reasons(report.untraced, network),
        }
        row["error"] = largest_error(expected, run(folded, inputs))
        twice, again = fold(folded)
        row |= {"again_fused": len(again.fused), "again_merged": len(again.merged)}
        twice_error = largest_error(expected, run(twice, inputs))
    except Exception as failure:
        return row | {"outcome": "crash", "note": _describe(failure)}
    tolerance = NARROW_TOLERANCE if narrow else TOLERANCE
    row["outcome"] = "right" if row["error"] <= tolerance else "wrong"
    if row["outcome"] == "right" and not twice_error <= tolerance:
        row |= {"outcome": "wrong", "note": f"right once, {twice_error:.1e} off after two folds"}
    if row["outcome"] == "wrong":
        row["sensitivity"] = sensitivity(network, inputs, expected)
    del folded, twice, network
    gc.collect()
    return row


def _row(family: str, name: str, **known: Any) -> runs.Row:
    return dict.fromkeys(COLUMNS, "") | {"family": family, "network": name} | known


def _describe(failure: Exception) -> str:
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0] if lines else ''}"[:300]


def _first_that_runs(
    network: nn.Module, choices: list[Inputs]
) -> tuple[Inputs, list[Tensor], bool]:
    """The first inputs that the network accepts, its outputs, and whether it used float32."""
    for number, inputs in enumerate(choices):
        inputs = tree_map(_double, inputs)
        try:
            with _Narrow() as found:
                expected = run(network, inputs)
        except Exception:
            if number == len(choices) - 1:
                raise
            continue
        if not expected:
            raise UnfitError("it returns no tensors")
        if not all(tensor.isfinite().all() for tensor in expected):
            raise UnfitError("its own outputs are not finite")
        return inputs, expected, found.narrow
    raise UnfitError("there are no inputs for it")


def _double(leaf: Any) -> Any:
    floats = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf.double() if floats else leaf


class _Narrow(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not type it
    """Detects operations whose result is a floating-point tensor other than float64."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.narrow = False

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.narrow |= any(
            isinstance(leaf, Tensor)
            and leaf.is_floating_point()
            and leaf.dtype != torch.float64
            and leaf.numel() > 1
            for leaf in tree_leaves(result)
        )
        return result


@torch.no_grad()
def run(network: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The outputs of a network."""
    torch.manual_seed(1)
    named = {key: value for key, value in inputs.items() if key != "args"}
    output = network(*copy.deepcopy(inputs.get("args", ())), **copy.deepcopy(named))
    return [tensor.clone() for tensor in verify.tensors(output)]


def sensitivity(network: nn.Module, inputs: Inputs, expected: list[Tensor]) -> float:
    """How much a relative change of the inputs by 1e-12 is amplified in the outputs."""

    def change(leaf: Any) -> Any:
        floats = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf * (1 + 1e-12 * torch.randn_like(leaf)) if floats else leaf

    return largest_error(expected, run(network, tree_map(change, inputs))) / 1e-12


def reasons(given: dict[str, str], network: nn.Module) -> str:
    """How often each reason is given, with the class of a layer in place of its name."""
    kinds = {name: type(module).__name__ for name, module in network.named_modules() if name}

    def without_names(reason: str) -> str:
        return re.sub(r"[\w.]*\w", lambda word: kinds.get(word[0], word[0]), reason)

    found = Counter(without_names(reason) for reason in given.values())
    return "; ".join(f"{number}x {reason}" for reason, number in found.most_common())


def summary(rows: list[dict[str, str]]) -> str:
    """The tables of the page."""
    present = [family for family in FAMILIES if any(row["family"] == family for row in rows)]
    packages = ", ".join(filter(None, (FAMILIES[family].version() for family in present)))
    lines = [
        "# Networks, folded",
        "",
        f"`python -m scripts.studies.fold_networks families=[{','.join(present)}]` on "
        f"{report.machine()}{', ' if packages else ''}{packages}. Random weights, BatchNorm "
        "statistics far from fresh, eval mode, float64. A network is wrong if its error, relative "
        f"to the largest value of the unfolded network, is above {TOLERANCE:g} "
        f"({NARROW_TOLERANCE:g} if it casts to float32 internally, `narrow` in `networks.csv`, "
        "which has all rows); crashed if the fold or the folded network raised; not measured if "
        "it does not run unfolded, or not in time. Seconds are of one fold, on one thread. "
        "Changed again counts networks in which a second fold still folds or merges something.",
        "",
        "| | networks | not measured | wrong | crashed | narrow | largest error (without narrow) | "
        "BatchNorms | left | merged | changed again | seconds: median | p95 | largest |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(_cells(family, rows))} |" for family in present]
    lines += ["", "BatchNorms left, by reason:", ""]
    lines += ["| | left | networks | reason |", "|---|---|---|---|"]
    for family in present:
        for reason, (number, networks) in _by_reason(_of(family, rows)).items():
            lines.append(f"| {family} | {number} | {networks} | {_cell(reason)} |")
    lines += ["", "Networks with BatchNorms left:", ""]
    lines += ["| | network | BatchNorms | left | why |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (present.index(row["family"]), row["network"])):
        if row["left"] not in ("", "0"):
            cells = (row["family"], row["network"], row["batchnorms"], row["left"])
            lines.append(f"| {' | '.join(cells)} | {_cell(row['why'])} |")
    lines += _odd(rows)
    return "\n".join(lines) + "\n"


def _of(family: str, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of a family, without those left out of the study."""
    return [row for row in rows if row["family"] == family and row["outcome"] != "left out"]


def _cells(family: str, rows: list[dict[str, str]]) -> list[str]:
    own = _of(family, rows)
    ran = [row for row in own if row["outcome"] in ("right", "wrong", "crash")]
    outcomes = Counter(row["outcome"] for row in own)
    wide = [float(row["error"]) for row in ran if row["error"] and row["narrow"] == "False"]
    seconds = sorted(float(row["seconds"]) for row in ran if row["seconds"])
    again = sum({row["again_fused"], row["again_merged"]} - {"", "0"} != set() for row in ran)
    cells: list[Any] = [family, len(own), len(own) - len(ran), outcomes["wrong"]]
    cells += [outcomes["crash"], sum(row["narrow"] == "True" for row in ran)]
    cells.append(f"{max(wide):.1e}" if wide else "-")
    for key in ("batchnorms", "left", "merged"):
        cells.append(sum(int(row[key]) for row in ran if row[key]))
    cells.append(again)
    if not seconds:
        return [*map(str, cells), "-", "-", "-"]
    p95 = seconds[math.ceil(0.95 * len(seconds)) - 1]
    times = (statistics.median(seconds), p95, seconds[-1])
    return [*map(str, cells), *(f"{value:.2f}" for value in times)]


def _by_reason(rows: list[dict[str, str]]) -> dict[str, tuple[int, int]]:
    """For each reason the number of BatchNorms left and of their networks, most first."""
    found: dict[str, tuple[int, int]] = {}
    for row in rows:
        for part in re.split(r"; (?=\d+x )", row["why"]) if row["why"] else []:
            number, _, reason = part.partition("x ")
            before = found.get(reason, (0, 0))
            found[reason] = (before[0] + int(number), before[1] + 1)
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def _odd(rows: list[dict[str, str]]) -> list[str]:
    """A table of networks that are wrong, crashed, changed by a second fold or not measured."""
    odd = []
    for row in rows:
        again = {row["again_fused"], row["again_merged"]} - {"", "0"}
        note = row["note"]
        if row["outcome"] == "wrong":
            note = f"off by {float(row['error']):.1e}; inputs are amplified " + (
                f"{float(row['sensitivity']):.0e} times. {note}"
            )
        if again:
            note = f"again: {row['again_fused']} folded, {row['again_merged']} merged. {note}"
        if row["outcome"] not in ("right", "left out") or again:
            odd.append(f"| {row['family']} | {row['network']} | {row['outcome']} | {_cell(note)} |")
    head = [
        "",
        "Exceptions:",
        "",
        "| | network | outcome | |",
        "|---|---|---|---|",
    ]
    return head + odd if odd else []


def _cell(text: str) -> str:
    return text.replace("|", "\\|")[:400]


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
