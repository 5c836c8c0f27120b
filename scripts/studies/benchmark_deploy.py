"""How fast folded networks are: python -m scripts.studies.benchmark_deploy

Latency of one network, multi-branch and folded, in every engine: torch, compiled torch,
onnxruntime, OpenVINO, in float32, bf16 and int8, beside the folded networks of timm (if it is
installed) and of the authors' program. Each candidate runs in its own process; they are timed in
turns. The folded network is timed twice (A/A control): if the two differ by more than 5 %,
no ratios are printed and no bars are drawn. Writes a table, bar charts and JSON.
"""

import copy
import functools
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import repvgg
from repvgg import cli, figures, verify
from repvgg.checks import check_integer, wrong_value
from repvgg.contract import METADATA_KEY, DataContract, Description
from repvgg.export import formats, int8
from repvgg.export.artifact import build_program
from repvgg.export.calibration import minmax
from repvgg.models.size import count_macs
from scripts.studies import report, timing
from scripts.studies.networks import randomize_batchnorms

DEFAULTS: dict[str, Any] = {
    "model": "repvgg_a0",
    "size": 224,
    "batches": [1, 16],
    "rounds": 25,
    "threads": torch.get_num_threads(),
    "compile": True,
    "out": "docs/studies/deploy",
}
BASE, AGAIN = "folded, torch", "folded, torch (A/A control)"
MULTI_BRANCH = "multi-branch, torch"
OTHERS = ("multi-branch", "timm", "reference")
CAPTION = (
    "Latency of each candidate: bars are medians, lines the quartiles; grey are multi-branch "
    "networks, the folded networks of other programs and the A/A control"
)
REST = 0.05  # seconds before each turn
MAX_NOISE = 0.05  # of the A/A control
# The measured peak that a candidate is compared with; float32 by default.
PEAKS = {"bf16": torch.bfloat16, "int8": torch.int8}

Call = Callable[[Tensor], Tensor]


def main(settings: dict[str, Any]) -> None:
    check(settings)
    out = Path(settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(settings["threads"])
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        prepare(files, settings)
        names = candidates(settings)
        print(f"starting {len(names)} processes, one after another")
        with timing.started(names, serve, str(files), settings) as running:
            times = {
                batch: timing.measure(running, batch, rounds=settings["rounds"], rest=REST)
                for batch in settings["batches"]
            }
    record = summarize(times, {name: one.number for name, one in running.items()}, settings)
    path = out / f"{settings['model']}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    redraw(path)
    print(path.with_suffix(".md").read_text())


def redraw(path: Path) -> None:
    """Write table and figures again from the recorded numbers."""
    record = json.loads(path.read_text())
    drawn = draw(record, path.with_suffix(""))
    path.with_suffix(".md").write_text(table(record, drawn))


def check(settings: dict[str, Any]) -> None:
    for key in ("size", "threads"):
        check_integer(key, settings[key], minimum=1, example=DEFAULTS[key])
    check_integer("rounds", settings["rounds"], minimum=2, example=25)  # quartiles need two
    for batch in settings["batches"] or [None]:
        check_integer("batches", batch, minimum=1, example=1)
    if settings["model"] not in repvgg.list_models():
        raise wrong_value("model", settings["model"], "must be of the family", "repvgg_a0")


def candidates(settings: dict[str, Any]) -> list[str]:
    """All candidates that this machine can run."""
    names = [MULTI_BRANCH, BASE, AGAIN, "folded, torch, channels_last"]
    if settings["compile"]:
        names += [
            "multi-branch, compiled, channels_last",
            "folded, compiled, channels_last",
            "folded, compiled, channels_last, bf16",
        ]
    names += ["multi-branch, onnxruntime", "onnxruntime", "onnxruntime, int8"]
    if find_spec("openvino"):
        names += ["multi-branch, OpenVINO", "OpenVINO", "OpenVINO, bf16", "OpenVINO, int8"]
    if timing.in_timm(settings["model"]):
        names.append("timm, folded, torch")
    if not settings["model"].endswith("se"):  # the authors' plain chain
        names.append("reference, folded, torch")
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        names = [name for name in names if "bf16" not in name]
    return names


def build(settings: dict[str, Any]) -> tuple[repvgg.RepVGG, repvgg.RepVGG, Description]:
    """The network, multi-branch and folded, with random BatchNorm statistics; its description."""
    torch.manual_seed(0)
    model = randomize_batchnorms(repvgg.create_model(settings["model"]))
    contract = DataContract(
        [str(i) for i in range(1000)],
        3,
        [settings["size"]] * 2,
        [0.485, 0.456, 0.406],
        [0.229, 0.224, 0.225],
        "bilinear",
    )
    description = Description({"name": settings["model"]}, contract)
    return model, repvgg.switch_to_deploy(model), description


def prepare(folder: Path, settings: dict[str, Any]) -> None:
    """Write the files that engines run: multi-branch, folded, and folded in int8."""
    import onnx

    multi_branch, folded, description = build(settings)
    proto = formats.build_onnx(folded, description)
    onnx.save_model(proto, folder / "model.onnx")
    images = torch.rand(8, 3, settings["size"], settings["size"])
    measured = int8.measure(proto, description, images)
    ranges = {name: minmax(histogram) for name, histogram in measured.items()}
    onnx.save_model(int8.rewrite(proto, ranges, description), folder / "int8.onnx")
    program = build_program(multi_branch, description)
    converted = torch.onnx.export(
        program,
        (images[:2],),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),  # as in the folded one
        opset_version=formats.ONNX_OPSET,
        verbose=False,
    )
    assert converted is not None
    proto = converted.model_proto
    proto.metadata_props.add(key=METADATA_KEY, value=description.to_json())
    onnx.save_model(proto, folder / "multi_branch.onnx")


