"""Train a network: python train.py model=repvgg_a0 rdrop=true

Configured by configs/train.yaml; `python train.py --help` lists what can be set. A run lives in
runs/<data>-<model>/<time>/: its configuration, TensorBoard events and checkpoints.
"""

from pathlib import Path
from typing import Any

from repvgg import cli
from repvgg.training import runs
from repvgg.training.settings import Settings

CONFIG = Path(__file__).absolute().parent / "configs" / "train.yaml"


def main(config: dict[str, Any], folder: Path) -> None:
    try:
        settings = Settings.read(config)
        from repvgg.training.run import run  # takes seconds; mistakes are told before

        run(settings, config, folder)
    finally:
        runs.discard_if_empty(folder)


if __name__ == "__main__":
    cli.run(main, CONFIG, prepare=runs.plan)
