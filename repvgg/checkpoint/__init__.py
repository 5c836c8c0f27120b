"""Checkpoints: our self-describing format, and third-party files.

`native` is our format and opens every file, `warm_start` begins a new network with one. `tensors`
reads weights of any container, `recognize` and `layouts` find which network third-party weights
belong to, `standins` opens pickles without running their code.
"""

from repvgg.checkpoint.native import (
    KEY,
    NETWORK_PREFIX,
    UNKNOWN,
    Checkpoint,
    Network,
    Probe,
    describe,
    description,
    from_state_dict,
    imagenet,
    is_ours,
    load,
    open_network,
    save,
    with_noise,
)
from repvgg.checkpoint.warm_start import initialize

__all__ = [
    "KEY",
    "NETWORK_PREFIX",
    "UNKNOWN",
    "Checkpoint",
    "Network",
    "Probe",
    "describe",
    "description",
    "from_state_dict",
    "imagenet",
    "initialize",
    "is_ours",
    "load",
    "open_network",
    "save",
    "with_noise",
]
