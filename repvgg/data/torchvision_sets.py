"""The data sets of torchvision by name: any whose items are (image, integer)."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Unpack

from filelock import FileLock
from torchvision import datasets
from torchvision.datasets import VisionDataset

from repvgg.checks import ArgumentError, check_boolean, did_you_mean
from repvgg.data.custom import ItemOptions, from_dataset
from repvgg.data.module import ImageData

# What torchvision calls the splits; the first that a data set has is taken.
SPLITS = {
    "train": ("train", "trainval", "train-standard"),
    "val": ("val", "valid"),
    "test": ("test",),
}


def torchvision(
    *,
    name: str | None,
    root: str = "data",
    download: bool = True,
    arguments: Mapping[str, object] | None = None,
    **options: Unpack[ItemOptions],
) -> ImageData:
    """A data set of torchvision, such as FashionMNIST, MNIST or SVHN.

    Its train and test parts, or its splits, are the parts here. Without validation images some
    training images validate.

    Args:
        name: of a class in torchvision.datasets; nothing else can be reached.
        root: the folder of its files.
        download: downloads them if they are missing and torchvision can.
        arguments: further arguments of the class, such as {"split": "letters"} for EMNIST.
        options: of `repvgg.data.custom.from_dataset`.

    Raises:
        ValueError: there is no such data set, its files are missing, or its items are no images
            with an integer.
    """
    check_boolean("download", download)
    kind = _find(name)
    folder = Path(root).expanduser()
    try:
        parts = _open(kind, folder, arguments or {}, download=False)
    except (RuntimeError, OSError) as error:
        if not download or "download" not in _parameters(kind):
            raise _missing(kind, folder, error) from error
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):  # one process of several downloads
                parts = _open(kind, folder, arguments or {}, download=True)
        except (RuntimeError, OSError) as failed:
            raise _missing(kind, folder, failed) from failed
    return from_dataset(parts, origin=f"torchvision.datasets.{name}", **options)


def _find(name: str | None) -> type[VisionDataset]:
    kinds: dict[str, type[VisionDataset]] = {}
    for known in datasets.__all__:
        kind = getattr(datasets, known)
        if isinstance(kind, type) and issubclass(kind, VisionDataset) and kind is not VisionDataset:
            kinds[known] = kind
    if name is None:
        raise ArgumentError("name is missing: pass name=FashionMNIST", "name")
    if name not in kinds:
        lower = {known.lower(): known for known in kinds}
        hint = did_you_mean(str(name).lower(), lower)
        for small, known in lower.items():
            hint = hint.replace(f" {small}?", f" {known}?")
        raise ArgumentError(
            f"name={name}: torchvision.datasets has no such data set; {hint}for example "
            "FashionMNIST, MNIST, SVHN, CIFAR10, Flowers102",
            "name",
        )
    return kinds[name]


def _parameters(kind: type[VisionDataset]) -> set[str]:
    """The names of its arguments, with those of its bases if it passes **kwargs on to them."""
    names: set[str] = set()
    for one in inspect.getmro(kind):
        parameters = inspect.signature(one).parameters.values()
        names |= {parameter.name for parameter in parameters}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return names


def _open(
    kind: type[VisionDataset], folder: Path, arguments: Mapping[str, object], *, download: bool
) -> dict[str, VisionDataset]:
    """The data set of each part.

    Raises:
        RuntimeError, OSError: the files are missing.
        ValueError: an argument is wrong.
    """
    known = _parameters(kind)
    if unknown := [name for name in arguments if name not in known]:
        raise ArgumentError(
            f"arguments: {kind.__name__} takes no {unknown[0]}; "
            f"{did_you_mean(unknown[0], known)}its signature is {inspect.signature(kind)}",
            "arguments",
        )
    given: dict[str, object] = {"root": str(folder)} if "root" in known else {}
    if "download" in known:
        given |= {"download": download}

    def open_part(**chosen: object) -> VisionDataset:
        try:
            return kind(**{**given, **arguments, **chosen})
        except TypeError as error:
            raise ArgumentError(f"arguments: {kind.__name__}: {error}", "arguments") from error
        except ModuleNotFoundError as error:
            raise ArgumentError(
                f"name={kind.__name__}: needs {error.name}: pip install {error.name}", "name"
            ) from error

    if "train" in known and "train" not in arguments:
        return {"train": open_part(train=True), "test": open_part(train=False)}
    if "split" not in known or "split" in arguments:
        return {"train": open_part()}
    parts: dict[str, VisionDataset] = {}
    for part, names in SPLITS.items():
        for name in names:
            try:
                parts[part] = open_part(split=name)
                break
            except ValueError as error:
                if "Unknown value" not in str(error):  # torchvision's words for no such split
                    raise
    if "train" not in parts:
        raise ArgumentError(
            f"arguments: {kind.__name__} has no split train; pass arguments.split=NAME", "arguments"
        )
    return parts


def _missing(kind: type[VisionDataset], folder: Path, error: Exception) -> ArgumentError:
    reason = " ".join(str(error).split())
    return ArgumentError(
        f"root={folder}: the files of {kind.__name__} cannot be read or downloaded ({reason}); "
        "pass the folder that holds them",
        "root",
    )
