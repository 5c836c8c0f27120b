"""Figures in one style, for TensorBoard, reports and docs; they need matplotlib when drawn."""

from repvgg.figures.charts import bars, dots, lines, reliability, stacked_bars
from repvgg.figures.grids import MOST_CLASSES, confusion, heat_map, images, kernels
from repvgg.figures.names import shorten
from repvgg.figures.style import (
    DARK,
    LIGHT,
    Draw,
    Theme,
    css_variables,
    inline_svg,
    rasterize,
    save_png,
    save_svgs,
)

__all__ = [
    "DARK",
    "LIGHT",
    "MOST_CLASSES",
    "Draw",
    "Theme",
    "bars",
    "confusion",
    "css_variables",
    "dots",
    "heat_map",
    "images",
    "inline_svg",
    "kernels",
    "lines",
    "rasterize",
    "reliability",
    "save_png",
    "save_svgs",
    "shorten",
    "stacked_bars",
]
