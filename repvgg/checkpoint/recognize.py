"""Find the RepVGG that a file holds, in any known layout: its form, its variant, its classes.

All of it follows from keys and shapes. Keys may stand in any wrapper and behind any prefix. Sizes
are those that most of the tensors speak for, so that one which does not fit is told by its name.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repvgg.checkpoint.layouts import LAYOUTS, Layout, split_key
from repvgg.checkpoint.standins import StandIn
from repvgg.checkpoint.tensors import STORE
from repvgg.models.network import MAX_STEM_WIDTH, RepVGG
from repvgg.models.registry import create_model, identify

COUNTER = "num_batches_tracked"  # files from before it existed lack it; no prediction reads it
REDUCTIONS = (16, 4, 8)  # of squeeze-and-excite gates, the usual ones
MOST_TOLD = 4  # keys in a message
MISFITS = ("missing", "unknown", "of another shape", "of no use")
IMPORT = "python scripts/import_checkpoint.py path=FILE"
OTHER_STRIDES = (
    "an identity branch is where neither channels nor size change, so the strides are others: type "
    f"for example {IMPORT} strides=[1,1,2,2,2]"
)

Place = tuple[int, ...]  # of a block: its stage and number; () is the stem's
Block = dict[str, Tensor]  # its tensors, by our names inside of it


class Found(NamedTuple):
    """A network that was found in a file.

    Attributes:
        entry: keys of the wrappers around its weights, joined by dots; empty where there is none.
        prefix: in front of each of its keys.
        layout: how they are named.
        weights: its tensors, by our names.
        keys: our names -> the keys behind the wrappers.
        unknown: keys behind the prefix that the layout does not know; without a classifier, those
            among the blocks alone.
        outside: keys of the same wrapper that are not of this network.
        matrices: those of `outside` behind the prefix that have two axes, and the length of the
            second: the features that they read, if one is a classifier by another name.
    """

    entry: str
    prefix: str
    layout: Layout
    weights: dict[str, Tensor]
    keys: dict[str, str]
    unknown: list[str]
    outside: list[str]
    matrices: dict[str, int]

    @property
    def headless(self) -> bool:
        return not _has_head(self.keys)

    @property
    def deployed(self) -> bool:
        return holds_deployed(self.weights)

    @property
    def form(self) -> str:
        return "deployed" if self.deployed else "training"


class Misfit(NamedTuple):
    """What of a found network does not fit; its keys as they are in the file.

    Attributes:
        missing: keys that the network has and the file has not.
        unknown: the other way round.
        shapes: keys of another shape, with both shapes.
        values: keys of tensors that are no finite real numbers, with what they are.
    """

    missing: list[str]
    unknown: list[str]
    shapes: list[str]
    values: list[str]

    def is_about_identities(self, found: Found) -> bool:
        """Whether all that is missing or too much is in identity branches."""
        names = [theirs for theirs, ours in found.layout.parts.items() if ours == "branch_identity"]
        keys = self.missing + self.unknown + self.shapes
        return bool(keys) and all(any(f".{name}." in key for name in names) for key in keys)

    def __str__(self) -> str:
        return "; ".join(
            f"{len(keys)} {kind}: {_some(keys)}"
            for kind, keys in zip(MISFITS, self, strict=True)
            if keys
        )


def holds_deployed(keys: Iterable[str]) -> bool:
    """Whether tensors, by our names, are those of a deployed RepVGG."""
    return any(".reparam." in key for key in keys)


def _has_head(keys: Iterable[str]) -> bool:
    """Whether there is any tensor of a classifier among those, by our names."""
    return any(key.startswith(("linear.", "auxiliary.")) for key in keys)


def find(content: Mapping[Any, Any] | Sequence[Any]) -> list[Found]:
    """Find every RepVGG in what a file held.

    Args:
        content: a state_dict, or wrappers around some, as deep as they come.
    """
    found = []
    for entry, tensors in _containers(content):
        best = {prefix: _best_layout(tensors, prefix) for prefix in _prefixes(tensors)}
        networks: dict[str, tuple[Layout, dict[str, str]]] = {}
        claimed: set[str] = set()  # a layout's own prefix may look like one in front of another's
        for prefix in sorted(best, key=lambda prefix: -len(best[prefix][1])):
            layout, names = best[prefix]
            keys = {ours: prefix + key for key, ours in names.items()}
            if claimed.isdisjoint(keys.values()):
                claimed |= set(keys.values())
                networks[prefix] = layout, keys
        for prefix, (layout, keys) in networks.items():
            nested = tuple(p for p in networks if p.startswith(prefix) and p != prefix)
            inside = [key for key in tensors if key.startswith(prefix)]
            inside = [key for key in inside if not key.startswith(nested)]
            if not _has_head(keys):  # what stands beside the blocks is of a detector or the like
                inside = [key for key in inside if layout.owns(key.removeprefix(prefix))]
            known, own = set(keys.values()), set(inside)
            outside = [key for key in tensors if key not in own]
            found.append(
                Found(
                    entry,
                    prefix,
                    layout,
                    {ours: tensors[key] for ours, key in keys.items()},
                    keys,
                    [key for key in inside if key not in known],
                    outside,
                    {
                        key: tensors[key].shape[1]
                        for key in outside
                        if key.startswith(prefix) and tensors[key].ndim == 2
                    },
                )
            )
    return found


def choose(content: Mapping[Any, Any] | Sequence[Any], weights: str | None = None) -> Found:
    """The one network of a file.

    Args:
        content: a state_dict, or wrappers around some.
        weights: which one, where there are several: its wrappers and prefix.

    Raises:
        ValueError: there is none, or there are several and none was chosen.
    """
    found = find(content)
    places = [place(one) for one in found]
    if not found:
        keys = [key for _, tensors in _containers(content) for key in tensors]
        said = (
            f"there is no RepVGG in it, in any known layout; of its {len(keys)} tensors the first "
            f"are {_some(keys)}"
            if keys
            else f"there are no tensors in it; its first keys: {_first(content)}"
        )
        closed = [f"{at} (a {one.name})" for at, one in _walk(content) if isinstance(one, StandIn)]
        if closed:
            said += f"; not opened, as it needs code: {_some(closed)}; if that is it, {STORE}"
        raise ValueError(said)
    if weights is not None and weights not in places:
        raise ValueError(f"weights={weights}: there is no RepVGG; allowed: {', '.join(places)}")
    twice = [at for at in dict.fromkeys(places) if places.count(at) > 1 and weights in (None, at)]
    if twice:
        raise ValueError(f"there are two networks at '{twice[0]}': store one of them by itself")
    if weights is None and len(found) > 1:
        raise ValueError(
            f"there are {len(found)} networks in it, {', '.join(places)}: say which one is meant; "
            f"type {IMPORT} weights={places[0]}"
        )
    return found[places.index(weights or places[0])]


def plan(
    found: Found, *, bn_eps: float = 1e-5, strides: Sequence[int] | None = None
) -> dict[str, Any]:
    """The arguments of `repvgg.create_model` that build the network, from shapes alone.

    Args:
        bn_eps: of its BatchNorms, which no state_dict tells.
        strides: of the stem and the stages, likewise; None is the paper's five twos.

    Raises:
        ValueError: a stage has no block, some blocks are deployed and some are not, or the widths
            are not those of a RepVGG.
    """
    blocks = _blocks(found)
    _require_one_form(found, blocks)
    stages = [{at: blocks[at] for at in blocks if at[:1] == (stage,)} for stage in range(4)]
    absent = [f"stage {1 + number}" for number, stage in enumerate(stages) if not stage]
    if () not in blocks:
        absent.insert(0, "stem")
    if absent:
        raise ValueError(f"{_told(found)} has no {', '.join(absent)}: it is not a whole RepVGG")
    depths = [1 + max(number for _, number in stage) for stage in stages]
    _require_halves(found, depths)
    widths = [_width(stage.values()) for stage in stages]
    stem = _width([blocks[()]])
    if stem != min(MAX_STEM_WIDTH, widths[0]):
        raise ValueError(
            f"{_told(found)} has a stem of {stem} channels, where a RepVGG of widths {widths} has "
            f"min({MAX_STEM_WIDTH}, {widths[0]})"
        )
    heads = [key for key, features in found.matrices.items() if features == widths[3]]
    if found.headless and heads:
        raise ValueError(
            f"{_told(found)} has no {' or '.join(found.layout.heads) or 'classifier'}, but beside "
            f"it {_some(heads)} reads as many features as it gives, {widths[3]}: if that is its "
            "classifier, rename it; if not, leave it out"
        )
    shape: dict[str, Any] = {"depths": depths, "widths": widths}
    if (groups := _groups(blocks, depths, widths)) > 1:
        shape["groups"] = groups
    if any(".post_bn." in key for key in found.weights):
        shape["block"] = "qarepvgg"
    for gate in ("se_before_relu", "se_after_relu"):
        if reduction := _reduction(blocks, gate):
            shape[gate] = reduction
    if any(key.startswith("auxiliary.") for key in found.weights):
        shape["auxiliary_heads"] = True
    config = identify(shape, deployed=found.deployed) | sizes(found)
    if strides is not None:
        config["strides"] = list(strides)
    return config if bn_eps == 1e-5 else {**config, "bn_eps": bn_eps}


def sizes(found: Found) -> dict[str, int]:
    """The number of classes and of channels of the images, as arguments of `create_model`.

    0 classes is a network without a classifier.
    """
    classifier, auxiliary = (
        [
            len(part)
            for key, part in found.weights.items()
            if re.fullmatch(rf"{head}linear\.(weight|bias)", key) and part.ndim and len(part)
        ]
        for head in ("", r"auxiliary\.\w+\.")
    )
    stem = _blocks(found).get((), {})
    count = _most_common(classifier or auxiliary, otherwise=1000)
    return {
        "num_classes": 0 if found.headless else count,
        "in_channels": _most_common(kernel.shape[1] for kernel in _kernels(stem)),
    }


def build(found: Found, config: dict[str, Any]) -> tuple[RepVGG, Misfit]:
    """Build the network that a config describes in the found form, and hold the weights to it."""
    with torch.device("meta"):  # draws no numbers, which would all be replaced
        network = create_model(**config)
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
            f"{keys[key]} {tuple(tensor.shape)} for {tuple(wanted[key].shape)}"
            for key, tensor in found.weights.items()
            if key in wanted and tensor.shape != wanted[key].shape
        ],
        [
            f"{keys[key]} ({fault})"
            for key, tensor in found.weights.items()
            if (fault := _fault(tensor, key.rpartition(".")[2]))
        ],
    )
    return network, misfit


def load(found: Found, config: dict[str, Any]) -> RepVGG:
    """Build the network that a config describes and give it the weights that were found.

    Returns:
        the network in the form that was found, in eval mode, float32, on the CPU.

    Raises:
        ValueError: not every tensor fits, both ways; the first that do not are named.
    """
    network, misfit = build(found, config)
    if any(misfit):
        hint = f"; {OTHER_STRIDES}" if misfit.is_about_identities(found) else ""
        raise ValueError(
            f"{_told(found)} looks like {describe_variant(config)}, but does not fit: {misfit}"
            f"{hint}"
        )
    copies = {}
    for key in network.state_dict():
        dtype = torch.int64 if key.endswith(f".{COUNTER}") else torch.float32
        tensor = found.weights.get(key, torch.zeros(()))  # only a counter may be missing
        copies[key] = tensor.detach().to("cpu", dtype, copy=True)
    network.load_state_dict(copies, assign=True)
    return network.eval()


def describe_variant(config: Mapping[str, Any]) -> str:
    """The name of a config's network, or its plan where it is none of the table's."""
    if "depths" not in config:
        return str(config["name"])
    groups = f", groups {config['groups']}" if config.get("groups", 1) > 1 else ""
    return f"a RepVGG of depths {config['depths']} and widths {config['widths']}{groups}"


def describe_classes(config: Mapping[str, Any]) -> str:
    count = config["num_classes"]
    return f"{count} classes" if count else "without a classifier"


def place(found: Found) -> str:
    """Where in the file it stands, as it is chosen."""
    return ".".join(part for part in (found.entry, found.prefix.rstrip(".")) if part) or "top"


def describe(found: Found, config: Mapping[str, Any]) -> str:
    """What was found, for the reader."""
    said = (
        f"{describe_variant(config)} in {found.layout.name} layout, {found.form} form, "
        f"{describe_classes(config)}, at '{place(found)}'"
    )
    if found.outside:
        count, keys = len(found.outside), _some(found.outside)
        said += f"; beside it {count} tensors that are not its own ({keys})"
    return said


def _told(found: Found) -> str:
    return f"'{place(found)}', in {found.layout.name} layout and {found.form} form,"


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:MOST_TOLD]) + (", ..." if len(keys) > MOST_TOLD else "")


def _first(content: Mapping[Any, Any] | Sequence[Any]) -> str:
    return ", ".join(map(str, list(content)[:MOST_TOLD])) or "none"


def _containers(content: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary that holds tensors by name, however deep, and where it stands."""
    for entry, mapping in _walk(content):
        if isinstance(mapping, Mapping):
            named = {key: value for key, value in mapping.items() if isinstance(key, str)}
            tensors = {key: _as_tensor(value) for key, value in named.items()}
            if kept := {key: tensor for key, tensor in tensors.items() if tensor is not None}:
                yield entry, kept


