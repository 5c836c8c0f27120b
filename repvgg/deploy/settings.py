"""The settings of a deployment, checked before anything heavy is imported or read."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from repvgg import cli
from repvgg.checks import check_boolean, check_integer, check_number, unknown_key
from repvgg.cli import Config
from repvgg.deploy.folder import check_replaceable

# As in repvgg.export, repeated here because importing that imports torch.
CHOICES = ("safetensors", "onnx", "pt2", "openvino", "aoti")
EXTRAS = {"openvino"}  # formats that need a package of the same name
# Sections that a user's own config of a data set may set, for training.
TRAINING = ("model", "optim", "trainer")


@dataclass(frozen=True)
class DeploySettings:
    """The keys of configs/deploy.yaml, which documents them.

    Attributes:
        ckpt: an existing file.
        network: the dotted name of what builds the network, if it is the user's own.
        out: the folder to create, absolute.
        data: a function that returns an `ImageData`, under `_target_`, and its arguments.
    """

    ckpt: Path
    out: Path
    overwrite: bool
    formats: tuple[str, ...]
    input: str
    output: str
    bf16: bool
    int8: bool
    int8_images: int
    int8_float_layers: int
    int8_drop: float
    benchmark: bool
    data: Config | None = None
    network: str | None = None

    @classmethod
    def read(cls, config: Config) -> "DeploySettings":
        """Read a composed configuration.

        Raises:
            ValueError: a key is unknown or missing, a value is wrong, a file or package is missing,
                or the folder exists.
        """
        _check_keys(config)
        ckpt = config["ckpt"]
        if check_boolean("trust", config["trust"]):
            raise ValueError("trust=true: goes with verify=FOLDER; leave it out with ckpt")
        if ckpt is None:
            found = sorted(Path("runs").rglob("best.ckpt"), key=os.path.getmtime)
            newest = found[-1] if found else "runs/.../checkpoints/best.ckpt"
            raise ValueError(f"ckpt is missing: run {cli.command('deploy')} ckpt={newest}")
        switches = {
            key: check_boolean(key, config[key])
            for key in ("benchmark", "overwrite", "int8", "bf16")
        }
        formats = _formats(config["formats"])
        images = check_integer("int8_images", config["int8_images"], minimum=1, example=256)
        layers = check_integer(
            "int8_float_layers", config["int8_float_layers"], minimum=0, example=2
        )
        drop = check_number("int8_drop", config["int8_drop"], below=1, example=0.005)
        data = _data(config.get("data"))
        path = Path(str(ckpt))
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "no file"
            raise ValueError(f"ckpt={path}: there is {kind} of that name; pass a checkpoint")
        out = _out(config["out"], path)
        if out.exists() and not switches["overwrite"]:
            raise ValueError(
                f"{out} exists: pass overwrite=true to replace it, or out=OTHER_FOLDER"
            )
        check_replaceable(out)
        for extra in sorted(EXTRAS & set(formats)):
            if find_spec(extra) is None:
                raise ValueError(f"formats: {extra} is missing: run pip install {extra}")
        return cls(
            ckpt=path,
            out=out.resolve(),
            formats=formats,
            input=str(config["input"]),
            output=str(config["output"]),
            int8_images=images,
            int8_float_layers=layers,
            int8_drop=drop,
            data=data,
            network=read_network(config),
            **switches,
        )


KEYS = ["verify", "trust", *(field.name for field in dataclasses.fields(DeploySettings))]


@dataclass(frozen=True)
class VerifySettings:
    """The keys of a command that verifies a deployed folder again."""

    folder: Path
    network: str | None = None
    trust: bool = False

    @classmethod
    def read(cls, config: Config) -> "VerifySettings":
        """Read a composed configuration that sets `verify`.

        Raises:
            ValueError: a key is unknown or missing, or the configuration names a checkpoint too.
        """
        _check_keys(config)
        if config["ckpt"] is not None or config["out"] is not None:
            raise ValueError(f"verify: it stands alone; run {cli.command('deploy')} verify=FOLDER")
        trust = check_boolean("trust", config["trust"])
        return cls(Path(str(config["verify"])), read_network(config), trust)


def read_network(config: Config) -> str | None:
    """The name of the user's own network, if there is one."""
    given = config["network"]
    return None if given is None else str(given)


def one_run(
    arguments: cli.Arguments, command: str = "deploy", keys: Sequence[str] = KEYS
) -> cli.Plan:
    """Reject a sweep, and a key of training.

    Args:
        keys: of the command.

    Raises:
        ValueError: the command line holds one of them.
    """
    multirun = any("hydra.mode=MULTIRUN" in override for override in arguments.overrides)
    if cli.SWEEP & set(arguments.options) or multirun:
        raise ValueError(f"-m: one checkpoint at a time; run {cli.command(command)} ckpt=PATH")
    for override in arguments.overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key.partition(".")[0] in TRAINING:
            if instead := cli.habits.key(key, value, keys):
                raise ValueError(f"{key}: there is no such key; {instead}")
            raise unknown_key(key, keys)
    return cli.Plan(arguments)


def _check_keys(config: Config, keys: Sequence[str] = KEYS) -> None:
    """Raise ValueError for a key that nothing reads, also one that was passed with `+`."""
    for key in config:
        if key not in keys and not (key in TRAINING and config.get("data")):
            raise unknown_key(key, keys)
    for key in keys:
        if key not in config and key != "data":  # Hydra leaves a group out that is null
            raise ValueError(f"{key} is missing: the configuration must set it")


def _formats(given: object) -> tuple[str, ...]:
    if (
        not isinstance(given, list)
        or not given
        or any(name not in CHOICES for name in given)
        or len({*given}) < len(given)
    ):
        example = given if given in CHOICES else CHOICES[0]  # formats=onnx
        raise ValueError(
            f"formats={given}: must be a list of {', '.join(CHOICES)}, each once; "
            f"pass for example formats=[{example}]"
        )
    return tuple(given)


def _data(given: object) -> Config | None:
    if given is None:
        return None
    if not isinstance(given, dict) or "_target_" not in given:
        raise ValueError(f"data={given}: names no data set; pass for example data=digits")
    return given


def _out(given: object, ckpt: Path) -> Path:
    """The folder that was passed; by default deploy/ in the run's folder."""
    if given is not None:
        return Path(str(given))
    if ckpt.parent.name == "checkpoints":
        return ckpt.parent.parent / "deploy"
    return ckpt.parent / f"{ckpt.stem}-deploy"
