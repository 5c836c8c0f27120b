"""Draw the pictures of README and docs from a trained network and from recorded measurements.

    python -m scripts.pictures ckpt=runs/first/checkpoints/best.ckpt

Writes docs/images/fold-*.svg (three branches become one convolution: real kernels and a measured
error) and docs/images/latency-*.svg (from docs/studies/deploy/repvgg_a0.json).
"""

from __future__ import annotations

import copy
import functools
import json
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor

from repvgg import RepVGGBlock, checkpoint, cli, data, figures, switch_to_deploy, verify
from repvgg.contract import Normalize, to_float
from repvgg.data.batches import Stored
from repvgg.figures import LIGHT
from repvgg.figures.style import new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
DEFAULTS: cli.Config = {"ckpt": None, "out": str(ROOT / "docs" / "images")}
LATENCY = ROOT / "docs" / "studies" / "deploy" / "repvgg_a0.json"
SHOWN = {  # rows of the recorded measurement
    "multi-branch, torch": "torch, multi-branch",
    "folded, torch": "torch, folded",
    "onnxruntime": "onnxruntime, folded",
    "onnxruntime, int8": "onnxruntime, folded, int8",
}


class Fold(NamedTuple):
    """What the picture of a fold shows.

    Attributes:
        kernels: by branch, one channel of its part of the folded kernel: (3, 3).
        error64, error32: of the folded network, relative to the largest logit in float64.
        images: on which they were measured.
        network: its name.
    """

    kernels: dict[str, Tensor]
    error64: float
    error32: float
    images: int
    network: str


def measure_fold(path: Path) -> Fold:
    """Fold a trained network; keep one channel of a block and the error of its logits."""
    restored = checkpoint.load(path)
    network = restored.model.eval()
    normalize = Normalize(restored.data.mean, restored.data.std)
    images = normalize(to_float(restored.probe.images))
    double = copy.deepcopy(network).double()
    reference = double(images.double())
    error64 = verify.relative_error(reference, switch_to_deploy(double)(images.double()))
    error32 = verify.relative_error(reference, switch_to_deploy(network)(images))
    blocks = [
        module
        for module in double.modules()
        if isinstance(module, RepVGGBlock) and module.branch_identity is not None
    ]
    parts = blocks[0].branch_affines()
    # (branches, channels, 3, 3): of each channel's own input
    kernels = torch.stack(
        [part.kernel.detach().diagonal().movedim(-1, 0) for part in parts.values()]
    )
    # A channel whose branches are alike in size shows all three; its rounded values must add up.
    sizes = kernels.abs().amax((-1, -2))
    alike = sizes.amin(0) / sizes.amax(0)
    rounded = kernels.mul(100).round()
    adds_up = (rounded.sum(0) == kernels.sum(0).mul(100).round()).all(-1).all(-1)
    channel = int(torch.where(adds_up, alike, -1.0).argmax())
    shown = dict(zip(parts, kernels[:, channel], strict=True))
    return Fold(shown, error64, error32, len(images), str(restored.config["name"]))


