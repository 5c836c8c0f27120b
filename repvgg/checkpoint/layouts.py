"""The key layouts of third-party checkpoints of RepVGG, and how their names become ours.

Seven beside ours are known: the authors' (RepVGG, arXiv:2101.03697), those of their RepVGGplus and
of their PSPNet example, timm's, that of timm's features_only, mmpretrain's and QARepVGG's
(arXiv:2212.01593).
"""

import re
from typing import NamedTuple

AUXILIARY = ("stage1", "stage2", "stage3_half")


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

    def owns(self, key: str) -> bool:
        """Whether a key, without prefix, stands where this layout has blocks, known or not."""
        before = re.escape(self.block.partition("{")[0])
        return re.match(rf"{re.escape(self.stem)}\.|{before}\d", key) is not None

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


def split_key(key: str) -> tuple[tuple[int, ...] | None, str, str]:
    """One of our keys: the stem's place is (), a block's its stage and number, a head's None."""
    path, _, leaf = key.rpartition(".")
    if match := re.fullmatch(r"stages\.(\d+)\.(\d+)\.(.+)", path):
        return (int(match[1]), int(match[2])), match[3], leaf
    if path.startswith("stem."):
        return (), path.removeprefix("stem."), leaf
    return None, path, leaf