def _walk(content: Any) -> Iterator[tuple[str, Any]]:
    """Every wrapper and every stand-in, and where it stands; once, in the order of the file."""
    seen: set[int] = set()
    left = [("", content)]
    while left:
        entry, part = left.pop()
        if id(part) in seen:  # under another name, or it holds itself
            continue
        seen.add(id(part))
        yield entry, part
        if isinstance(part, Mapping):
            items = [*part.items()]
        elif isinstance(part, list | tuple):
            items = [*enumerate(part)]
        else:
            continue
        left += [
            (f"{entry}.{key}" if entry else str(key), value)
            for key, value in reversed(items)
            if isinstance(value, Mapping | list | tuple | StandIn)
        ]


def _as_tensor(value: Any) -> Tensor | None:
    """A tensor, or numbers of numpy as one; None for anything else."""
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        return None
    if value.dtype.kind not in "biufc":
        return None
    wide = {"f": "f8", "c": "c16"}.get(value.dtype.kind)  # the widest that torch has
    dtype = value.dtype.newbyteorder("=")
    if wide and dtype.itemsize > np.dtype(wide).itemsize:
        dtype = np.dtype(wide)
    return torch.from_numpy(np.array(value, dtype, order="C"))


def _prefixes(tensors: Mapping[str, Tensor]) -> dict[str, None]:
    """What stands in front of the keys of a block of any layout."""
    prefixes: dict[str, None] = {}
    for layout in LAYOUTS:
        pattern = layout.pattern()
        for key in tensors:
            match = pattern.fullmatch(key)
            if match and layout.parts[match["part"]].startswith(("branch_3x3", "reparam")):
                prefixes[match["prefix"]] = None
    return prefixes


