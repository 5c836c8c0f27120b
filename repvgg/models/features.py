"""RepVGG as a backbone: feature maps of stem and stages, and what timm's users call on a network.

Names and conventions are those of timm (Wightman, 2019), so that detectors, segmenters and
optimizers written for timm's networks take ours.
"""

from collections.abc import Iterator, Sequence
from typing import TypedDict, TypeVar, overload

from torch import Tensor, nn

from repvgg.checks import check_boolean, wrong_value
from repvgg.models.block import RepVGGBlock
from repvgg.models.branches import pair

T = TypeVar("T", int, str)


class Feature(TypedDict):
    """A feature map, with timm's keys.

    Attributes:
        num_chs: channels.
        reduction: strides from the image to the map, multiplied.
        module: name of the module that returns it.
        stage: 0 for the stem, 1 to 4 for the stages.
        index: its place among all maps.
    """

    num_chs: int
    reduction: int
    module: str
    stage: int
    index: int


class FeatureInfo:
    """Channels, reductions and names of feature maps, as timm's `FeatureInfo`.

    `channels()`, `reduction()` and `module_name()` list the returned maps, in their order. With
    `idx` they and `info[i]` describe any map of the network, whether it is returned or not.

    Args:
        info: of every map of the network.
        out_indices: of the maps that are returned.
    """

    def __init__(self, info: Sequence[Feature], out_indices: Sequence[int]) -> None:
        self.info = list(info)
        self.out_indices = tuple(out_indices)

    @overload
    def channels(self, idx: int) -> int: ...
    @overload
    def channels(self, idx: Sequence[int] | None = None) -> list[int]: ...
    def channels(self, idx: int | Sequence[int] | None = None) -> int | list[int]:
        return self._pick([one["num_chs"] for one in self.info], idx)

    @overload
    def reduction(self, idx: int) -> int: ...
    @overload
    def reduction(self, idx: Sequence[int] | None = None) -> list[int]: ...
    def reduction(self, idx: int | Sequence[int] | None = None) -> int | list[int]:
        return self._pick([one["reduction"] for one in self.info], idx)

    @overload
    def module_name(self, idx: int) -> str: ...
    @overload
    def module_name(self, idx: Sequence[int] | None = None) -> list[str]: ...
    def module_name(self, idx: int | Sequence[int] | None = None) -> str | list[str]:
        return self._pick([one["module"] for one in self.info], idx)

    def get_dicts(
        self, keys: Sequence[str] | None = None, idx: Sequence[int] | None = None
    ) -> list[dict[str, object]]:
        """The returned maps, or those of `idx`, with all keys or those given."""
        chosen = [self.info[i] for i in (self.out_indices if idx is None else idx)]
        return [{k: v for k, v in one.items() if keys is None or k in keys} for one in chosen]

    def _pick(self, values: list[T], idx: int | Sequence[int] | None) -> T | list[T]:
        if isinstance(idx, int):
            return values[idx]
        return [values[i] for i in (self.out_indices if idx is None else idx)]

    def __getitem__(self, index: int) -> Feature:
        return self.info[index]

    def __len__(self) -> int:
        return len(self.info)


