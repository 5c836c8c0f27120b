"""RepVGG: train it with branches, deploy it as plain 3x3 convolutions, verify every step.

The names below import torch, and `data` and `export` their libraries, at first use, so `--help` is
fast. Training (`repvgg.training.classifier`, `repvgg.training.callbacks`) needs lightning; import
it by name.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repvgg import checkpoint, data, export, losses, rdrop, reparam, verify
    from repvgg.fusion.fuse import fuse_conv_bn
    from repvgg.models.block import QARepVGGBlock, RepVGGBlock
    from repvgg.models.forms import switch_to_deploy
    from repvgg.models.multi_branch import switch_to_train
    from repvgg.models.network import RepVGG
    from repvgg.models.over_parameterize import over_parameterize
    from repvgg.models.reestimate import reestimate_bn
    from repvgg.models.registry import create_model, list_models

__version__ = "0.2.0"

__all__ = [
    "QARepVGGBlock",
    "RepVGG",
    "RepVGGBlock",
    "checkpoint",
    "create_model",
    "data",
    "export",
    "fuse_conv_bn",
    "list_models",
    "losses",
    "over_parameterize",
    "rdrop",
    "reestimate_bn",
    "reparam",
    "switch_to_deploy",
    "switch_to_train",
    "verify",
]

_HOME = {
    "QARepVGGBlock": "models.block",
    "RepVGG": "models.network",
    "RepVGGBlock": "models.block",
    "create_model": "models.registry",
    "fuse_conv_bn": "fusion.fuse",
    "list_models": "models.registry",
    "over_parameterize": "models.over_parameterize",
    "reestimate_bn": "models.reestimate",
    "switch_to_deploy": "models.forms",
    "switch_to_train": "models.multi_branch",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"repvgg.{_HOME[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"repvgg.{name}")
    raise AttributeError(f"module 'repvgg' has no attribute '{name}'")
