"""How fast deployed networks are: python scripts/benchmark_deploy.py

Latency of one network as it was trained, as it is deployed, and in every engine: torch, compiled
torch, onnxruntime, OpenVINO, in 32, 16 and 8 bits, beside the deployed forms of timm (if it is
installed) and of the authors' program. Each candidate has a process of its own; they are timed in
turns. The deployed form is there twice: where the two differ by more than `max_noise`, no ratios
are told. Writes a table, a bar chart and JSON.
"""

import copy
import json
import os
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import study
import torch
import turns
from torch import Tensor, nn

import repvgg
from repvgg import cli, verify
from repvgg.checks import check_integer, check_number, refusal
from repvgg.contract import METADATA_KEY, DataContract, Description
from repvgg.deploy.measure import count_macs
from repvgg.export import formats, int8
from repvgg.export.artifact import build_program
from repvgg.export.calibration import minmax

DEFAULTS: dict[str, Any] = {
    "model": "repvgg_a0",
    "size": 224,
    "batches": [1, 16],
    "rounds": 25,
    "threads": torch.get_num_threads(),
    "rest": 0.05,  # seconds before each turn
    "max_noise": 0.05,
    "compile": True,
    "out": "docs/deploy",
}
BASE, AGAIN = "deployed, torch", "deployed, torch, again"
TRAINED = "trained form, torch"
# Which of the measured peaks a candidate is held against.
PEAKS = {"bf16": torch.bfloat16, "int8": torch.int8}

Call = Callable[[Tensor], Any]


def main(settings: dict[str, Any]) -> None:
    check(settings)
    study.require_packages()
    out = Path(settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(settings["threads"])
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        prepare(files, settings)
        names = candidates(settings)
        print(f"starting {len(names)} processes, one after another")
        running = {name: turns.start(name, serve, name, str(files), settings) for name in names}
        try:
            times = {
                batch: turns.measure(
                    running, batch, rounds=settings["rounds"], rest=settings["rest"]
                )
                for batch in settings["batches"]
            }
        finally:
            turns.stop(running)
    record = summarize(times, {name: one.said for name, one in running.items()}, settings)
    (out / f"{settings['model']}.json").write_text(json.dumps(record, indent=2) + "\n")
    text = table(record)
    (out / f"{settings['model']}.md").write_text(text)
    draw(record, out / f"{settings['model']}.png")
    print(text)


def check(settings: dict[str, Any]) -> None:
    for key in ("size", "threads"):
        check_integer(key, settings[key], minimum=1, example=DEFAULTS[key])
    check_integer("rounds", settings["rounds"], minimum=2, example=25)  # quartiles need two
    for key in ("rest", "max_noise"):
        check_number(key, settings[key], example=DEFAULTS[key])
    for batch in settings["batches"] or [None]:
        check_integer("batches", batch, minimum=1, example=1)
    if settings["model"] not in repvgg.list_models():
        raise refusal("model", settings["model"], "must be of the family", "repvgg_a0")


def candidates(settings: dict[str, Any]) -> list[str]:
    """Everything that can be had here."""
    names = [TRAINED, BASE, AGAIN, "deployed, torch, channels_last"]
    if settings["compile"]:
        names += [
            "trained form, compiled, channels_last",
            "deployed, compiled, channels_last",
            "deployed, compiled, channels_last, bf16",
        ]
    names += ["trained form, onnxruntime", "onnxruntime", "onnxruntime, int8"]
    if find_spec("openvino"):
        names += ["trained form, OpenVINO", "OpenVINO", "OpenVINO, bf16", "OpenVINO, int8"]
    if find_spec("timm") and settings["model"] in timm_names():
        names.append("timm, deployed, torch")
    if not settings["model"].endswith("se"):  # the authors' plain chain
        names.append("reference, deployed, torch")
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        names = [name for name in names if "bf16" not in name]
    return names


def timm_names() -> list[str]:
    import timm

    return timm.list_models("repvgg*")


def build(settings: dict[str, Any]) -> tuple[nn.Module, nn.Module, Description]:
    """The network as trained and deployed, with statistics far from fresh, and its description."""
    torch.manual_seed(0)
    model = study.settle(repvgg.create_model(settings["model"]))
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
    """Write the files that engines run: of both forms, and of the deployed one in 8 bits."""
    import onnx

    trained, deployed, description = build(settings)
    proto = formats.build_onnx(deployed, description)
    onnx.save_model(proto, folder / "model.onnx")
    images = torch.rand(8, 3, settings["size"], settings["size"])
    measured = int8.measure(proto, description, images)
    ranges = {name: minmax(histogram) for name, histogram in measured.items()}
    onnx.save_model(int8.rewrite(proto, ranges, description), folder / "int8.onnx")
    program = build_program(trained, description)
    converted = torch.onnx.export(
        program,
        (images[:2],),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),  # as the deployed one
        opset_version=formats.ONNX_OPSET,
        verbose=False,
    )
    assert converted is not None
    proto = converted.model_proto
    proto.metadata_props.add(key=METADATA_KEY, value=description.to_json())
    onnx.save_model(proto, folder / "trained.onnx")


