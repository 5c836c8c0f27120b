"""Checkpoints: our format, which describes itself, and third-party files.

`native` is our format and opens every file; `warm_start` initializes a new network from one.
`tensors` reads files, and `standins` their pickles without running code. `locate` finds a RepVGG by
its keys (`layouts`), `shapes` derives its arguments, `recognize` loads its weights.
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
