"""The arguments of a network, from the shapes of its tensors.

Every size is the one that most tensors have, so an odd tensor is later named as a misfit.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from repvgg.checkpoint.layouts import split_key
from repvgg.checkpoint.locate import Found
from repvgg.checks import first_of
from repvgg.contract import Plain
from repvgg.models.network import MAX_STEM_WIDTH
from repvgg.models.registry import identify

REDUCTIONS = (16, 4, 8)  # usual ones of squeeze-and-excite

Place = tuple[int, ...]  # of a block: its stage and number; () is the stem
Block = dict[str, Tensor]  # its tensors, by our names inside it


def plan(
    found: Found, *, bn_eps: float = 1e-5, strides: Sequence[int] | None = None
) -> dict[str, Plain]:
    """Derive the arguments of `repvgg.create_model` that build the network.

    Args:
        bn_eps: of its BatchNorms, which a state_dict does not record.
        strides: of the stem and the stages, which a state_dict does not record; None is the paper's
            [2, 2, 2, 2, 2].

    Raises:
        ValueError: a stage has no block, some blocks are folded and some are not, or the widths are
            not those of a RepVGG.
    """
    blocks = _blocks(found)
    _require_one_form(found, blocks)
    stages = [{at: blocks[at] for at in blocks if at[:1] == (stage,)} for stage in range(4)]
    absent = [f"stage {1 + number}" for number, stage in enumerate(stages) if not stage]
    if () not in blocks:
        absent.insert(0, "stem")
    if absent:
        raise ValueError(f"{found} has no {', '.join(absent)}: it is not a whole RepVGG")
    depths = [1 + max(number for _, number in stage) for stage in stages]
    _require_halves(found, depths)
    widths = [_width(stage.values()) for stage in stages]
    stem = _width([blocks[()]])
    if stem != min(MAX_STEM_WIDTH, widths[0]):
        raise ValueError(
            f"{found} has a stem of {stem} channels, where a RepVGG of widths {widths} has "
            f"min({MAX_STEM_WIDTH}, {widths[0]})"
        )
    heads = [key for key, features in found.matrices.items() if features == widths[3]]
    if found.headless and heads:
        raise ValueError(
            f"{found} has no {' or '.join(found.layout.heads) or 'classifier'}, but beside it "
            f"{first_of(heads)} takes as many features as it returns, {widths[3]}: rename it if it "
            "is the classifier, else remove it"
        )
    shape: dict[str, Plain] = {"depths": depths, "widths": widths}
    if (groups := _groups(blocks, depths, widths)) > 1:
        shape["groups"] = groups
    if any(".post_bn." in key for key in found.weights):
        shape["block"] = "qarepvgg"
    for name in ("se_before_relu", "se_after_relu"):
        if reduction := _reduction(blocks, name):
            shape[name] = reduction
    if any(key.startswith("auxiliary.") for key in found.weights):
        shape["auxiliary_heads"] = True
    config = identify(shape, deployed=found.deployed) | sizes(found)
    if strides is not None:
        config["strides"] = list(strides)
    return config if bn_eps == 1e-5 else {**config, "bn_eps": bn_eps}


def sizes(found: Found) -> dict[str, Plain]:
    """Derive num_classes and in_channels, as arguments of `repvgg.create_model`.

    A network without a classifier has 0 classes.
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


def _blocks(found: Found) -> dict[Place, Block]:
    blocks: dict[Place, Block] = {}
    for key, tensor in found.weights.items():
        at, part, leaf = split_key(key)
        # A block's number is below the number of tensors, or the key is not of a block.
        if at is not None and max(at, default=0) < len(found.weights):
            blocks.setdefault(at, {})[f"{part}.{leaf}"] = tensor
    return blocks


def _require_one_form(found: Found, blocks: Mapping[Place, Block]) -> None:
    """Raise ValueError if some blocks are folded and some are not."""
    forms: dict[bool, dict[Place, str]] = {True: {}, False: {}}  # folded: the first key of each
    for key in found.weights:
        at, part, _ = split_key(key)
        if at is not None and at in blocks and part.startswith(("reparam", "branch_", "post_bn")):
            forms[part == "reparam"].setdefault(at, found.keys[key])
    folded, multi_branch = ([*forms[form].values()] for form in (True, False))
    if folded and multi_branch:
        raise ValueError(
            f"'{found.place}' ({found.layout.name} layout) mixes the forms: {len(folded)} blocks "
            f"are folded ({first_of(folded)}), {len(multi_branch)} are not "
            f"({first_of(multi_branch)})"
        )


def _require_halves(found: Found, depths: list[int]) -> None:
    """Raise ValueError unless an auxiliary classifier of RepVGGplus halves the third stage."""
    if len(found.layout.stages) == 4:
        return
    if depths[2] < 2:
        raise ValueError(f"{found} has one block in its third stage, which needs two halves")
    for ours, theirs in found.keys.items():
        at, _, _ = split_key(ours)
        if at is None or found.prefix + found.layout.to_theirs(ours, depths) == theirs:
            continue
        raise ValueError(
            f"{found} has {depths[2]} blocks in the third stage, so its first half has "
            f"{depths[2] // 2}: {theirs} does not fit, or other blocks are missing"
        )


def _width(blocks: Iterable[Block]) -> int:
    """The number of output channels of most tensors of some blocks."""
    return _most_common(
        len(tensor)
        for block in blocks
        for key, tensor in block.items()
        if tensor.ndim and len(tensor) and not key.startswith("se_")
    )


def _groups(blocks: Mapping[Place, Block], depths: list[int], widths: list[int]) -> int:
    """The groups of every second block after the stem; other blocks have none."""
    places = [(stage, number) for stage in range(4) for number in range(depths[stage])]
    return _most_common(
        max(1, widths[places[i - 1][0]] // kernel.shape[1])
        for i in range(1, len(places), 2)
        for kernel in _kernels(blocks.get(places[i], {}))
    )


def _reduction(blocks: Mapping[Place, Block], name: str) -> int:
    """The reduction that fits all squeeze-and-excite layers of a name; 0 if there are none."""
    layers = [
        (_width([block]), len(squeeze))
        for block in blocks.values()
        if (squeeze := block.get(f"{name}.squeeze.weight")) is not None and squeeze.ndim
    ]
    if not layers:
        return 0
    widest = max(width for width, _ in layers)
    fitting = (
        reduction
        for reduction in (*REDUCTIONS, *range(1, widest + 1))
        if all(max(1, width // reduction) == hidden for width, hidden in layers)
    )
    return next(fitting, 0) or _most_common(width // max(1, hidden) for width, hidden in layers)


def _kernels(block: Block) -> list[Tensor]:
    """The kernels of the branches, or the folded one."""
    return [
        tensor
        for key, tensor in block.items()
        if tensor.ndim == 4 and tensor.shape[1] and not key.startswith("se_")
    ]


def _most_common(numbers: Iterable[int], *, otherwise: int = 1) -> int:
    """The most common number, the first of several; `otherwise` if there is none."""
    return next((number for number, _ in Counter(numbers).most_common(1)), otherwise)