def draw_fold(theme: figures.Theme, fold: Fold) -> Figure:
    """Three branches, their kernels, and the sum as the kernel of one convolution."""
    with styled(theme):
        figure, axes = new_figure(9.6, 4.5)
        axes.set_xlim(0, 96)
        axes.set_ylim(0, 45)
        axes.set_aspect("equal")
        axes.set_axis_off()
        colors = dict(zip(fold.kernels, (theme.main, theme.second, theme.third), strict=True))
        layers = {
            "3x3": ("3x3 conv", "BatchNorm"),
            "1x1": ("1x1 conv", "BatchNorm"),
            "identity": ("identity", "BatchNorm"),
        }
        heights = dict(zip(fold.kernels, (33.0, 20.5, 8.0), strict=True))
        middle = heights["1x1"]
        axes.text(1, 43.2, "Trained: three branches", weight="bold", fontsize=12)
        axes.text(62, 43.2, "Deployed: one 3x3 convolution", weight="bold", fontsize=12)
        axes.text(1, middle, "x", va="center", ha="center", fontsize=12, style="italic")
        for name, height in heights.items():
            _arrow(axes, theme, (2.2, middle), (5.5, height))
            for place, layer in zip((11.5, 25.5), layers[name], strict=True):
                _box(axes, place, height, layer, colors[name], theme)
            _arrow(axes, theme, (17.5, height), (19.5, height))
            _arrow(axes, theme, (31.5, height), (35.2, height))
            _kernel(axes, theme, (41, height), fold.kernels[name], colors[name])
            _arrow(axes, theme, (47, height), (54.2, middle + (height - middle) * 0.12))
        axes.text(56, middle, "+", va="center", ha="center", fontsize=17)
        _circle(axes, (56, middle), 2.1, theme)
        _arrow(axes, theme, (58.2, middle), (62.2, middle))
        total = torch.stack([*fold.kernels.values()]).sum(0)
        _kernel(axes, theme, (69.5, middle), total, theme.fourth, size=13.5)
        _arrow(axes, theme, (76.8, middle), (79.5, middle))
        _box(axes, 85.5, middle, "3x3 conv", theme.fourth, theme)
        _arrow(axes, theme, (91.5, middle), (94.5, middle))
        note = (
            "The same function. Largest difference of the logits, relative to the\n"
            f"largest logit: {fold.error64:.1e} in float64, {fold.error32:.1e} in float32\n"
            f"({fold.network}, {fold.images} images)"
        )
        axes.text(62, 6.8, note, color=theme.muted, fontsize=8.2, va="center")
        below = "kernels of one channel,\neach with its BatchNorm folded in"
        axes.text(41, 0.6, below, color=theme.muted, fontsize=7.4, ha="center", va="center")
    return figure


def _kernel(
    axes: Axes,
    theme: figures.Theme,
    centre: tuple[float, float],
    kernel: Tensor,
    color: str,
    *,
    size: float = 10.5,
) -> None:
    """A 3x3 kernel as cells with their values; zeros stay empty."""
    from matplotlib.patches import Rectangle

    cell = size / 3
    largest = float(kernel.abs().max())
    left, top = centre[0] - size / 2, centre[1] + size / 2
    for row in range(3):
        for column in range(3):
            value = float(kernel[row, column])
            corner = (left + column * cell, top - (row + 1) * cell)
            share = 0.15 + 0.45 * abs(value) / largest if value else 0.0
            fill = Rectangle(corner, cell, cell, facecolor=color, alpha=share, linewidth=0)
            axes.add_patch(fill)
            axes.add_patch(
                Rectangle(corner, cell, cell, fill=False, edgecolor=color, linewidth=0.9)
            )
            text = f"{value:.2f}".replace("-", "\N{MINUS SIGN}") if value else "0"
            axes.text(
                corner[0] + cell / 2,
                corner[1] + cell / 2,
                text,
                ha="center",
                va="center_baseline",
                fontsize=6.6 * size / 10.5,
                color=theme.text if value else theme.muted,
            )


def _box(axes: Axes, x: float, y: float, text: str, color: str, theme: figures.Theme) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner, size = (x - 6, y - 2.3), (12, 4.6)
    style = "round,pad=0,rounding_size=0.9"
    axes.add_patch(
        FancyBboxPatch(corner, *size, boxstyle=style, facecolor=color, alpha=0.14, linewidth=0)
    )
    axes.add_patch(
        FancyBboxPatch(corner, *size, boxstyle=style, fill=False, edgecolor=color, linewidth=1.3)
    )
    axes.text(x, y, text, ha="center", va="center_baseline", fontsize=9, color=theme.text)


