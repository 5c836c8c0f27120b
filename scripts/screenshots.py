"""Take the screenshots of README and docs: terminal, TensorBoard, report, and the README itself.

    pip install -e ".[docs,test]" && apt-get install chromium
    python -m scripts.screenshots

Trains and deploys RepVGG-A0 on digits, or takes run=FOLDER, a run with its deploy folder, and
photographs it in headless Chromium.
"""

from __future__ import annotations

import fcntl
import html
import itertools
import os
import pty
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from repvgg import cli
from repvgg.figures import DARK, LIGHT, Theme

ROOT = Path(__file__).parents[1]
DEFAULTS: cli.Config = {
    "run": None,
    "out": str(ROOT / "docs" / "images"),
    "only": "terminal,tensorboard,report,readme",
}
TABS = {  # of TensorBoard: address, and width and height in pixels
    "scalars": ("custom_scalars", (1400, 1000)),
    "images": ("images&tagFilter=val|batch", (1750, 900)),
    "branches": ("images&tagFilter=branches", (1750, 760)),
    "hparams": ("hparams", (1700, 600)),
    "text": ("text", (1400, 1000)),
}
FIRST_MINUTE = (
    "python train.py model=repvgg_tiny rdrop=true hydra.run.dir=runs/first",
    "python deploy.py ckpt=runs/first/checkpoints/best.ckpt data=digits int8=true",
    "repvgg predict model=runs/first/deploy/model.onnx images=docs/images/digits",
)
COLUMNS, LINES = 100, 120  # of the terminal
CELL = 7.9, 17.0  # pixels: width of a letter and height of a line
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
CHROMIUM = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PAGE = """<!doctype html><meta charset="utf-8"><base href="{base}/"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 32px; max-width: 830px;
  color: {theme.text}; background: {theme.page}; color-scheme: {scheme} }}
img {{ max-width: 100% }} code, pre {{ font: 85% {font} }} a {{ color: {theme.main} }}
pre {{ background: {theme.grid}55; padding: 16px; border-radius: 6px; overflow: auto }}
h1, h2 {{ border-bottom: 1px solid {theme.grid}; padding-bottom: .3em }}
table {{ border-collapse: collapse; font-size: 90% }}
td, th {{ border: 1px solid {theme.grid}; padding: 5px 12px }}
</style>{body}"""


def main(settings: cli.Config) -> None:
    """Take those screenshots that `only` names."""
    out = Path(str(settings["out"]))
    out.mkdir(parents=True, exist_ok=True)
    wanted = str(settings["only"]).split(",")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("docs", "train.py", "deploy.py"):  # commands are shown as in a clone
            (Path(folder) / name).symlink_to(ROOT / name)
        run = Path(str(settings["run"])) if settings["run"] else make_run(Path(folder))
        if "terminal" in wanted:
            commands = first_minute(Path(folder))
            for name, theme in (("light", LIGHT), ("dark", DARK)):
                path = out / f"terminal-{name}.svg"
                path.write_text(draw_terminal(commands, theme))
        if "tensorboard" in wanted:
            for name, (tab, size) in TABS.items():
                # Pictures of one run; a table of all.
                with tensorboard(run.parent if name == "hparams" else run) as address:
                    photograph(f"{address}/#{tab}", out / f"tensorboard-{name}.png", size)
        if "report" in wanted:
            page = (run / "deploy" / "report.html").resolve().as_uri()
            for scheme in ("light", "dark"):
                photograph(page, out / f"report-{scheme}.png", (1100, 1150), dark=scheme == "dark")
        if "readme" in wanted:
            for scheme in ("light", "dark"):
                file = Path(folder) / f"readme-{scheme}.html"
                file.write_text(readme_as_html(scheme))
                photograph(
                    file.as_uri(), out / f"readme-{scheme}.png", (900, 4300), dark=scheme == "dark"
                )


def make_run(folder: Path) -> Path:
    """Train and deploy a network whose run is shown."""
    options = ["data=digits", "formats=[safetensors,onnx,pt2,openvino]", "int8=true"]
    for command in (
        ["train.py", "model=repvgg_a0", "rdrop=true", "hydra.run.dir=runs/a0"],
        ["deploy.py", "ckpt=runs/a0/checkpoints/best.ckpt", *options],
    ):
        subprocess.run([sys.executable, *command], cwd=folder, check=True)
    return folder / "runs" / "a0"


def first_minute(folder: Path) -> list[tuple[str, Any]]:
    """Run the commands of the README's first minute in a terminal.

    Returns:
        of each, the command and the screen after it.
    """
    screens = []
    for command in FIRST_MINUTE:
        program, *arguments = shlex.split(command)
        start = [sys.executable] if program == "python" else [sys.executable, "-m", "repvgg"]
        screens.append((command, run_in_terminal([*start, *arguments], folder)))
    return screens


