"""Compare three ways to fuse torchvision's networks: python -m scripts.studies.fusion

`repvgg.fuse_conv_bn`, torch.fx's `fuse`, and the loop over children that tutorials show fuse all of
torchvision's networks and 38 of timm's, with random weights and BatchNorm statistics. Each is
compared with the network itself in float64; ours also module by module. Writes out/networks.csv, a
row per network as soon as it is done, and out/networks.md with the tables.

    python -m scripts.studies.fusion only=[resnet18,fasterrcnn_resnet50_fpn_v2]
"""

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse as fuse_by_fx
from torch.nn.utils.fusion import fuse_conv_bn_eval

from repvgg import cli, fuse_conv_bn, verify
from repvgg.checks import check_integer, wrong_value
from repvgg.fusion.normalizations import is_normalization
from scripts.studies import report, runs
from scripts.studies.networks import count_batchnorms, largest_error, randomize_batchnorms

DEFAULTS: dict[str, Any] = {
    "out": "docs/studies/fusion",
    "only": [],
    "workers": 1,
}
TIMM = [
    "convnext_atto",
    "cspresnet50",
    "darknet53",
    "dla34",
    "dpn68",
    "ecaresnet26t",
    "edgenext_xx_small",
    "efficientnet_b0",
    "efficientnet_lite0",
    "tf_efficientnet_b0",
    "fbnetc_100",
    "gernet_s",
    "ghostnet_100",
    "hardcorenas_a",
    "hrnet_w18_small",
    "inception_resnet_v2",
    "inception_v4",
    "legacy_senet154",
    "mixnet_s",
    "mnasnet_100",
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "mobileone_s0",
    "nasnetalarge",
    "pnasnet5large",
    "regnety_002",
    "repvgg_a0",
    "repghostnet_050",
    "res2net50_26w_4s",
    "resnest14d",
    "resnet26d",
    "rexnet_100",
    "selecsls42b",
    "seresnext26t_32x4d",
    "tinynet_a",
    "vovnet39a",
    "xception41",
]
PARTS = {
    "classification": torchvision.models,
    "segmentation": torchvision.models.segmentation,
    "detection": torchvision.models.detection,
    "video": torchvision.models.video,
    "optical_flow": torchvision.models.optical_flow,
}
BEFORE_BOXES = ("backbone", "rpn.head", "head")