def _best_layout(tensors: Mapping[str, Tensor], prefix: str) -> tuple[Layout, dict[str, str]]:
    """The layout that knows the most keys behind a prefix, and our names of those."""
    inside = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
    names = [(layout, layout.to_ours(inside)) for layout in LAYOUTS]
    return max(names, key=lambda pair: len(pair[1]))


def _blocks(found: Found) -> dict[Place, Block]:
    blocks: dict[Place, Block] = {}
    for key, tensor in found.weights.items():
        at, part, leaf = split_key(key)
        # No number is as large as there are tensors: such a key does not count as a block.
        if at is not None and max(at, default=0) < len(found.weights):
            blocks.setdefault(at, {})[f"{part}.{leaf}"] = tensor
    return blocks


def _require_one_form(found: Found, blocks: Mapping[Place, Block]) -> None:
    forms: dict[bool, dict[Place, str]] = {True: {}, False: {}}  # deployed: the first key of each
    for key in found.weights:
        at, part, _ = split_key(key)
        if at is not None and at in blocks and part.startswith(("reparam", "branch_", "post_bn")):
            forms[part == "reparam"].setdefault(at, found.keys[key])
    deployed, training = ([*forms[form].values()] for form in (True, False))
    if deployed and training:
        raise ValueError(
            f"'{place(found)}', in {found.layout.name} layout, mixes the forms: {len(deployed)} "
            f"blocks are deployed ({_some(deployed)}), {len(training)} are not ({_some(training)})"
        )


