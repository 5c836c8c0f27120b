"""The settings of an evaluation, checked before anything heavy is imported or read."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from repvgg import cli
from repvgg.checks import check_boolean, check_integer, wrong_value
from repvgg.cli import Config
from repvgg.deploy.folder import SUMS
from repvgg.deploy.settings import _check_keys, _data, read_network

SPLITS = ("train", "val", "test", "all")
DEVICES = ("auto", "cpu", "cuda")
ENDINGS = (".ckpt", ".onnx", ".pt", ".pt2", ".pth", ".safetensors", ".xml")  # of networks
METRICS = "metrics.json"
PREDICTIONS = "predictions.csv"
FILES = (METRICS, "per_class.csv", "confusion.csv", "confusion.png", PREDICTIONS)


@dataclass(frozen=True)
class EvaluateSettings:
    """The keys of configs/evaluate.yaml, which documents them.

    Attributes:
        ckpt: an existing file.
        data: a function that returns an `ImageData`, under `_target_`, and its arguments.
        network: the dotted name of what builds the network, if it is the user's own.
        trust: as in `repvgg.export.open_artifact`.
        passed: the arguments of the data that were passed on the command line.
        out: the folder to create, absolute.
    """

    ckpt: Path
    data: Config
    split: str
    out: Path
    overwrite: bool
    predictions: bool
    batch_size: int | None
    device: str
    trust: bool
    network: str | None = None
    passed: frozenset[str] = frozenset()

    @classmethod
    def read(cls, config: Config, overrides: Iterable[str] = ()) -> "EvaluateSettings":
        """Read a composed configuration.

        Args:
            overrides: of the command line, as key=value.

        Raises:
            ValueError: a key is unknown or missing, a value is wrong, a file is missing, or the
                folder exists.
        """
        _check_keys(config, KEYS)
        run = cli.command("evaluate")
        if config["ckpt"] is None:
            raise ValueError(f"ckpt is missing: run {run} ckpt=PATH data=digits")
        data = _data(config.get("data"))
        if data is None:
            raise ValueError(
                "data is missing: pass for example data=digits, or data=imagefolder "
                "data.root=FOLDER"
            )
        for key, allowed in (("split", SPLITS), ("device", DEVICES)):
            if config[key] not in allowed:
                must = f"must be one of {', '.join(allowed)}"
                raise wrong_value(key, config[key], must, allowed[-2])
        size = config["batch_size"]
        if size is not None:
            check_integer("batch_size", size, minimum=1, example=64)
        ckpt, split = Path(str(config["ckpt"])), str(config["split"])
        check_file(ckpt, "ckpt")
        out = default_folder(ckpt, split) if config["out"] is None else Path(str(config["out"]))
        overwrite = check_boolean("overwrite", config["overwrite"])
        if out.exists() and not overwrite:
            raise ValueError(
                f"{out} exists: pass overwrite=true to replace it, or out=OTHER_FOLDER"
            )
        check_replaceable(out)
        words = (override.lstrip("+").partition("=")[0] for override in overrides)
        return cls(
            ckpt=ckpt,
            data=data,
            split=split,
            out=out.resolve(),
            overwrite=overwrite,
            predictions=check_boolean("predictions", config["predictions"]),
            batch_size=None if size is None else int(str(size)),
            device=str(config["device"]),
            trust=check_boolean("trust", config["trust"]),
            network=read_network(config),
            passed=frozenset(w.removeprefix("data.") for w in words if w.startswith("data.")),
        )


KEYS = [field.name for field in dataclasses.fields(EvaluateSettings) if field.name != "passed"]


def check_file(path: Path, key: str) -> None:
    """Check that a path is a file; of a folder, name the files in it that may be meant.

    Raises:
        ValueError: it is not.
    """
    if path.is_file():
        return
    if not path.is_dir():
        raise ValueError(f"{key}: '{path}' is no file; pass a checkpoint or a deployed file")
    best = path / "checkpoints" / "best.ckpt"
    if best.is_file():
        raise ValueError(f"{key}={path}: is the folder of a run; pass {key}={best}")
    inside = [found.name for found in sorted(path.iterdir()) if found.suffix in ENDINGS]
    held = f"it holds {', '.join(inside)}; " if inside else ""
    best = path / "best.ckpt"
    example = best if best.name in inside else path / inside[-1] if inside else "FILE"
    raise ValueError(f"{key}={path}: is a folder; {held}pass for example {key}={example}")


def default_folder(ckpt: Path, split: str) -> Path:
    """The folder of an evaluation: beside checkpoints/ or deploy/, or beside the file."""
    ours = ckpt.absolute().parent.name == "checkpoints" or (ckpt.parent / SUMS).is_file()
    place = ckpt.absolute().parent.parent if ours else ckpt.parent
    best = ours and ckpt.name == "best.ckpt"
    return place / (f"evaluate-{split}" if best else f"evaluate-{split}-{ckpt.name}")


def check_replaceable(out: Path) -> None:
    """Raise ValueError if `out` exists and is anything but an evaluation."""
    if not out.exists():
        return
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if METRICS not in names or not names <= {*FILES}:
        raise ValueError(
            f"{out} is not an evaluation, so it is not replaced: pass out=OTHER_FOLDER"
        )
