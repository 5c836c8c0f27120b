"""RepVGG: a plain stack of RepVGG blocks, pooled and classified.

RepVGG (Ding et al., 2021, arXiv:2101.03697), section 3.4 and table 2: a stem block, four stages,
global average pooling, dropout, a linear layer. RepVGGplus adds auxiliary classifiers that exist
while it trains. The named variants are in `repvgg.models.registry`.
"""

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx, nn

from repvgg.checks import check_integer, check_integers, check_number, refusal
from repvgg.models.block import BLOCKS, RepVGGBlock

MAX_STEM_WIDTH = 64


class RepVGG(nn.Module):
    """A RepVGG network.

    Shapes: images (N, in_channels, H, W) -> logits (N, num_classes).

    Args:
        depths: blocks in each of the four stages.
        widths: channels of each stage. The stem has min(64, widths[0]).
        block: "repvgg", or "qarepvgg" for blocks that survive 8-bit quantization.
        strides: of the stem and of the first block of each stage. The paper's five twos divide
            the resolution by 32; small images want ones in front.
        groups: of the 3x3 and 1x1 convolutions of every second block after the stem, the second
            first (section 3.4); the other blocks have 1.
        num_classes: K; 0 is a network without a classifier, which returns the pooled features
            (N, widths[3]).
        in_channels: channels of the images.
        dropout: probability in front of the linear layer; 0 is off.
        branch_drop: of every block: see `RepVGGBlock`; 0 is off.
        drop_path: of the last block; it grows linearly from the stem, as in stochastic depth
            (Huang et al., 2016, arXiv:1603.09382). Blocks without identity branch have none; 0 is
            off. This and `branch_drop` are noise in front of BatchNorms, whose statistics are to be
            re-estimated without it before folding: see `repvgg.reestimate_bn`.
        bn_eps: added to the variance by every BatchNorm.
        se_before_relu: reduction of the squeeze-and-excite gates in front of the ReLUs; 0 is none.
        se_after_relu: reduction of those behind the ReLUs; 0 is none.
        auxiliary_heads: classifiers after stage 1, stage 2 and the first half of stage 3, as in
            RepVGGplus: see `forward_auxiliary`.

    Raises:
        ValueError: a value is outside its range; the message names it.
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
        super().__init__()
        depths = check_integers("model.depths", depths, length=4, example="[2,4,14,1]")
        widths = check_integers("model.widths", widths, length=4, example="[48,96,192,1280]")
        strides = check_integers("model.strides", strides, length=5, example="[2,2,2,2,2]")
        check_integer("model.num_classes", num_classes, minimum=0, example=10)
        check_integer("model.in_channels", in_channels, minimum=1, example=3)
        check_integer("model.groups", groups, minimum=1, example=2)
        check_number("model.dropout", dropout, below=1, example=0.2)
        check_number("model.branch_drop", branch_drop, below=1, example=0.1)
        check_number("model.drop_path", drop_path, below=1, example=0.1)
        check_number("model.bn_eps", bn_eps, example=1e-5)
        check_integer("model.se_before_relu", se_before_relu, minimum=0, example=16)
        check_integer("model.se_after_relu", se_after_relu, minimum=0, example=4)
        if not isinstance(auxiliary_heads, bool):
            raise refusal("model.auxiliary_heads", auxiliary_heads, "must be true or false", "true")
        if auxiliary_heads and num_classes == 0:
            allowed = "these heads are classifiers, of which model.num_classes=0 has none"
            raise refusal("model.auxiliary_heads", auxiliary_heads, allowed, "false")
        if auxiliary_heads and depths[2] < 2:
            raise refusal(
                "model.depths", depths, "auxiliary heads halve stage 3, so it needs 2", "[1,1,2,1]"
            )
        if any(width % groups for width in widths):
            raise refusal("model.groups", groups, f"must divide all of widths {widths}", 1)
        if block not in BLOCKS:
            raise refusal("model.block", block, f"must be one of {', '.join(BLOCKS)}", "repvgg")
        self.num_classes = num_classes
        self.in_channels = in_channels

        def build(number: int, in_width: int, out_width: int, stride: int) -> RepVGGBlock:
            """The stem has number 0."""
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
        self.stem = build(0, in_channels, width, strides[0])
        stages = []
        number = 0
        for depth, out_width, stride in zip(depths, widths, strides[1:], strict=True):
            stage = []
            for i in range(depth):
                number += 1
                stage.append(build(number, width, out_width, stride if i == 0 else 1))
                width = out_width
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        if drop_path > 0 and not any(
            isinstance(module, RepVGGBlock) and module.branch_identity is not None
            for module in self.modules()
        ):
            raise refusal(
                "model.drop_path", drop_path, "this network has no block with an identity branch", 0
            )
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, num_classes) if num_classes else nn.Identity()

        # After which block each auxiliary classifier reads the features.
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
        if not torch.jit.is_scripting():
            self._warn_of_idle_heads(images)
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Run the trunk: (N, C, H, W) -> (N, widths[3], h, w).

        Deterministic, unless `branch_drop` or `drop_path` is on in training mode.
        """
        return self.stages(self.stem(images))

    def forward_head(self, features: Tensor) -> Tensor:
        """Pool, drop out, classify: (N, widths[3], h, w) -> (N, K). Random in training mode."""
        if torch.jit.is_scripting():
            return self.linear(self.dropout(features.mean((2, 3))))
        return self.linear(self.dropout(_pool(features)))  # of (N, widths[3])

    def forward_auxiliary(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run the trunk and, on the way, the auxiliary classifiers.

        The training loss adds their cross-entropies, each weighted 0.1 in the RepVGGplus recipe.

        Returns:
            what `forward_features` returns, and logits (N, K) of each auxiliary classifier (an
            empty list for a network without, or after `switch_to_deploy`).
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
        """Say once that a training forward gives the auxiliary classifiers no gradient."""
        if not (self._taps and self.training) or self._has_warned:
            return
        recorded = isinstance(images, fx.Proxy) or torch.jit.is_tracing()
        if recorded or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if any(parameter.requires_grad for parameter in self.auxiliary.parameters()):
            self._has_warned = True
            warnings.warn(
                "a plain forward in training mode gives the auxiliary classifiers no gradient: "
                "call forward_auxiliary, or build the network with auxiliary_heads=False",
                stacklevel=4,
            )

    def blocks(self) -> Iterator[nn.Module]:
        """All blocks after the stem, in order."""
        for stage in self.stages.children():
            yield from stage.children()

    def switch_to_deploy(self) -> None:
        """Fold every block and drop the auxiliary classifiers, in place; go to eval mode.

        Raises:
            ValueError: a block cannot be folded; it is named. The blocks before it are folded.
        """
        for name, module in self.named_modules():
            if isinstance(module, RepVGGBlock):
                try:
                    module.switch_to_deploy()
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
        self._taps = {}
        self.auxiliary = nn.ModuleDict()
        self.eval()


def _pool(features: Tensor) -> Tensor:
    """The mean over H and W, which exports as one node; adaptive pooling does not.

    In a graph of torch.fx it keeps four dimensions first: torch's quantized tensors in
    channels_last need them.
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
