"""The RepVGG block: parallel branches while it trains, one 3x3 convolution when it is deployed.

RepVGG (Ding et al., 2021, arXiv:2101.03697), section 3.2 and figure 4:

    y = ReLU(BN3(W3 * x) + BN1(W1 * x) + BN0(x))

The identity branch exists where channels and size stay. The only way to the deployed form is to
build the block and call `switch_to_deploy()`. While it trains, a block can drop branches at random;
the deployed convolution is the expectation over what was dropped.

QARepVGG (Chu et al., 2022, arXiv:2212.01593) moves two of the three BatchNorms behind the sum, so
that the deployed kernels survive 8-bit quantization: `QARepVGGBlock`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from repvgg.arguments import check_number
from repvgg.reparam import Affine, bare_affine, fold_bn, identity_kernel, merge, pad_kernel

KERNEL_SIZE = 3


class SqueezeExcite(nn.Module):
    """Reweights channels by a gate computed from their means (Hu et al., 2018, arXiv:1709.01507).

    Shapes: (N, C, H, W) -> (N, C, H, W).

    Args:
        channels: C.
        reduction: the gate's hidden layer has C // reduction channels, at least one.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.excite = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)  # (N, C, 1, 1)
        gate = self.excite(self.squeeze(gate).relu()).sigmoid()
        return x * gate


class DropRows(nn.Module):
    """Zeroes whole images of a batch at random while it trains, and scales up the others.

    A kept image is multiplied by 1 / (1 - p): the expectation is the input. On a residual branch
    this is stochastic depth (Huang et al., 2016, arXiv:1603.09382), "drop path".

    Shapes: (N, ...) -> (N, ...).

    Args:
        p: probability in [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        ones = x.new_ones((len(x),) + (1,) * (x.ndim - 1))
        return x * F.dropout(ones, self.p)

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


class Branch(nn.Module):
    """A convolution and the BatchNorm behind it, if there is one."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d | None) -> None:
        super().__init__()
        self.conv = conv
        self.bn = bn

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if self.bn is None else self.bn(y)

    def affine(self) -> Affine:
        """The one convolution that equals the branch in eval mode; in float64."""
        kernel = self.conv.weight.double()
        bias = None if self.conv.bias is None else self.conv.bias.double()
        return bare_affine(kernel, bias) if self.bn is None else fold_bn(kernel, bias, self.bn)


