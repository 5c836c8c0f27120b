"""The field's key layouts, written down a second time: what the package's reading is held to."""

import re
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDENS = np.load(Path(__file__).with_name("goldens.npz"))
AUTHORS = {
    "branch_3x3": "rbr_dense",
    "branch_1x1": "rbr_1x1",
    "branch_identity": "rbr_identity",
    "reparam": "rbr_reparam",
    "se_before_relu.squeeze": "se.down",
    "se_before_relu.excite": "se.up",
    "se_after_relu.squeeze": "post_se.down",
    "se_after_relu.excite": "post_se.up",
}
TIMM = {
    "branch_3x3": "conv_kxk",
    "branch_1x1": "conv_1x1",
    "branch_identity": "identity",
    "reparam": "reparam_conv",
    "se_before_relu.squeeze": "attn.fc1",
    "se_before_relu.excite": "attn.fc2",
}
MMPRETRAIN = {
    "branch_3x3.bn": "branch_3x3.norm",
    "branch_1x1.bn": "branch_1x1.norm",
    "branch_identity": "branch_norm",
    "reparam": "branch_reparam",
    "se_before_relu.squeeze": "se_layer.conv1.conv",
    "se_before_relu.excite": "se_layer.conv2.conv",
}
PLUS_HEADS = {
    "auxiliary.stage1.": "stage1_aux.",
    "auxiliary.stage2.": "stage2_aux.",
    "auxiliary.stage3_half.": "stage3_first_aux.",
}
HEAD_PARTS = {"conv.": "0.conv.", "bn.": "0.bn.", "linear.": "3."}


def authors(key: str) -> str:
    key = re.sub(r"^stem\.", "stage0.", key)
    key = re.sub(r"^stages\.(\d)\.", lambda match: f"stage{int(match[1]) + 1}.", key)
    return _swap(key, AUTHORS)


def plus(key: str) -> str:
    """Of RepVGGplus-L2pse, whose third stage has 24 blocks in two halves."""
    for ours, theirs in PLUS_HEADS.items():
        if key.startswith(ours):
            rest = key.removeprefix(ours)
            part = next(part for part in HEAD_PARTS if rest.startswith(part))
            return theirs + HEAD_PARTS[part] + rest.removeprefix(part)
    key = re.sub(r"^stage(\d)\.(\d+)\.", r"stage\1.blocks.\2.", authors(key))
    match = re.match(r"stage3\.blocks\.(\d+)\.(.*)", key)
    if not match:
        return key
    number = int(match[1])
    half = f"first.blocks.{number}" if number < 12 else f"second.blocks.{number - 12}"
    return f"stage3_{half}.{match[2]}"


def timm(key: str) -> str:
    return _swap(re.sub(r"^linear\.", "head.fc.", key), TIMM)


def mmpretrain(key: str) -> str:
    key = re.sub(r"^stem\.", "backbone.stem.", key)
    key = re.sub(r"^stages\.(\d)\.", lambda match: f"backbone.stage_{int(match[1]) + 1}.", key)
    return _swap(re.sub(r"^linear\.", "head.fc.", key), MMPRETRAIN)


def qarepvgg(key: str) -> str:
    key = key.replace(".branch_1x1.conv.", ".rbr_1x1.").replace(".post_bn.", ".bn.")
    return authors(key)


def ours(key: str) -> str:
    return key


def renamed(network: nn.Module, naming) -> dict[str, Tensor]:
    return {naming(key): tensor for key, tensor in network.state_dict().items()}


def golden_weights(shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The weights that the golden logits belong to: a function of each tensor's name and shape."""
    weights = {}
    for key, shape in shapes.items():
        draw = np.random.default_rng(zlib.crc32(key.encode()))
        size = tuple(shape)
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.tensor(1)
            continue
        if len(size) == 4:
            values = draw.standard_normal(size, dtype=np.float32)
            values *= np.float32(np.sqrt(1 / np.prod(size[1:])))
        elif len(size) == 2:
            values = draw.standard_normal(size, dtype=np.float32) * np.float32(0.05)
        elif key.endswith("running_var"):
            values = np.float32(0.5) + draw.random(size, dtype=np.float32)
        elif key.endswith("running_mean"):
            values = draw.standard_normal(size, dtype=np.float32) * np.float32(0.1)
        elif key.endswith("weight"):
            values = np.float32(0.3) + np.float32(0.4) * draw.random(size, dtype=np.float32)
        else:
            values = draw.standard_normal(size, dtype=np.float32) * np.float32(0.1)
        weights[key] = torch.from_numpy(values)
    return weights


def _swap(key: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        if f".{ours}." in key:
            return key.replace(f".{ours}.", f".{theirs}.")
    return key
