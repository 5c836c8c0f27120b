"""Label images with a deployed file.

Everything else comes from the file's metadata: channels, size, interpolation, normalization,
classes. An image of another size is resized by its shorter side and cropped at the center. Prints a
line for each image: its name, the label, and the label's probability.
"""

from repvgg import cli
from repvgg.checks import check_integer

DEFAULTS: cli.Config = {"model": None, "images": None, "batch_size": 32}


def main() -> None:
    usage = f"    {cli.command('predict')} model=model.onnx images=FOLDER"
    cli.script(predict, f"{__doc__}\n{usage}", DEFAULTS)


def predict(settings: cli.Config) -> None:
    model = cli.given_path(settings, "model", "PATH")
    images = cli.given_path(settings, "images", "PATH")
    size = check_integer("batch_size", settings["batch_size"], minimum=1, example=32)
    from repvgg.deploy.predict import label  # takes seconds

    for path, name, probability in label(images, model, batch_size=size):
        print(f"{path}\t{name}\t{probability:.4f}")
