"""Fuses torchvision's networks, and 38 of timm's: python scripts/study_fusion.py

Three fusers on the same networks with random weights and BatchNorm statistics far from fresh:
`repvgg.fuse_conv_bn`, torch.fx's `fuse`, and the loop over children in their order that tutorials
show. Each is held against the network itself in float64; ours also module by module. Writes a
row for each to out/networks.csv as they end, and out/networks.md of what was found.

    python scripts/study_fusion.py only=[resnet18,fasterrcnn_resnet50_fpn_v2]
"""

import copy
import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import study
import torch
import torchvision
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse as fuse_by_fx
from torch.nn.utils.fusion import fuse_conv_bn_eval

from repvgg import cli, fuse_conv_bn, verify
from repvgg.checks import check_integer, refusal
from repvgg.fusion.normalizations import is_normalization

DEFAULTS: dict[str, Any] = {
    "out": "docs/fusion",
    "only": [],
    "skip": [],
    "timm": True,
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
    known = [name for _, _, name in networks(True)]
    for key in ("only", "skip"):
        for name in settings[key]:
            if name not in known:
                raise refusal(key, name, "there is no such network in the study", "[resnet18]")
    check_integer("workers", settings["workers"], minimum=1, example=1)
    if settings["timm"]:
        import timm  # noqa: F401  (now, not after half an hour)
    out = Path(settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    path = out / "networks.csv"
    done = {row["network"] for row in study.read(path)}
    calls = [
        (library, part, name)
        for library, part, name in networks(settings["timm"])
        if name_of(library, name) not in done
        and name not in settings["skip"]
        and (not settings["only"] or name in settings["only"])
    ]
    study.run(measure, calls, path, workers=settings["workers"])
    text = summary(study.read(path))
    (out / "networks.md").write_text(text)
    print(text)


def networks(with_timm: bool) -> Iterable[tuple[str, str, str]]:
    for part, module in PARTS.items():
        for name in torchvision.models.list_models(module=module):
            yield "torchvision", part, name
    if with_timm:
        for name in TIMM:
            yield "timm", "classification", name


def name_of(library: str, name: str) -> str:
    return name if library == "torchvision" else f"{library}/{name}"


def build(library: str, part: str, name: str) -> nn.Module:
    """The network with random weights and settled statistics, in eval mode and float32."""
    torch.manual_seed(0)
    if library == "timm":
        import timm

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
    return study.settle(network)


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


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(dtype)
    return [cast(item, dtype) for item in inputs]


def measure(library: str, part: str, name: str) -> study.Row:
    """One row of the table."""
    network = build(library, part, name)
    inputs = inputs_for(part, name)
    wide = cast(inputs, torch.float64)
    row: study.Row = {"network": name_of(library, name), "part": part}
    row["batchnorms"] = count(network)

    ours, report = fuse_conv_bn(network)
    row |= {
        "left": count(ours),
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
        row[f"{key}_left"] = count(fused)
        row[f"{key}_error"] = error(expected, fused, part, inputs)
        del fused
    del network
    fused, report = fuse_conv_bn(reference)
    row["error_float64"] = error(expected, fused, part, wide)
    moved = report.moved
    if part == "optical_flow":
        reference, fused, wide = reference.context_encoder, fused.context_encoder, wide[:1]  # type: ignore
        moved = {name.removeprefix("context_encoder.") for name in moved}
    errors = verify.compare_modules(reference, fused, wide, moved=moved)
    if part == "detection":
        errors = {key: value for key, value in errors.items() if key.startswith(BEFORE_BOXES)}
    row["worst_module"] = max(errors.values())
    row["modules"] = len(errors)
    return row


def outputs(network: nn.Module, part: str, inputs: list[Any]) -> Any:
    """What is compared.

    Of a detector, what its backbone and heads give before boxes are chosen: the choice is not
    continuous, rounding swaps two boxes of nearly one score. Of RAFT, which casts to float32 by
    itself, what its encoders give.
    """
    if part == "optical_flow":
        if inputs[0].dtype == torch.float32:
            network(*inputs)  # it runs, whatever it gives
        return [network.feature_encoder(inputs[0]), network.context_encoder(inputs[1])]  # type: ignore
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
    if len(found) != len(expected):
        return math.inf
    return max(verify.relative_error(a, b) for a, b in zip(expected, found, strict=True))


def count(network: nn.Module) -> int:
    return sum(is_normalization(module) for module in network.modules())


def by_child_order(network: nn.Module) -> nn.Module:
    """The usual loop: a BatchNorm that is declared right behind a convolution goes into it."""
    network = copy.deepcopy(network)
    for module in network.modules():
        children = list(module.named_children())
        for (first, conv), (second, bn) in itertools.pairwise(children):
            fits = isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d) and is_normalization(bn)
            if fits and conv.out_channels == len(bn.running_mean):  # type: ignore
                if not hasattr(bn, "eps") or not hasattr(bn, "weight"):
                    continue
                setattr(module, first, fuse_conv_bn_eval(conv, bn))  # type: ignore
                setattr(module, second, nn.Identity())
    return network


def summary(rows: list[dict[str, str]]) -> str:
    """The tables of the page."""
    lines = [
        f"# Every network of torchvision but the quantized, and {len(TIMM)} of timm, fused",
        "",
        f"`python scripts/study_fusion.py` on {study.machine()}, torchvision "
        f"{torchvision.__version__}. Random weights, BatchNorm statistics far from fresh, eval "
        "mode. Errors are relative to the largest value of the network itself in float64; of a "
        "detector, what its backbone and the heads in front of its boxes give (BatchNorms behind "
        "them only count as left), of RAFT, what its encoders give. Wrong is above 1e-4. All "
        "rows are in `networks.csv`.",
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
    lines += ["", "Networks of which ours leaves BatchNorms:", ""]
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