def main(settings: dict[str, Any]) -> None:
    known = [name for _, _, name in networks()]
    for name in settings["only"]:
        if name not in known:
            raise wrong_value("only", name, "there is no such network in the study", "[resnet18]")
    check_integer("workers", settings["workers"], minimum=0, example=1)
    out = Path(settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    path = out / "networks.csv"
    done = {row["network"] for row in runs.read(path)}
    calls = [
        (library, part, name)
        for library, part, name in networks()
        if name_of(library, name) not in done and (not settings["only"] or name in settings["only"])
    ]
    runs.run(measure, calls, path, workers=settings["workers"])
    text = summary(runs.read(path))
    (out / "networks.md").write_text(text)
    print(text)


def networks() -> Iterator[tuple[str, str, str]]:
    """Library, task and name of every network."""
    for part, module in PARTS.items():
        for name in torchvision.models.list_models(module=module):
            yield "torchvision", part, name
    for name in TIMM:
        yield "timm", "classification", name


def name_of(library: str, name: str) -> str:
    return name if library == "torchvision" else f"{library}/{name}"


def build(library: str, part: str, name: str) -> nn.Module:
    """The network with random weights and BatchNorm statistics, in eval mode and float32."""
    torch.manual_seed(0)
    if library == "timm":
        network = timm.create_model(name)
    else:
        options: dict[str, Any] = {"weights": None}
        if part in ("segmentation", "detection"):
            options["weights_backbone"] = None
        if "_fpn" in name:
            options |= {"min_size": 224, "max_size": 320}  # float64 at 800 takes 20 GB
        if "rcnn" in name:
            options |= {"rpn_pre_nms_top_n_test": 200, "rpn_post_nms_top_n_test": 50}
        if name in ("googlenet", "inception_v3"):
            options["init_weights"] = True
        network = torchvision.models.get_model(name, **options)
    return randomize_batchnorms(network)


def inputs_for(part: str, name: str) -> list[Any]:
    """Positional inputs, float32."""
    torch.manual_seed(1)
    if part == "detection":
        return [[torch.rand(3, 240, 320), torch.rand(3, 320, 256)]]
    if part == "optical_flow":
        return [torch.rand(1, 3, 128, 160) * 2 - 1, torch.rand(1, 3, 128, 160) * 2 - 1]
    if part == "video":
        return [
            torch.rand(1, 3, 16, *[112 if name in ("r3d_18", "mc3_18", "r2plus1d_18") else 224] * 2)
        ]
    if part == "segmentation":
        return [torch.rand(1, 3, 200, 232)]
    fixed = name.startswith(("vit_", "maxvit"))
    size = 224 if fixed else 128
    return [torch.rand(1, 3, size, size)]


def to_dtype(inputs: Any, dtype: torch.dtype) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(dtype)
    return [to_dtype(item, dtype) for item in inputs]


def measure(library: str, part: str, name: str) -> runs.Row:
    """One row of the table."""
    network = build(library, part, name)
    inputs = inputs_for(part, name)
    wide = to_dtype(inputs, torch.float64)
    row: runs.Row = {"network": name_of(library, name), "part": part}
    row["batchnorms"] = count_batchnorms(network)

    ours, report = fuse_conv_bn(network)
    row |= {
        "left": count_batchnorms(ours),
        "why": "; ".join(sorted(set(report.kept.values()))),
        "merged": len(report.merged),
        "untraced": len(report.untraced),
    }
    reference = copy.deepcopy(network).double()
    with torch.no_grad():
        expected = verify.tensors(outputs(reference, part, wide))
    row["error_float32"] = error(expected, ours, part, inputs)
    del ours
    row["multi_float32"] = error(expected, network, part, inputs)
    for key, fuse in (("fx", fuse_by_fx), ("order", by_child_order)):  # fx copies it
        try:
            fused = fuse(network)
        except Exception as failure:
            row |= {f"{key}_left": None, f"{key}_error": f"fails: {type(failure).__name__}"}
            continue
        row[f"{key}_left"] = count_batchnorms(fused)
        row[f"{key}_error"] = error(expected, fused, part, inputs)
        del fused
    del network
    fused, report = fuse_conv_bn(reference)
    row["error_float64"] = error(expected, fused, part, wide)
    moved = report.moved
    if part == "optical_flow":
        reference, fused = (net.get_submodule("context_encoder") for net in (reference, fused))
        wide = wide[:1]
        moved = {name.removeprefix("context_encoder.") for name in moved}
    errors = verify.compare_modules(reference, fused, wide, moved=moved)
    if part == "detection":
        errors = {key: value for key, value in errors.items() if key.startswith(BEFORE_BOXES)}
    row["worst_module"] = max(errors.values())
    row["modules"] = len(errors)
    return row


def outputs(network: nn.Module, part: str, inputs: list[Any]) -> Any:
    """The tensors to compare.

    Of a detector, the outputs of its backbone and heads: the choice of boxes is not continuous, and
    rounding swaps two boxes of nearly the same score. Of RAFT, which casts to float32 internally,
    the outputs of its encoders.
    """
    if part == "optical_flow":
        if inputs[0].dtype == torch.float32:
            network(*inputs)  # it must run
        encoders = ("feature_encoder", "context_encoder")
        return [network.get_submodule(encoders[i])(inputs[i]) for i in range(2)]
    if part != "detection":
        return network(*inputs)
    found: list[Any] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: found.append(output))
        for key, module in network.named_modules()
        if key in BEFORE_BOXES
    ]
    try:
        network(*inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return found


@torch.no_grad()
def error(expected: list[Tensor], network: nn.Module, part: str, inputs: list[Any]) -> float | str:
    try:
        found = verify.tensors(outputs(network, part, inputs))
    except Exception as failure:
        return f"fails: {type(failure).__name__}"
    return largest_error(expected, found)


def by_child_order(network: nn.Module) -> nn.Module:
    """The usual loop: fuse a BatchNorm into the convolution declared right before it."""
    network = copy.deepcopy(network)
    for module in network.modules():
        children = list(module.named_children())
        for (first, conv), (second, bn) in itertools.pairwise(children):
            if not isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d) or not is_normalization(bn):
                continue
            like_torch = cast(nn.BatchNorm2d, bn)  # or a class with the same attributes
            if not hasattr(bn, "eps") or not hasattr(bn, "weight"):
                continue
            if like_torch.running_mean is not None and conv.out_channels == len(
                like_torch.running_mean
            ):
                setattr(module, first, fuse_conv_bn_eval(conv, like_torch))
                setattr(module, second, nn.Identity())
    return network


