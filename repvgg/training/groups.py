"""Which parameters train, and how: weight decay by kind, layer-wise rates, frozen modules."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from repvgg.checks import ArgumentError, did_you_mean, wrong_value
from repvgg.models.features import without_decay


def parameter_groups(
    net: nn.Module, weight_decay: float, *, lr: float | None = None, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Split parameters into those that decay and those that do not, as the RepVGG recipe does.

    See `repvgg.models.features.without_decay`. Frozen parameters are in no group.

    Args:
        lr: the rate of the last layer; needed with `layer_decay`.
        layer_decay: below 1, layer i of L has the rate lr * layer_decay^(L - 1 - i); see `layers`
            (Clark et al., 2020, arXiv:2003.10555, section 3.1; as in timm).

    Returns:
        parameter groups for an optimizer, "decay" and "no_decay"; with `layer_decay` both for each
        layer, named after it, with its rate.
    """
    left_out = without_decay(net)
    kept = {id(parameter) for name, parameter in net.named_parameters() if name in left_out}

    def split(parameters: Sequence[nn.Parameter], prefix: str = "") -> list[dict[str, Any]]:
        decay: list[nn.Parameter] = []
        no_decay: list[nn.Parameter] = []
        for parameter in parameters:
            (no_decay if id(parameter) in kept else decay).append(parameter)
        return [
            {"name": f"{prefix}decay", "params": decay, "weight_decay": weight_decay},
            {"name": f"{prefix}no_decay", "params": no_decay, "weight_decay": 0.0},
        ]

    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if layer_decay == 1:
        return split(trained)
    assert lr is not None
    left = {id(parameter) for parameter in trained}
    found = layers(net)
    groups = []
    for number, (name, parameters) in enumerate(found):
        own = [parameter for parameter in parameters if id(parameter) in left]
        left -= {id(parameter) for parameter in own}  # shared with an earlier layer
        rate = lr * layer_decay ** (len(found) - 1 - number)
        groups += [{**group, "lr": rate} for group in split(own, f"{name}/") if group["params"]]
    return groups


def layers(net: nn.Module) -> list[tuple[str, list[nn.Parameter]]]:
    """The layers of a network from the images to the logits: the stem, each block, the head.

    A layer is a module with parameters, in the order of registration. Sequential and ModuleList
    are opened. What has no order of its own joins a layer: the network's own parameters the first,
    a ModuleDict (auxiliary classifiers) the one before it.

    Returns:
        the name of each layer and its parameters.
    """
    found: list[tuple[str, list[nn.Parameter]]] = []
    for name, module in _opened(net, ""):
        parameters = list(module.parameters())
        if isinstance(module, nn.ModuleDict) and found:
            found[-1][1].extend(parameters)
        elif parameters:
            found.append((name, parameters))
    own = list(net.parameters(recurse=False))
    if own and found:
        found[0][1].extend(own)
    elif own:
        found.append((type(net).__name__, own))
    return found


def freeze(net: nn.Module, prefixes: Sequence[str]) -> None:
    """Let the parameters of modules keep their values; see `frozen_norms` for the statistics.

    Args:
        prefixes: names of modules, such as "stem" or "stages.0"; all modules below are frozen.

    Raises:
        ArgumentError: no module has such a name, or no parameter would be left to train.
    """
    names = [name for name, _ in net.named_modules() if name]
    for prefix in prefixes:
        if prefix not in names:
            top = ", ".join(name for name, _ in net.named_children())
            raise ArgumentError(
                f"freeze={prefix}: there is no module of that name; "
                f"{did_you_mean(prefix, names)}the network has {top}",
                "freeze",
            )
        net.get_submodule(prefix).requires_grad_(False)
    if prefixes and not any(parameter.requires_grad for parameter in net.parameters()):
        allowed = "freezes every parameter, so nothing trains; leave the classifier out"
        raise wrong_value("freeze", list(prefixes), allowed)


def frozen_norms(net: nn.Module, prefixes: Sequence[str]) -> Iterator[nn.Module]:
    """The normalizations below frozen modules, whose running statistics must not change."""
    for prefix in prefixes:
        for module in net.get_submodule(prefix).modules():
            if isinstance(module, _NormBase):
                yield module


def _opened(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from _opened(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child