class Backbone(nn.Module):
    """A stem and stages of RepVGG blocks, without a forward.

    Args:
        stem: a block.
        stages: each a sequence of blocks.
    """

    def __init__(self, stem: nn.Module, stages: nn.Sequential) -> None:
        super().__init__()
        self.stem = stem
        self.stages = stages

    # torch.jit.script compiles properties unless they are listed here.
    __jit_unused_properties__ = ("feature_info", "num_features")

    @property
    def num_features(self) -> int:
        """Channels of the last feature map."""
        return self.feature_info[-1]["num_chs"]

    @property
    def feature_info(self) -> FeatureInfo:
        """Describes the feature maps, from the layers as they are now."""
        info: list[Feature] = []
        reduction = 1
        named = [("stem", self.stem)]
        named += [(f"stages.{number}", stage) for number, stage in self.stages.named_children()]
        for index, (name, part) in enumerate(named):
            channels = 0
            for block in [part] if index == 0 else part.children():
                if not isinstance(block, RepVGGBlock):
                    raise ValueError(
                        f"{name} has a {type(block).__name__}, which is no RepVGG block, so the "
                        "channels and the stride of its feature map are unknown"
                    )
                channels = block.out_channels
                reduction *= _stride(block)
            info.append(
                Feature(
                    num_chs=channels, reduction=reduction, module=name, stage=index, index=index
                )
            )
        return FeatureInfo(info, range(len(info)))

    def blocks(self) -> Iterator[nn.Module]:
        """All blocks after the stem, in order."""
        for stage in self.stages.children():
            yield from stage.children()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the RepVGG recipe does not decay: see `without_decay`."""
        return without_decay(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass: see `RepVGGBlock.recompute`."""
        check_boolean("enable", enable)
        for module in self.modules():
            if isinstance(module, RepVGGBlock):
                module.recompute = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Patterns that assign parameters to layers, for layer-wise decay by timm's optimizers.

        A layer is the stem, a block (a stage if `coarse`) or the classifiers.
        """
        return {
            "stem": r"^stem",
            "blocks": [(r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)", None)],
        }

    def switch_to_deploy(self) -> None:
        """Fold every block, in place; set eval mode.

        Raises:
            ValueError: a block cannot be folded; the error names it. Earlier blocks are folded.
        """
        for name, module in self.named_modules():
            if isinstance(module, RepVGGBlock):
                try:
                    module.switch_to_deploy()
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
        self.eval()


class RepVGGFeatures(Backbone):
    """The feature maps of a network, for detectors and segmenters.

    Shapes: images (N, C, H, W) -> a list of (N, num_chs, ceil(H / reduction), ceil(W / reduction)),
    one for each index.

    Args:
        network: its stem and stages become those of this module; they are not copied. Stages that
            no map needs are left out, and so is the head.
        out_indices: of the maps, in increasing order: 0 is the stem, 1 to 4 are the stages,
            negative ones count from the end. An integer n stands for the last n.

    Attributes:
        feature_info: channels, reductions and names of the maps.
        out_indices: none is negative.

    Raises:
        ArgumentError: `out_indices` are none of these.
    """

    def __init__(self, network: Backbone, out_indices: object = (0, 1, 2, 3, 4)) -> None:
        stages = list(network.stages)
        chosen = _indices(out_indices, 1 + len(stages))
        super().__init__(network.stem, nn.Sequential(*stages[: chosen[-1]]))
        self.out_indices = chosen
        self.training = self.stages.training = network.training

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images)
        maps: list[Tensor] = []
        if 0 in self.out_indices:
            maps.append(x)
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number + 1 in self.out_indices:
                maps.append(x)
        return maps

    @property
    def feature_info(self) -> FeatureInfo:
        return FeatureInfo(super().feature_info.info, self.out_indices)


def without_decay(network: nn.Module) -> set[str]:
    """Names of the parameters of any network that the RepVGG recipe does not decay.

    Kernels, linear weights and the weights of the identity branches' BatchNorms decay. Biases and
    the weights of all other BatchNorms do not.
    """
    identities = {
        id(module.branch_identity.weight)
        for module in network.modules()
        if isinstance(module, RepVGGBlock) and isinstance(module.branch_identity, nn.BatchNorm2d)
    }
    return {
        name
        for name, parameter in network.named_parameters()
        if parameter.ndim <= 1 and id(parameter) not in identities
    }


def _stride(block: RepVGGBlock) -> int:
    """The stride of the convolution; `block.stride` is a copy."""
    conv = block.reparam
    if conv is None:
        assert block.branch_3x3 is not None
        conv = block.branch_3x3.conv
    return pair(conv.stride)[0]


def _indices(given: object, count: int) -> list[int]:
    """Resolve the indices of `count` maps: none is negative, and they increase."""
    chosen: list[int] = []
    if isinstance(given, int) and not isinstance(given, bool) and 1 <= given <= count:
        chosen = list(range(count - given, count))
    elif isinstance(given, Sequence) and all(type(i) is int and -count <= i < count for i in given):
        chosen = [i % count for i in given]
    if not chosen or chosen != sorted(set(chosen)):
        allowed = (
            f"must be increasing integers from {-count} to {count - 1} (0 is the stem), or how "
            "many of the last maps"
        )
        raise wrong_value("out_indices", given, allowed, f"[{','.join(map(str, range(1, count)))}]")
    return chosen