def summary(rows: list[dict[str, str]]) -> str:
    """The tables of the page."""
    lines = [
        f"# Fusing every network of torchvision but the quantized, and {len(TIMM)} of timm",
        "",
        f"`python -m scripts.studies.fusion` on {report.machine()}, torchvision "
        f"{torchvision.__version__}. Random weights, BatchNorm statistics far from fresh, eval "
        "mode. Errors are relative to the largest value of the unfused network in float64. "
        "Compared are, of a detector, the outputs of its backbone and heads (later BatchNorms "
        "only count as left); of RAFT, the outputs of its encoders. An error above 1e-4 is wrong. "
        "`networks.csv` has a row per network.",
        "",
        "| | networks | BatchNorms | left: ours | torch.fx | child order | largest error: ours, "
        "float64 | module by module | float32 | unfused, float32 | torch.fx, float32 | "
        "child order, float32 |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for part in dict.fromkeys(group(row) for row in rows):
        own = [row for row in rows if group(row) == part]
        cells = [part, str(len(own)), total(own, "batchnorms"), total(own, "left")]
        cells += [total(own, "fx_left"), total(own, "order_left")]
        for key in ("error_float64", "worst_module", "error_float32", "multi_float32"):
            cells.append(worst(own, key))
        cells += [worst(own, "fx_error"), worst(own, "order_error")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Networks in which ours leaves BatchNorms:", ""]
    lines += ["| network | BatchNorms | left | why | torch.fx leaves |", "|---|---|---|---|---|"]
    for row in rows:
        if row["left"] != "0":
            lines.append(
                f"| {row['network']} | {row['batchnorms']} | {row['left']} | {row['why'][:300]} | "
                f"{row['fx_left'] or row['fx_error']} |"
            )
    return "\n".join(lines) + "\n"


def group(row: dict[str, str]) -> str:
    library = "timm" if row["network"].startswith("timm/") else "torchvision"
    return f"{library}, {row['part'].replace('_', ' ')}"


def total(rows: list[dict[str, str]], key: str) -> str:
    known = [row for row in rows if row[key] != ""]
    missing = len(rows) - len(known)
    text = str(sum(int(row[key]) for row in known))
    return f"{text} ({missing} fail)" if missing else text


def worst(rows: list[dict[str, str]], key: str) -> str:
    values = [float(row[key]) for row in rows if "fails" not in row[key]]
    wrong = sum(not value <= 1e-4 for value in values)
    text = f"{max(values):.1e}" if values else "-"
    fails = len(rows) - len(values)
    notes = [f"{wrong} wrong"] * (wrong > 0) + [f"{fails} fail"] * (fails > 0)
    return f"{text} ({', '.join(notes)})" if notes else text


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
