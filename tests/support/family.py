"""The re-parameterization blocks of the field, written from their definitions.

Each takes channels, groups and a stride. A block whose definition fixes one of them ignores it:
depthwise blocks have as many groups as channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_bn(inputs: int, outputs: int, size, **options) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, bias=False, **options), nn.BatchNorm2d(outputs)
    )


class ACB(nn.Module):
    """ACNet: square, horizontal and vertical kernels (arXiv:1908.03930)."""

    def __init__(self, channels: int = 8, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        shared = {"groups": groups, "stride": stride}
        self.square = conv_bn(channels, channels, 3, padding=1, **shared)
        self.horizontal = conv_bn(channels, channels, (1, 3), padding=(0, 1), **shared)
        self.vertical = conv_bn(channels, channels, (3, 1), padding=(1, 0), **shared)

    def forward(self, x: Tensor) -> Tensor:
        return self.square(x) + self.horizontal(x) + self.vertical(x)


class MobileOne(nn.Module):
    """MobileOne: several equal kernels, a 1x1 and an identity (arXiv:2206.04040)."""

    def __init__(
        self, channels: int = 8, groups: int = 1, stride: int = 1, size: int = 3, copies: int = 4
    ) -> None:
        super().__init__()
        shared = {"groups": groups, "stride": stride}
        self.kernels = nn.ModuleList(
            conv_bn(channels, channels, size, padding=size // 2, **shared) for _ in range(copies)
        )
        self.scale = conv_bn(channels, channels, 1, **shared) if size > 1 else None
        self.skip = nn.BatchNorm2d(channels) if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = 0 if self.skip is None else self.skip(x)
        if self.scale is not None:
            y = y + self.scale(x)
        for kernel in self.kernels:
            y = y + kernel(x)
        return F.relu(y)


class LargeKernel(nn.Module):
    """RepLKNet: a small kernel beside a large one (arXiv:2203.06717)."""

    def __init__(self, channels: int = 8, groups: int = 1, stride: int = 1, widen: int = 1) -> None:
        super().__init__()
        shared = {"groups": groups, "stride": stride}
        self.large = conv_bn(channels, widen * channels, 13, padding=6, **shared)
        self.small = conv_bn(channels, widen * channels, 5, padding=2, **shared)

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) + self.small(x)


class RepCPE(nn.Module):
    """FastViT's positional encoding: a depthwise 7x7 and the identity (arXiv:2303.14189)."""

    def __init__(self, channels: int = 8, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 7, padding=3, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x


class RepConv(nn.Module):
    """YOLOv7's block: a 3x3, a 1x1 and an identity."""

    def __init__(self, channels: int = 8, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        shared = {"groups": groups, "stride": stride}
        self.dense = conv_bn(channels, channels, 3, padding=1, **shared)
        self.point = conv_bn(channels, channels, 1, **shared)
        self.identity = nn.BatchNorm2d(channels) if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        same = 0 if self.identity is None else self.identity(x)
        return F.silu(self.dense(x) + self.point(x) + same)


class RepGhost(nn.Module):
    """RepGhost: a cheap depthwise kernel and a normalized identity (arXiv:2211.06088)."""

    def __init__(self, channels: int = 8, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.primary = nn.Sequential(*conv_bn(channels, channels, 1, groups=groups), nn.ReLU())
        self.cheap = conv_bn(channels, channels, 3, padding=1, groups=channels)
        self.fusion = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return F.relu(self.cheap(y) + self.fusion(y))


class RepViT(nn.Module):
    """RepViT's token mixer: a normalization behind the sum (arXiv:2307.09283)."""

    def __init__(self, channels: int = 8, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = conv_bn(channels, channels, 3, padding=1, groups=groups)
        self.point = nn.Conv2d(channels, channels, 1, groups=groups)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn((self.conv(x) + self.point(x)) + x)


class QARepVGG(nn.Module):
    """QARepVGG: one normalization behind the sum (arXiv:2212.01593)."""

    def __init__(self, channels: int = 8, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        shared = {"groups": groups, "stride": stride}
        self.dense = conv_bn(channels, channels, 3, padding=1, **shared)
        self.point = nn.Conv2d(channels, channels, 1, bias=False, **shared)
        self.bn = nn.BatchNorm2d(channels)
        self.identity = nn.Identity() if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x) + self.point(x)
        if self.identity is not None:
            y = y + self.identity(x)
        return F.relu(self.bn(y))


class Dilated(nn.Module):
    """UniRepLKNet: dilated kernels beside a large one (arXiv:2311.15599, section 3.1)."""

    SMALL = ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5))  # size and dilation

    def __init__(self, channels: int = 8, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        shared = {"groups": groups, "stride": stride}
        self.large = conv_bn(channels, channels, 13, padding=6, **shared)
        self.small = nn.ModuleList(
            conv_bn(channels, channels, k, padding=d * (k - 1) // 2, dilation=d, **shared)
            for k, d in self.SMALL
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.large(x)
        for small in self.small:
            y = y + small(x)
        return y


class ResponseNorm(nn.Module):
    """Global response normalization, channels last (arXiv:2301.00808)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.randn(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(p=2, dim=(1, 2), keepdim=True)
        return self.gamma * (x * (size / (size.mean(-1, keepdim=True) + 1e-6))) + self.beta + x


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class ChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class UniRepLKBlock(nn.Module):
    """UniRepLKNet's block, with linear layers that see channels last."""

    def __init__(self, channels: int = 8, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        wide = 4 * channels
        self.dwconv = Dilated(channels, channels)
        self.norm = nn.BatchNorm2d(channels)
        self.first = nn.Sequential(ChannelsLast(), nn.Linear(channels, wide))
        self.act = nn.Sequential(nn.GELU(), ResponseNorm(wide))
        self.second = nn.Sequential(
            nn.Linear(wide, channels, bias=False), ChannelsFirst(), nn.BatchNorm2d(channels)
        )
        self.gamma = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.act(self.first(self.norm(self.dwconv(x)))))
        return x + y * self.gamma.view(1, -1, 1, 1)


class Linear3(nn.Module):
    """FastViT's mixer before it is subtracted: a 3x3, a 1x1 and an identity."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.conv = conv_bn(channels, channels, 3, padding=1, groups=groups)
        self.scale = conv_bn(channels, channels, 1, groups=groups)
        self.skip = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.scale(x) + self.skip(x)


class RepMixer(nn.Module):
    """FastViT's token mixer: x + g (M(x) - N(x)) (arXiv:2303.14189, section 3.1)."""

    def __init__(self, channels: int = 8, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.mixer = Linear3(channels, groups)
        self.norm = nn.BatchNorm2d(channels)
        self.layer_scale = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * (self.mixer(x) - self.norm(x))


class NormAndPad(nn.Module):
    """DBB's normalization, which pads by its own value for zeros (arXiv:2103.13425)."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        if self.padding > 0:
            bn, p = self.bn, self.padding
            scale = bn.weight.detach() / torch.sqrt(bn.running_var + bn.eps)
            border = (bn.bias.detach() - bn.running_mean * scale).view(1, -1, 1, 1)
            y = F.pad(y, [p] * 4)
            y[:, :, 0:p, :] = border
            y[:, :, -p:, :] = border
            y[:, :, :, 0:p] = border
            y[:, :, :, -p:] = border
        return y


class DBB(nn.Module):
    """A diverse branch block (arXiv:2103.13425, figure 2)."""

    def __init__(self, channels: int = 8, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        shared = {"groups": groups, "stride": stride}
        point = {"groups": groups, "bias": False}
        self.origin = conv_bn(channels, channels, 3, padding=1, **shared)
        self.point = conv_bn(channels, channels, 1, **shared)
        self.average = nn.Sequential(
            nn.Conv2d(channels, channels, 1, **point),
            NormAndPad(channels, 1),
            nn.AvgPool2d(3, stride),
            nn.BatchNorm2d(channels),
        )
        self.sequence = nn.Sequential(
            nn.Conv2d(channels, channels, 1, **point),
            NormAndPad(channels, 1),
            *conv_bn(channels, channels, 3, **shared),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.origin(x) + self.point(x) + self.average(x) + self.sequence(x)


class DepthwiseDBB(nn.Module):
    """The diverse branch block of a depthwise convolution: inner width 2C, no 1x1 branch."""

    def __init__(self, channels: int = 8, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        shared = {"groups": channels, "stride": stride}
        self.origin = conv_bn(channels, channels, 3, padding=1, **shared)
        self.average = nn.Sequential(nn.AvgPool2d(3, stride, 1), nn.BatchNorm2d(channels))
        self.sequence = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1, groups=channels, bias=False),
            NormAndPad(2 * channels, 1),
            *conv_bn(2 * channels, channels, 3, **shared),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.origin(x) + self.average(x) + self.sequence(x)


class RepNeXtS(nn.Module):
    """RepNeXt S: a 3x3, a row, a column and a dilated 2x2, without normalization."""

    def __init__(self, channels: int = 8, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, channels, size, groups=groups, stride=stride, **options)
            for size, options in (
                (3, {"padding": 1}),
                ((1, 3), {"padding": (0, 1)}),
                ((3, 1), {"padding": (1, 0)}),
                (2, {"padding": 1, "dilation": 2}),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.branches
        y = first(x)
        for branch in others:
            y = y + branch(x)
        return y


class RepNeXtM(nn.Module):
    """RepNeXt M: a 7x7, a 5x3, a 3x5, and rows that columns follow."""

    def __init__(self, channels: int = 8, groups: int = 1, stride: int = 1) -> None:
        super().__init__()

        def kernel(height: int, width: int, **options) -> nn.Conv2d:
            padding = (height // 2, width // 2)
            size = (height, width)
            return nn.Conv2d(channels, channels, size, padding=padding, groups=channels, **options)

        self.large, self.tall, self.flat = kernel(7, 7), kernel(5, 3), kernel(3, 5)
        self.cross7 = nn.Sequential(kernel(1, 7, bias=False), kernel(7, 1, bias=False))
        self.cross5 = nn.Sequential(kernel(1, 5, bias=False), kernel(5, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) + self.tall(x) + self.flat(x) + self.cross7(x) + self.cross5(x)


class OREPA(nn.Module):
    """OREPA: one convolution whose kernel is a sum of terms (arXiv:2204.00826)."""

    def __init__(self, channels: int = 8, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.groups, self.stride = groups, stride
        width = channels // groups
        self.origin = nn.Parameter(torch.randn(channels, width, 3, 3))
        self.average = nn.Parameter(torch.randn(channels, width, 1, 1))
        self.first = nn.Parameter(torch.randn(groups, width, width))
        self.second = nn.Parameter(torch.randn(channels, width, 3, 3))
        self.vector = nn.Parameter(torch.randn(3, channels))
        self.register_buffer("ninths", torch.full((1, 1, 3, 3), 1 / 9))
        self.register_buffer("eye", torch.eye(width).expand(groups, -1, -1).clone())
        self.bn = nn.BatchNorm2d(channels)

    def weight(self) -> Tensor:
        channels, width, *size = self.second.shape
        second = self.second.view(self.groups, channels // self.groups, width, *size)
        both = torch.einsum("goihw,gij->gojhw", second, self.first + self.eye)
        terms = (self.origin, self.average * self.ninths, both.reshape(channels, width, *size))
        total = terms[0] * self.vector[0].view(-1, 1, 1, 1)
        for number in (1, 2):
            total = total + terms[number] * self.vector[number].view(-1, 1, 1, 1)
        return total

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight(), None, self.stride, 1, 1, self.groups)
        return F.relu(self.bn(y))


class OREPAPoint(nn.Module):
    """OREPA's 1x1: a weight and the product of two."""

    def __init__(self, channels: int = 8, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.origin = nn.Parameter(torch.randn(channels, channels, 1, 1))
        self.first = nn.Parameter(torch.randn(channels, channels))
        self.second = nn.Parameter(torch.randn(channels, channels))
        self.vector = nn.Parameter(torch.randn(2, channels))
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        both = (self.second @ self.first) * self.vector[1].view(-1, 1)
        weight = self.origin * self.vector[0].view(-1, 1, 1, 1) + both.unsqueeze(2).unsqueeze(3)
        return self.bn(F.conv2d(x, weight, stride=self.stride))


SOBEL = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
LAPLACE = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])


def padded_point(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """ECB's 1x1, padded by its bias."""
    y = F.pad(F.conv2d(x, kernel, bias, stride=1), (1, 1, 1, 1), "constant", 0)
    border = bias.view(1, -1, 1, 1)
    y[:, :, 0:1, :] = border
    y[:, :, -1:, :] = border
    y[:, :, :, 0:1] = border
    y[:, :, :, -1:] = border
    return y


class PointThen3x3(nn.Module):
    """ECB's 1x1, then a 3x3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.k0 = nn.Parameter(torch.randn(channels, channels, 1, 1))
        self.k1 = nn.Parameter(torch.randn(channels, channels, 3, 3))
        self.b0, self.b1 = (nn.Parameter(torch.randn(channels)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(padded_point(x, self.k0, self.b0), self.k1, self.b1, stride=1)


class PointThenFilter(nn.Module):
    """ECB's 1x1, then a fixed filter that is scaled by channel."""

    def __init__(self, channels: int, filter: Tensor) -> None:
        super().__init__()
        self.channels = channels
        self.k0 = nn.Parameter(torch.randn(channels, channels, 1, 1))
        self.scale = nn.Parameter(torch.randn(channels, 1, 1, 1))
        self.b0, self.b1 = (nn.Parameter(torch.randn(channels)) for _ in range(2))
        self.register_buffer("mask", filter.expand(channels, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        y = padded_point(x, self.k0, self.b0)
        return F.conv2d(y, self.scale * self.mask, self.b1, stride=1, groups=self.channels)


class ECB(nn.Module):
    """ECBSR's edge-oriented block, without normalization."""

    def __init__(self, channels: int = 8, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.wide = PointThen3x3(channels)
        self.edges = nn.ModuleList(
            PointThenFilter(channels, each) for each in (SOBEL, SOBEL.T, LAPLACE)
        )
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) + self.wide(x)
        for edge in self.edges:
            y = y + edge(x)
        return self.act(y + x)


class Vanilla(nn.Module):
    """VanillaNet's block at the end of its training, when the slope has reached 1."""

    def __init__(self, channels: int = 8, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.first, self.second = conv_bn(channels, channels, 1), conv_bn(channels, channels, 1)
        self.slope = 1.0
        self.pool = nn.MaxPool2d(2)
        self.channels = channels
        self.series = nn.Parameter(torch.randn(channels, 1, 7, 7))
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.second(F.leaky_relu(self.first(x), self.slope)))
        return self.bn(F.conv2d(F.relu(x), self.series, padding=3, groups=self.channels))


# Blocks by name, and the convolutions and linear layers that remain at least.
FAMILY: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "ACB": (ACB, 1),
    "MobileOne 3x3": (MobileOne, 1),
    "MobileOne 1x1": (lambda *given: MobileOne(*given, size=1, copies=1), 1),
    "RepLK": (LargeKernel, 1),
    "FastViT patch embedding": (lambda *given: LargeKernel(*given, widen=2), 1),
    "RepCPE": (RepCPE, 1),
    "YOLOv7 RepConv": (RepConv, 1),
    "RepGhost": (RepGhost, 2),
    "RepViT": (RepViT, 1),
    "QARepVGG": (QARepVGG, 1),
    "UniRepLKNet dilated": (Dilated, 1),
    "UniRepLKNet block": (UniRepLKBlock, 3),
    "RepMixer": (RepMixer, 1),
    "DBB": (DBB, 1),
    "DBB depthwise": (DepthwiseDBB, 1),
    "RepNeXt S": (RepNeXtS, 1),
    "RepNeXt M": (RepNeXtM, 1),
    "OREPA": (OREPA, 1),
    "OREPA 1x1": (OREPAPoint, 1),
    "ECB": (ECB, 1),
    "VanillaNet": (Vanilla, 2),
}
