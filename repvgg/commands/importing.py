"""The work of `repvgg import`: read a third-party checkpoint and write one of ours."""

import contextlib
import shlex
from collections.abc import Mapping
from pathlib import Path

from repvgg import checkpoint, cli
from repvgg.checkpoint.tensors import read
from repvgg.checks import ArgumentError
from repvgg.commands.import_checkpoint import Settings
from repvgg.contract import DataContract
from repvgg.models.size import count_parameters


def convert(path: Path, settings: Settings) -> None:
    if checkpoint.is_ours(read(path)):
        with contextlib.suppress(ArgumentError):  # the code of a custom network is missing
            checkpoint.load(path)  # raises if it is damaged
        deploy = f"{cli.command('deploy')} ckpt={shlex.quote(str(path))}"
        raise ValueError(f"'{path}' is a checkpoint of ours already: {deploy}")
    out = Path(settings.out) if settings.out else path.with_suffix(".ckpt")
    check_out(out, overwrite=settings.overwrite)
    network = checkpoint.open_network(
        path, weights=settings.weights, bn_eps=settings.bn_eps, strides=settings.strides
    )
    opened = checkpoint.with_noise(network, data_contract(settings, network))
    checkpoint.save(out, opened)
    tensors = len(opened.model.state_dict())
    print(opened.origin)
    print(f"{count_parameters(opened.model):,} parameters; all {tensors} tensors loaded")
    data, config = opened.data, opened.config
    source = "from the file" if network.data else "as for ImageNet"
    print(f"as passed on the command line, else {source}:")
    print(f"  {len(data.classes)} classes, the first is {data.classes[0]}")
    print(f"  {data.image_size[0]} pixels, shorter side {data.resize_size}, {data.interpolation}")
    print(f"  mean {[*data.mean]}, std {[*data.std]}")
    strides, bn_eps = config.get("strides", [2, 2, 2, 2, 2]), config.get("bn_eps", 1e-5)
    print(f"  strides {strides}, bn_eps {bn_eps}")
    quoted = shlex.quote(str(out))
    print(f"written to {out}; deploy it: {cli.command('deploy')} ckpt={quoted}")
    print(f"train it further: {cli.command('train')} init={quoted} {overrides(config)} data=...")


def check_out(out: Path, *, overwrite: bool) -> None:
    if out.is_dir():
        raise ValueError(f"out={out}: is a folder; pass out=FILE.ckpt")
    if not out.parent.is_dir():
        raise ValueError(f"out={out}: there is no folder {out.parent}; make it, or pass another")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: pass overwrite=true to replace it, or out=OTHER_FILE")


def data_contract(settings: Settings, network: checkpoint.Network) -> DataContract:
    """The preprocessing: as passed, else as in the file, else ImageNet's."""
    channels = network.in_channels
    usual = network.data or checkpoint.imagenet(network.config | {"in_channels": 3})
    mean = usual.mean if settings.mean is None else settings.mean
    std = usual.std if settings.std is None else settings.std
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(
                f"{key}={[*values]}: the network takes {channels} channels; pass a number for each"
            )
    size, resize = [*usual.image_size], usual.resize_size
    if settings.image_size is not None:
        given = [settings.image_size, settings.image_size]
        size, resize = given, settings.image_size if given != size else resize
    return DataContract(
        classes=usual.classes if settings.classes is None else read_names(settings.classes),
        in_channels=channels,
        image_size=size,
        mean=[float(value) for value in mean],
        std=[float(value) for value in std],
        interpolation=settings.interpolation or usual.interpolation,
        resize_size=settings.resize_size or resize,
    )


def read_names(path: str) -> list[str]:
    """The names in a file, one a line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"classes={path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"classes={path}: is no text in UTF-8 ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def overrides(config: Mapping[str, object]) -> str:
    """The keys of `train` that build the network, but for those that follow from the data."""
    keys = [f"model={config['name']}"]
    for key, value in ({"strides": (2, 2, 2, 2, 2)} | dict(config)).items():
        if key not in ("name", "num_classes", "in_channels"):
            shown = str(value).replace(" ", "").replace("(", "[").replace(")", "]")
            keys.append(f"++model.{key}={shown.lower() if isinstance(value, bool) else shown}")
    return " ".join(keys)
