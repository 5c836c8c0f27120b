"""Build the RepVGG that was found in a file and load its weights.

`locate` finds the network by its keys, `shapes` derives its arguments. Loading is strict: if a
tensor is missing, unexpected, mis-shaped or not finite, nothing is loaded and the keys are listed.
"""

import torch

from repvgg.checkpoint.locate import Found, choose, find
from repvgg.checkpoint.shapes import plan, sizes
from repvgg.checks import ArgumentError, brief, first_of
from repvgg.contract import ModelConfig
from repvgg.models.network import RepVGG
from repvgg.models.rebuild import COUNTER, MISFITS, Misfit, fault
from repvgg.models.registry import create_model

__all__ = [
    "MISFITS",
    "OTHER_STRIDES",
    "Found",
    "Misfit",
    "build",
    "choose",
    "describe",
    "describe_classes",
    "describe_variant",
    "find",
    "is_about_identities",
    "load",
    "plan",
    "sizes",
]

OTHER_STRIDES = (
    "identity branches exist where channels and size stay, so the strides are others: pass them, "
    "for example strides=[1,1,2,2,2]"
)


def is_about_identities(misfit: Misfit, found: Found) -> bool:
    """Whether all missing and unknown keys are of identity branches."""
    names = [theirs for theirs, ours in found.layout.parts.items() if ours == "branch_identity"]
    keys = misfit.missing + misfit.unknown + misfit.shapes
    return bool(keys) and all(any(f".{name}." in key for name in names) for key in keys)


def build(found: Found, config: ModelConfig) -> tuple[RepVGG, Misfit]:
    """Build the network of a config, folded if the file is, and compare keys and shapes.

    Returns:
        the network without values, on the meta device, and the tensors that do not fit it.
    """
    with torch.device("meta"):  # draws no random numbers: all are replaced
        overrides = {key: value for key, value in config.items() if key != "name"}
        network = create_model(str(config["name"]), features_only=False, **overrides)
        if found.deployed:
            network.switch_to_deploy()
    wanted, keys = network.state_dict(), found.keys
    depths = [len([*stage.children()]) for stage in network.stages.children()]
    misfit = Misfit(
        [
            found.prefix + found.layout.to_theirs(key, depths)
            for key in wanted
            if key not in keys and not key.endswith(f".{COUNTER}")
        ],
        found.unknown + [theirs for ours, theirs in keys.items() if ours not in wanted],
        [
            f"{keys[key]} {brief(tuple(tensor.shape))} for {tuple(wanted[key].shape)}"
            for key, tensor in found.weights.items()
            if key in wanted and tensor.shape != wanted[key].shape
        ],
        [
            f"{keys[key]} ({said})"
            for key, tensor in found.weights.items()
            if (said := fault(tensor, key))
        ],
    )
    return network, misfit


def load(found: Found, config: ModelConfig) -> RepVGG:
    """Build the network of a config and load the weights that were found.

    Returns:
        the network, folded if the file is, in eval mode, float32, on the CPU.

    Raises:
        ValueError: a tensor is missing, unexpected, mis-shaped or not finite; the first are named.
    """
    network, misfit = build(found, config)
    if any(misfit):
        message = f"{found} looks like {describe_variant(config)}, but does not fit: {misfit}"
        if is_about_identities(misfit, found):
            raise ArgumentError(f"{message}; {OTHER_STRIDES}", "strides")
        raise ValueError(message)
    copies = {}
    for key in network.state_dict():
        dtype = torch.int64 if key.endswith(f".{COUNTER}") else torch.float32
        tensor = found.weights.get(key, torch.zeros(()))  # only a counter may be missing
        copies[key] = tensor.detach().to("cpu", dtype, copy=True)
    network.load_state_dict(copies, assign=True)
    return network.eval()


def describe_variant(config: ModelConfig) -> str:
    """The name of a config's variant, or depths and widths if no variant has them."""
    if "depths" not in config:
        return str(config["name"])
    groups = f", groups {config['groups']}" if config.get("groups", 1) != 1 else ""
    return f"a RepVGG of depths {config['depths']} and widths {config['widths']}{groups}"


def describe_classes(config: ModelConfig) -> str:
    """The number of classes of a config's network."""
    count = config["num_classes"]
    return f"{count} classes" if count else "without a classifier"


def describe(found: Found, config: ModelConfig) -> str:
    """What was found, in one line."""
    said = (
        f"{describe_variant(config)} in {found.layout.name} layout, {found.form}, "
        f"{describe_classes(config)}, at '{brief(found.place)}'"
    )
    if found.outside:
        count, keys = len(found.outside), first_of(found.outside)
        said += f"; {count} other tensors beside it ({keys})"
    return said
