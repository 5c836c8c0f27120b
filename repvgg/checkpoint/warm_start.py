"""A new network that begins with the weights of a checkpoint."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from repvgg.checkpoint import recognize
from repvgg.checkpoint.native import Network
from repvgg.models.forms import is_deployed, switch_to_deploy
from repvgg.models.multi_branch import switch_to_train
from repvgg.models.network import RepVGG

_SYNSET = re.compile(r"n\d{8}")  # a folder of ImageNet's


def initialize(
    network: nn.Module, start: Network, images: Tensor, *, classes: Sequence[str] | None = None
) -> list[str]:
    """Give a network in its training form the weights of a checkpoint in either form, in place.

    The classifier stays as it is where the number of classes differs or the checkpoint has none,
    and so do auxiliary classifiers that the checkpoint has not. Where strides differ so that a
    block has an identity branch here and had none, the branch adds nothing at first. A deployed
    checkpoint tells neither strides nor the kind of block: it becomes what `network` is.

    Args:
        images: (N, C, H, W), as `network` takes them, on which the statistics of a network that was
            deployed are measured: see `repvgg.switch_to_train`.
        classes: names of the classes that `network` is to tell apart. Where the checkpoint has
            names too, the classifier's rows are matched by name, and those of other names stay as
            they are; ImageNet's folders (n01440764, ...) are in the order of its names. None takes
            the rows as they are.

    Returns:
        the names of the tensors that are new, or new for some classes.

    Raises:
        ValueError: something else does not fit; nothing was changed.
    """
    source = start.model
    given = source.state_dict()
    if isinstance(source, RepVGG) and isinstance(network, RepVGG) and is_deployed(source):
        twin = switch_to_deploy(network)
        new = _take(twin, given, start, classes)
        given = switch_to_train(twin, images).state_dict()
        return [*new, *_take(network, given, start)]
    own = dict(source.named_modules())
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d) and isinstance(own.get(name), nn.BatchNorm2d):
            theirs = own[name].eps
            if module.eps != theirs:
                raise ValueError(
                    f"its BatchNorms have an epsilon of {theirs:g}, this network's of "
                    f"{module.eps:g}: type ++model.bn_eps={theirs:g}"
                )
    return _take(network, given, start, classes)


def _take(
    network: nn.Module,
    given: Mapping[str, Tensor],
    start: Network,
    classes: Sequence[str] | None = None,
) -> list[str]:
    """Load what fits; the names of what is new. Only a classifier or an identity branch may be."""
    wanted = network.state_dict()
    head = ("linear.", "auxiliary.") if isinstance(network, RepVGG) else _last(network)
    partly: list[str] = []
    if classes is not None and start.data is not None and list(classes) != start.data.classes:
        rest = {key: value for key, value in given.items() if not key.startswith(head)}
        found = _match_classes(wanted, given, head, start.data.classes, classes)
        given = rest | found.tensors
        partly = [f"{key} of {', '.join(found.new)}" for key in found.tensors if found.new]
    taken = {
        key: tensor
        for key, tensor in given.items()
        if key in wanted and tensor.shape == wanted[key].shape
    }
    new = [key for key in wanted if key not in taken]
    wrong = [key for key in given if key not in taken and not key.startswith(head)]
    wrong += [key for key in new if not key.startswith(head) and ".branch_identity." not in key]
    if wrong := [*dict.fromkeys(wrong)]:
        raise ValueError(
            f"it holds {recognize.describe_variant(start.config)}, which does not fit this "
            f"network: {', '.join(wrong[:4])}{', ...' if len(wrong) > 4 else ''}; give the model "
            "that it is, on images of as many channels"
        )
    network.load_state_dict(taken, strict=False)
    for key, parameter in network.named_parameters():
        if key in new and key.endswith(".branch_identity.weight"):
            nn.init.zeros_(parameter)
    return new + partly


class _Matched(NamedTuple):
    tensors: dict[str, Tensor]
    new: list[str]  # classes that the checkpoint does not know


def _match_classes(
    wanted: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    head: str | tuple[str, ...],
    before: Sequence[str],
    classes: Sequence[str],
) -> _Matched:
    """A classifier's tensors for other classes: rows of the same name are taken over."""
    places = {name: row for row, name in enumerate(before)}
    if len(before) == len(classes) == 1000 and all(_SYNSET.fullmatch(name) for name in classes):
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
    """The prefix of the layer that was declared last: of a classifier, that of its classes."""
    *_, last = (name for name, module in network.named_modules() if module._parameters)
    return f"{last}."