def _arrow(
    axes: Axes, theme: figures.Theme, start: tuple[float, float], end: tuple[float, float]
) -> None:
    style = {"arrowstyle": "-|>", "color": theme.muted, "linewidth": 1.1, "shrinkA": 0}
    axes.annotate("", end, start, arrowprops={**style, "shrinkB": 0, "mutation_scale": 9})


def _circle(axes: Axes, centre: tuple[float, float], radius: float, theme: figures.Theme) -> None:
    from matplotlib.patches import Circle

    axes.add_patch(Circle(centre, radius, fill=False, edgecolor=theme.muted, linewidth=1.1))


def draw_latency(theme: figures.Theme) -> Figure:
    """Milliseconds of RepVGG-A0, from the recorded measurement."""
    recorded = json.loads(LATENCY.read_text())
    rows = recorded["batches"]["1"]["rows"]
    times = {shown: rows[name]["milliseconds"] for name, shown in SHOWN.items()}
    quartiles = {shown: (rows[name]["lower"], rows[name]["upper"]) for name, shown in SHOWN.items()}
    size = recorded["size"]
    return figures.bars(
        theme,
        times,
        unit=f"milliseconds, median and quartiles of {recorded['rounds']} rounds",
        title=f"RepVGG-A0, one image of {size}x{size}, {recorded['threads']} CPU threads",
        intervals=quartiles,
        main=[*times][1:],
        width=8.4,
    )


def draw_badge(label: str, value: str) -> str:
    """A small label of two fields, as the text of an SVG file."""
    left, right = (7 * len(text) + 14 for text in (label, value))
    texts = ((label, left / 2), (value, left + right / 2))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" '
        f'aria-label="{label}: {value}" font-family="Verdana, DejaVu Sans, sans-serif" '
        'font-size="11" fill="#ffffff" text-anchor="middle">'
        f'<rect width="{left + right}" height="20" rx="3" fill="{LIGHT.main}"/>'
        f'<path d="M3 0h{left - 3}v20H3a3 3 0 0 1-3-3V3a3 3 0 0 1 3-3z" fill="#444c56"/>'
        + "".join(f'<text x="{x:g}" y="14">{text}</text>' for text, x in texts)
        + "</svg>\n"
    )


def badges() -> dict[str, str]:
    """What the package requires, and its licence, as pyproject.toml has them; by file name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: "
    pythons = [
        line.removeprefix(prefix)
        for line in project["classifiers"]
        if line.startswith(f"{prefix}3.")
    ]
    (torch_range,) = (text for text in project["dependencies"] if text.startswith("torch>="))
    lowest, below = (text.rpartition(".") for text in re.findall(r"[\d.]+", torch_range))
    return {
        "python": draw_badge("python", " | ".join(pythons)),
        "torch": draw_badge("torch", f"{''.join(lowest)} to {below[0]}.{int(below[2]) - 1}"),
        "licence": draw_badge("licence", project["license"]),
    }


def write_digits(folder: Path) -> list[Path]:
    """Write the first image of each class of the test part, for a first prediction."""
    test = cast(Stored, data.digits().test)  # the images in memory
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for digit in range(10):
        index = int((test.labels == digit).nonzero()[0])
        path = folder / f"digit-{digit}.png"
        pixels = test.images[index, 0]
        Image.fromarray(pixels.numpy()).save(path)
        paths.append(path)
    return paths


def main(settings: cli.Config) -> None:
    """Draw every picture for light and for dark pages."""
    path = cli.given_path(settings, "ckpt", "runs/first/checkpoints/best.ckpt")
    fold = measure_fold(path)
    out = Path(str(settings["out"]))
    pictures: dict[str, figures.Draw] = {
        "fold": functools.partial(draw_fold, fold=fold),
        "latency": draw_latency,
    }
    for name, draw in pictures.items():
        print(*figures.save_svgs(draw, out / name), sep="\n")
    for name, text in badges().items():
        path = out / f"badge-{name}.svg"
        path.write_text(text)
        print(path)
    print(*write_digits(out / "digits"), sep="\n")


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
