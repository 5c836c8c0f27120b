"""Initialize a new network from a checkpoint."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from repvgg.checkpoint import recognize
from repvgg.checkpoint.native import Network
from repvgg.checks import first_of
from repvgg.models.forms import is_deployed, switch_to_deploy
from repvgg.models.multi_branch import switch_to_train
from repvgg.models.network import RepVGG

_SYNSET = re.compile(r"n\d{8}")  # a folder of ImageNet


def initialize(
    network: nn.Module, start: Network, images: Tensor, *, classes: Sequence[str] | None = None
) -> list[str]:
    """Load the weights of a checkpoint into a multi-branch network, in place.

    The classifier stays new if the number of classes differs or the checkpoint has none. Auxiliary
    classifiers stay new if the checkpoint has none. An identity branch that only `network` has, by
    its strides, is zero at first. A folded checkpoint records neither strides nor the kind of
    block, so it is divided among the branches of `network`.

    Args:
        images: (N, C, H, W), preprocessed. For a folded checkpoint they give the BatchNorm
            statistics: see `repvgg.switch_to_train`.
        classes: names of the classes of `network`. If the checkpoint has names too, the rows of the
            classifier are matched by name, and the other rows stay new. ImageNet's folders
            (n01440764, ...) are in the order of its names. None copies the rows in order.

    Returns:
        the names of the tensors that are new, or new for some classes.

    Raises:
        ValueError: any other tensor does not fit; the network is then unchanged.
    """
    source = start.model
    given = source.state_dict()
    if isinstance(source, RepVGG) and isinstance(network, RepVGG) and is_deployed(source):
        folded = switch_to_deploy(network)
        new = _copy_fitting(folded, given, start, classes)
        given = switch_to_train(folded, images).state_dict()
        return [*new, *_copy_fitting(network, given, start)]
    own = dict(source.named_modules())
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d) and isinstance(own.get(name), nn.BatchNorm2d):
            theirs = own[name].eps
            if module.eps != theirs:
                raise ValueError(
                    f"its BatchNorms have an epsilon of {theirs:g}, this network's have "
                    f"{module.eps:g}: build the network with bn_eps={theirs:g}"
                )
    return _copy_fitting(network, given, start, classes)


def _copy_fitting(
    network: nn.Module,
    given: Mapping[str, Tensor],
    start: Network,
    classes: Sequence[str] | None = None,
) -> list[str]:
    """Load the tensors that fit; return the names of new ones.

    Raises:
        ValueError: a tensor does not fit that is not of a classifier or an identity branch.
    """
    wanted = network.state_dict()
    head = ("linear.", "auxiliary.") if isinstance(network, RepVGG) else _last(network)
    partly: list[str] = []
    if classes is not None and start.data is not None and list(classes) != start.data.classes:
        rest = {key: value for key, value in given.items() if not key.startswith(head)}
        found = _match_classes(wanted, given, head, start.data.classes, classes)
        given = rest | found.tensors
        partly = [f"{key} of {', '.join(found.new)}" for key in found.tensors if found.new]
    fitting = {
        key: tensor
        for key, tensor in given.items()
        if key in wanted and tensor.shape == wanted[key].shape
    }
    new = [key for key in wanted if key not in fitting]
    wrong = [key for key in given if key not in fitting and not key.startswith(head)]
    wrong += [key for key in new if not key.startswith(head) and ".branch_identity." not in key]
    if wrong := [*dict.fromkeys(wrong)]:
        raise ValueError(
            f"it holds {recognize.describe_variant(start.config)}, which does not fit this "
            f"network: {first_of(wrong)}; use the same model, on images of as many channels"
        )
    network.load_state_dict(fitting, strict=False)
    for key, parameter in network.named_parameters():
        if key in new and key.endswith(".branch_identity.weight"):
            nn.init.zeros_(parameter)
    return new + partly


def are_imagenet_folders(folders: Sequence[str], names: Sequence[str]) -> bool:
    """Whether classes are ImageNet's 1000 folders (n01440764, ...), in the order of its names."""
    found = [sum(map(bool, map(_SYNSET.fullmatch, given))) for given in (folders, names)]
    return len(folders) == len(names) == 1000 and found == [1000, 0]


class _Matched(NamedTuple):
    tensors: dict[str, Tensor]
    new: list[str]  # classes that the checkpoint does not have


def _match_classes(
    wanted: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    head: str | tuple[str, ...],
    before: Sequence[str],
    classes: Sequence[str],
) -> _Matched:
    """Tensors of a classifier for other classes, with the rows of classes of the same name."""
    places = {name: row for row, name in enumerate(before)}
    if are_imagenet_folders(classes, before):
        places = {name: row for row, name in enumerate(classes)}
    known = [(row, places[name]) for row, name in enumerate(classes) if name in places]
    found: dict[str, Tensor] = {}
    for key, tensor in given.items():
        if not key.startswith(head) or key not in wanted or not known:
            continue
        target = wanted[key].clone()
        if len(tensor) != len(before) or tensor.shape[1:] != target.shape[1:]:
            continue
        rows, sources = zip(*known, strict=True)
        target[list(rows)] = tensor[list(sources)]
        found[key] = target
    return _Matched(found, [name for name in classes if name not in places])


def _last(network: nn.Module) -> str:
    """The prefix of the layer that was declared last, usually the classifier."""
    *_, last = (name for name, module in network.named_modules() if module._parameters)
    return f"{last}."
