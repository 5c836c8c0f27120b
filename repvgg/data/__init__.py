"""Data sets: images in memory, in folders, in shards or in the user's code become batches.

`sets` has the data sets by name, `folders` those of image files, `torchvision_sets` those of
torchvision, `custom` the user's own; `module` the Lightning data module, `batches` the order of the
images. The names below load Lightning on first use: worker processes and predictions run without.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repvgg.data.custom import from_dataset
    from repvgg.data.folders import csv, imagefolder
    from repvgg.data.module import ImageData
    from repvgg.data.opening import open_data
    from repvgg.data.sets import cifar10, cifar100, digits
    from repvgg.data.torchvision_sets import torchvision

__all__ = [
    "ImageData",
    "cifar10",
    "cifar100",
    "csv",
    "digits",
    "from_dataset",
    "imagefolder",
    "open_data",
    "torchvision",
]
HOMES = {
    "ImageData": "module",
    "csv": "folders",
    "from_dataset": "custom",
    "imagefolder": "folders",
    "open_data": "opening",
    "torchvision": "torchvision_sets",
}


def __getattr__(name: str) -> object:
    if name in __all__:
        home = HOMES.get(name, "sets")
        return getattr(importlib.import_module(f"repvgg.data.{home}"), name)
    raise AttributeError(f"module 'repvgg.data' has no attribute '{name}'")
