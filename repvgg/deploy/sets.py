"""The images of a deployment: for calibrating int8, and for evaluating every file."""

from typing import NamedTuple

import torch
from torch import Tensor

from repvgg import data as data_sets
from repvgg.checkpoint import UNKNOWN, Checkpoint, Probe
from repvgg.cli import Config
from repvgg.contract import DataContract, to_float
from repvgg.deploy.settings import DeploySettings

MOST_VALIDATED = 5000  # images, evenly spread: more would not fit into memory at 224 pixels


class Labelled(NamedTuple):
    """Images (N, C, H, W), float32 in [0, 1], and labels (N,)."""

    images: Tensor
    labels: Tensor


class Sets(NamedTuple):
    """Images besides the probe batch; (N, C, H, W), float32 in [0, 1].

    Attributes:
        calibration: ranges of int8 are measured on these.
        held_out: ranges are chosen on these.
        validation: of the data set that was passed, if there is one.
        source: where `calibration` and `held_out` come from.
    """

    calibration: Tensor
    held_out: Tensor
    validation: Labelled | None
    source: str


def is_labelled(probe: Probe) -> bool:
    """Whether the probe batch holds real images; that of a third-party checkpoint is noise."""
    return bool((probe.labels != UNKNOWN).all())


def load_sets(settings: DeploySettings, restored: Checkpoint) -> Sets:
    """Read the data set, or split the probe batch if there is none.

    Raises:
        ValueError: the data does not fit the checkpoint, or there are no images for int8.
    """
    if settings.data is None:
        if settings.int8 and not is_labelled(restored.probe):
            raise ValueError(
                f"int8=true: '{settings.ckpt}' holds no images to measure ranges on; pass for "
                "example data=imagefolder data.root=FOLDER"
            )
        images = to_float(restored.probe.images)
        sets = Sets(images[::2], images[1::2], None, "the checkpoint's probe batch")
    else:
        sets = _read(settings.data, settings.int8_images, restored.data)
    if settings.int8 and not len(sets.held_out):
        raise ValueError(
            f"int8=true: ranges need at least two images, and {sets.source} has fewer; pass for "
            "example data=imagefolder data.root=FOLDER"
        )
    return sets


def _read(config: Config, most: int, trained_on: DataContract) -> Sets:
    data = data_sets.open_data(config)
    expected, given = _kind_of_images(trained_on), _kind_of_images(data.contract)
    for key, value in expected.items():
        if given[key] != value:
            raise ValueError(
                f"data: its {key} is {str(given[key])[:60]}, the checkpoint was trained on "
                f"{str(value)[:60]}; pass the data it was trained on, or none"
            )
    available = len(data.train.labels)
    count = min(most, available // 2)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(0))
    calibration, held_out = (
        to_float(data.read(data.train, rows)[0])
        for rows in (order[:count], order[count : 2 * count])
    )
    images, labels = data.spread(data.val, MOST_VALIDATED)
    validation = Labelled(to_float(images), labels)
    return Sets(calibration, held_out, validation, "the training set")


def _kind_of_images(contract: DataContract) -> dict[str, object]:
    """What must be the same; as lists, since data sets have tuples and checkpoints lists."""
    return {
        "in_channels": contract.in_channels,
        "image_size": list(contract.image_size),
        "classes": list(contract.classes),
    }
