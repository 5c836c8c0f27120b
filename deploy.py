"""Deploy a trained network: python deploy.py ckpt=runs/.../checkpoints/best.ckpt

Folds the network, writes it in each format, reloads every file from disk and compares it with the
trained network in float64. The folder appears under its name when all verdicts passed.
"""

from pathlib import Path
from typing import Any

from repvgg import cli
from repvgg.deploy.settings import check_arguments, check_verify, one_run

CONFIG = Path(__file__).absolute().parent / "configs" / "deploy.yaml"


def main(config: dict[str, Any], _: Path) -> None:
    if config["verify"] is not None:
        folder = check_verify(config)
        from repvgg.deploy.run import verify_again  # takes seconds; mistakes are told before

        verify_again(folder)
        return
    path, out = check_arguments(config)
    from repvgg.deploy.run import run

    run(path, out, config)


if __name__ == "__main__":
    cli.run(main, CONFIG, prepare=one_run)
