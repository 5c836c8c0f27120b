"""Third-party checkpoints, which hold only weights, in other key layouts (`checkpoint.layouts`).

What they do not record is assumed: ImageNet's data description, and a probe batch of noise.
"""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from repvgg.checkpoint import recognize
from repvgg.checkpoint.native import UNKNOWN, Checkpoint, Network, record_probe
from repvgg.checkpoint.tensors import METADATA, Content
from repvgg.checks import ArgumentError, check_integer
from repvgg.contract import (
    METADATA_KEY,
    DataContract,
    Description,
    ModelConfig,
    Plain,
)
from repvgg.models.network import RepVGG
from repvgg.models.registry import imagenet_classes

NUM_NOISE = 8  # images in the probe batch of a third-party checkpoint


class Assumptions(TypedDict, total=False):
    """What the caller knows about a third-party file; None or missing: what is usual.

    Attributes:
        weights: which of several networks in the file, such as "state_dict_ema".
        bn_eps, strides: of the network: see `from_state_dict`.
    """

    weights: str | None
    bn_eps: float | None
    strides: Sequence[int] | None


def from_state_dict(
    state_dict: Mapping[str, object],
    *,
    weights: str | None = None,
    bn_eps: float = 1e-5,
    strides: Sequence[int] | None = None,
) -> RepVGG:
    """Build the RepVGG of a state_dict in any known layout, and load it.

    Layout, variant, classes and form follow from keys and shapes; other depths and widths than
    those of a variant work too. Loading is strict. If the whole classifier is missing, the network
    has none (num_classes=0) and returns pooled features; other tensors, of a detector or segmenter,
    are then ignored.

    Args:
        state_dict: of the authors' RepVGG, RepVGGplus or PSPNet, timm, mmpretrain, QARepVGG, or
            ours; multi-branch or folded, tensors or NumPy arrays, with any wrappers and prefix.
        weights: which network, if there are several: its wrappers and prefix.
        bn_eps: of its BatchNorms, which a state_dict does not record. Some programs train with
            1e-3.
        strides: of the stem and of the first block of each stage, which a state_dict does not
            record; None is the paper's [2, 2, 2, 2, 2].

    Returns:
        the network, folded if the state_dict is, in eval mode, float32, on the CPU.

    Raises:
        ValueError: there is no RepVGG or there are several, or a tensor does not fit; the first
            such keys are named.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"a {type(state_dict).__name__} is not a state_dict: pass state_dict()")
    found = recognize.choose(state_dict, weights)
    return recognize.load(found, recognize.plan(found, bn_eps=bn_eps, strides=strides))


def imagenet(config: ModelConfig) -> DataContract:
    """The usual data description of a network that was trained on ImageNet.

    Args:
        config: of the network. 1000 classes get ImageNet's names, any other number gets numbers.

    Raises:
        ValueError: the network does not take images of three channels, or has no classifier.
    """
    _require_classifier(config)
    if config["in_channels"] != 3:
        raise ArgumentError(
            f"it takes images of {config['in_channels']} channels, so it was not trained on "
            "ImageNet: pass mean and std of its images, for example mean=[0.5] std=[0.5]",
            "mean",
            "std",
        )
    count = check_integer("num_classes", config["num_classes"], minimum=1, example=1000)
    classes = imagenet_classes() if count == 1000 else [str(number) for number in range(count)]
    large = config["name"] in ("repvgg_d2se", "repvggplus_l2pse")  # published at 320 pixels
    return DataContract(
        classes=classes,
        in_channels=3,
        image_size=[320, 320] if large else [224, 224],
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225],
        interpolation="bilinear",
        resize_size=320 if large else 256,
    )


def with_noise(network: Network, data: DataContract) -> Checkpoint:
    """Make a checkpoint of a network without a probe batch: record its logits of noise.

    Raises:
        ValueError: the network has another number of classes or channels, or no classifier.
    """
    _require_classifier(network.config)
    for what, given, held in (
        ("classes", len(data.classes), network.config["num_classes"]),
        ("channels", data.in_channels, network.config["in_channels"]),
    ):
        if given != held:
            raise ValueError(f"data has {given} {what}, but the network has {held}")
    probe = record_probe(network.model, data, _noise(data), torch.full((NUM_NOISE,), UNKNOWN))
    return Checkpoint(network.model, network.config, data, probe, network.origin)


def open_foreign(
    content: Content,
    *,
    weights: str | None = None,
    bn_eps: float | None = None,
    strides: Sequence[int] | None = None,
) -> Network:
    """Find and load the network in the content of a third-party file; see `Assumptions`."""
    found = recognize.choose(content, weights)
    config: dict[str, Plain]
    if said := description(content):
        if bn_eps is not None or strides is not None:
            raise ValueError("it records these: leave out bn_eps and strides")
        config, data = {**recognize.sizes(found), **said.config}, said.data
    else:
        eps = 1e-5 if bn_eps is None else bn_eps
        config, data = recognize.plan(found, bn_eps=eps, strides=strides), None
    model = recognize.load(found, config)
    return Network(model, config, data, recognize.describe(found, config))


def description(content: Content) -> Description | None:
    """The description in a safetensors file that deploy.py wrote; None for other files."""
    said = content.get(METADATA)
    text = said.get(METADATA_KEY) if isinstance(said, Mapping) else None
    if not isinstance(text, str):
        return None
    try:
        found = Description.from_json(text)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return None  # written by another program
    named = isinstance(found.config, Mapping) and isinstance(found.config.get("name"), str)
    return found if named else None


def _require_classifier(config: ModelConfig) -> None:
    if config["num_classes"] == 0:
        raise ValueError(
            f"it holds {recognize.describe_variant(config)} without a classifier, so it has no "
            "logits: train one first, or use its features, "
            "repvgg.checkpoint.open_network(PATH).model"
        )


def _noise(data: DataContract) -> Tensor:
    """Images of coarse and fine noise, always the same: (NUM_NOISE, C, H, W), uint8."""
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_NOISE, data.in_channels)
    coarse = torch.rand(*shape, 7, 7, generator=generator)
    images = F.interpolate(coarse, size=tuple(data.image_size), mode="bilinear")
    images = images + 0.1 * torch.randn(images.shape, generator=generator)
    return (255 * images.clamp(0, 1)).to(torch.uint8)
