"""Data sets: images in memory, in folders or in shards become batches on each device.

`sets` has the data sets by name, `module` the Lightning data module, `batches` the order of the
images, `scan` the images of a folder. The names below load Lightning on first use: worker processes
and predictions run without it.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repvgg.data.module import ImageData
    from repvgg.data.sets import cifar10, cifar100, digits, imagefolder, open_data

__all__ = ["ImageData", "cifar10", "cifar100", "digits", "imagefolder", "open_data"]


def __getattr__(name: str) -> object:
    if name in __all__:
        home = "module" if name == "ImageData" else "sets"
        return getattr(importlib.import_module(f"repvgg.data.{home}"), name)
    raise AttributeError(f"module 'repvgg.data' has no attribute '{name}'")
