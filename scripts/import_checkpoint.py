"""Make a checkpoint of ours from a file of the field: python scripts/import_checkpoint.py path=FILE

Opens weights of a RepVGG in the layout of its authors, of RepVGGplus, timm, mmpretrain or QARepVGG,
trained or deployed, in any wrapper (.pth, .pt, .safetensors), and writes what deploy.py and
train.py init= take, and what knows its classes and its images. They are ImageNet's unless given.
"""

import re
from pathlib import Path
from typing import Any

from repvgg import cli, layouts
from repvgg.arguments import check_integer, check_integers, check_number
from repvgg.benchmark import count_parameters
from repvgg.checkpoint import imagenet, load, read, save
from repvgg.model import DataContract

DEFAULTS: dict[str, Any] = {
    "path": None,
    "out": None,  # beside it, with the ending .ckpt
    "weights": None,  # which network, where the file holds several, e.g. state_dict_ema
    "classes": None,  # a file of names, one a line, in the order of the logits
    "image_size": None,  # pixels; 224, and 320 for the variants that were published so
    "resize_size": None,
    "interpolation": "bilinear",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "bn_eps": 1e-5,
    "strides": [2, 2, 2, 2, 2],
    "overwrite": False,
}


def main(settings: dict[str, Any]) -> None:
    if settings["path"] is None:
        raise ValueError("path is missing: type path=FILE")
    path = Path(settings["path"])
    content = read(path)
    out = Path(settings["out"]) if settings["out"] else path.with_suffix(".ckpt")
    if out.exists() and not settings["overwrite"]:
        raise ValueError(f"{out} exists: type overwrite=true to replace it, or out=OTHER_FILE")
    options = {
        "bn_eps": check_number("bn_eps", settings["bn_eps"], example=1e-5),
        "strides": check_integers("strides", settings["strides"], length=5, example="[2,2,2,2,2]"),
    }
    try:
        found = layouts.choose(content, settings["weights"])
        config = layouts.plan(found, **options)
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from error
    opened = load(path, weights=settings["weights"], data=contract(settings, config), **options)
    save(out, opened)
    print(opened.origin)
    print(f"{count_parameters(opened.model):,} parameters, all {len(found.weights)} tensors loaded")
    seen = opened.data
    print(
        f"assumed: {len(seen.classes)} classes, the first is {seen.classes[0]}; mean {seen.mean},"
    )
    print(f"std {seen.std}; {seen.image_size[0]} pixels, shorter side {seen.resize_size}, ")
    print(f"{seen.interpolation}; strides {[*options['strides']]}, bn_eps {options['bn_eps']:g}")
    print(f"written to {out}; deploy it: python deploy.py ckpt={out}")
    print(f"train it further: python train.py init={out} model={config['name']} data=...")


def contract(settings: dict[str, Any], config: dict[str, Any]) -> DataContract:
    """What the images are: as was typed, and ImageNet's where nothing was."""
    usual = imagenet(config | {"in_channels": 3})
    mean, std = settings["mean"], settings["std"]
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != config["in_channels"]:
            raise ValueError(
                f"{key}={values}: the network takes {config['in_channels']} channels, a number "
                "for each"
            )
        for value in values:
            check_number(key, value, example=0.5)
    classes = usual.classes
    if settings["classes"] is not None:
        lines = Path(settings["classes"]).read_text().splitlines()
        classes = [line.strip() for line in lines if line.strip()]
    size = pixels(settings, "image_size", usual.image_size[0])
    known = size == usual.image_size[0]
    return DataContract(
        classes=classes,
        in_channels=config["in_channels"],
        image_size=[size, size],
        mean=mean,
        std=std,
        interpolation=settings["interpolation"],
        resize_size=pixels(settings, "resize_size", usual.resize_size if known else size),
    )


def pixels(settings: dict[str, Any], key: str, usual: Any) -> int:
    """A number that was typed, or else the usual one."""
    typed = settings[key]
    if typed is None:
        return usual
    value = int(typed) if re.fullmatch(r"\d+", typed) else typed
    return check_integer(key, value, minimum=8, example=224)


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
