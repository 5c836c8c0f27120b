"""The key layouts in which the field stores RepVGG: recognised, read, renamed to ours.

What a file holds follows from its keys and shapes alone: the layout, the form, the variant, the
number of classes. Five layouts beside ours are known: the authors' (RepVGG, arXiv:2101.03697), that
of their RepVGGplus, timm's, mmpretrain's and QARepVGG's (arXiv:2212.01593). Keys may stand in any
wrapper and behind any prefix.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repvgg.model import MAX_STEM_WIDTH, RepVGG
from repvgg.zoo import create_model, identify

KERNELS = ("branch_3x3.conv.weight", "reparam.weight")  # of a block in either form
AUXILIARY = ("stage1", "stage2", "stage3_half")
COUNTER = "num_batches_tracked"  # files from before it existed lack it; no prediction reads it
MOST_TOLD = 4  # keys in a message
IMPORT = "python scripts/import_checkpoint.py path=FILE"
OTHER_STRIDES = (
    "an identity branch is where neither channels nor size change, so the strides are others: type "
    f"for example {IMPORT} strides=[1,1,2,2,2]"
)


class Layout(NamedTuple):
    """How one source names the tensors of a RepVGG.

    Attributes:
        name: of the source.
        stem: the stem's name.
        block: the name of a block after it, with {stage} and {number}.
        stages: what stands for {stage}, in order; five where the third stage is in two halves.
        parts: names inside a block, and ours.
        heads: names outside of blocks, and ours.
    """

    name: str
    stem: str
    block: str
    stages: tuple[str, ...]
    parts: dict[str, str]
    heads: dict[str, str]

    def pattern(self) -> re.Pattern[str]:
        """Matches a key of a block, behind any prefix."""
        block = re.escape(self.block).replace(r"\{number\}", r"(?P<number>\d+)")
        block = block.replace(r"\{stage\}", f"(?P<stage>{'|'.join(self.stages)})")
        parts = "|".join(map(re.escape, self.parts))
        return re.compile(
            rf"(?P<prefix>(?:.*\.)?)(?:{re.escape(self.stem)}|{block})"
            rf"\.(?P<part>{parts})\.(?P<leaf>.+)"
        )

    def to_ours(self, keys: list[str]) -> dict[str, str]:
        """Those keys, without prefix, that this layout knows, and our names of them."""
        pattern = self.pattern()
        matches = {key: match for key in keys if (match := pattern.fullmatch(key))}
        halved = len(self.stages) == 5
        first = [
            int(m["number"]) for m in matches.values() if halved and m["stage"] == self.stages[2]
        ]
        half = 1 + max(first, default=-1)
        ours = {}
        for key in keys:
            if match := matches.get(key):
                if match["prefix"]:
                    continue
                place = "stem"
                if match["stage"] is not None:
                    stage, number = self.stages.index(match["stage"]), int(match["number"])
                    if halved and stage > 2:
                        stage, number = stage - 1, number + (half if stage == 3 else 0)
                    place = f"stages.{stage}.{number}"
                ours[key] = f"{place}.{self.parts[match['part']]}.{match['leaf']}"
            else:
                head, _, leaf = key.rpartition(".")
                if head in self.heads:
                    ours[key] = f"{self.heads[head]}.{leaf}"
        return ours

    def to_theirs(self, key: str, depths: list[int]) -> str:
        """The name of one of our keys in this layout."""
        place, part, leaf = _split(key)
        if place is None:
            named = {ours: theirs for theirs, ours in self.heads.items()}
            return f"{named.get(part, part)}.{leaf}"
        inside = f"{part}.{leaf}"
        for theirs, ours in self.parts.items():
            if inside.startswith(f"{ours}."):
                inside = theirs + inside.removeprefix(ours)
                break
        if place == ():
            return f"{self.stem}.{inside}"
        stage, number = place
        half = depths[2] // 2
        if len(self.stages) == 5 and (stage == 3 or (stage == 2 and number >= half)):
            stage, number = stage + 1, number - (half if stage == 2 else 0)
        return f"{self.block.format(stage=self.stages[stage], number=number)}.{inside}"


_AUTHORS = {
    "rbr_dense": "branch_3x3",
    "rbr_1x1": "branch_1x1",
    "rbr_identity": "branch_identity",
    "rbr_reparam": "reparam",
    "se.down": "se_before_relu.squeeze",
    "se.up": "se_before_relu.excite",
    "post_se.down": "se_after_relu.squeeze",
    "post_se.up": "se_after_relu.excite",
}
_NUMBERS = ("1", "2", "3", "4")
OURS = Layout(
    "our",
    "stem",
    "stages.{stage}.{number}",
    ("0", "1", "2", "3"),
    {
        name: name
        for name in (
            "branch_3x3",
            "branch_1x1",
            "branch_identity",
            "post_bn",
            "reparam",
            "se_before_relu",
            "se_after_relu",
        )
    },
    {
        "linear": "linear",
        **{
            f"auxiliary.{name}.{part}": f"auxiliary.{name}.{part}"
            for name in AUXILIARY
            for part in ("conv", "bn", "linear")
        },
    },
)
LAYOUTS = (
    Layout(
        "the authors'", "stage0", "stage{stage}.{number}", _NUMBERS, _AUTHORS, {"linear": "linear"}
    ),
    Layout(
        "RepVGGplus's",
        "stage0",
        "stage{stage}.blocks.{number}",
        ("1", "2", "3_first", "3_second", "4"),
        _AUTHORS,
        {
            "linear": "linear",
            **{
                f"{theirs}_aux.{number}": f"auxiliary.{ours}.{part}"
                for theirs, ours in zip(
                    ("stage1", "stage2", "stage3_first"), AUXILIARY, strict=True
                )
                for number, part in (("0.conv", "conv"), ("0.bn", "bn"), ("3", "linear"))
            },
        },
    ),
    Layout(
        "timm's",
        "stem",
        "stages.{stage}.{number}",
        ("0", "1", "2", "3"),
        {
            "conv_kxk": "branch_3x3",
            "conv_1x1": "branch_1x1",
            "identity": "branch_identity",
            "reparam_conv": "reparam",
            "attn.fc1": "se_before_relu.squeeze",
            "attn.fc2": "se_before_relu.excite",
        },
        {"head.fc": "linear"},
    ),
    Layout(
        "mmpretrain's",
        "backbone.stem",
        "backbone.stage_{stage}.{number}",
        _NUMBERS,
        {
            "branch_3x3.conv": "branch_3x3.conv",
            "branch_3x3.norm": "branch_3x3.bn",
            "branch_1x1.conv": "branch_1x1.conv",
            "branch_1x1.norm": "branch_1x1.bn",
            "branch_norm": "branch_identity",
            "branch_reparam": "reparam",
            "se_layer.conv1.conv": "se_before_relu.squeeze",
            "se_layer.conv2.conv": "se_before_relu.excite",
        },
        {"head.fc": "linear"},
    ),
    Layout(
        "QARepVGG's",
        "stage0",
        "stage{stage}.{number}",
        _NUMBERS,
        {
            "rbr_dense": "branch_3x3",
            "rbr_1x1": "branch_1x1.conv",
            "bn": "post_bn",
            "rbr_reparam": "reparam",
            "se.down": "se_before_relu.squeeze",
            "se.up": "se_before_relu.excite",
        },
        {"linear": "linear"},
    ),
    OURS,
)


class Found(NamedTuple):
    """A network that was found in a file.

    Attributes:
        entry: keys of the wrappers around its weights, joined by dots; empty where there is none.
        prefix: in front of each of its keys.
        layout: how they are named.
        weights: its tensors, by our names.
        unknown: keys behind the prefix that the layout does not know.
        outside: keys of the same wrapper that have not the prefix, so are not of this network.
    """

    entry: str
    prefix: str
    layout: Layout
    weights: dict[str, Tensor]
    unknown: list[str]
    outside: list[str]

    @property
    def deployed(self) -> bool:
        return is_deployed(self.weights)

    @property
    def form(self) -> str:
        return "deployed" if self.deployed else "training"


class Misfit(NamedTuple):
    """What of a found network does not fit; its keys as they are in the file.

    Attributes:
        missing: keys that the network has and the file has not.
        unknown: the other way round.
        shapes: keys of another shape, with both shapes.
    """

    missing: list[str]
    unknown: list[str]
    shapes: list[str]

    def is_about_identities(self, found: Found) -> bool:
        """Whether all that is missing or too much is in identity branches."""
        names = [theirs for theirs, ours in found.layout.parts.items() if ours == "branch_identity"]
        keys = self.missing + self.unknown + self.shapes
        return bool(keys) and all(any(f".{name}." in key for name in names) for key in keys)

    def __str__(self) -> str:
        told = [
            f"{len(keys)} {kind}: {', '.join(keys[:MOST_TOLD])}"
            + (", ..." if len(keys) > MOST_TOLD else "")
            for kind, keys in zip(("missing", "unknown", "of another shape"), self, strict=True)
            if keys
        ]
        return "; ".join(told)


def is_deployed(keys: Mapping[str, Any]) -> bool:
    """Whether tensors, by our names, are those of a deployed RepVGG."""
    return any(".reparam." in key for key in keys)


def find(content: Mapping[Any, Any]) -> list[Found]:
    """Find every RepVGG in what a file held.

    Args:
        content: a state_dict, or wrappers around some, as deep as they come.
    """
    found = []
    for entry, tensors in _containers(content):
        prefixes: dict[str, None] = {}
        for layout in LAYOUTS:
            pattern = layout.pattern()
            for key in tensors:
                match = pattern.fullmatch(key)
                if match and layout.parts[match["part"]].startswith(("branch_3x3", "reparam")):
                    prefixes[match["prefix"]] = None
        best = {prefix: _best_layout(tensors, prefix) for prefix in prefixes}
        claimed: set[str] = set()  # a layout's own prefix may look like one in front of another's
        for prefix in sorted(best, key=lambda prefix: -len(best[prefix][1])):
            layout, ours = best[prefix]
            if claimed.isdisjoint(prefix + key for key in ours):
                claimed |= {prefix + key for key in ours}
                inside = [key for key in tensors if key.startswith(prefix)]
                found.append(
                    Found(
                        entry,
                        prefix,
                        layout,
                        {name: tensors[prefix + key] for key, name in ours.items()},
                        [key for key in inside if key.removeprefix(prefix) not in ours],
                        [key for key in tensors if not key.startswith(prefix)],
                    )
                )
    return found


def plan(
    found: Found, *, bn_eps: float = 1e-5, strides: Sequence[int] | None = None
) -> dict[str, Any]:
    """The arguments of `repvgg.create_model` that build the network, from shapes alone.

    Args:
        bn_eps: of its BatchNorms, which no state_dict tells.
        strides: of the stem and the stages, likewise; None is the paper's five twos.

    Raises:
        ValueError: a stage has no block, or the widths are not those of a RepVGG.
    """
    kernels: dict[tuple[int, ...], Tensor] = {}
    places: dict[tuple[int, ...], None] = {}
    for key, tensor in found.weights.items():
        place, part, leaf = _split(key)
        if place:
            places[place] = None
        if place is not None and f"{part}.{leaf}" in KERNELS and tensor.ndim == 4:
            kernels[place] = tensor
    stages = [[place for place in kernels if place and place[0] == stage] for stage in range(4)]
    absent = [f"stage {1 + stage}" for stage in range(4) if not stages[stage]]
    if () not in kernels:
        absent.insert(0, "stem")
    if absent:
        raise ValueError(f"{_told(found)} has no {', '.join(absent)}: it is not a whole RepVGG")
    depths = [1 + max(number for at, number in places if at == stage) for stage in range(4)]
    widths = [kernels[stage[0]].shape[0] for stage in stages]
    stem = kernels[()].shape[0]
    if stem != min(MAX_STEM_WIDTH, widths[0]):
        raise ValueError(
            f"{_told(found)} has a stem of {stem} channels, where a RepVGG of widths {widths} has "
            f"min({MAX_STEM_WIDTH}, {widths[0]})"
        )
    linear = found.weights.get("linear.weight")
    shape: dict[str, Any] = {"depths": depths, "widths": widths, "groups": _groups(kernels, depths)}
    if any(".post_bn." in key for key in found.weights):
        shape["block"] = "qarepvgg"
    for gate in ("se_before_relu", "se_after_relu"):
        squeeze = found.weights.get(f"stages.3.0.{gate}.squeeze.weight")
        if squeeze is not None:
            shape[gate] = widths[3] // squeeze.shape[0]
    if any(key.startswith("auxiliary.") for key in found.weights):
        shape["auxiliary_heads"] = True
    config = identify(shape, deployed=found.deployed) | {
        "num_classes": 1000 if linear is None else linear.shape[0],
        "in_channels": kernels[()].shape[1],
    }
    if strides is not None:
        config["strides"] = list(strides)
    return config if bn_eps == 1e-5 else {**config, "bn_eps": bn_eps}


def build(found: Found, config: dict[str, Any]) -> tuple[RepVGG, Misfit]:
    """Build the network that a config describes in the found form, and hold the weights to it."""
    with torch.device("meta"):  # draws no numbers, which would all be replaced
        network = create_model(**config)
        if found.deployed:
            network.switch_to_deploy()
    wanted = network.state_dict()
    depths = [len([*stage.children()]) for stage in network.stages.children()]

    def theirs(key: str) -> str:
        return found.prefix + found.layout.to_theirs(key, depths)

    misfit = Misfit(
        [
            theirs(key)
            for key in wanted
            if key not in found.weights and not key.endswith(f".{COUNTER}")
        ],
        found.unknown + [theirs(key) for key in found.weights if key not in wanted],
        [
            f"{theirs(key)} {tuple(tensor.shape)} for {tuple(wanted[key].shape)}"
            for key, tensor in found.weights.items()
            if key in wanted and tensor.shape != wanted[key].shape
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
    counters = {
        key: torch.zeros((), dtype=torch.int64)
        for key in network.state_dict()
        if key.endswith(f".{COUNTER}")
    }
    copies = {
        key: tensor.detach().to("cpu", torch.float32, copy=True)
        for key, tensor in found.weights.items()
        if key not in counters
    }
    network.load_state_dict(counters | copies, assign=True)
    return network.eval()


def choose(content: Mapping[Any, Any], weights: str | None = None) -> Found:
    """The one network of a file.

    Args:
        content: a state_dict, or wrappers around some.
        weights: which one, where there are several: its wrappers and prefix.

    Raises:
        ValueError: there is none, or there are several and none was chosen.
    """
    found = {place(one): one for one in find(content)}
    if not found:
        keys = [key for _, tensors in _containers(content) for key in tensors]
        raise ValueError(
            f"there is no RepVGG in it, in any known layout; of its {len(keys)} tensors the first "
            f"are {', '.join(keys[:MOST_TOLD])}"
            if keys
            else f"there are no tensors in it; its first keys: {_first(content)}"
        )
    if weights is not None and weights not in found:
        raise ValueError(f"weights={weights}: there is no RepVGG; allowed: {', '.join(found)}")
    if weights is None and len(found) > 1:
        raise ValueError(
            f"there are {len(found)} networks in it, {', '.join(found)}: say which one is meant; "
            f"type {IMPORT} weights={next(iter(found))}"
        )
    return found[weights or next(iter(found))]


def describe_variant(config: dict[str, Any]) -> str:
    """The name of a config's network, or its plan where it is none of the table's."""
    if "depths" not in config:
        return str(config["name"])
    groups = f", groups {config['groups']}" if "groups" in config else ""
    return f"a RepVGG of depths {config['depths']} and widths {config['widths']}{groups}"


def place(found: Found) -> str:
    """Where in the file it stands, as it is chosen."""
    return ".".join(part for part in (found.entry, found.prefix.rstrip(".")) if part) or "top"


def describe(found: Found, config: dict[str, Any]) -> str:
    """What was found, for the reader."""
    said = (
        f"{describe_variant(config)} in {found.layout.name} layout, {found.form} form, "
        f"{config['num_classes']} classes, at '{place(found)}'"
    )
    if found.outside:
        keys = ", ".join(found.outside[:MOST_TOLD])
        said += f"; beside it {len(found.outside)} tensors that are not its own ({keys})"
    return said


def _told(found: Found) -> str:
    return f"'{place(found)}', in {found.layout.name} layout and {found.form} form,"


def _first(content: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, list(content)[:MOST_TOLD])) or "none"


def _best_layout(tensors: Mapping[str, Tensor], prefix: str) -> tuple[Layout, dict[str, str]]:
    """The layout that knows the most keys behind a prefix, and our names of those."""
    inside = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
    names = [(layout, layout.to_ours(inside)) for layout in LAYOUTS]
    return max(names, key=lambda pair: len(pair[1]))


def _containers(
    content: Mapping[Any, Any], entry: str = ""
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary that holds tensors by name, however deep, and where it stands."""
    tensors = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if tensors:
        yield entry, tensors
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _containers(value, f"{entry}.{key}" if entry else str(key))


def _split(key: str) -> tuple[tuple[int, ...] | None, str, str]:
    """One of our keys: the stem's place is (), a block's its stage and number, a head's None."""
    path, _, leaf = key.rpartition(".")
    if match := re.fullmatch(r"stages\.(\d+)\.(\d+)\.(.+)", path):
        return (int(match[1]), int(match[2])), match[3], leaf
    if path.startswith("stem."):
        return (), path.removeprefix("stem."), leaf
    return None, path, leaf


def _groups(kernels: Mapping[tuple[int, ...], Tensor], depths: list[int]) -> int:
    """Of the second block after the stem, the first that may have some."""
    places = [(stage, number) for stage in range(4) for number in range(depths[stage])]
    if len(places) < 2 or not {*places[:2]} <= kernels.keys():
        return 1
    before, second = kernels[places[0]], kernels[places[1]]
    return max(1, before.shape[0] // second.shape[1])