def run_in_terminal(command: Sequence[str], folder: Path) -> Any:
    """Run a command in a terminal of its own; returns its screen, of pyte.

    Raises:
        OSError: it failed.
    """
    import pyte

    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = {
        **os.environ,
        "TERM": "xterm-256color",
        "COLORTERM": "truecolor",
        "PYTHONPATH": str(ROOT),
    }
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=end,
        stdout=end,
        stderr=end,
        close_fds=True,
    )
    os.close(end)
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # the process has closed its end
            break
        if not data:
            break
        stream.feed(data)
    os.close(terminal)
    if process.wait():
        shown = "\n".join(line.rstrip() for line in screen.display).strip()
        raise OSError(f"{shlex.join(command)} failed:\n{shown}")
    return screen


def draw_terminal(screens: Sequence[tuple[str, Any]], theme: Theme) -> str:
    """Commands and what the terminal showed, as the text of an SVG file."""
    lines: list[list[tuple[int, str, str, bool]]] = []  # runs: column, text, colour, bold
    for command, screen in screens:
        lines.append([(0, "$", theme.muted, False), (2, command, theme.text, True)])
        last = max(row for row, line in enumerate(screen.display) if line.strip())
        lines += [_runs(screen.buffer[row], theme) for row in range(last + 1)]
        lines.append([])
    lines.pop()
    width, height = COLUMNS * CELL[0] + 40, len(lines) * CELL[1] + 64
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'font-family="{FONT}" font-size="13" xml:space="preserve">',
        f'<rect width="100%" height="100%" rx="8" fill="{theme.page}" stroke="{theme.grid}"/>',
        *(
            f'<circle cx="{22 + 18 * index}" cy="20" r="5.5" fill="{color}"/>'
            for index, color in enumerate((theme.wrong, theme.second, theme.third))
        ),
    ]
    for row, runs in enumerate(lines):
        for column, text, color, bold in runs:
            x, y = 20 + column * CELL[0], 54 + row * CELL[1]
            weight = ' font-weight="bold"' if bold else ""
            length = f'textLength="{len(text) * CELL[0]:g}" lengthAdjust="spacingAndGlyphs"'
            parts.append(
                f'<text x="{x:g}" y="{y:g}" fill="{color}"{weight} {length}>'
                f"{html.escape(text)}</text>"
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _runs(line: Any, theme: Theme) -> list[tuple[int, str, str, bool]]:
    """Letters of one style that stand side by side, as one text; two spaces part texts."""
    names = {
        "default": theme.text,
        "black": theme.muted,
        "red": theme.wrong,
        "green": theme.third,
        "brown": theme.second,  # as pyte calls yellow
        "blue": theme.main,
        "magenta": theme.fourth,
        "cyan": theme.main,
        "white": theme.text,
    }
    styles = [
        (line[column].fg.removeprefix("bright"), line[column].bold) for column in range(COLUMNS)
    ]
    letters = "".join(line[column].data for column in range(COLUMNS))
    runs = []
    for found in re.finditer(r"\S+(?: \S+)*", letters):
        start = found.start()
        for style, group in itertools.groupby(styles[slice(*found.span())]):
            end = start + len([*group])
            name, bold = style
            if text := letters[start:end].strip():
                place = start + letters[start:end].index(text)
                runs.append((place, text, names.get(name) or f"#{name}", bold))
            start = end
    return runs


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """TensorBoard on a free port of this machine, ended afterwards.

    Raises:
        OSError: it did not answer within a minute.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder.name]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--load_fast", "false"],
        cwd=folder.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://localhost:{port}"
    try:
        for _ in range(60):
            try:
                urlopen(address).close()
                break
            except URLError:
                time.sleep(1)
        else:
            raise OSError("TensorBoard did not answer within a minute")
        time.sleep(5)  # until it has read the events
        yield address
    finally:
        process.terminate()
        process.wait()


def photograph(address: str, path: Path, size: tuple[int, int], *, dark: bool = False) -> None:
    """Write a screenshot of a page as PNG.

    Args:
        size: of the window, width and height in pixels.
        dark: the page is shown to a reader who prefers dark pages.

    Raises:
        ValueError: Chromium is missing.
    """
    program = next((p for p in map(shutil.which, ("chromium", "google-chrome")) if p), None)
    if program is None:
        raise ValueError("Chromium is missing: run apt-get install chromium")
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                program,
                *CHROMIUM,
                *scheme,
                f"--user-data-dir={profile}",
                "--virtual-time-budget=20000",
                f"--window-size={size[0]},{size[1]}",
                f"--screenshot={path}",
                address,
            ],
            check=True,
            capture_output=True,
        )
    print(path)


def readme_as_html(scheme: str) -> str:
    """The README as a page, much as code hosts show it."""
    import markdown

    body = markdown.markdown((ROOT / "README.md").read_text(), extensions=["tables", "fenced_code"])
    theme = DARK if scheme == "dark" else LIGHT
    return PAGE.format(body=body, base=ROOT.as_uri(), theme=theme, scheme=scheme, font=FONT)


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