def serve(pipe: Connection, name: str, folder: str, settings: dict[str, Any]) -> None:
    """Build a candidate, send its error against the float64 network, then time calls."""
    torch.set_num_threads(settings["threads"])
    size = settings["size"]
    images = {n: torch.rand(n, 3, size, size) for n in {1, *settings["batches"]}}
    trained, deployed, description = build(settings)
    program = build_program(trained, description)
    with torch.no_grad():
        expected = copy.deepcopy(program).double()(images[1].double())
        call = candidate(name, Path(folder), program, deployed, description)
        error = verify.relative_error(expected, call(images[1]).float())
        for batch in images.values():  # compiles
            call(batch)
        turns.answer(pipe, error, lambda batch: call(images[batch]))


def candidate(
    name: str,
    folder: Path,
    trained: nn.Module,
    deployed: nn.Module,
    description: Description,
) -> Call:
    file = {"trained": "trained.onnx"}.get(name.split()[0], "model.onnx")
    if name.endswith("int8"):
        file = "int8.onnx"
    if "onnxruntime" in name:
        return formats.load_onnx(folder / file, spin=True)  # it has a process of its own
    if "OpenVINO" in name:
        precision = "bf16" if name.endswith("bf16") else "f32"
        return formats.load_openvino(folder / file, precision=precision)
    program = trained if name.startswith("trained") else build_program(deployed, description)
    if name.startswith("timm"):
        import timm
        from timm.utils.model import reparameterize_model

        theirs = reparameterize_model(timm.create_model(name_of(description)).eval())
        _fill(theirs, deployed)
        program = nn.Sequential(program[0], theirs).eval()
    if name.startswith("reference"):
        program = nn.Sequential(program[0], Reference(deployed)).eval()
    if "channels_last" in name:
        program = program.to(memory_format=torch.channels_last)
    if name.endswith("bf16"):
        program[1].bfloat16()
        program = nn.Sequential(program[0], _ToBF16(), program[1])
    if "compiled" in name:
        import torch._inductor.config as inductor

        inductor.freezing = True
        # For each size by itself: a dynamic program is slower.
        program = torch.compile(program, dynamic=False)  # type: ignore[assignment]
    if "channels_last" in name:
        return lambda images: program(images.contiguous(memory_format=torch.channels_last))
    return program


def name_of(description: Description) -> str:
    return str(description.config["name"])


