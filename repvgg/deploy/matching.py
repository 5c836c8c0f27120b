"""Fit a data set to a network: its preprocessing, and its classes by name."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from repvgg.checkpoint.warm_start import are_imagenet_folders
from repvgg.cli import Config
from repvgg.contract import DataContract

SIZES = ("image_size", "eval_size", "resize_size")


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
    """The configuration of a data set of ours, with the preprocessing of the network.

    A factory of the user's own may do its own preprocessing, so its configuration stays.

    Args:
        passed: arguments from the command line, which stay.
    """
    if not is_ours(config):
        return config
    height, width = network.image_size
    fitted: dict[str, object] = {
        "interpolation": network.interpolation,
        "in_channels": network.in_channels,
        "mean": list(network.mean),  # else some data sets measure them
        "std": list(network.std),
    }
    if height == width and not {*SIZES} & {*passed}:
        fitted |= {"image_size": height, "eval_size": None, "resize_size": network.resize_size}
    changed = {key: fitted[key] for key in fitted.keys() & config.keys() if key not in passed}
    return {**config, **changed}


def is_ours(config: Config) -> bool:
    """Whether a data set is one of the package, not a factory of the user's own."""
    return str(config.get("_target_")).startswith("repvgg.data.")


def check_images(
    data: DataContract, network: DataContract, config: Config, passed: Collection[str]
) -> list[str]:
    """Compare the images of a data set with those that a network takes.

    Args:
        config: of the data set.
        passed: arguments from the command line.

    Returns:
        a line on what differs.

    Raises:
        ValueError: other channels, or another size that the command line did not ask for.
    """
    if data.in_channels != network.in_channels:
        raise ValueError(
            f"data: its in_channels is {data.in_channels}, that of the network "
            f"{network.in_channels}{_advice('in_channels', network.in_channels, config)}"
        )
    ours, theirs = _preprocessing(data), _preprocessing(network)
    if ours["image_size"] != theirs["image_size"] and not {*SIZES} & {*passed}:
        raise ValueError(
            f"data: its images have {ours['image_size']} pixels, the network takes "
            f"{theirs['image_size']}{_advice('image_size', network.image_size[0], config)}"
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
        if are_imagenet_folders(data, network):
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


def _advice(key: str, value: int, config: Config) -> str:
    return f"; pass data.{key}={value}" if key in config else ""


def _preprocessing(contract: DataContract) -> dict[str, object]:
    return {
        "image_size": "x".join(map(str, contract.image_size)),
        "resize_size": contract.resize_size,
        "interpolation": contract.interpolation,
    }


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
