"""The key layouts of third-party RepVGG checkpoints, and the mapping of their keys to ours.

There are seven beside ours: the authors' (RepVGG, arXiv:2101.03697), their RepVGGplus's, their
PSPNet example's, timm's, timm's for features_only, mmpretrain's and QARepVGG's (arXiv:2212.01593).
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

AUXILIARY = ("stage1", "stage2", "stage3_half")


class Layout(NamedTuple):
    """The names of the tensors of a RepVGG in one source.

    Attributes:
        name: of the source.
        stem: the stem's name.
        block: the name of any other block, with {stage} and {number}.
        stages: the values of {stage}, in order; five if the third stage is in two halves.
        parts: names inside a block -> ours.
        heads: names outside blocks -> ours.
    """

    name: str
    stem: str
    block: str
    stages: tuple[str, ...]
    parts: dict[str, str]
    heads: dict[str, str]

    def pattern(self) -> re.Pattern[str]:
        """A pattern that matches the keys of blocks, with any prefix."""
        block = re.escape(self.block).replace(r"\{number\}", r"(?P<number>[0-9]{1,6})")
        block = block.replace(r"\{stage\}", f"(?P<stage>{'|'.join(self.stages)})")
        parts = "|".join(map(re.escape, self.parts))
        return re.compile(
            rf"(?P<prefix>(?:.*\.)?)(?:{re.escape(self.stem)}|{block})"
            rf"\.(?P<part>{parts})\.(?P<leaf>.+)"
        )

    def owns(self, key: str) -> bool:
        """Whether a key, without prefix, is among the blocks, even if it is unknown."""
        before = re.escape(self.block.partition("{")[0])
        return re.match(rf"{re.escape(self.stem)}\.|{before}\d", key) is not None

    def to_ours(self, keys: list[str]) -> dict[str, str]:
        """The keys, without prefix, that this layout knows, and our names for them."""
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
        """The key in this layout for one of ours."""
        place, part, leaf = split_key(key)
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
_TIMM = {
    "conv_kxk": "branch_3x3",
    "conv_1x1": "branch_1x1",
    "identity": "branch_identity",
    "reparam_conv": "reparam",
    "attn.fc1": "se_before_relu.squeeze",
    "attn.fc2": "se_before_relu.excite",
}
_NUMBERS = ("1", "2", "3", "4")
_FROM_ZERO = ("0", "1", "2", "3")
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
        _TIMM,
        {"head.fc": "linear"},
    ),
    Layout("timm's features_only", "stem", "stages_{stage}.{number}", _FROM_ZERO, _TIMM, {}),
    Layout("the PSPNet example's", "layer0", "layer{stage}.{number}", _NUMBERS, _AUTHORS, {}),
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


def holds_folded(keys: Iterable[str]) -> bool:
    """Whether keys, in our names, are those of a folded RepVGG."""
    return any(".reparam." in key for key in keys)


def has_classifier(keys: Iterable[str]) -> bool:
    """Whether keys, in our names, include any of a classifier."""
    return any(key.startswith(("linear.", "auxiliary.")) for key in keys)


def split_key(key: str) -> tuple[tuple[int, ...] | None, str, str]:
    """Split one of our keys into place, part and leaf.

    The place is () for the stem, stage and number for a block, and None for a head.
    """
    path, _, leaf = key.rpartition(".")
    if match := re.fullmatch(r"stages\.(\d+)\.(\d+)\.(.+)", path):
        return (int(match[1]), int(match[2])), match[3], leaf
    if path.startswith("stem."):
        return (), path.removeprefix("stem."), leaf
    return None, path, leaf
