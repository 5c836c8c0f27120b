"""Map-style data sets, and what they state of themselves, as torchvision's do.

One, or two or three by part. Other kinds of data are errors that say what to return instead.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from repvgg.checks import ArgumentError
from repvgg.data.split import first_names

KEY = "data._target_"
INSTEAD = {  # of what can be returned by mistake
    "IterableDataset": "it cannot be shuffled and resumed: return a map-style Dataset, with "
    "__len__ and __getitem__, or write image files and use data=imagefolder",
    "DataLoader": "return its dataset: training makes its own batches",
    "LightningDataModule": "return its Dataset, or an ImageData of repvgg.data; any other "
    "LightningDataModule trains with repvgg.training.classifier.Classifier in your own Trainer",
}


@runtime_checkable
class MapStyle(Protocol):
    """`torch.utils.data.Dataset` with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> object: ...


def as_parts(given: object, origin: str) -> dict[str, MapStyle]:
    """The data sets by part: train and, if they exist, val and test.

    Raises:
        ArgumentError: this is neither a map-style data set nor two or three of them, or one is
            empty.
    """
    if isinstance(given, tuple | list) and len(given) in (2, 3) and not _is_item(given[0]):
        named: dict[object, object] = dict(zip(("train", "val", "test"), given, strict=False))
    elif isinstance(given, Mapping):
        named = dict(given)
        if "train" not in named or not named.keys() <= {"train", "val", "test"}:
            keys = ", ".join(map(str, named))
            raise ArgumentError(
                f"{origin}: returns a {type(given).__name__} with the keys {keys[:80]}; they must "
                "be train and, if they exist, val and test, each a Dataset",
                KEY,
            )
    else:
        named = {"train": given}
    parts: dict[str, MapStyle] = {}
    for part, dataset in named.items():
        if dataset is None and part != "train":
            continue
        which = origin if len(named) == 1 else f"{origin}: {part}"
        parts[str(part)] = _check_map_style(dataset, which)
    return parts


def _check_map_style(given: object, which: str) -> MapStyle:
    # By name: importing Lightning would slow each worker process, and it has two packages.
    kinds = {kind.__name__ for kind in type(given).__mro__}
    for name, advice in INSTEAD.items():
        if name in kinds:
            own = type(given).__name__
            known = "" if own == name else f", a kind of {name}"
            raise ArgumentError(f"{which}: returns a {own}{known}; {advice}", KEY)
    if isinstance(given, str | bytes) or not isinstance(given, MapStyle):
        raise ArgumentError(
            f"{which}: returns a {type(given).__name__}, not a data set; return a map-style "
            "torch.utils.data.Dataset of (image, label), (train, val) or (train, val, test) of "
            "them, or a repvgg.data.ImageData",
            KEY,
        )
    try:
        count = len(given)
    except TypeError as error:  # Dataset without __len__
        raise ArgumentError(
            f"{which}: {type(given).__name__} has no length: {error}", KEY
        ) from error
    if count == 0:
        raise ArgumentError(f"{which}: {type(given).__name__} is empty, its length is 0", KEY)
    return given


def _is_item(given: object) -> bool:
    """Whether this is (image, label): then a list of them is one data set."""
    return isinstance(given, tuple)


def stated_labels(dataset: object) -> Tensor | None:
    """The labels that a data set states, as torchvision's do; None if it states none.

    They save a pass over all images. `Items` compares them with what is read.
    """
    if isinstance(dataset, Subset):
        inner = stated_labels(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(dataset.indices)]
    for name in ("targets", "labels", "_labels"):
        given = getattr(dataset, name, None)
        if isinstance(given, Tensor | np.ndarray | Sequence) and not isinstance(given, str):
            try:
                labels = torch.as_tensor(np.asarray(given))
            except (TypeError, ValueError):
                continue
            integers = not labels.is_floating_point() and labels.dtype != torch.bool
            if labels.ndim == 1 and integers and isinstance(dataset, MapStyle):
                return labels.long() if len(labels) == len(dataset) else None
    return None


def stated_classes(dataset: object) -> list[str]:
    """The names under `classes`, as torchvision's data sets have them; none if there are none.

    Raises:
        ArgumentError: data sets that were concatenated have other classes.
    """
    if isinstance(dataset, ConcatDataset):
        first, *others = (stated_classes(part) for part in dataset.datasets)
        if different := next((names for names in others if names != first), None):
            raise ArgumentError(
                f"{KEY}: concatenates data sets of the classes {first_names(first) or 'unknown'} "
                f"and {first_names(different)}; they must be the same, in the same order",
                KEY,
            )
        return [] if any(names != first for names in others) else first
    while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset  # of a Subset
    given = getattr(dataset, "classes", None)
    if isinstance(given, str) or not isinstance(given, Sequence):
        return []
    # ImageNet's are tuples of synonyms.
    return [name if isinstance(name, str) else ", ".join(map(str, name)) for name in given]
