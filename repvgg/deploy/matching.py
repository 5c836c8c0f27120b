"""Fit a data set to a network: its image size, and its classes by name."""

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from repvgg.cli import Config
from repvgg.contract import DataContract

SIZES = ("image_size", "eval_size", "resize_size")
PREPROCESSING = (*SIZES, "interpolation")  # arguments of data sets that scale their images
_SYNSET = re.compile(r"n\d{8}")  # a folder of ImageNet


class Match(NamedTuple):
    """The classes of a data set among those of a network.

    Attributes:
        outputs: (number of classes of the data,), int64: label -> output of the network.
        classes: names of the outputs.
        notes: lines for the reader.
    """

    outputs: Tensor
    classes: list[str]
    notes: list[str]


def fit_preprocessing(config: Config, network: DataContract, passed: Collection[str]) -> Config:
    """The configuration of a data set, with the network's preprocessing where it scales images.

    Args:
        passed: arguments from the command line, which stay.
    """
    height, width = network.image_size
    if not {*PREPROCESSING} <= config.keys() or height != width:
        return config
    fitted: dict[str, object] = {"interpolation": network.interpolation}
    if not {*SIZES} & {*passed}:
        sizes = {"image_size": height, "eval_size": None, "resize_size": network.resize_size}
        fitted |= sizes
    return {**config, **{key: value for key, value in fitted.items() if key not in passed}}


def check_images(data: DataContract, network: DataContract, passed: Collection[str]) -> list[str]:
    """Compare the images of a data set with those that a network takes.

    Returns:
        a line on what differs.

    Raises:
        ValueError: other channels, or another size that the command line did not ask for.
    """
    if data.in_channels != network.in_channels:
        raise ValueError(
            f"data: in_channels is {data.in_channels}, and the network takes {network.in_channels}"
        )
    ours, theirs = _preprocessing(data), _preprocessing(network)
    if ours["image_size"] != theirs["image_size"] and not {*SIZES} & {*passed}:
        raise ValueError(
            f"data: its images have {ours['image_size']} pixels, the network takes "
            f"{theirs['image_size']}; pass data of this size"
        )
    differing = [
        f"{key} is {given}, that of the network {theirs[key]}"
        for key, given in ours.items()
        if given != theirs[key]
    ]
    return [f"preprocessing: {'; '.join(differing)}"] if differing else []


def match_classes(data: Sequence[str], network: Sequence[str], *, assumed: bool) -> Match:
    """Find the output of each class: by name, or in order where the names tell nothing.

    Args:
        data, network: names of classes.
        assumed: the network's are numbers that no file names; as many classes are taken in order.

    Raises:
        ValueError: a class of the data is none of the network's.
    """
    in_order = torch.arange(len(data))
    if [*data] == [*network]:
        return Match(in_order, [*network], [])
    if len(data) == len(network):
        if assumed:
            note = f"the file names no classes: the {len(data)} of the data are taken in order"
            return Match(in_order, [*data], [note])
        if len(data) == 1000 and all(_SYNSET.fullmatch(name) for name in data):
            note = "classes: ImageNet's folders (n01440764, ...) are in the order of its names"
            return Match(in_order, [*network], [note])
    places = {name: row for row, name in enumerate(network)}
    unknown = [name for name in data if [*network].count(name) != 1]
    if unknown:
        raise ValueError(
            f"data: {len(unknown)} of its {len(data)} classes are none of the network's "
            f"{len(network)}: {_some(unknown)}; the network has {_some(network)}"
        )
    outputs = torch.tensor([places[name] for name in data])
    if len(data) == len(network):
        return Match(outputs, [*network], ["classes: in another order than the network's"])
    note = f"classes: {len(data)} of the network's {len(network)}, by name; it chooses among all"
    return Match(outputs, [*network], [note])


def _preprocessing(contract: DataContract) -> dict[str, object]:
    return {
        "image_size": "x".join(map(str, contract.image_size)),
        "resize_size": contract.resize_size,
        "interpolation": contract.interpolation,
    }


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
