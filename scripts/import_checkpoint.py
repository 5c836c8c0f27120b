"""Make a checkpoint of ours from a file of the field: python scripts/import_checkpoint.py path=FILE

Opens weights of a RepVGG in the layout of its authors, of RepVGGplus, timm, mmpretrain or QARepVGG,
trained or deployed, in any wrapper (.pth, .pt, .safetensors), and writes what deploy.py and
train.py init= take, and what knows its classes and its images. What is not typed is as the file
says, if deploy.py wrote it, and else as for ImageNet.
"""

import shlex
from pathlib import Path
from typing import Any

from repvgg import checkpoint, cli
from repvgg.checkpoint.tensors import read
from repvgg.checks import check_integer, check_integers, check_number, refusal
from repvgg.contract import DataContract
from repvgg.deploy.measure import count_parameters

DEFAULTS: dict[str, Any] = {
    "path": None,
    "out": None,  # beside it, with the ending .ckpt
    "weights": None,  # which network, where the file holds several, e.g. state_dict_ema
    "classes": None,  # a file of names, one a line, in the order of the logits
    "image_size": cli.Unset(int, "224"),  # pixels
    "resize_size": cli.Unset(int, "256"),
    "interpolation": None,  # bilinear or bicubic
    "mean": cli.Unset(list, "[0.485,0.456,0.406]"),
    "std": cli.Unset(list, "[0.229,0.224,0.225]"),
    "bn_eps": cli.Unset(float, "1e-5"),
    "strides": cli.Unset(list, "[2,2,2,2,2]"),
    "overwrite": False,
}
INTERPOLATIONS = ("bilinear", "bicubic")


def main(settings: dict[str, Any]) -> None:
    if settings["path"] is None:
        raise ValueError("path is missing: type path=FILE")
    path = Path(settings["path"])
    if checkpoint.is_ours(read(path)):
        checkpoint.load(path)  # which says what is wrong with it
        raise ValueError(f"'{path}' is a checkpoint of ours already: python deploy.py ckpt={path}")
    out = Path(settings["out"]) if settings["out"] else path.with_suffix(".ckpt")
    check_out(out, overwrite=settings["overwrite"])
    options: dict[str, Any] = {"weights": settings["weights"]}
    if settings["bn_eps"] is not None:
        options["bn_eps"] = check_number("bn_eps", settings["bn_eps"], minimum=1e-12, example=1e-5)
    if settings["strides"] is not None:
        options["strides"] = check_integers(
            "strides", settings["strides"], length=5, example="[2,2,2,2,2]"
        )
    network = checkpoint.open_network(path, **options)
    opened = checkpoint.with_noise(network, contract(settings, network))
    checkpoint.save(out, opened)
    tensors = len(opened.model.state_dict())
    print(opened.origin)
    print(f"{count_parameters(opened.model):,} parameters; all {tensors} tensors loaded")
    seen, config = opened.data, opened.config
    print(f"as typed, else as {'the file says' if network.data else 'for ImageNet'}:")
    print(f"  {len(seen.classes)} classes, the first is {seen.classes[0]}")
    print(f"  {seen.image_size[0]} pixels, shorter side {seen.resize_size}, {seen.interpolation}")
    print(f"  mean {[*seen.mean]}, std {[*seen.std]}")
    strides = [*config.get("strides", (2, 2, 2, 2, 2))]
    print(f"  strides {strides}, bn_eps {config.get('bn_eps', 1e-5):g}")
    quoted = shlex.quote(str(out))
    print(f"written to {out}; deploy it: python deploy.py ckpt={quoted}")
    print(f"train it further: python train.py init={quoted} {typed(config)} data=...")


def check_out(out: Path, *, overwrite: bool) -> None:
    if out.is_dir():
        raise ValueError(f"out={out}: is a folder; type out=FILE.ckpt")
    if not out.parent.is_dir():
        raise ValueError(f"out={out}: there is no folder {out.parent}; make it, or type another")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: type overwrite=true to replace it, or out=OTHER_FILE")


def contract(settings: dict[str, Any], network: checkpoint.Network) -> DataContract:
    """What the images are: as was typed, as the file says, and ImageNet's where neither does."""
    channels = network.config["in_channels"]
    usual = network.data or checkpoint.imagenet(network.config | {"in_channels": 3})
    by_channel = {}
    for key, kept in (("mean", usual.mean), ("std", usual.std)):
        values = kept if settings[key] is None else settings[key]
        if len(values) != channels:
            raise ValueError(
                f"{key}={[*values]}: the network takes {channels} channels; type a number for each"
            )
        least = 1e-6 if key == "std" else 0.0
        by_channel[key] = [check_number(key, value, minimum=least, example=0.5) for value in values]
    interpolation = settings["interpolation"] or usual.interpolation
    if interpolation not in INTERPOLATIONS:
        allowed = f"must be one of {', '.join(INTERPOLATIONS)}"
        raise refusal("interpolation", interpolation, allowed, "bilinear")
    size = [*usual.image_size]
    resize = usual.resize_size
    if settings["image_size"] is not None:
        pixels = check_integer("image_size", settings["image_size"], minimum=8, example=224)
        size, resize = [pixels, pixels], pixels if [pixels, pixels] != size else resize
    if settings["resize_size"] is not None:
        resize = check_integer("resize_size", settings["resize_size"], minimum=8, example=256)
    return DataContract(
        classes=usual.classes if settings["classes"] is None else names(settings["classes"]),
        in_channels=channels,
        image_size=size,
        interpolation=interpolation,
        resize_size=resize,
        **by_channel,
    )


def names(path: str) -> list[str]:
    """Those in a file, one a line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"classes={path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"classes={path}: is no text in UTF-8 ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def typed(config: dict[str, Any]) -> str:
    """The keys of train.py that build the network; all but what the data decides."""
    keys = [f"model={config['name']}"]
    for key, value in ({"strides": (2, 2, 2, 2, 2)} | config).items():
        if key not in ("name", "num_classes", "in_channels"):
            shown = str(value).replace(" ", "").replace("(", "[").replace(")", "]")
            keys.append(f"++model.{key}={shown.lower() if isinstance(value, bool) else shown}")
    return " ".join(keys)


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