def _require_halves(found: Found, depths: list[int]) -> None:
    """Of RepVGGplus: its auxiliary classifier stands in the middle of the third stage."""
    if len(found.layout.stages) == 4:
        return
    if depths[2] < 2:
        raise ValueError(f"{_told(found)} has one block in its third stage, which is two halves")
    for ours, theirs in found.keys.items():
        at, _, _ = split_key(ours)
        if at is None or found.prefix + found.layout.to_theirs(ours, depths) == theirs:
            continue
        raise ValueError(
            f"{_told(found)} has {depths[2]} blocks in the third stage, of which the first half "
            f"is {depths[2] // 2}: there {theirs} has no place, or other blocks are missing"
        )


def _width(blocks: Iterable[Block]) -> int:
    """The number of channels that most tensors of some blocks put out."""
    return _most_common(
        len(tensor)
        for block in blocks
        for key, tensor in block.items()
        if tensor.ndim and len(tensor) and not key.startswith("se_")
    )


def _groups(blocks: Mapping[Place, Block], depths: list[int], widths: list[int]) -> int:
    """Of every second block after the stem, which alone may have some."""
    places = [(stage, number) for stage in range(4) for number in range(depths[stage])]
    return _most_common(
        max(1, widths[places[i - 1][0]] // kernel.shape[1])
        for i in range(1, len(places), 2)
        for kernel in _kernels(blocks.get(places[i], {}))
    )


def _reduction(blocks: Mapping[Place, Block], gate: str) -> int:
    """That with which every gate has the hidden channels it has; 0 where there are no gates."""
    gates = [
        (_width([block]), len(squeeze))
        for block in blocks.values()
        if (squeeze := block.get(f"{gate}.squeeze.weight")) is not None and squeeze.ndim
    ]
    if not gates:
        return 0
    widest = max(width for width, _ in gates)
    fitting = (
        reduction
        for reduction in (*REDUCTIONS, *range(1, widest + 1))
        if all(max(1, width // reduction) == hidden for width, hidden in gates)
    )
    return next(fitting, 0) or _most_common(width // max(1, hidden) for width, hidden in gates)


def _kernels(block: Block) -> list[Tensor]:
    """Those of the branches, or of what they became."""
    return [
        tensor
        for key, tensor in block.items()
        if tensor.ndim == 4 and tensor.shape[1] and not key.startswith("se_")
    ]


def _most_common(numbers: Iterable[int], *, otherwise: int = 1) -> int:
    """The number that comes most often, the first of several; another where there is none."""
    return next((number for number, _ in Counter(numbers).most_common(1)), otherwise)


def _fault(tensor: Tensor, leaf: str) -> str:
    """Why a tensor cannot be what the end of its name says; empty if it can."""
    if tensor.is_meta:
        return "without values"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return "sparse or quantized"
    if tensor.is_complex() or (leaf != COUNTER and not tensor.is_floating_point()):
        return str(tensor.dtype).removeprefix("torch.")
    if not tensor.float().isfinite().all():
        return "not finite"
    return "negative" if leaf == "running_var" and (tensor.float() < 0).any() else ""
