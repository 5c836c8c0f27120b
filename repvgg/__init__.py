"""RepVGG: train it with branches, deploy it as plain 3x3 convolutions, verify every step.

The public names below need torch alone, and load it when the first of them is used, so that a
command line can answer `--help` without it. Training (`repvgg.module`, `repvgg.data`,
`repvgg.callbacks`) needs lightning too and is imported by name.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repvgg import checkpoint, losses, rdrop, reparam, verify
    from repvgg.block import QARepVGGBlock, RepVGGBlock
    from repvgg.expand import over_parameterize
    from repvgg.forms import reestimate_bn, switch_to_deploy
    from repvgg.fusion.fuse import fuse_conv_bn
    from repvgg.model import RepVGG
    from repvgg.unfold import switch_to_train
    from repvgg.zoo import create_model, list_models

__version__ = "0.1.0"

__all__ = [
    "QARepVGGBlock",
    "RepVGG",
    "RepVGGBlock",
    "checkpoint",
    "create_model",
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
    "QARepVGGBlock": "block",
    "RepVGG": "model",
    "RepVGGBlock": "block",
    "create_model": "zoo",
    "fuse_conv_bn": "fusion.fuse",
    "list_models": "zoo",
    "over_parameterize": "expand",
    "reestimate_bn": "forms",
    "switch_to_deploy": "forms",
    "switch_to_train": "unfold",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"repvgg.{_HOME[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"repvgg.{name}")
    raise AttributeError(f"module 'repvgg' has no attribute '{name}'")