class RepVGGBlock(nn.Module):
    """A 3x3 + 1x1 + identity block that collapses, exactly, into one 3x3 convolution.

    Shapes: (N, C, H, W) -> (N, O, ceil(H / stride), ceil(W / stride)).

    Args:
        in_channels: C.
        out_channels: O.
        stride: 1 or more. The identity branch needs stride 1 and O equal to C.
        groups: divides C and O. Holds for all branches.
        dilation: of the 3x3 branch, which is padded by as much.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        bn: normalize every branch. Without it the block is the plain residual sum
            ReLU(W3 * x + W1 * x + x).
        bias: give the two convolutions a bias.
        bn_eps: added to the variance by every BatchNorm.
        branch_drop: probability with which the 1x1 and the identity branch are dropped, each by
            itself and for each image, while the block trains; 0 is off.
        drop_path: probability with which the 3x3 and 1x1 branches are dropped together, so that
            the identity remains; 0 is off. Needs the identity branch.
        se_before_relu: reduction of a squeeze-and-excite gate between the sum and the ReLU
            (RepVGG-D2se); 0 is none.
        se_after_relu: reduction of one behind the ReLU (RepVGGplus); 0 is none.

    Attributes:
        recompute: set it to keep only the block's input for the backward pass and to compute the
            rest again there (Chen et al., 2016, arXiv:1604.06174): less memory, a third more time,
            the same numbers. BatchNorm's running statistics advance once.

    Raises:
        ValueError: `drop_path` without an identity branch; a probability outside [0, 1); torch's,
            where groups do not divide the channels or a padding mode is unknown.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        padding_mode: str = "zeros",
        bn: bool = True,
        bias: bool = False,
        bn_eps: float = 1e-5,
        branch_drop: float = 0.0,
        drop_path: float = 0.0,
        se_before_relu: int = 0,
        se_after_relu: int = 0,
    ) -> None:
        super().__init__()
        check_number("branch_drop", branch_drop, below=1, example=0.1)
        check_number("drop_path", drop_path, below=1, example=0.1)
        self.recompute = False
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride
        self.groups = groups
        self.dilation = dilation
        self.padding_mode = padding_mode
        self.bn_eps = bn_eps

        def normalization() -> nn.BatchNorm2d | None:
            return nn.BatchNorm2d(out_channels, eps=bn_eps) if bn else None

        self.branch_3x3: Branch | None = Branch(
            nn.Conv2d(in_channels, out_channels, bias=bias, stride=stride, **self._shape()),
            normalization(),
        )
        # The stride of this branch is taken by subsampling its input in `forward`.
        self.branch_1x1: Branch | None = Branch(
            nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=bias), normalization()
        )
        self.branch_identity: nn.Module | None = None
        if in_channels == out_channels and stride == 1:
            self.branch_identity = normalization() or nn.Identity()
        elif drop_path > 0:
            raise ValueError(
                f"drop_path={drop_path}: a block from {in_channels} to {out_channels} channels "
                f"with stride {stride} has no identity branch to fall back on; give drop_path=0"
            )
        self.branch_drop = DropRows(branch_drop) if branch_drop else nn.Identity()
        self.drop_path = DropRows(drop_path) if drop_path else nn.Identity()
        self.reparam: nn.Conv2d | None = None

        self.se_before_relu = (
            SqueezeExcite(out_channels, se_before_relu) if se_before_relu else nn.Identity()
        )
        self.relu: nn.Module = nn.ReLU()
        self.se_after_relu = (
            SqueezeExcite(out_channels, se_after_relu) if se_after_relu else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(
                self._forward,
                x,
                use_reentrant=False,
                context_fn=lambda: (contextlib.nullcontext(), _without_statistics(self)),
            )
        return self._forward(x)

    def equivalent_kernel_bias(self) -> Affine:
        """Compute the one 3x3 convolution that equals the sum of the branches in eval mode.

        Summed in float64 and cast once to the dtype of the block's parameters; gradients flow to
        the parameters of every branch (RepVGG, section 3.3).

        Returns:
            kernel (O, C / groups, 3, 3) and bias (O,).

        Raises:
            ValueError: a BatchNorm of the block has no running statistics.
        """
        if self.reparam is not None:
            return bare_affine(self.reparam.weight, self.reparam.bias)
        assert self.branch_3x3 is not None
        dtype = self.branch_3x3.conv.weight.dtype
        kernel, bias = self._merged()
        return Affine(kernel.to(dtype), bias.to(dtype))

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Replace the branches by their one convolution, in place, and go to eval mode.

        The block computes what it computed in eval mode. Calling it again changes nothing. An
        optimizer, EMA or DDP wrapper that holds the old parameters keeps them: to go on training,
        switch a copy (`repvgg.switch_to_deploy`).

        Raises:
            ValueError: a BatchNorm of the block has no running statistics; nothing was changed.
        """
        if self.reparam is None:
            kernel, bias = self.equivalent_kernel_bias()
            # On the meta device: its numbers are replaced, and no random state is consumed.
            reparam = nn.Conv2d(
                self.in_channels,
                self.out_channels,
                stride=self.stride,
                device="meta",
                **self._shape(),
            )
            reparam.weight = nn.Parameter(kernel)
            reparam.bias = nn.Parameter(bias)
            self.reparam = reparam
            self.branch_3x3 = self.branch_1x1 = self.branch_identity = None
            self.branch_drop = self.drop_path = nn.Identity()
        self.eval()

    def extra_repr(self) -> str:
        form = "training form" if self.reparam is None else "deployed"
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}, {form}"

    def _shape(self) -> dict:
        """What the 3x3 branch and the deployed convolution have in common besides the stride."""
        return {
            "kernel_size": KERNEL_SIZE,
            "padding": self.dilation,
            "dilation": self.dilation,
            "groups": self.groups,
            "padding_mode": self.padding_mode,
        }

    def _merged(self) -> Affine:
        """The sum of the branches in eval mode; in float64."""
        assert self.branch_3x3 is not None
        assert self.branch_1x1 is not None
        dense = self.branch_3x3.affine()
        point = self.branch_1x1.affine()
        branches = [dense, Affine(pad_kernel(point.kernel, KERNEL_SIZE), point.bias)]
        if self.branch_identity is not None:
            eye = identity_kernel(self.in_channels, self.groups, device=dense.kernel.device)
            bn = self.branch_identity
            same = fold_bn(eye, None, bn) if isinstance(bn, nn.BatchNorm2d) else bare_affine(eye)
            branches.append(Affine(pad_kernel(same.kernel, KERNEL_SIZE), same.bias))
        return merge(*branches)

    def _forward(self, x: Tensor) -> Tensor:
        y = self._sum_of_branches(x) if self.reparam is None else self._deployed(x)
        return self.se_after_relu(self.relu(self.se_before_relu(y)))

    def _sum_of_branches(self, x: Tensor) -> Tensor:
        assert self.branch_3x3 is not None
        assert self.branch_1x1 is not None
        # A 1x1 convolution of stride s in channels_last corrupts the heap in its weight gradient
        # on CPU (torch 2.13 and 2.15). Subsampling first is the same function, and safe.
        point = x if self.stride == 1 else x[..., :: self.stride, :: self.stride]
        y = self.branch_3x3(x) + self.branch_drop(self.branch_1x1(point))
        if self.branch_identity is None:
            return y
        return self.drop_path(y) + self.branch_drop(self.branch_identity(x))

    def _deployed(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError(
                "this RepVGGBlock was switched to its deployed form, which is not for training: "
                "call .eval() to run it, or train the multi-branch network and switch a copy "
                "with repvgg.switch_to_deploy(model)"
            )
        assert self.reparam is not None
        return self.reparam(x)


class QARepVGGBlock(RepVGGBlock):
    """The quantization-friendly sibling: a bare 1x1, a bare identity, one BatchNorm behind the sum.

    QARepVGG (Chu et al., 2022, arXiv:2212.01593), section 3 ("S4"):

        y = ReLU(BN(BN3(W3 * x) + W1 * x + x))

    The variance of the deployed kernels stays small without the BatchNorms of the two thin
    branches, and the one behind the sum keeps training stable. Squeeze-and-excite gates stand
    behind that BatchNorm, as the fold would not be exact otherwise.

    Shapes, arguments, errors: those of `RepVGGBlock`, which has `bn` and `bias` besides.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        padding_mode: str = "zeros",
        bn_eps: float = 1e-5,
        branch_drop: float = 0.0,
        drop_path: float = 0.0,
        se_before_relu: int = 0,
        se_after_relu: int = 0,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            stride=stride,
            groups=groups,
            dilation=dilation,
            padding_mode=padding_mode,
            bn_eps=bn_eps,
            branch_drop=branch_drop,
            drop_path=drop_path,
            se_before_relu=se_before_relu,
            se_after_relu=se_after_relu,
        )
        assert self.branch_1x1 is not None
        self.branch_1x1.bn = None
        if self.branch_identity is not None:
            self.branch_identity = nn.Identity()
        self.post_bn: nn.BatchNorm2d | None = nn.BatchNorm2d(out_channels, eps=bn_eps)

    def switch_to_deploy(self) -> None:
        super().switch_to_deploy()
        self.post_bn = None

    def _merged(self) -> Affine:
        assert self.post_bn is not None
        return fold_bn(*super()._merged(), self.post_bn)

    def _sum_of_branches(self, x: Tensor) -> Tensor:
        assert self.post_bn is not None
        return self.post_bn(super()._sum_of_branches(x))


def compile_blocks(network: nn.Module, **options: Any) -> int:
    """Compile every block of a network by itself, in place; names of weights do not change.

    Blocks of one shape share their code, so a deep network compiles as fast as a shallow one.

    Args:
        options: of `torch.compile`.

    Returns:
        how many blocks there are.
    """
    blocks = [module for module in network.modules() if isinstance(module, RepVGGBlock)]
    # All are calls of one function, which torch compiles eight times and then gives up: for each
    # shape, to train and to evaluate.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 8 + 4 * len(blocks))
    for block in blocks:
        block.compile(**options)
    return len(blocks)


@contextlib.contextmanager
def _without_statistics(block: nn.Module) -> Iterator[None]:
    """Let no BatchNorm of a block count the images that it sees a second time."""
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # the running statistics stay; a forward must save as many tensors
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked -= 1


BLOCKS: dict[str, type[RepVGGBlock]] = {"repvgg": RepVGGBlock, "qarepvgg": QARepVGGBlock}
