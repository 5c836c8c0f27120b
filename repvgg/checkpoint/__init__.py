"""Checkpoints: our format, which describes itself, and third-party files.

`native` is our format, `foreign` what others write, and `opening` opens either. `warm_start`
initializes a new network from one.
`tensors` reads files, and `standins` their pickles without running code. `locate` finds a RepVGG by
its keys (`layouts`), `shapes` derives its arguments, `recognize` loads its weights.
"""

from repvgg.checkpoint.foreign import description, from_state_dict, imagenet, with_noise
from repvgg.checkpoint.native import (
    KEY,
    NETWORK_PREFIX,
    UNKNOWN,
    Checkpoint,
    Network,
    Probe,
    describe,
    is_ours,
    save,
)
from repvgg.checkpoint.opening import load, open_network
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
