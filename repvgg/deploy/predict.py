"""Labels for images, by a network from any file."""

import csv
import glob
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from repvgg import whole
from repvgg.contract import DataContract, to_float
from repvgg.data.images import MODES, fit, open_image, to_tensor
from repvgg.deploy.opening import Opened
from repvgg.deploy.tables import Prediction, cells, header, most_likely


@dataclass(frozen=True)
class Labelled:
    """An image and its most likely classes.

    Attributes:
        error: why it could not be read or labelled.
    """

    path: Path
    predictions: list[Prediction]
    error: str = ""


def label(
    images: Sequence[Path], network: Opened, *, top: int = 1, batch_size: int
) -> Iterator[Labelled]:
    """Label images, in order.

    Args:
        top: classes for each image.

    Raises:
        ValueError: the network takes other images than files hold, or computes NaN or inf.
    """
    contract = network.data
    if contract.in_channels not in MODES:
        raise ValueError(
            f"the network takes {contract.in_channels} channels, image files have 1 or 3"
        )
    for start in range(0, len(images), batch_size):
        batch: list[Path] = []
        pixels: list[Tensor] = []
        errors: dict[Path, str] = {}
        for path in images[start : start + batch_size]:
            try:
                pixels.append(read(path, contract))
                batch.append(path)
            except ValueError as error:
                errors[path] = str(error)
        found: dict[Path, list[Prediction]] = {}
        if batch:
            logits = network.predict(torch.stack(pixels))
            rows = most_likely(logits.softmax(1), contract.classes, top)
            found = dict(zip(batch, rows, strict=True))
            for row in (~logits.isfinite().all(1)).nonzero().flatten().tolist():
                errors[batch[row]] = f"{batch[row]}: its logits are NaN or infinite"
        for path in images[start : start + batch_size]:
            yield Labelled(path, found.get(path, []), errors.get(path, ""))


def find(place: str) -> list[Path]:
    """Find images: a file, a folder, a pattern such as shots/*.jpg, or a list [a,b] of these.

    Raises:
        ValueError: there is none.
    """
    known = Image.registered_extensions()
    if Path(place).is_file():
        found = [Path(place)]
    elif Path(place).is_dir():
        found = sorted(Path(place).rglob("*"))
    elif place.startswith("[") and place.endswith("]"):
        parts = [part.strip() for part in place[1:-1].split(",")]
        return list(dict.fromkeys(path for part in parts for path in find(part)))
    else:
        found = [Path(match) for match in sorted(glob.glob(place, recursive=True))]
    images = [path for path in found if path.is_file() and path.suffix.lower() in known]
    if not images:
        raise ValueError(f"images={place}: there is no image; known are .png, .jpg and others")
    return images


def read(path: Path, contract: DataContract) -> Tensor:
    """Read an image with the preprocessing of the network: (C, H, W), float32 in [0, 1].

    Raises:
        ValueError: the file cannot be read, or the range of its pixels is unknown.
    """
    height, width = contract.image_size
    image = fit(
        open_image(path, contract.in_channels),
        (height, width),
        interpolation=contract.interpolation,
        resize=contract.resize_size,
    )
    return to_float(to_tensor(image))


def check_out(out: Path, *, overwrite: bool) -> None:
    """Check that a file of predictions can be written.

    Raises:
        ValueError: its ending is unknown, its folder is missing, or it exists.
    """
    if out.suffix.lower() not in (".json", ".csv"):
        raise ValueError(f"out={out}: its ending must be .json or .csv; for example out=labels.csv")
    if not out.parent.is_dir():
        raise ValueError(f"out={out}: there is no folder {out.parent}; make it, or pass another")
    if out.is_dir():
        raise ValueError(f"out={out}: is a folder; pass a file")
    if out.exists() and not overwrite:
        raise ValueError(f"out={out} exists: pass overwrite=true to replace it, or another file")


def write(found: Sequence[Labelled], out: Path) -> None:
    """Write predictions as JSON or CSV, whole or not at all."""
    text = io.StringIO(newline="")
    if out.suffix.lower() == ".json":
        rows = [
            {
                "path": str(image.path),
                "predictions": [
                    {"class": name, "probability": share} for name, share in image.predictions
                ],
            }
            for image in found
        ]
        text.write(json.dumps(rows, indent=1) + "\n")
    else:
        table = csv.writer(text, lineterminator="\n")
        count = max((len(image.predictions) for image in found), default=0)
        table.writerow(header(["path"], count))
        table.writerows([image.path, *cells(image.predictions)] for image in found)
    whole.write(out, text.getvalue().encode(errors="backslashreplace"))
