"""Figures are drawn in both themes, for any names and any number of classes."""

import re
import sys
from functools import partial
from xml.etree import ElementTree

import pytest
import torch

from repvgg import figures
from repvgg.figures.style import LIGHT, to_svg

HOSTILE = ["$a_{b$", "<script>alert(1)</script>", "x" * 300, "\x1b[31mred\n", "‮evil", "犬", "[b]"]
CHARTS = {
    "bars": partial(
        figures.bars,
        values=dict(zip(HOSTILE, range(7), strict=True)),
        unit="ms",
        intervals={HOSTILE[0]: (0.0, 9.0)},
        main=HOSTILE[:1],
    ),
    "stacked_bars": partial(
        figures.stacked_bars,
        shares={"3x3": [0.5, 0.4], "<1x1>": [0.5, 0.6]},
        rows=["a", "b"],
        unit="%",
    ),
    "lines": partial(figures.lines, series={"<a>": ([0, 1], [1, 2])}, xlabel="step", ylabel="loss"),
    "dots": partial(
        figures.dots,
        series={"float32": {"<a>": 1e-7, "b": 0.0}, "64": {"b": 1e-16}},
        ylabel="error",
        log=True,
    ),
    "kernels": partial(
        figures.kernels,
        maps=torch.tensor([[[[0.0, -2.0]], [[1.0, 0.0]]], [[[0.0, 0.0]], [[0.0, 0.0]]]]),
        rows=HOSTILE[:2],
        columns=["3x3", "sum"],
    ),
    "heat_map": partial(
        figures.heat_map,
        values=torch.tensor([[1.0, torch.nan]]),
        rows=["<a>"],
        columns=HOSTILE[:2],
        label="%",
    ),
    "confusion": partial(figures.confusion, counts=torch.eye(7, dtype=torch.int64), names=HOSTILE),
    "reliability": partial(
        figures.reliability, confidence=[0.2, 0.9], accuracy=[0.1, 0.8], counts=[3, 5]
    ),
    "images": partial(
        figures.images,
        pixels=torch.rand(7, 3, 8, 8),
        captions=HOSTILE,
        wrong=[True] + [False] * 6,
        columns=4,
        title="<b>",
    ),
}


@pytest.mark.parametrize("draw", CHARTS.values(), ids=CHARTS)
def test_a_chart_is_drawn_in_both_themes(draw, tmp_path):
    light, dark = figures.save_svgs(draw, tmp_path / "figures" / "chart")

    assert (light.name, dark.name) == ("chart-light.svg", "chart-dark.svg")
    for path in (light, dark):
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert light.read_text() != dark.read_text()


@pytest.mark.parametrize("theme", [figures.LIGHT, figures.DARK])
@pytest.mark.parametrize("draw", CHARTS.values(), ids=CHARTS)
def test_the_pixels_of_a_chart_are_not_blank(draw, theme):
    pixels = figures.rasterize(draw, theme)

    assert pixels.dtype == torch.uint8
    assert pixels.shape[2] == 3
    page = torch.tensor([int(theme.page[i : i + 2], 16) for i in (1, 3, 5)])
    assert pixels[0, 0].tolist() == page.tolist()
    assert 0.01 < (pixels != page).any(2).float().mean() < 0.99


@pytest.mark.parametrize("count", [2, 31, 121, 1000])
def test_a_confusion_matrix_is_drawn_for_any_number_of_classes(count):
    names = [f"class {number}" for number in range(count)]
    counts = torch.eye(count, dtype=torch.int64)

    pixels = figures.rasterize(partial(figures.confusion, counts=counts, names=names))

    assert pixels.min() < 128
    assert max(pixels.shape) <= 1400


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (512, 512), (8, 64)])
def test_images_of_any_size_and_channels_are_drawn(channels, size):
    pixels = torch.rand(2, channels, *size)

    drawn = figures.rasterize(partial(figures.images, pixels=pixels, captions=["a", "b"]))

    assert (drawn != 255).any(2).float().mean() > 0.05


def test_values_that_are_all_zero_are_drawn_on_a_linear_axis():
    zeros = {"a": 0.0, "b": 0.0}

    for draw in (
        partial(figures.dots, series={"float64": zeros}, ylabel="error", log=True),
        partial(figures.lines, series={"a": ([0], [0])}, xlabel="x", ylabel="y", log=True),
    ):
        assert draw(LIGHT).axes[0].get_yscale() == "linear"


def test_an_inline_figure_follows_the_colours_of_its_page():
    svg = figures.inline_svg(CHARTS["bars"], 'latency "<1>"')

    assert svg.startswith('<svg role="img" aria-label="latency &quot;&lt;1&gt;&quot;"')
    assert "var(--text)" in svg
    assert "var(--main)" in svg
    assert LIGHT.text not in svg
    assert "<script" not in svg
    used = set(re.findall(r"var\(--(\w+)\)", svg))
    assert all(f"--{name}:" in figures.css_variables(figures.DARK) for name in used)


def test_two_inline_figures_share_no_ids():
    ids = [
        set(re.findall(r'\bid="([^"]+)"', figures.inline_svg(CHARTS[name], name)))
        for name in ("bars", "lines")
    ]

    assert ids[0].isdisjoint(ids[1])
    for name, known in zip(("bars", "lines"), ids, strict=True):
        svg = figures.inline_svg(CHARTS[name], name)
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= known


def test_the_same_figure_is_the_same_file():
    assert to_svg(CHARTS["lines"], LIGHT) == to_svg(CHARTS["lines"], LIGHT)


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(ImportError, match=r"^matplotlib is missing: run pip install matplotlib$"):
        figures.rasterize(CHARTS["bars"])