def serve(pipe: Connection, name: str, folder: str, settings: dict[str, Any]) -> None:
    """In its own process: send the error against the float64 network, then time calls."""
    torch.set_num_threads(settings["threads"])
    size = settings["size"]
    images = {n: torch.rand(n, 3, size, size) for n in {1, *settings["batches"]}}
    multi_branch, folded, description = build(settings)
    program = build_program(multi_branch, description)
    with torch.no_grad():
        expected = copy.deepcopy(program).double()(images[1].double())
        call = candidate(name, Path(folder), program, folded, description)
        error = verify.relative_error(expected, call(images[1]).float())
        for batch in images.values():  # compiles
            call(batch)
        timing.answer(pipe, error, lambda batch: call(images[batch]))


def candidate(
    name: str,
    folder: Path,
    multi_branch: nn.Sequential,
    folded: repvgg.RepVGG,
    description: Description,
) -> Call:
    file = "multi_branch.onnx" if name.startswith("multi-branch") else "model.onnx"
    if name.endswith("int8"):
        file = "int8.onnx"
    if "onnxruntime" in name:
        return formats.load_onnx(folder / file, spin=True)  # it has its own process
    if "OpenVINO" in name:
        precision = "bf16" if name.endswith("bf16") else "f32"
        return formats.load_openvino(folder / file, precision=precision)
    program = (
        multi_branch if name.startswith("multi-branch") else build_program(folded, description)
    )
    if name.startswith("timm"):
        import timm
        from timm.utils.model import reparameterize_model

        theirs = reparameterize_model(timm.create_model(name_of(description)).eval())
        _fill(theirs, folded)
        program = nn.Sequential(program[0], theirs).eval()
    if name.startswith("reference"):
        program = nn.Sequential(program[0], Reference(folded)).eval()
    if "channels_last" in name:
        program = program.to(memory_format=torch.channels_last)
    if name.endswith("bf16"):
        program[1].bfloat16()
        program = nn.Sequential(program[0], _ToBF16(), program[1])
    call = timing.compiled(program) if "compiled" in name else program
    if "channels_last" in name:
        return lambda images: call(images.contiguous(memory_format=torch.channels_last))
    return call


def name_of(description: Description) -> str:
    return str(description.config["name"])


