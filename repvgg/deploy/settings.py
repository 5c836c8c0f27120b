"""What a deployment is given, checked before anything heavy is imported or read."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from repvgg import cli
from repvgg.checks import check_integer, check_number

# As in repvgg.export, known here without importing torch.
CHOICES = ("safetensors", "onnx", "pt2", "openvino", "aoti")
EXTRAS = {"openvino"}  # formats that need a package of their name


def check_arguments(config: dict[str, Any]) -> tuple[Path, Path]:
    """Refuse what can be refused before anything is loaded; the checkpoint and the folder."""
    if config["ckpt"] is None:
        found = sorted(Path("runs").rglob("best.ckpt"), key=os.path.getmtime)
        newest = found[-1] if found else "runs/.../checkpoints/best.ckpt"
        raise ValueError(f"ckpt is missing: run {cli.command('deploy')} ckpt={newest}")
    path = Path(str(config["ckpt"]))
    for key in ("benchmark", "overwrite", "int8", "bf16"):
        if not isinstance(config[key], bool):
            raise ValueError(f"{key}={config[key]}: must be true or false")
    formats = config["formats"]
    if (
        not isinstance(formats, list)
        or not formats
        or any(f not in CHOICES for f in formats)
        or len({*formats}) < len(formats)
    ):
        raise ValueError(
            f"formats={formats}: must be a list of {', '.join(CHOICES)}, each once; "
            f"type for example formats=[{CHOICES[0]}]"
        )
    check_integer("int8_images", config["int8_images"], minimum=1, example=256)
    check_integer("int8_float_layers", config["int8_float_layers"], minimum=0, example=2)
    check_number("int8_drop", config["int8_drop"], below=1, example=0.005)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no file"
        raise ValueError(
            f"ckpt={path}: there is {kind} of that name; give a best.ckpt that train.py wrote"
        )
    if config["out"] is not None:
        out = Path(str(config["out"]))
    elif path.parent.name == "checkpoints":
        out = path.parent.parent / "deploy"
    else:
        out = path.parent / f"{path.stem}-deploy"
    if out.exists() and not config["overwrite"]:
        raise ValueError(f"{out} exists: type overwrite=true to replace it, or out=OTHER_FOLDER")
    check_replaceable(out)
    for extra in sorted(EXTRAS & set(formats)):
        if find_spec(extra) is None:
            raise ValueError(f'{extra} is missing: type pip install -e ".[{extra}]"')
    return path, out.resolve()


def check_replaceable(out: Path) -> None:
    """Refuse to replace anything but what deploy.py wrote, and that alone."""
    if not out.exists():
        return
    from repvgg.deploy.certificate import SUMS, read_sums

    try:
        ours = {*read_sums(out), SUMS}
    except (ValueError, OSError):
        raise ValueError(
            f"{out} is not a deployment, so it is not replaced: type out=OTHER_FOLDER"
        ) from None
    others = sorted(path.name for path in out.iterdir() if path.name not in ours)
    if others:
        raise ValueError(
            f"{out} holds what deploy.py did not write, so it is not replaced: "
            f"{', '.join(others[:5])}; type out=OTHER_FOLDER"
        )


def one_run(arguments: cli.Arguments) -> cli.Plan:
    """Refuse a sweep: every deployment is certified by itself."""
    if cli.SWEEP & set(arguments.options):
        raise ValueError(f"-m: one checkpoint at a time; run {cli.command('deploy')} ckpt=PATH")
    return cli.Plan(arguments)


def check_verify(config: dict[str, Any]) -> Path:
    """The folder to verify again, which is all that such a command may name."""
    if config["ckpt"] is not None or config["out"] is not None:
        raise ValueError(f"verify: it stands alone; run {cli.command('deploy')} verify=FOLDER")
    return Path(str(config["verify"]))