class _ToBF16(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.bfloat16()


class Reference(nn.Module):
    """The deployed form as the authors' program has it: convolution and ReLU, block after block."""

    def __init__(self, deployed: nn.Module) -> None:
        super().__init__()
        convolutions = [copy.deepcopy(m) for m in deployed.modules() if isinstance(m, nn.Conv2d)]
        self.blocks = nn.Sequential(
            *(layer for conv in convolutions for layer in (conv, nn.ReLU()))
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = copy.deepcopy(deployed.linear)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.pool(self.blocks(images)).flatten(1))


@torch.no_grad()
def _fill(theirs: nn.Module, ours: nn.Module) -> None:
    """Give a deployed network of timm our weights, layer by layer in the order of the blocks."""
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


def measure_peak(dtype: torch.dtype, *, size: int = 2048, seconds: float = 2.0) -> float | None:
    """The most operations a second that a product of two matrices reached; None if it cannot."""
    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    product = torch._int_mm if dtype == torch.int8 else torch.mm
    best, deadline = float("inf"), time.perf_counter() + seconds
    try:
        while time.perf_counter() < deadline:
            begin = time.perf_counter()
            product(a, b)
            best = min(best, time.perf_counter() - begin)
    except (RuntimeError, NotImplementedError):
        return None
    return 2 * size**3 / best


def summarize(
    times: dict[int, dict[str, list[float]]], errors: dict[str, float], settings: dict[str, Any]
) -> dict[str, Any]:
    _, deployed, description = build(settings)
    image = torch.zeros(1, 3, settings["size"], settings["size"])
    macs = count_macs(deployed, image)
    peaks = {
        str(d).removeprefix("torch."): measure_peak(d) for d in (torch.float32, *PEAKS.values())
    }
    batches = {}
    for batch, measured in times.items():
        control = turns.summarize(measured[AGAIN], measured[BASE]).speedup
        rows = {}
        for name, values in measured.items():
            timing = turns.summarize(values, measured[BASE])
            kind = PEAKS.get(name.rpartition(", ")[2], torch.float32)
            peak = peaks[str(kind).removeprefix("torch.")]
            rate = 2 * macs * batch / (timing.milliseconds / 1000)
            rows[name] = {
                **timing._asdict(),
                "images_per_second": 1000 * batch / timing.milliseconds,
                "share_of_peak": None if peak is None else rate / peak,
            }
        noisy = abs(control - 1) > settings["max_noise"]
        batches[str(batch)] = {"control": control, "noisy": noisy, "rows": rows}
    return {
        "command": "python scripts/benchmark_deploy.py"
        + "".join(
            f" {key}={str(settings[key]).replace(' ', '')}"
            for key in DEFAULTS
            if settings[key] != DEFAULTS[key] and key != "out"
        ),
        "model": name_of(description),
        "size": settings["size"],
        "rounds": settings["rounds"],
        "threads": settings["threads"],
        "machine": study.machine(),
        "versions": study.versions("onnxruntime", "openvino", "timm"),
        "load": os.getloadavg()[0],
        "macs_per_image": macs,
        "peak_operations_per_second": peaks,
        "errors": errors,
        "batches": batches,
    }


def table(record: dict[str, Any]) -> str:
    peaks = ", ".join(
        f"{name} {'not measured' if peak is None else f'{peak / 1e9:.0f} G'}"
        for name, peak in record["peak_operations_per_second"].items()
    )
    lines = [
        f"# {record['model']}, {record['size']}x{record['size']}",
        "",
        f"`{record['command']}`: {record['rounds']} rounds after {turns.WARMUP} to warm up, every "
        f"candidate in a process of its own, in turns; {record['machine']}, {record['versions']}, "
        f'{record["threads"]} threads. "Times as fast" is the median over rounds (quartiles), '
        "against the deployed form in torch, eager, float32. The largest product of matrices "
        f"reached, operations a second: {peaks}; per cent of it counts the deployed network's "
        "multiplications and additions. The error is relative to the largest value of the trained "
        "network in float64. onnxruntime's threads spin between calls, as by default.",
    ]
    for batch, measured in record["batches"].items():
        lines += [
            "",
            f"## Batch {batch}",
            "",
            f"Control: {measured['control']:.3f}x."
            + (" Too noisy: no ratios are told." if measured["noisy"] else ""),
            "",
            "| | ms | quartiles | times as fast | images a second | of the peak | error |",
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
    """What fusing gives and what the engine gives, by the medians."""
    lines = ["| engine | fusing gives | the engine gives | both |", "|---|---|---|---|"]
    pairs = {
        "torch": (TRAINED, BASE),
        "torch, compiled": (
            "trained form, compiled, channels_last",
            "deployed, compiled, channels_last",
        ),
        "onnxruntime": ("trained form, onnxruntime", "onnxruntime"),
        "OpenVINO": ("trained form, OpenVINO", "OpenVINO"),
    }
    for engine, (before, after) in pairs.items():
        if before in rows and after in rows:
            old, new = rows[before]["milliseconds"], rows[after]["milliseconds"]
            lines.append(
                f"| {engine} | {old / new:.2f}x | {rows[BASE]['milliseconds'] / new:.2f}x | "
                f"{rows[TRAINED]['milliseconds'] / new:.2f}x |"
            )
    return lines


def draw(record: dict[str, Any], path: Path) -> None:
    """Bars of how many times as fast each is, with quartiles; of batches that were quiet enough."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    batches = {batch: one for batch, one in record["batches"].items() if not one["noisy"]}
    if not batches:
        path.unlink(missing_ok=True)
        return
    names = list(next(iter(batches.values()))["rows"])
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(names) + 1), layout="constrained")
    height = 0.8 / len(batches)
    for i, (batch, measured) in enumerate(batches.items()):
        rows = measured["rows"].values()
        places = [place + (i - (len(batches) - 1) / 2) * height for place in range(len(names))]
        values = [row["speedup"] for row in rows]
        spread = [
            [row["speedup"] - row["speedup_lower"] for row in rows],
            [row["speedup_upper"] - row["speedup"] for row in rows],
        ]
        label, error_kw = f"batch {batch}", {"elinewidth": 1}
        axes.barh(places, values, height, xerr=spread, label=label, error_kw=error_kw)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the deployed form in torch")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