class _ToBF16(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.bfloat16()


class Reference(nn.Module):
    """The folded network of the authors' program: a convolution and a ReLU per block."""

    def __init__(self, folded: repvgg.RepVGG) -> None:
        super().__init__()
        convolutions = [copy.deepcopy(m) for m in folded.modules() if isinstance(m, nn.Conv2d)]
        self.blocks = nn.Sequential(
            *(layer for conv in convolutions for layer in (conv, nn.ReLU()))
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = copy.deepcopy(folded.linear)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.pool(self.blocks(images)).flatten(1))
        return logits


@torch.no_grad()
def _fill(theirs: nn.Module, ours: nn.Module) -> None:
    """Copy our weights into a folded network of timm, in the order of the layers."""
    pairs = zip(
        *(
            [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
            for network in (theirs, ours)
        ),
        strict=True,
    )
    for own, other in pairs:
        own.weight.copy_(other.weight)
        own.bias.copy_(other.bias)


def summarize(
    times: dict[int, dict[str, list[float]]], errors: dict[str, float], settings: dict[str, Any]
) -> dict[str, Any]:
    _, folded, description = build(settings)
    image = torch.zeros(1, 3, settings["size"], settings["size"])
    macs = count_macs(folded, image)
    peaks = {
        str(d).removeprefix("torch."): timing.measure_peak(d)
        for d in (torch.float32, *PEAKS.values())
    }
    batches = {}
    for batch, measured in times.items():
        control = timing.summarize(measured[AGAIN], measured[BASE]).speedup
        rows = {}
        for name, values in measured.items():
            found = timing.summarize(values, measured[BASE])
            kind = PEAKS.get(name.rpartition(", ")[2], torch.float32)
            peak = peaks[str(kind).removeprefix("torch.")]
            rate = 2 * macs * batch / (found.milliseconds / 1000)
            rows[name] = {
                **found._asdict(),
                "images_per_second": 1000 * batch / found.milliseconds,
                "share_of_peak": None if peak is None else rate / peak,
            }
        noisy = abs(control - 1) > MAX_NOISE
        batches[str(batch)] = {"control": control, "noisy": noisy, "rows": rows}
    return {
        "command": report.command("benchmark_deploy", settings, DEFAULTS),
        "model": name_of(description),
        "size": settings["size"],
        "rounds": settings["rounds"],
        "threads": settings["threads"],
        "machine": report.machine(),
        "versions": report.versions("onnxruntime", "openvino", "timm"),
        "load": os.getloadavg()[0],
        "macs_per_image": macs,
        "peak_operations_per_second": peaks,
        "errors": errors,
        "batches": batches,
    }


def table(record: dict[str, Any], drawn: Mapping[str, Path] | None = None) -> str:
    """The page of a record.

    Args:
        drawn: the figure of each batch that has one.
    """
    peaks = ", ".join(
        f"{name} {'not measured' if peak is None else f'{peak / 1e9:.0f} G'}"
        for name, peak in record["peak_operations_per_second"].items()
    )
    lines = [
        f"# {record['model']}, {record['size']}x{record['size']}",
        "",
        f"`{record['command']}`: {record['rounds']} rounds after {timing.WARMUP} to warm up, each "
        f"candidate in its own process, in turns; {record['machine']}, {record['versions']}, "
        f"{record['threads']} threads. The speed-up is the median over rounds (quartiles), "
        "against the folded network in torch, eager, float32. The fastest matmul reached "
        f"{peaks} operations per second; the share of it counts the multiplications and "
        "additions of the folded network. The error is relative to the largest value of the "
        "multi-branch network in float64. onnxruntime's threads spin between calls, the default.",
    ]
    for batch, measured in record["batches"].items():
        lines += [
            "",
            f"## Batch {batch}",
            "",
            f"A/A control: {measured['control']:.3f}x."
            + (" Too noisy: no ratios are printed." if measured["noisy"] else ""),
            "",
            *([report.picture(drawn[batch].name, CAPTION), ""] if drawn and batch in drawn else []),
            "| | ms | quartiles | speed-up | images/s | of the peak | error |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, row in measured["rows"].items():
            ratio = ""
            if not measured["noisy"]:
                quartiles = f"{row['speedup_lower']:.2f} to {row['speedup_upper']:.2f}"
                ratio = f"{row['speedup']:.2f} ({quartiles})"
            share = row["share_of_peak"]
            lines.append(
                f"| {name} | {row['milliseconds']:.2f} | {row['lower']:.2f} to {row['upper']:.2f} "
                f"| {ratio} | {row['images_per_second']:.1f} "
                f"| {'' if share is None else f'{share:.0%}'} | {record['errors'][name]:.1e} |"
            )
        if not measured["noisy"]:
            lines += ["", *_split(measured["rows"])]
    return "\n".join(lines) + "\n"


def _split(rows: dict[str, Any]) -> list[str]:
    """Speed-up by folding and by the engine, from the medians."""
    lines = ["| engine | by folding | by the engine | both |", "|---|---|---|---|"]
    pairs = {
        "torch": (MULTI_BRANCH, BASE),
        "torch, compiled": (
            "multi-branch, compiled, channels_last",
            "folded, compiled, channels_last",
        ),
        "onnxruntime": ("multi-branch, onnxruntime", "onnxruntime"),
        "OpenVINO": ("multi-branch, OpenVINO", "OpenVINO"),
    }
    for engine, (before, after) in pairs.items():
        if before in rows and after in rows:
            old, new = rows[before]["milliseconds"], rows[after]["milliseconds"]
            lines.append(
                f"| {engine} | {old / new:.2f}x | {rows[BASE]['milliseconds'] / new:.2f}x | "
                f"{rows[MULTI_BRANCH]['milliseconds'] / new:.2f}x |"
            )
    return lines


def draw(record: dict[str, Any], stem: Path) -> dict[str, Path]:
    """Bars of the latency with quartiles, a figure for each batch that was not too noisy."""
    drawn = {}
    for batch, measured in record["batches"].items():
        if measured["noisy"]:
            continue
        rows = measured["rows"]
        count = "one image" if batch == "1" else f"{batch} images"
        chart = functools.partial(
            figures.bars,
            values={name: row["milliseconds"] for name, row in rows.items()},
            intervals={name: (row["lower"], row["upper"]) for name, row in rows.items()},
            main=[name for name in rows if not name.startswith(OTHERS) and name != AGAIN],
            unit="milliseconds, median and quartiles",
            title=f"{record['model']}: {count} of {record['size']}x{record['size']}",
        )
        drawn[batch] = stem.with_name(f"{stem.name}-{batch}")
        figures.save_svgs(chart, drawn[batch])
    return drawn


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
