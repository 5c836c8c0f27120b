"""The images of a deployment: those that calibrate int8, and those that evaluate every file."""

import json
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repvgg import data as data_sets
from repvgg.checkpoint import Checkpoint
from repvgg.contract import DataContract, to_float

MOST_VALIDATED = 5000  # images, evenly spread: more would not fit into memory at 224 pixels


class Sets(NamedTuple):
    """Images (float32 in [0, 1]) and labels beside the checkpoint's own.

    Attributes:
        measured: images on which ranges of int8 are measured.
        held_out: images on which they are chosen.
        validation: of the data that was given, if any was.
        source: where `measured` and `held_out` come from.
    """

    measured: Tensor
    held_out: Tensor
    validation: "tuple[Tensor, Tensor] | None"
    source: str


def load_sets(config: dict[str, Any], restored: Checkpoint) -> Sets:
    """Read the data set, if one was given, or divide the probe.

    Raises:
        ValueError: the data does not fit the checkpoint.
    """
    images = to_float(restored.probe.images)
    if config.get("data") is None:
        return Sets(images[::2], images[1::2], None, "the checkpoint's probe")

    data = data_sets.open_data(config["data"])
    wanted, given = as_json(restored.data), as_json(data.contract)
    for key in ("in_channels", "image_size", "classes"):
        if wanted[key] != given[key]:
            theirs, ours = (str(contract[key])[:60] for contract in (given, wanted))
            raise ValueError(
                f"data: its {key} is {theirs}, the checkpoint was trained on {ours}; give the data "
                "it was trained on, or none"
            )
    held = len(data.train.labels)
    count = min(config["int8_images"], held // 2)
    order = torch.randperm(held, generator=torch.Generator().manual_seed(0))
    measured, held_out = (
        to_float(data.read(data.train, rows)[0])
        for rows in (order[:count], order[count : 2 * count])
    )
    images, labels = data.spread(data.val, MOST_VALIDATED)
    validation = to_float(images), labels
    return Sets(measured, held_out, validation, "the training set")


def as_json(contract: DataContract) -> dict[str, Any]:
    """As a checkpoint holds it: lists, where the data has tuples."""
    return json.loads(json.dumps(asdict(contract)))
