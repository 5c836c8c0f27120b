"""Label images with a checkpoint or a deployed file.

The file records channels, size, interpolation, normalization and classes. An image of another size
is resized by its shorter side and cropped at the center. `images` is a file, a folder, which is
searched, a pattern such as 'shots/*.jpg', or a list [a.jpg,b.jpg]. Prints a line for each image:
its name, and its `top` classes with their probabilities; `out` writes them into a .json or .csv
file instead. An image that cannot be read is an error at the end: all others are labelled. A
network of your own needs network=mypackage.MyNet, unless the file holds its program. A .pt2 file
can run code when it is opened, so it needs trust=true.
"""

from pathlib import Path

from repvgg import cli
from repvgg.checks import check_boolean, check_integer
from repvgg.signals import importing

DEFAULTS: cli.Config = {
    "model": None,
    "images": None,
    "network": None,
    "trust": False,
    "top": 1,
    "out": None,
    "overwrite": False,
    "batch_size": 32,
}


def main() -> None:
    usage = f"    {cli.command('predict')} model=model.onnx images=FOLDER"
    cli.script(predict, f"{__doc__}\n{usage}", DEFAULTS)


def predict(settings: cli.Config) -> None:
    model = cli.given_path(settings, "model", "PATH")
    images = cli.given_path(settings, "images", "PATH")
    out = None if settings["out"] is None else Path(str(settings["out"]))
    top = check_integer("top", settings["top"], minimum=1, example=5)
    size = check_integer("batch_size", settings["batch_size"], minimum=1, example=32)
    network = None if settings["network"] is None else str(settings["network"])
    overwrite = check_boolean("overwrite", settings["overwrite"])
    trust = check_boolean("trust", settings["trust"])
    with importing():
        from repvgg.commands.labelling import run  # takes seconds

    run(
        model,
        str(images),
        network=network,
        trust=trust,
        top=top,
        batch_size=size,
        out=out,
        overwrite=overwrite,
    )
