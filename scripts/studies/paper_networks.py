"""Small networks of papers, as they are commonly written in public repositories."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_bn(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Sequential:
    """The `Sequential` with children `conv` and `bn` of most of these repositories."""
    block = nn.Sequential()
    padding = kernel // 2 * dilation
    block.add_module(
        "conv",
        nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False),
    )
    block.add_module("bn", nn.BatchNorm2d(outputs))
    return block


def conv_bn_act(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        act(),
    )


class Classifier(nn.Module):
    """A stem, blocks, pooling and a linear layer."""

    def __init__(self, *blocks: nn.Module, width: int, stem: int = 16) -> None:
        super().__init__()
        self.stem = conv_bn_act(3, stem, 3, 2)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        x = F.adaptive_avg_pool2d(x, 1)
        return self.head(x.view(x.size(0), -1))


class SEBlock(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, inner, 1)
        self.up = nn.Conv2d(inner, channels, 1)
        self.channels = channels

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.avg_pool2d(inputs, kernel_size=inputs.size(3))
        x = torch.sigmoid(self.up(F.relu(self.down(x))))
        return inputs * x.view(-1, self.channels, 1, 1)


class RepVGGBlock(nn.Module):
    """RepVGG (Ding 2021), D2se: squeeze-and-excite behind the sum; `post`: behind the ReLU."""

    rbr_reparam: nn.Conv2d  # after the fold of the authors' program

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int = 1,
        groups: int = 1,
        se: bool = False,
        post: bool = False,
    ) -> None:
        super().__init__()
        self.nonlinearity = nn.ReLU()
        self.se = SEBlock(outputs, outputs // 4) if se else nn.Identity()
        self.post_se = SEBlock(outputs, outputs // 4) if post else nn.Identity()
        same = inputs == outputs and stride == 1
        self.rbr_identity = nn.BatchNorm2d(inputs) if same else None
        self.rbr_dense = conv_bn(inputs, outputs, 3, stride, groups)
        self.rbr_1x1 = conv_bn(inputs, outputs, 1, stride, groups)

    def forward(self, inputs: Tensor) -> Tensor:
        if hasattr(self, "rbr_reparam"):
            return self.nonlinearity(self.se(self.rbr_reparam(inputs)))
        id_out: Any = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        out = self.rbr_dense(inputs) + self.rbr_1x1(inputs) + id_out
        return self.post_se(self.nonlinearity(self.se(out)))


def repvgg(se: bool = False, post: bool = False) -> nn.Module:
    def block(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> RepVGGBlock:
        return RepVGGBlock(inputs, outputs, stride, groups, se, post)

    return Classifier(
        block(16, 24, 2), block(24, 24), block(24, 48, 2), block(48, 48, 1, 4), width=48
    )


class RepVGGplusStage(nn.Module):
    """RepVGGplus (the authors' repository): stages with an auxiliary head, SE behind the ReLU."""

    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        super().__init__()
        sizes = [inputs] + [outputs] * depth
        self.blocks = nn.ModuleList(
            RepVGGBlock(a, b, 2 if i == 0 else 1, post=True)
            for i, (a, b) in enumerate(itertools.pairwise(sizes))
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class RepVGGplus(nn.Module):
    """RepVGGplus (the authors' repository): outputs in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.stage0 = RepVGGBlock(3, 16, 2, post=True)
        self.stage1 = RepVGGplusStage(16, 24, 2)
        self.stage2 = RepVGGplusStage(24, 32, 3)
        self.aux = nn.Sequential(
            conv_bn_act(24, 24, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)
        )
        self.linear = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stage1(self.stage0(x))
        aux = self.aux(x)
        x = self.stage2(x)
        return {"main": self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)), "aux": aux}


class QARepVGGBlock(nn.Module):
    """QARepVGG (Chu 2022): the branches lose BatchNorms, one follows their sum."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.rbr_dense = conv_bn(inputs, outputs, 3, stride)
        self.rbr_1x1 = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.rbr_identity = nn.Identity() if inputs == outputs and stride == 1 else None
        self.bn = nn.BatchNorm2d(outputs)
        self.nonlinearity = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        identity: Any = 0 if self.rbr_identity is None else self.rbr_identity(x)
        return self.nonlinearity(self.bn(self.rbr_dense(x) + self.rbr_1x1(x) + identity))


class ACBlock(nn.Module):
    """ACNet (Ding 2019): square, vertical and horizontal kernels with a BatchNorm each."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.square_conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.square_bn = nn.BatchNorm2d(outputs)
        self.ver_conv = nn.Conv2d(inputs, outputs, (3, 1), stride, (1, 0), bias=False)
        self.ver_bn = nn.BatchNorm2d(outputs)
        self.hor_conv = nn.Conv2d(inputs, outputs, (1, 3), stride, (0, 1), bias=False)
        self.hor_bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        square = self.square_bn(self.square_conv(x))
        vertical = self.ver_bn(self.ver_conv(x))
        horizontal = self.hor_bn(self.hor_conv(x))
        return F.relu(square + vertical + horizontal)


class IdentityBasedConv1x1(nn.Conv2d):
    """DBB's 1x1 kernel, to which the identity is added."""

    id_tensor: Tensor

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__(channels, channels, 1, groups=groups, bias=False)
        width = channels // groups
        identity = torch.eye(width).repeat(groups, 1).view(channels, width, 1, 1)
        self.register_buffer("id_tensor", identity)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight + self.id_tensor.to(self.weight.device).type_as(self.weight)
        return F.conv2d(x, kernel, None, stride=1, padding=0, groups=self.groups)


class BNAndPad(nn.Module):
    """DBB's BatchNorm, which pads with what it makes of zero."""

    def __init__(self, pad: int, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.pad_pixels = pad

    def forward(self, x: Tensor) -> Tensor:
        output = self.bn(x)
        if self.pad_pixels > 0:
            # An assert that there are statistics would change the order in which they are read.
            values = self.bn.bias.detach() - self.bn.running_mean * self.bn.weight.detach() / (  # type: ignore[operator]
                torch.sqrt(self.bn.running_var + self.bn.eps)  # type: ignore[arg-type, operator]
            )
            output = F.pad(output, [self.pad_pixels] * 4)
            values = values.view(1, -1, 1, 1)
            output[:, :, 0 : self.pad_pixels, :] = values
            output[:, :, -self.pad_pixels :, :] = values
            output[:, :, :, 0 : self.pad_pixels] = values
            output[:, :, :, -self.pad_pixels :] = values
        return output


class DBB(nn.Module):
    """Diverse Branch Block (Ding 2021): 3x3, 1x1, 1x1 then average, 1x1 then 3x3."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.dbb_origin = conv_bn(inputs, outputs, 3, stride)
        self.dbb_avg = nn.Sequential()
        self.dbb_avg.add_module("conv", nn.Conv2d(inputs, outputs, 1, bias=False))
        self.dbb_avg.add_module("bn", BNAndPad(1, outputs))
        self.dbb_avg.add_module("avg", nn.AvgPool2d(3, stride, 0))
        self.dbb_avg.add_module("avgbn", nn.BatchNorm2d(outputs))
        self.dbb_1x1 = conv_bn(inputs, outputs, 1, stride)
        self.dbb_1x1_kxk = nn.Sequential()
        self.dbb_1x1_kxk.add_module("idconv1", IdentityBasedConv1x1(inputs))
        self.dbb_1x1_kxk.add_module("bn1", BNAndPad(1, inputs))
        self.dbb_1x1_kxk.add_module("conv2", nn.Conv2d(inputs, outputs, 3, stride, bias=False))
        self.dbb_1x1_kxk.add_module("bn2", nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.dbb_origin(x)
        out += self.dbb_1x1(x)
        out += self.dbb_avg(x)
        out += self.dbb_1x1_kxk(x)
        return F.relu(out)


class MobileOneBlock(nn.Module):
    """MobileOne (Vasu 2022): k parallel 3x3, one 1x1 and a BatchNorm of the input."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, k: int = 3
    ) -> None:
        super().__init__()
        self.num_conv_branches = k
        same = inputs == outputs and stride == 1
        self.rbr_skip = nn.BatchNorm2d(inputs) if same else None
        self.rbr_conv = nn.ModuleList(
            conv_bn(inputs, outputs, kernel, stride, groups) for _ in range(k)
        )
        self.rbr_scale = conv_bn(inputs, outputs, 1, stride, groups) if kernel > 1 else None
        self.activation: nn.Module = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        skip: Any = 0
        if self.rbr_skip is not None:
            skip = self.rbr_skip(x)
        scale: Any = 0
        if self.rbr_scale is not None:
            scale = self.rbr_scale(x)
        out = scale + skip
        for index in range(self.num_conv_branches):
            out += self.rbr_conv[index](x)
        return self.activation(out)


class ReparamLargeKernelConv(nn.Module):
    """RepLKNet (Ding 2022): a large depthwise kernel beside a small one."""

    def __init__(self, channels: int, kernel: int = 13, small: int = 5) -> None:
        super().__init__()
        self.lkb_origin = conv_bn(channels, channels, kernel, groups=channels)
        self.small_conv = conv_bn(channels, channels, small, groups=channels)

    def forward(self, inputs: Tensor) -> Tensor:
        out = self.lkb_origin(inputs)
        if hasattr(self, "small_conv"):
            out += self.small_conv(inputs)
        return out


class RepLKBlock(nn.Module):
    """RepLKNet (Ding 2022): a BatchNorm in front, 1x1, large kernel, 1x1, a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.prelkb_bn = nn.BatchNorm2d(channels)
        self.pw1 = conv_bn_act(channels, channels, 1)
        self.large_kernel = ReparamLargeKernelConv(channels)
        self.pw2 = conv_bn(channels, channels, 1)
        self.ffn_bn = nn.BatchNorm2d(channels)
        self.ffn1 = conv_bn(channels, 4 * channels, 1)
        self.ffn2 = conv_bn(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.pw1(self.prelkb_bn(x))
        x = x + self.pw2(F.relu(self.large_kernel(out)))
        return x + self.ffn2(F.gelu(self.ffn1(self.ffn_bn(x))))


class DilatedReparamBlock(nn.Module):
    """UniRepLKNet (Ding 2024): a large kernel beside small dilated ones."""

    def __init__(self, channels: int, kernel: int = 9) -> None:
        super().__init__()
        self.lk_origin = nn.Conv2d(
            channels, channels, kernel, 1, kernel // 2, groups=channels, bias=False
        )
        self.kernel_sizes = [5, 5, 3, 3]
        self.dilates = [1, 2, 3, 4]
        self.origin_bn = nn.BatchNorm2d(channels)
        for k, r in zip(self.kernel_sizes, self.dilates, strict=True):
            padding = (r * (k - 1) + 1) // 2
            conv = nn.Conv2d(channels, channels, k, 1, padding, r, channels, bias=False)
            setattr(self, f"dil_conv_k{k}_{r}", conv)
            setattr(self, f"dil_bn_k{k}_{r}", nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "origin_bn"):
            return self.lk_origin(x)
        out = self.origin_bn(self.lk_origin(x))
        for k, r in zip(self.kernel_sizes, self.dilates, strict=True):
            conv = getattr(self, f"dil_conv_k{k}_{r}")
            bn = getattr(self, f"dil_bn_k{k}_{r}")
            out = out + bn(conv(x))
        return out


class GRN(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.rand(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        size = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return (self.gamma * size / (size.mean(-1, keepdim=True) + 1e-6) + 1) * x + self.beta


class UniRepLKBlock(nn.Module):
    """UniRepLKNet (Ding 2024): linear layers in channels-last, a BatchNorm at the end."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = DilatedReparamBlock(channels)
        self.norm = nn.BatchNorm2d(channels)
        self.se = SEBlock(channels, channels // 4)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.grn = GRN(4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels, bias=False)
        self.last = nn.BatchNorm2d(channels)
        self.gamma = nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.norm(self.dwconv(x))).permute(0, 2, 3, 1)
        y = self.pwconv2(self.grn(F.gelu(self.pwconv1(y)))).permute(0, 3, 1, 2)
        return x + self.gamma.view(1, -1, 1, 1) * self.last(y)


class Residual(nn.Module):
    def __init__(self, m: nn.Module, drop: float = 0.0) -> None:
        super().__init__()
        self.m = m
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.drop > 0:
            keep = torch.rand(x.size(0), 1, 1, 1, device=x.device).ge_(self.drop)
            return x + self.m(x) * keep.div(1 - self.drop).detach()
        return x + self.m(x)


class RepVGGDW(nn.Module):
    """RepViT (Wang 2024): depthwise 3x3 and 1x1 and the input, a BatchNorm behind the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv_bn(channels, channels, 3, groups=channels)
        self.conv1 = nn.Conv2d(channels, channels, 1, groups=channels)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn((self.conv(x) + self.conv1(x)) + x)


class RepViTBlock(nn.Module):
    """RepViT (Wang 2024)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, se: bool = True) -> None:
        super().__init__()
        squeeze = SEBlock(inputs, inputs // 4) if se else nn.Identity()
        if stride == 2:
            first = conv_bn(inputs, inputs, 3, 2, inputs)
            self.token_mixer = nn.Sequential(first, squeeze, conv_bn(inputs, outputs, 1))
        else:
            self.token_mixer = nn.Sequential(RepVGGDW(inputs), squeeze)
        self.channel_mixer = Residual(
            nn.Sequential(
                conv_bn(outputs, 2 * outputs, 1), nn.GELU(), conv_bn(2 * outputs, outputs, 1)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.channel_mixer(self.token_mixer(x))


class RepMixer(nn.Module):
    """FastViT (Vasu 2023): x + scale * (mixer(x) - norm(x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = MobileOneBlock(channels, channels, 3, groups=channels, k=0)
        self.norm.rbr_scale = None
        self.norm.activation = nn.Identity()
        self.mixer = MobileOneBlock(channels, channels, 3, groups=channels, k=1)
        self.mixer.activation = nn.Identity()
        self.layer_scale = nn.Parameter(torch.rand(channels, 1, 1))
        self.ffn = nn.Sequential(
            conv_bn(channels, channels, 7, groups=channels),
            nn.Conv2d(channels, 3 * channels, 1),
            nn.GELU(),
            nn.Conv2d(3 * channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale * (self.mixer(x) - self.norm(x))
        return x + self.ffn(x)


class RepGhostModule(nn.Module):
    """RepGhost (Chen 2022): a cheap depthwise branch and a BatchNorm of the same input, summed."""

    def __init__(self, inputs: int, outputs: int, relu: bool = True) -> None:
        super().__init__()
        self.primary_conv = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True) if relu else nn.Sequential(),
        )
        self.fusion_conv = nn.Sequential()
        self.fusion_bn = nn.Sequential(nn.BatchNorm2d(outputs))
        self.cheap_operation = nn.Sequential(
            nn.Conv2d(outputs, outputs, 3, 1, 1, groups=outputs, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.relu = nn.ReLU(inplace=False) if relu else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary_conv(x)
        x2 = self.cheap_operation(x1)
        x2 = x2 + self.fusion_bn(self.fusion_conv(x1))
        return self.relu(x2)


class RepNeXtMixer(nn.Module):
    """RepNeXt (Zhao 2024): depthwise kernels of many shapes beside each other, in chunks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        part = channels // 4
        self.split = [channels - 3 * part, part, part, part]
        self.square = conv_bn(part, part, 3, groups=part)
        self.wide = nn.Conv2d(part, part, (1, 11), padding=(0, 5), groups=part)
        self.high = nn.Conv2d(part, part, (11, 1), padding=(5, 0), groups=part)
        self.small = nn.Conv2d(part, part, (1, 3), padding=(0, 1), groups=part)
        self.norm = nn.BatchNorm2d(channels)
        self.mlp = nn.Sequential(
            conv_bn(channels, 2 * channels, 1), nn.GELU(), conv_bn(2 * channels, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        same, square, wide, high = torch.split(x, self.split, dim=1)
        wide = self.wide(wide) + self.small(wide)
        y = torch.cat((same, self.square(square) + square, wide, self.high(high)), dim=1)
        return x + self.mlp(self.norm(y))


class OREPA(nn.Module):
    """OREPA (Hu 2022): branches are summed as kernels in the forward, one BatchNorm behind."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.weight_origin = nn.Parameter(torch.randn(outputs, inputs, 3, 3) * 0.1)
        self.weight_1x1 = nn.Parameter(torch.randn(outputs, inputs, 1, 1) * 0.1)
        self.weight_inner = nn.Parameter(torch.randn(inputs, inputs, 1, 1) * 0.1)
        self.weight_outer = nn.Parameter(torch.randn(outputs, inputs, 3, 3) * 0.1)
        self.vector = nn.Parameter(torch.rand(3, outputs))
        self.register_buffer("average", torch.full((3, 3), 1 / 9))
        self.stride = stride
        self.bn = nn.BatchNorm2d(outputs)

    def kernel(self) -> Tensor:
        average = torch.einsum("oihw,hw->oihw", self.weight_1x1.expand(-1, -1, 3, 3), self.average)
        inner = torch.einsum(
            "ti,othw->oihw", self.weight_inner.squeeze(3).squeeze(2), (self.weight_outer)
        )
        branches = torch.stack((self.weight_origin, average, inner))
        return torch.einsum("boihw,bo->oihw", branches, self.vector)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(F.conv2d(x, self.kernel(), stride=self.stride, padding=1)))


class SeqConv3x3(nn.Module):
    """ECBSR (Zhang 2021): 1x1, its bias padded around it, then a 3x3 or a fixed filter."""

    def __init__(self, channels: int, fixed: Sequence[Sequence[float]] | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 1)
        self.scale = nn.Parameter(torch.randn(channels, 1, 1, 1))
        self.bias = nn.Parameter(torch.randn(channels))
        if fixed is None:
            self.k1 = nn.Parameter(torch.randn(channels, channels, 3, 3) * 0.1)
            self.mask = None
        else:
            mask = torch.tensor(fixed).expand(channels, 1, 3, 3).clone()
            self.mask = nn.Parameter(mask, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.first(x), (1, 1, 1, 1))
        assert self.first.bias is not None
        border = self.first.bias.view(1, -1, 1, 1)
        y[:, :, 0:1, :] = border
        y[:, :, -1:, :] = border
        y[:, :, :, 0:1] = border
        y[:, :, :, -1:] = border
        if self.mask is None:
            return F.conv2d(y, self.k1, self.bias)
        return F.conv2d(y, self.scale * self.mask, self.bias, groups=y.size(1))


class ECB(nn.Module):
    """ECBSR (Zhang 2021): edge filters beside a 3x3 and the input; with a BatchNorm to fold."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        sobel = [[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]
        laplace = [[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]
        self.conv3x3 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv1x1_3x3 = SeqConv3x3(channels)
        self.conv1x1_sbx = SeqConv3x3(channels, sobel)
        self.conv1x1_sby = SeqConv3x3(channels, list(zip(*sobel, strict=True)))
        self.conv1x1_lpl = SeqConv3x3(channels, laplace)
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3x3(x) + self.conv1x1_3x3(x) + self.conv1x1_sbx(x)
        y = y + self.conv1x1_sby(x) + self.conv1x1_lpl(x) + x
        return self.act(self.bn(y))


class SeriesActivation(nn.ReLU):
    """VanillaNet's activation: ReLU, then a separate depthwise filter, then a BatchNorm."""

    def __init__(self, channels: int, num: int = 3) -> None:
        super().__init__()
        self.num, self.channels = num, channels
        self.weight = nn.Parameter(torch.randn(channels, 1, num * 2 + 1, num * 2 + 1) * 0.02)
        self.bn = nn.BatchNorm2d(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(
            F.conv2d(super().forward(x), self.weight, padding=self.num, groups=(self.channels))
        )


class VanillaBlock(nn.Module):
    """VanillaNet (Chen 2023): two 1x1 with an activation that fades to none between them."""

    def __init__(self, inputs: int, outputs: int, stride: int = 2) -> None:
        super().__init__()
        self.act_learn = 1.0
        self.conv1 = nn.Sequential(nn.Conv2d(inputs, inputs, 1), nn.BatchNorm2d(inputs, eps=1e-6))
        self.conv2 = nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs, eps=1e-6))
        self.pool = nn.Identity() if stride == 1 else nn.MaxPool2d(stride)
        self.act = SeriesActivation(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = F.leaky_relu(x, self.act_learn)
        return self.act(self.pool(self.conv2(x)))


class SEBasicBlock(nn.Module):
    """SENet (Hu 2018), as in repositories for CIFAR: avg_pool2d(y, y.size(2)) and 1x1 layers."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.fc1 = nn.Conv2d(outputs, outputs // 4, 1)
        self.fc2 = nn.Conv2d(outputs // 4, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        weight = F.avg_pool2d(out, out.size(2))
        weight = torch.sigmoid(self.fc2(F.relu(self.fc1(weight))))
        out = out * weight
        out += self.shortcut(x)
        return F.relu(out)


class PointNet(nn.Module):
    """PointNet (Qi 2017): a transform of the points, shared layers, bn(dropout(fc(x)))."""

    class TNet(nn.Module):
        def __init__(self, k: int) -> None:
            super().__init__()
            self.k = k
            self.conv1, self.bn1 = nn.Conv1d(k, 16, 1), nn.BatchNorm1d(16)
            self.conv2, self.bn2 = nn.Conv1d(16, 32, 1), nn.BatchNorm1d(32)
            self.fc1, self.bn3 = nn.Linear(32, 16), nn.BatchNorm1d(16)
            self.fc2 = nn.Linear(16, k * k)

        def forward(self, x: Tensor) -> Tensor:
            batch = x.size(0)
            x = F.relu(self.bn1(self.conv1(x)))
            x = F.relu(self.bn2(self.conv2(x)))
            x = torch.max(x, 2, keepdim=True)[0].view(-1, 32)
            x = self.fc2(F.relu(self.bn3(self.fc1(x))))
            identity = torch.eye(self.k, dtype=x.dtype).view(1, self.k * self.k).repeat(batch, 1)
            return (x + identity).view(-1, self.k, self.k)

    def __init__(self) -> None:
        super().__init__()
        self.stn, self.fstn = self.TNet(3), self.TNet(16)
        self.conv1, self.bn1 = nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16)
        self.conv2, self.bn2 = nn.Conv1d(16, 64, 1), nn.BatchNorm1d(64)
        self.fc1, self.bn4 = nn.Linear(64, 32), nn.BatchNorm1d(32)
        self.fc2, self.bn5 = nn.Linear(32, 16), nn.BatchNorm1d(16)
        self.fc3 = nn.Linear(16, 10)
        self.dropout = nn.Dropout(p=0.4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.bmm(x.transpose(2, 1), self.stn(x)).transpose(2, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        feature = self.fstn(x)
        x = torch.bmm(x.transpose(2, 1), feature).transpose(2, 1)
        x = self.bn2(self.conv2(x))
        x = torch.max(x, 2, keepdim=True)[0].view(-1, 64)
        x = F.relu(self.bn4(self.fc1(x)))
        x = F.relu(self.bn5(self.dropout(self.fc2(x))))
        return F.log_softmax(self.fc3(x), dim=1), feature


class ShuffleUnit(nn.Module):
    """ShuffleNet v2 (Ma 2018): half of the channels pass by, then all are shuffled."""

    def __init__(self, channels: int, down: bool = False) -> None:
        super().__init__()
        half, stride = channels // 2, 2 if down else 1
        inputs = channels if down else half
        self.down = down
        self.branch1 = nn.Sequential(
            nn.Conv2d(inputs, inputs, 3, 2, 1, groups=inputs, bias=False),
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
        )
        self.branch2 = nn.Sequential(
            nn.Conv2d(inputs, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, stride, 1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
        )
        if not down:
            self.branch1 = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            out = torch.cat((self.branch1(x), self.branch2(x)), 1)
        else:
            left, right = x.chunk(2, dim=1)
            out = torch.cat((left, self.branch2(right)), 1)
        n, c, h, w = out.size()
        return out.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class DenseLayer(nn.Module):
    """DenseNet (Huang 2017): BatchNorm, ReLU, convolution, and all inputs concatenated."""

    def __init__(self, inputs: int, growth: int = 8) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat([out, x], 1)


class Transition(nn.Module):
    """DenseNet (Huang 2017): BatchNorm, ReLU, 1x1, average."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class PreActBlock(nn.Module):
    """PreActResNet (He 2016): BatchNorm and ReLU in front; the shortcut leaves behind them."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        out += shortcut
        return out


class Inception(nn.Module):
    """GoogLeNet (Szegedy 2015) with BatchNorms: four branches concatenated."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.b1 = conv_bn_act(inputs, width, 1)
        self.b2 = nn.Sequential(conv_bn_act(inputs, width, 1), conv_bn_act(width, width, 3))
        self.b3 = nn.Sequential(
            conv_bn_act(inputs, width, 1), conv_bn_act(width, width, 3), conv_bn_act(width, width)
        )
        self.b4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn_act(inputs, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b1(x), self.b2(x), self.b3(x), self.b4(x)], 1)


class InvertedResidual(nn.Module):
    """MobileNetV3 (Howard 2019) and EfficientNet (Tan 2019): expand, depthwise, SE, project."""

    class Squeeze(nn.Module):
        def __init__(self, channels: int, gate: type[nn.Module]) -> None:
            super().__init__()
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Sequential(
                nn.Linear(channels, channels // 4),
                nn.ReLU(),
                nn.Linear(channels // 4, channels),
                gate(),
            )

        def forward(self, x: Tensor) -> Tensor:
            b, c, _, _ = x.size()
            return x * self.fc(self.pool(x).view(b, c)).view(b, c, 1, 1)

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int,
        act: type[nn.Module],
        gate: type[nn.Module],
    ) -> None:
        super().__init__()
        inner = 4 * inputs
        self.conv = nn.Sequential(
            *conv_bn_act(inputs, inner, 1, act=act),
            *conv_bn_act(inner, inner, kernel, stride, inner, act=act),
            self.Squeeze(inner, gate),
            *conv_bn(inner, outputs, 1),
        )
        self.identity = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.identity else self.conv(x)


def inverted(act: type[nn.Module], gate: type[nn.Module]) -> nn.Module:
    return Classifier(
        InvertedResidual(16, 16, 3, 1, act, gate),
        InvertedResidual(16, 24, 5, 2, act, gate),
        InvertedResidual(24, 24, 5, 1, act, gate),
        width=24,
    )


class GhostModule(nn.Module):
    """GhostNet (Han 2020): half of the outputs are cheap ones of the other half."""

    def __init__(self, inputs: int, outputs: int, relu: bool = True) -> None:
        super().__init__()
        half = math.ceil(outputs / 2)
        self.outputs = outputs
        act = nn.ReLU if relu else nn.Sequential
        self.primary_conv = conv_bn_act(inputs, half, 1, act=act)
        self.cheap_operation = conv_bn_act(half, half, 3, groups=half, act=act)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary_conv(x)
        x2 = self.cheap_operation(x1)
        return torch.cat([x1, x2], dim=1)[:, : self.outputs, :, :]


class GhostBottleneck(nn.Module):
    """GhostNet (Han 2020)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = 2 * inputs
        self.ghost1 = GhostModule(inputs, inner)
        self.stride = stride
        if stride > 1:
            self.conv_dw = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
            self.bn_dw = nn.BatchNorm2d(inner)
        self.ghost2 = GhostModule(inner, outputs, relu=False)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            depthwise = conv_bn(inputs, inputs, 3, stride, inputs)
            self.shortcut = nn.Sequential(*depthwise, *conv_bn(inputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.ghost1(x)
        if self.stride > 1:
            out = self.bn_dw(self.conv_dw(out))
        out = self.ghost2(out)
        out += self.shortcut(x)
        return out


class CSPStage(nn.Module):
    """CSPDarknet (Wang 2020), as in YOLOv4: BatchNorm behind the concatenation's 1x1, and SiLU."""

    class Bottleneck(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.cv1 = conv_bn_act(channels, channels, 1, act=nn.SiLU)
            self.cv2 = conv_bn_act(channels, channels, 3, act=nn.SiLU)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.cv2(self.cv1(x))

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.down = conv_bn_act(inputs, outputs, 3, 2, act=nn.Mish)
        self.cv1 = conv_bn_act(outputs, half, 1, act=nn.SiLU)
        self.cv2 = nn.Conv2d(outputs, half, 1, bias=False)
        self.cv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn = nn.BatchNorm2d(2 * half)
        self.act = nn.LeakyReLU(0.1, inplace=True)
        self.cv4 = conv_bn_act(2 * half, outputs, 1, act=nn.SiLU)
        self.m = nn.Sequential(*(self.Bottleneck(half) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        y1 = self.cv3(self.m(self.cv1(x)))
        y2 = self.cv2(x)
        return self.cv4(self.act(self.bn(torch.cat((y1, y2), dim=1))))


class UNet(nn.Module):
    """U-Net (Ronneberger 2015): double convolutions, up by transposed ones, padded to fit."""

    class Up(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(inputs, inputs // 2, 2, 2)
            self.conv = UNet.twice(inputs, outputs)

        def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
            x1 = self.up(x1)
            dy, dx = x2.size()[2] - x1.size()[2], x2.size()[3] - x1.size()[3]
            x1 = F.pad(x1, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
            return self.conv(torch.cat([x2, x1], dim=1))

    @staticmethod
    def twice(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(*conv_bn_act(inputs, outputs), *conv_bn_act(outputs, outputs))

    def __init__(self) -> None:
        super().__init__()
        self.inc = self.twice(3, 8)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), self.twice(8, 16))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), self.twice(16, 32))
        self.up1, self.up2 = self.Up(32, 16), self.Up(16, 8)
        self.outc = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        return self.outc(self.up2(self.up1(x3, x2), x1))


class HRModule(nn.Module):
    """HRNet (Sun 2019), two resolutions that are summed into each other."""

    def __init__(self, widths: Sequence[int] = (16, 32)) -> None:
        super().__init__()
        first, second = widths
        self.branches = nn.ModuleList([SEBasicBlock(c, c) for c in widths])
        up = nn.Sequential(*conv_bn(second, first, 1), nn.Upsample(scale_factor=2, mode="nearest"))
        down = conv_bn(first, second, 3, 2)
        # ModuleList accepts None, which its stub does not say.
        first_row = nn.ModuleList([None, up])  # type: ignore[list-item]
        second_row = nn.ModuleList([down, None])  # type: ignore[list-item]
        self.fuse_layers = nn.ModuleList([first_row, second_row])
        self.relu = nn.ReLU(True)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        x = [branch(item) for branch, item in zip(self.branches, x, strict=True)]
        fused = []
        for i, layers in enumerate(self.fuse_layers):
            assert isinstance(layers, nn.ModuleList)
            y = x[0] if i == 0 else layers[0](x[0])
            for j in range(1, len(x)):
                y = y + (x[j] if i == j else layers[j](x[j]))
            fused.append(self.relu(y))
        return fused


class HRNet(nn.Module):
    """HRNet (Sun 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_act(3, 16, 3, 2)
        self.transition = nn.ModuleList([nn.Sequential(), conv_bn_act(16, 32, 3, 2)])
        self.stage = nn.ModuleList([HRModule(), HRModule()])
        self.last = nn.Sequential(*conv_bn_act(48, 48, 1), nn.Conv2d(48, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        xs = [layer(x) for layer in self.transition]
        for module in self.stage:
            xs = module(xs)
        size = xs[0].shape[-2:]
        up = F.interpolate(xs[1], size=size, mode="bilinear", align_corners=False)
        return self.last(torch.cat([xs[0], up], 1))


class PSPNet(nn.Module):
    """PSPNet (Zhao 2017): pooled to several sizes, upsampled, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn_act(3, 16, 3, 2), conv_bn_act(16, 32, 3, 2))
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(bins), *conv_bn_act(32, 8, 1))
            for bins in (1, 2, 3, 6)
        )
        self.final = nn.Sequential(*conv_bn_act(64, 32), nn.Dropout2d(0.1), nn.Conv2d(32, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        x = self.body(x)
        parts = [x]
        for stage in self.stages:
            parts.append(F.interpolate(stage(x), x.shape[2:], mode="bilinear", align_corners=True))  # noqa: PERF401
        return F.interpolate(self.final(torch.cat(parts, 1)), size, mode="bilinear")


class DeepLabV3(nn.Module):
    """DeepLabV3 (Chen 2017): dilated convolutions beside each other, and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn_act(3, 16, 3, 2), conv_bn_act(16, 32, 3, 2))
        self.convs = nn.ModuleList([conv_bn_act(32, 16, 1)])
        for rate in (2, 4, 6):
            self.convs.append(nn.Sequential(*conv_bn(32, 16, 3, dilation=rate), nn.ReLU()))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn_act(32, 16, 1))
        self.project = nn.Sequential(*conv_bn_act(80, 16, 1), nn.Dropout(0.5))
        self.low = conv_bn_act(32, 8, 1)
        self.classifier = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = self.body(x)
        found = [conv(feature) for conv in self.convs]
        found.append(F.interpolate(self.pool(feature), feature.shape[-2:], mode="bilinear"))
        y = torch.cat([self.project(torch.cat(found, 1)), self.low(feature)], 1)
        return {"out": F.interpolate(self.classifier(y), x.shape[-2:], mode="bilinear")}


class CRNN(nn.Module):
    """CRNN (Shi 2015): columns of convolutional features through an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        cnn = nn.Sequential()
        for i, (a, b, norm) in enumerate([(1, 8, False), (8, 16, True), (16, 32, True)]):
            cnn.add_module(f"conv{i}", nn.Conv2d(a, b, 3, 1, 1))
            if norm:
                cnn.add_module(f"batchnorm{i}", nn.BatchNorm2d(b))
            cnn.add_module(f"relu{i}", nn.ReLU(True))
            cnn.add_module(f"pooling{i}", nn.MaxPool2d(2))
        self.cnn = cnn
        self.last = nn.Sequential(nn.Conv2d(32, 32, (4, 1)), nn.BatchNorm2d(32), nn.ReLU(True))
        self.rnn = nn.LSTM(32, 16, bidirectional=True)
        self.embedding = nn.Linear(32, 12)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.last(self.cnn(x))
        _, _, height, _ = conv.size()
        assert height == 1, "the height of conv must be 1"
        recurrent, _ = self.rnn(conv.squeeze(2).permute(2, 0, 1))
        steps, batch, width = recurrent.size()
        return self.embedding(recurrent.view(steps * batch, width)).view(steps, batch, -1)


class TCN(nn.Module):
    """TCN (Bai 2018): causal convolutions, cut at their end; BatchNorm in place of weight norm."""

    class Chomp(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size = size

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, : -self.size].contiguous()

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
            super().__init__()
            padding = 2 * dilation
            layers: list[nn.Module] = []
            for channels in (inputs, outputs):
                layers += [
                    nn.Conv1d(channels, outputs, 3, padding=padding, dilation=dilation),
                    TCN.Chomp(padding),
                    nn.BatchNorm1d(outputs),
                    nn.ReLU(),
                    nn.Dropout(0.2),
                ]
            self.net = nn.Sequential(*layers)
            self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

        def forward(self, x: Tensor) -> Tensor:
            res = x if self.downsample is None else self.downsample(x)
            return F.relu(self.net(x) + res)

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(*(self.Block(4 if i == 0 else 16, 16, 2**i) for i in range(3)))
        self.linear = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.linear(self.network(x)[:, :, -1]), dim=1)


class R2Plus1D(nn.Module):
    """R(2+1)D (Tran 2018): a convolution in space, then one in time."""

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
            super().__init__()
            inner = 12
            self.spatial = nn.Conv3d(
                inputs, inner, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False
            )
            self.bn1 = nn.BatchNorm3d(inner)
            self.temporal = nn.Conv3d(
                inner, outputs, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False
            )
            self.bn2 = nn.BatchNorm3d(outputs)
            self.same = stride == 1 and inputs == outputs
            self.down = nn.Conv3d(inputs, outputs, 1, stride, bias=False)
            self.down_bn = nn.BatchNorm3d(outputs)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn2(self.temporal(F.relu(self.bn1(self.spatial(x)))))
            return F.relu(y + (x if self.same else self.down_bn(self.down(x))))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(self.Block(3, 8), self.Block(8, 8), self.Block(8, 16, 2))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).mean((2, 3, 4)))


class Generator(nn.Module):
    """DCGAN (Radford 2016): transposed convolutions with BatchNorms, from noise."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(16, 32 * 4 * 4, bias=False))
        self.norm = nn.BatchNorm1d(32 * 4 * 4)
        self.main = nn.Sequential(
            nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(True),
            nn.ConvTranspose2d(16, 16, 4, 2, 1, groups=2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(True),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(16, 8, 3, padding=1),
            nn.BatchNorm2d(8, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.ConvTranspose2d(8, 3, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        x = F.relu(self.norm(self.linear(z)))
        return self.main(x.view(x.shape[0], 32, 4, 4))


class Siamese(nn.Module):
    """Siamese network (Koch 2015): one body for two images, and the distance of the embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn_act(3, 8, 3, 2), conv_bn_act(8, 16, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.embed = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.out = nn.Linear(16, 1)

    def forward_once(self, x: Tensor) -> Tensor:
        return self.embed(self.body(x))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a, b = self.forward_once(first), self.forward_once(second)
        return torch.sigmoid(self.out(torch.abs(a - b)))


class RepConv(nn.Module):
    """YOLOv7 (Wang 2022): RepVGG's block, mostly without its identity, SiLU behind."""

    rbr_reparam: nn.Conv2d  # after the fold of the authors' program

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.act = nn.SiLU()
        same = inputs == outputs and stride == 1
        self.rbr_identity = nn.BatchNorm2d(inputs) if same else None
        self.rbr_dense = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.rbr_1x1 = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, 0, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        if hasattr(self, "rbr_reparam"):
            return self.act(self.rbr_reparam(inputs))
        id_out: Any = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        return self.act(self.rbr_dense(inputs) + self.rbr_1x1(inputs) + id_out)


class PPYOLOEBlock(nn.Module):
    """PP-YOLOE (Xu 2022): 3x3 and alpha times 1x1, in a residual block."""

    class RepVggBlock(nn.Module):
        def __init__(self, channels: int, alpha: bool) -> None:
            super().__init__()
            self.conv1 = conv_bn(channels, channels, 3)
            self.conv2 = conv_bn(channels, channels, 1)
            self.alpha = nn.Parameter(torch.tensor([0.7])) if alpha else None

        def forward(self, x: Tensor) -> Tensor:
            if self.alpha is not None:
                y = self.conv1(x) + self.alpha * self.conv2(x)
            else:
                y = self.conv1(x) + self.conv2(x)
            return F.silu(y)

    def __init__(self, channels: int, alpha: bool = True) -> None:
        super().__init__()
        self.conv1 = conv_bn_act(channels, channels, 3, act=nn.SiLU)
        self.conv2 = self.RepVggBlock(channels, alpha)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))


def plain(
    block: Callable[..., nn.Module], *arguments: Sequence[Any], width: int = 16
) -> Callable[[], nn.Module]:
    """A classifier of blocks with these arguments."""
    return lambda: Classifier(*(block(*given) for given in arguments), width=width)


STRIDED = ((16, 24, 2), (24, 24))

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "repvgg": repvgg,
    "repvgg_d2se": lambda: repvgg(se=True),
    "repvgg_post_se": lambda: repvgg(post=True),
    "repvggplus": RepVGGplus,
    "qarepvgg": plain(QARepVGGBlock, *STRIDED, width=24),
    "acnet": plain(ACBlock, *STRIDED, width=24),
    "dbb": plain(DBB, *STRIDED, width=24),
    "mobileone": plain(
        MobileOneBlock, (16, 16, 3, 1, 16), (16, 24, 1), (24, 24, 3, 2, 24), (24, 24, 1), width=24
    ),
    "replknet": plain(RepLKBlock, (16,), (16,)),
    "unireplknet": plain(UniRepLKBlock, (16,), (16,)),
    "repvit": plain(RepViTBlock, (16, 16), (16, 24, 2, False), (24, 24, 1, False), width=24),
    "fastvit": plain(RepMixer, (16,), (16,)),
    "repghost": plain(RepGhostModule, (16, 24), (24, 24, False), width=24),
    "repnext": plain(RepNeXtMixer, (16,), (16,)),
    "orepa": plain(OREPA, *STRIDED, width=24),
    "ecbsr": plain(ECB, (16,), (16,)),
    "vanillanet": plain(VanillaBlock, (16, 24), (24, 24, 1), width=24),
    "senet": plain(SEBasicBlock, *STRIDED, width=24),
    "pointnet": PointNet,
    "shufflenet_v2": plain(ShuffleUnit, (16, True), (16,), (16,)),
    "densenet": lambda: Classifier(
        *(DenseLayer(16), DenseLayer(24), Transition(32, 16), DenseLayer(16)), width=24
    ),
    "preact_resnet": plain(PreActBlock, *STRIDED, (24, 24), width=24),
    "inception": plain(Inception, (16, 8), (32, 8), width=32),
    "mobilenet_v3": lambda: inverted(nn.Hardswish, nn.Hardsigmoid),
    "efficientnet": lambda: inverted(nn.SiLU, nn.Sigmoid),
    "ghostnet": plain(GhostBottleneck, (16, 16, 1), (16, 24, 2), width=24),
    "cspdarknet": plain(CSPStage, (16, 24), (24, 32), width=32),
    "unet": UNet,
    "hrnet": HRNet,
    "pspnet": PSPNet,
    "deeplabv3": DeepLabV3,
    "crnn": CRNN,
    "tcn": TCN,
    "r2plus1d": R2Plus1D,
    "dcgan": Generator,
    "siamese": Siamese,
    "yolov7": plain(RepConv, *STRIDED, width=24),
    "ppyoloe": plain(PPYOLOEBlock, (16,), (16, False)),
}
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "pointnet": [(2, 3, 50)],
    "crnn": [(1, 1, 32, 64)],
    "tcn": [(2, 4, 30)],
    "r2plus1d": [(1, 3, 8, 24, 24)],
    "dcgan": [(2, 16)],
    "siamese": [(2, 3, 40, 40), (2, 3, 40, 40)],
}
SHAPE = [(2, 3, 64, 64)]


class Papers:
    """The family of them, for the study."""

    on_meta = False

    def names(self) -> list[str]:
        return list(NETWORKS)

    def build(self, name: str) -> nn.Module:
        return NETWORKS[name]()

    def inputs(self, name: str, network: nn.Module) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(1)
        shapes = SHAPES.get(name, SHAPE)
        return [{"args": tuple(torch.randn(shape, generator=generator) for shape in shapes)}]

    @staticmethod
    def version() -> str:
        return ""
