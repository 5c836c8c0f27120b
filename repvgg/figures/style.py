"""The style of all figures: two themes, and a drawing as SVG or as pixels.

A chart is a function of a theme. It draws the same figure for a light page, for a dark page, or
once with CSS variables for a page that follows the reader's setting.
"""

import contextlib
import html
import io
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repvgg.checks import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of a figure.

    Attributes:
        page: behind the figure, which itself is transparent.
        text: of titles, labels and numbers.
        muted: of axes, ticks and notes.
        grid: of grid lines.
        main: of what the figure is about.
        second, third, fourth: of further series.
        neutral: of what it is compared with.
        wrong: of errors.
    """

    page: str
    text: str
    muted: str
    grid: str
    main: str
    second: str
    third: str
    fourth: str
    neutral: str
    wrong: str

    @property
    def series(self) -> tuple[str, ...]:
        """Colours of several series, in this order."""
        return self.main, self.second, self.third, self.fourth, self.neutral


LIGHT = Theme(
    page="#ffffff",
    text="#1f2329",
    muted="#59636f",
    grid="#d8dee5",
    main="#1f6feb",
    second="#d9730d",
    third="#1a8f5c",
    fourth="#8250df",
    neutral="#9aa4b0",
    wrong="#cf222f",
)
DARK = Theme(
    page="#0d1117",
    text="#e6edf4",
    muted="#9198a2",
    grid="#30373f",
    main="#58a6ff",
    second="#f0883e",
    third="#3fb970",
    fourth="#bc8cff",
    neutral="#6e7782",
    wrong="#ff7b73",
)

Draw = Callable[[Theme], "Figure"]  # a chart with all arguments but the theme

FONTS = ["DejaVu Sans"]  # which matplotlib ships: a figure is laid out the same on all machines


@contextlib.contextmanager
def styled(theme: Theme) -> Iterator[None]:
    """Make matplotlib draw in a theme.

    Raises:
        ImportError: matplotlib is missing.
    """
    require("matplotlib")
    import matplotlib

    settings: Any = {  # the keys that matplotlib's types list differ between versions
        "figure.facecolor": "none",
        "figure.constrained_layout.h_pad": 0.1,
        "figure.constrained_layout.w_pad": 0.1,
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "font.family": FONTS,
        "font.size": 10,
        "text.color": theme.text,
        "text.parse_math": False,  # a class name may hold $
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.text,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": False,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.grid,
        "ytick.color": theme.grid,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.text,
        "legend.frameon": False,
        "svg.hashsalt": "repvgg",  # the same figure is the same file
        "svg.fonttype": "none",  # text stays text
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # letters that the font lacks
        yield


def new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """An empty figure in inches, with one pair of axes; call it within `styled`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    return figure, figure.add_subplot()


def to_svg(draw: Draw, theme: Theme) -> str:
    """Draw a figure as the text of an SVG file.

    Raises:
        ImportError: matplotlib is missing.
    """
    with styled(theme):
        text = io.StringIO()
        draw(theme).savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    # Verdana has the widths of DejaVu Sans.
    return text.getvalue().replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")


def save_svgs(draw: Draw, stem: Path) -> tuple[Path, Path]:
    """Write a figure for light and for dark pages: `stem-light.svg` and `stem-dark.svg`.

    Raises:
        ImportError: matplotlib is missing.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, theme in (("light", LIGHT), ("dark", DARK)):
        path = stem.with_name(f"{stem.name}-{name}.svg")
        path.write_text(to_svg(draw, theme))
        paths.append(path)
    return paths[0], paths[1]


def inline_svg(draw: Draw, title: str) -> str:
    """Draw a figure as an `<svg>` element whose colours follow the CSS variables of its page.

    Args:
        title: says what the figure shows, for readers who do not see it.

    Raises:
        ImportError: matplotlib is missing.
    """
    text = to_svg(draw, LIGHT)
    text = re.sub("<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for field in fields(Theme):
        text = text.replace(getattr(LIGHT, field.name), f"var(--{field.name})")
    salt = f"{zlib.crc32(text.encode()):x}"  # two figures on a page must not share ids
    text = re.sub(r'\bid="([^"]+)"', rf'id="\1-{salt}"', text)
    text = re.sub(r'(href="#|url\(#)([^")]+)', rf"\1\2-{salt}", text)
    label = html.escape(title, quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def css_variables(theme: Theme) -> str:
    """Declarations of the variables that `inline_svg` uses."""
    return "".join(f"--{field.name}:{getattr(theme, field.name)};" for field in fields(Theme))


def rasterize(draw: Draw, theme: Theme = LIGHT, *, dpi: int = 100) -> Tensor:
    """Draw a figure as pixels on the theme's page.

    Returns:
        (H, W, 3), uint8.

    Raises:
        ImportError: matplotlib is missing.
    """
    with styled(theme):
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = draw(theme)
        figure.set_facecolor(theme.page)
        figure.set_dpi(dpi)
        canvas: Any = FigureCanvasAgg(figure)  # its methods have no types
        canvas.draw()
        width, height = canvas.get_width_height()
        pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
        return pixels.view(height, width, 4)[..., :3].contiguous()


def save_png(draw: Draw, path: Path) -> None:
    """Write a figure as pixels, for light pages.

    Raises:
        ImportError: matplotlib is missing.
    """
    from PIL import Image

    Image.fromarray(rasterize(draw).numpy()).save(path)
