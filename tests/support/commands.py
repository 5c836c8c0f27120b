"""The two commands of the project as a user runs them, and what their tests share."""

import os
import subprocess
import sys
from pathlib import Path

import hydra
import numpy as np
from omegaconf import OmegaConf
from PIL import Image

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SHORT = ("model=repvgg_tiny", "rdrop=true", "trainer.max_epochs=3", "data.batch_size=128")


def run(program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run train.py, deploy.py or a script, or a command of `python -m repvgg`."""
    start = [ROOT / program] if program.endswith(".py") else ["-m", "repvgg", program]
    return subprocess.run(
        [sys.executable, "-W", "error", *quiet(), *start, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def compose(name: str, *overrides: str) -> dict:
    """The plain configuration that Hydra makes of a root configuration and overrides."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose(name, list(overrides)), resolve=True)


def quiet() -> list[str]:
    """The one warning of the stack itself, which train.py silences too, but later."""
    return ["-W", "ignore:`isinstance(treespec, LeafSpec)`:FutureWarning"]


def tree(folder: Path) -> dict[str, int]:
    """Every file below a folder with the time of its last change."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file()
    }


def make(folder: Path, *, count: int = 6) -> Path:
    """A folder of images in two classes, which their upper halves tell apart."""
    noise = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = noise.integers(0, 256, (18, 20, 3), dtype=np.uint8)
            pixels[:9] = 255 * label
            Image.fromarray(pixels).save(folder / name / f"{i}.jpg")
    return folder
