"""Find the RepVGG networks in a file, whatever their key layout, wrappers and prefixes."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from repvgg.checkpoint.layouts import LAYOUTS, Layout, has_classifier, holds_folded
from repvgg.checkpoint.standins import StandIn
from repvgg.checkpoint.tensors import STORE
from repvgg.checks import ArgumentError, brief, first_of

MOST_NETWORKS = 100  # in a file
DEEPEST = 50  # wrappers in wrappers


class Found(NamedTuple):
    """A network that was found in a file.

    Attributes:
        entry: keys of the wrappers around its weights, joined by dots; empty if there are none.
        prefix: common to all its keys.
        layout: of its keys.
        weights: its tensors, by our names.
        keys: our names -> the keys inside the wrappers.
        unknown: keys with the prefix that the layout does not know. Without a classifier, only
            those among the blocks.
        outside: keys in the same wrapper that are not of this network.
        matrices: those of `outside` with the prefix and two axes, and the length of the second
            axis: the number of input features, if it is a classifier under another name.
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
        return not has_classifier(self.keys)

    @property
    def deployed(self) -> bool:
        return holds_folded(self.weights)

    @property
    def form(self) -> str:
        return "folded" if self.deployed else "multi-branch"

    @property
    def place(self) -> str:
        """Its wrappers and prefix, by which it is chosen."""
        return ".".join(part for part in (self.entry, self.prefix.rstrip(".")) if part) or "top"

    def __str__(self) -> str:
        return f"'{brief(self.place)}' ({self.layout.name} layout, {self.form})"


def find(content: object) -> list[Found]:
    """Find every RepVGG in the content of a file.

    Args:
        content: a state_dict, or wrappers of any depth around some.
    """
    found = []
    for entry, tensors in _containers(content):
        prefixes = _prefixes(tensors)
        if len(prefixes) > MOST_NETWORKS:
            raise ValueError(f"it holds {len(prefixes):,} networks; store one of them alone")
        best = {prefix: _best_layout(tensors, prefix) for prefix in prefixes}
        networks: dict[str, tuple[Layout, dict[str, str]]] = {}
        claimed: set[str] = set()  # a layout's own prefix may look like one before another layout
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
            if not has_classifier(keys):  # keys outside the blocks are of a detector or the like
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


def choose(content: object, weights: str | None = None) -> Found:
    """Find the one network of a file.

    Args:
        content: a state_dict, or wrappers around some.
        weights: which one, if there are several: its wrappers and prefix.

    Raises:
        ValueError: there is none, or there are several and `weights` does not choose one.
    """
    found = find(content)
    places = [one.place for one in found]
    if not found:
        raise ValueError(_nothing_found(content))
    if weights is not None and weights not in places:
        raise ValueError(
            f"weights={brief(weights)}: there is no RepVGG; "
            f"allowed: {', '.join(map(brief, places))}"
        )
    twice = [at for at in dict.fromkeys(places) if places.count(at) > 1 and weights in (None, at)]
    if twice:
        raise ValueError(f"there are two networks at '{brief(twice[0])}': store one of them alone")
    if weights is None and len(found) > 1:
        raise ArgumentError(
            f"there are {len(found)} networks in it, {first_of(places)}: choose one, for example "
            f"weights={brief(places[0])}",
            "weights",
        )
    return found[places.index(weights or places[0])]


def _nothing_found(content: object) -> str:
    keys = [key for _, tensors in _containers(content) for key in tensors]
    if keys:
        said = (
            f"there is no RepVGG in it, in any known layout; the first of its {len(keys)} tensors "
            f"are {first_of(keys)}"
        )
    else:
        keys = [brief(key) for key in content] if isinstance(content, Iterable) else []
        said = f"there are no tensors in it; its first keys: {first_of(keys) or 'none'}"
    closed = [f"{at} (a {one.name})" for at, one in _walk(content) if isinstance(one, StandIn)]
    if closed:
        said += f"; not opened, as it needs code: {first_of(closed)}; to use it, {STORE}"
    return said


def _containers(content: object) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary that holds tensors by name, at any depth, and its place."""
    for entry, mapping in _walk(content):
        if isinstance(mapping, Mapping):
            named = {key: value for key, value in mapping.items() if isinstance(key, str)}
            tensors = {key: _as_tensor(value) for key, value in named.items()}
            if kept := {key: tensor for key, tensor in tensors.items() if tensor is not None}:
                yield entry, kept


def _walk(content: object) -> Iterator[tuple[str, object]]:
    """Every wrapper and stand-in, and its place; each once, in the order of the file."""
    seen: set[int] = set()
    left = [("", content, 0)]
    while left:
        entry, part, depth = left.pop()
        if id(part) in seen:  # under another name, or inside itself
            continue
        seen.add(id(part))
        if depth > DEEPEST:
            raise ValueError(f"it nests more than {DEEPEST} wrappers; store a state_dict alone")
        yield entry, part
        items: list[tuple[object, object]]
        if isinstance(part, Mapping):
            items = [*part.items()]
        elif isinstance(part, list | tuple):
            items = [*enumerate(part)]
        else:
            continue
        left += [
            (f"{entry}.{brief(key)}" if entry else brief(key), value, depth + 1)
            for key, value in reversed(items)
            if isinstance(value, Mapping | list | tuple | StandIn)
        ]


def _as_tensor(value: object) -> Tensor | None:
    """A tensor, or a numeric NumPy array as one; None for anything else."""
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
    """The prefixes of the keys of blocks, in any layout."""
    prefixes: dict[str, None] = {}
    for layout in LAYOUTS:
        pattern = layout.pattern()
        for key in tensors:
            match = pattern.fullmatch(key)
            if match and layout.parts[match["part"]].startswith(("branch_3x3", "reparam")):
                prefixes[match["prefix"]] = None
    return prefixes


def _best_layout(tensors: Mapping[str, Tensor], prefix: str) -> tuple[Layout, dict[str, str]]:
    """The layout that knows the most keys with a prefix, and our names of those."""
    inside = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
    names = [(layout, layout.to_ours(inside)) for layout in LAYOUTS]
    return max(names, key=lambda pair: len(pair[1]))
