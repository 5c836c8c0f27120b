"""RepVGG: a plain stack of RepVGG blocks, pooled and classified.

RepVGG (Ding et al., 2021, arXiv:2101.03697), section 3.4 and table 2: a stem block, four stages,
global average pooling, dropout, a linear layer. RepVGGplus adds auxiliary classifiers for training.
`repvgg.models.registry` has the named variants.
"""

import warnings
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]  # not in __all__

from repvgg.checks import (
    check_boolean,
    check_integer,
    check_integers,
    check_number,
    wrong_value,
)
from repvgg.models.block import BLOCKS, RepVGGBlock, is_traced
from repvgg.models.features import Backbone

MAX_STEM_WIDTH = 64
MOST_BLOCKS = 500  # ten times those of the deepest variant; each takes a millisecond to build


class RepVGG(Backbone):
    """A RepVGG network.

    Shapes: images (N, in_channels, H, W) -> logits (N, num_classes).

    Args:
        depths: blocks in each of the four stages.
        widths: channels of each stage. The stem has min(64, widths[0]).
        block: "repvgg", or "qarepvgg" for blocks that suit int8 quantization.
        strides: of the stem and of the first block of each stage. The paper's five twos divide
            the resolution by 32. For small images the first ones should be 1.
        groups: of the convolutions of every second block after the stem: blocks 2, 4, ... (section
            3.4). The other blocks have 1.
        num_classes: K. With 0 there is no classifier, and the network returns the pooled features
            (N, widths[3]).
        in_channels: channels of the images.
        dropout: probability in front of the linear layer; 0 is off.
        branch_drop: of every block: see `RepVGGBlock`; 0 is off.
        drop_path: of the last block. It grows linearly from the stem, as in stochastic depth
            (Huang et al., 2016, arXiv:1603.09382); 0 is off. Blocks without an identity branch
            have none. `drop_path` and `branch_drop` change the statistics of BatchNorms:
            re-estimate them before folding (`repvgg.reestimate_bn`).
        bn_eps: added to the variance by every BatchNorm.
        se_before_relu: reduction of squeeze-and-excite before the ReLUs; 0 is none.
        se_after_relu: reduction of squeeze-and-excite after the ReLUs; 0 is none.
        auxiliary_heads: classifiers after stage 1, stage 2 and the first half of stage 3, as in
            RepVGGplus: see `forward_auxiliary`.

    Raises:
        ArgumentError: a value is outside its range.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        widths: Sequence[int],
        block: str = "repvgg",
        strides: Sequence[int] = (2, 2, 2, 2, 2),
        groups: int = 1,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.0,
        branch_drop: float = 0.0,
        drop_path: float = 0.0,
        bn_eps: float = 1e-5,
        se_before_relu: int = 0,
        se_after_relu: int = 0,
        auxiliary_heads: bool = False,
    ) -> None:
        depths = check_integers("depths", depths, length=4, example="[2,4,14,1]")
        widths = check_integers("widths", widths, length=4, example="[48,96,192,1280]")
        strides = check_integers("strides", strides, length=5, example="[2,2,2,2,2]")
        check_integer("num_classes", num_classes, minimum=0, example=10)
        check_integer("in_channels", in_channels, minimum=1, example=3)
        check_integer("groups", groups, minimum=1, example=2)
        check_number("dropout", dropout, below=1, example=0.2)
        check_number("branch_drop", branch_drop, below=1, example=0.1)
        check_number("drop_path", drop_path, below=1, example=0.1)
        check_number("bn_eps", bn_eps, example=1e-5)
        check_integer("se_before_relu", se_before_relu, minimum=0, example=16)
        check_integer("se_after_relu", se_after_relu, minimum=0, example=4)
        check_boolean("auxiliary_heads", auxiliary_heads)
        if auxiliary_heads and num_classes == 0:
            allowed = "are classifiers, which a network of num_classes=0 does not have"
            raise wrong_value("auxiliary_heads", auxiliary_heads, allowed, "false")
        if auxiliary_heads and depths[2] < 2:
            raise wrong_value(
                "depths", depths, "stage 3 needs 2 blocks or more for auxiliary heads", "[1,1,2,1]"
            )
        if sum(depths) > MOST_BLOCKS:
            raise wrong_value("depths", depths, f"must be at most {MOST_BLOCKS} blocks together")
        if any(width % groups for width in widths):
            raise wrong_value("groups", groups, f"must divide all widths {widths}", 1)
        if block not in BLOCKS:
            raise wrong_value("block", block, f"must be one of {', '.join(BLOCKS)}", "repvgg")

        def build(number: int, in_width: int, out_width: int, stride: int) -> RepVGGBlock:
            """Build block `number`; the stem is block 0."""
            has_identity = in_width == out_width and stride == 1
            return BLOCKS[block](
                in_width,
                out_width,
                stride=stride,
                groups=groups if number > 0 and number % 2 == 0 else 1,
                bn_eps=bn_eps,
                branch_drop=branch_drop,
                drop_path=drop_path * (number + 1) / (1 + sum(depths)) if has_identity else 0.0,
                se_before_relu=se_before_relu,
                se_after_relu=se_after_relu,
            )

        width = min(MAX_STEM_WIDTH, widths[0])
        stem = build(0, in_channels, width, strides[0])
        stages = []
        number = 0
        for depth, out_width, stride in zip(depths, widths, strides[1:], strict=True):
            stage = []
            for i in range(depth):
                number += 1
                stage.append(build(number, width, out_width, stride if i == 0 else 1))
                width = out_width
            stages.append(nn.Sequential(*stage))
        super().__init__(stem, nn.Sequential(*stages))
        self.num_classes = num_classes
        self.in_channels = in_channels
        if drop_path > 0 and not any(
            isinstance(module, RepVGGBlock) and module.branch_identity is not None
            for module in self.modules()
        ):
            raise wrong_value(
                "drop_path", drop_path, "this network has no block with an identity branch", 0
            )
        self.dropout = nn.Dropout(dropout)
        self.linear = _classifier(width, num_classes)

        # The block after which each auxiliary classifier reads the features.
        self._taps: dict[int, str] = {}
        self._has_warned = False
        self.auxiliary = nn.ModuleDict()
        if auxiliary_heads:
            self._taps = {
                depths[0]: "stage1",
                depths[0] + depths[1]: "stage2",
                depths[0] + depths[1] + depths[2] // 2: "stage3_half",
            }
            for name, channels in zip(self._taps.values(), widths[:3], strict=True):
                self.auxiliary[name] = _auxiliary_head(channels, num_classes, bn_eps)

    def forward(self, images: Tensor) -> Tensor:
        if not is_scripting():
            self._warn_of_idle_heads(images)
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Run the backbone: (N, C, H, W) -> (N, widths[3], h, w).

        It is random in training mode if `branch_drop` or `drop_path` is on.
        """
        features: Tensor = self.stages(self.stem(images))
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, drop out, classify: (N, widths[3], h, w) -> (N, K).

        It is random in training mode if `dropout` is on.

        Args:
            pre_logits: return what enters the linear layer, (N, widths[3]).
        """
        pooled = features.mean((2, 3)) if is_scripting() else _pool(features)  # (N, widths[3])
        head: Tensor = self.dropout(pooled)
        if not pre_logits:
            head = self.linear(head)
        return head

    def get_classifier(self) -> nn.Module:
        """The linear layer; with num_classes=0 an nn.Identity."""
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the linear layer, and those of the auxiliary classifiers, by new ones.

        They have new random weights, and device and dtype of the backbone. The config of a
        checkpoint records the number of classes too, so save it with the new one.

        Args:
            num_classes: with 0 the network returns pooled features, and auxiliary classifiers are
                removed.
            global_pool: for callers of timm's method: None or "avg", as this network averages.

        Raises:
            ArgumentError: `num_classes` is below 0, or `global_pool` is another pooling.
        """
        check_integer("num_classes", num_classes, minimum=0, example=10)
        if global_pool not in (None, "avg"):
            allowed = "must be avg; for the feature maps call forward_features"
            raise wrong_value("global_pool", global_pool, allowed)
        weight = next(self.stages.parameters())
        self.num_classes = num_classes
        self.linear = _classifier(self.num_features, num_classes).to(weight.device, weight.dtype)
        if num_classes == 0:
            self._remove_auxiliary()
        for head in self.auxiliary.values():
            assert isinstance(head, nn.Sequential)
            old = head[-1]
            assert isinstance(old, nn.Linear)
            head[-1] = _classifier(old.in_features, num_classes).to(weight.device, weight.dtype)

    def forward_auxiliary(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run the backbone and the auxiliary classifiers.

        The training loss adds their cross-entropies, each weighted 0.1 in the RepVGGplus recipe.

        Returns:
            the features, as `forward_features`, and logits (N, K) of each auxiliary classifier. The
            list is empty for a network without them, and after `switch_to_deploy`.
        """
        x = self.stem(images)
        logits = []
        for number, block in enumerate(self.blocks(), start=1):
            x = block(x)
            if number in self._taps:
                logits.append(self.auxiliary[self._taps[number]](x))
        return x, logits

    @torch.jit.unused
    def _warn_of_idle_heads(self, images: Tensor) -> None:
        """Warn once that a plain forward does not train the auxiliary classifiers."""
        if not (self._taps and self.training) or self._has_warned:
            return
        if is_traced(images) or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if any(parameter.requires_grad for parameter in self.auxiliary.parameters()):
            self._has_warned = True
            warnings.warn(
                "a plain forward in training mode gives the auxiliary classifiers no gradient: "
                "call forward_auxiliary, or build the network with auxiliary_heads=False",
                stacklevel=4,
            )

    def switch_to_deploy(self) -> None:
        """Fold every block and remove the auxiliary classifiers, in place; set eval mode.

        Raises:
            ValueError: a block cannot be folded; the error names it. Earlier blocks are folded.
        """
        super().switch_to_deploy()
        self._remove_auxiliary()

    def _remove_auxiliary(self) -> None:
        self._taps = {}
        self.auxiliary = nn.ModuleDict()


def _classifier(width: int, num_classes: int) -> nn.Module:
    return nn.Linear(width, num_classes) if num_classes else nn.Identity()


def _pool(features: Tensor) -> Tensor:
    """Average over H and W; unlike adaptive pooling this exports as one node.

    In a graph of torch.fx the mean keeps four dimensions, which torch's quantized tensors in
    channels_last need.
    """
    if isinstance(features, fx.Proxy):
        return features.mean((2, 3), keepdim=True).flatten(1)
    return features.mean((2, 3))


def _auxiliary_head(channels: int, num_classes: int, bn_eps: float) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
            bn=nn.BatchNorm2d(channels, eps=bn_eps),
            relu=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(channels, num_classes),
        )
    )
