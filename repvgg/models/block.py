"""The RepVGG block: parallel branches in training, one 3x3 convolution when deployed.

RepVGG (Ding et al., 2021, arXiv:2101.03697), section 3.2 and figure 4:

    y = ReLU(BN3(W3 * x) + BN1(W1 * x) + BN0(x))

The identity branch exists where channels and size stay. The only way to the folded block is to
build the multi-branch block and call `switch_to_deploy()`. In training a block can drop branches at
random. The folded convolution is the expectation over the dropped branches.

`QARepVGGBlock` (Chu et al., 2022, arXiv:2212.01593) has one BatchNorm behind the sum in place of
two inside the branches. Its folded kernels lose less in int8.
"""

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.jit import (  # type: ignore[attr-defined]  # not in __all__
    is_scripting,
    is_tracing,
)
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from repvgg.checks import check_number
from repvgg.fusion.copying import present_value
from repvgg.models.branches import (
    Branch,
    DropRows,
    check_drop,
    convolution_like,
    embed_branch,
    normalize,
    pair,
    read_branch,
    read_identity,
)
from repvgg.reparam import Affine, bare_affine, merge, rounded

KERNEL_SIZE = 3
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class SqueezeExcite(nn.Module):
    """Squeeze-and-excite: scale channels by their means (Hu et al., 2018, arXiv:1709.01507).

    Shapes: (N, C, H, W) -> (N, C, H, W).

    Args:
        channels: C.
        reduction: the hidden layer has C // reduction channels, at least one.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.excite = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = x.mean((2, 3), keepdim=True)  # (N, C, 1, 1)
        scale = self.excite(self.squeeze(scale).relu()).sigmoid()
        return x * scale


class RepVGGBlock(nn.Module):
    """A 3x3 + 1x1 + identity block that folds, exactly, into one 3x3 convolution.

    Shapes: (N, C, H, W) -> (N, O, ceil(H / stride), ceil(W / stride)).

    Args:
        in_channels: C.
        out_channels: O.
        stride: 1 or more. The identity branch needs stride 1 and O equal to C.
        groups: divides C and O; of all branches.
        dilation: of the 3x3 branch, and its padding.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        bn: normalize every branch. Without it the block is the plain residual sum
            ReLU(W3 * x + W1 * x + x).
        bias: give the two convolutions a bias.
        bn_eps: added to the variance by every BatchNorm.
        branch_drop: probability of dropping the 1x1 branch in training, separately for each image;
            the same for the identity branch; 0 is off.
        drop_path: probability of dropping the 3x3 and 1x1 branches together, so that the identity
            remains; 0 is off. Needs the identity branch.
        se_before_relu: reduction of squeeze-and-excite between the sum and the ReLU (RepVGG-D2se);
            0 is none.
        se_after_relu: reduction of squeeze-and-excite after the ReLU (RepVGGplus); 0 is none.

    Layers may be replaced or changed before the fold: other channels, strides, dilations or padding
    modes, a SyncBatchNorm or a frozen BatchNorm, pruned weights.

    Attributes:
        stride: of the subsampling before the 1x1 branch.
        in_channels: read-only, from the 3x3 branch or the folded convolution, as `out_channels`,
            `groups`, `dilation`, `padding_mode` and `bn_eps` are.
        recompute: activation checkpointing. True keeps only the block's input for the backward
            pass, which computes the rest again (Chen et al., 2016, arXiv:1604.06174). It takes less
            memory and a third more time; the numbers and the BatchNorm statistics are the same.

    Raises:
        ValueError: `drop_path` without an identity branch; a probability outside [0, 1); torch's
            own, where groups do not divide the channels or a padding mode is unknown.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        padding_mode: PaddingMode = "zeros",
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
        self.stride = stride
        self._bn_eps = bn_eps  # for a block without BatchNorm

        def normalization() -> nn.BatchNorm2d | None:
            return nn.BatchNorm2d(out_channels, eps=bn_eps) if bn else None

        self.branch_3x3: Branch | None = Branch(
            nn.Conv2d(
                in_channels,
                out_channels,
                KERNEL_SIZE,
                stride=stride,
                padding=dilation,
                dilation=dilation,
                groups=groups,
                bias=bias,
                padding_mode=padding_mode,
            ),
            normalization(),
        )
        # `forward` subsamples the input of this branch by the stride.
        self.branch_1x1: Branch | None = Branch(
            nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=bias), normalization()
        )
        self.branch_identity: nn.Module | None = None
        if in_channels == out_channels and stride == 1:
            self.branch_identity = normalization() or nn.Identity()
        elif drop_path > 0:
            raise ValueError(
                f"drop_path={drop_path}: a block from {in_channels} to {out_channels} channels "
                f"with stride {stride} has no identity branch to keep; pass drop_path=0"
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
        self._place_norms(out_channels, bn_eps)

    def forward(self, x: Tensor) -> Tensor:
        recompute = self.recompute and self.training and not is_scripting()
        if recompute and torch.is_grad_enabled():
            return self._recomputed(x)
        return self._forward(x)

    def equivalent_kernel_bias(self) -> Affine:
        """Compute the convolution that equals the sum of the branches in eval mode.

        The sum is in float64 and cast once to the dtype of the block's parameters. Gradients flow
        to the parameters of every branch (RepVGG, section 3.3).

        Returns:
            kernel (O, C / groups, 3, 3) and bias (O,). The kernel has the size of the 3x3 branch,
            if that was changed.

        Raises:
            ValueError: a branch is not linear in eval mode or cannot be folded. Its normalization
                has no running statistics or is not a BatchNorm, a layer has hooks or overrides
                torch's code, or stride, padding or channels do not match the 3x3 branch. Or the
                result is too large for the dtype.
        """
        if self.reparam is not None:
            return bare_affine(self.reparam.weight, self.reparam.bias)
        assert self.branch_3x3 is not None
        dtype = self.branch_3x3.conv.weight.dtype
        return rounded(*self._merged(), dtype)

    def branch_affines(self) -> dict[str, Affine]:
        """Compute the part of every branch in the folded convolution.

        Returns:
            by branch ("3x3", "1x1", "identity"), kernel (O, C / groups, 3, 3) and bias (O,), in
            float64. They add up to the folded kernel and bias.

        Raises:
            ValueError: the block is folded; or as `equivalent_kernel_bias`.
        """
        if self.reparam is not None:
            raise ValueError("the block is folded: its branches are gone")
        return self._branches()

    def switch_to_deploy(self) -> None:
        """Replace the branches by one convolution, in place, and set eval mode.

        The block's outputs in eval mode stay the same. Calling it again changes nothing. The
        convolution has the stride, padding, dtype, device, memory format and `requires_grad` of
        the 3x3 branch. An optimizer, EMA or DDP wrapper keeps the old parameters: if training
        continues, switch a copy (`repvgg.switch_to_deploy`).

        Raises:
            ValueError: as `equivalent_kernel_bias`, or the folded weights are NaN or infinite;
                the block is then unchanged.
        """
        if self.reparam is None:
            with torch.inference_mode(False), torch.no_grad():
                reparam = self._convolution()
            eps = self.bn_eps
            self.reparam = reparam
            self.stride = reparam.stride[0]  # the same in both dimensions, or the 1x1 fails to fit
            self._bn_eps = eps
            self.branch_3x3 = self.branch_1x1 = self.branch_identity = None
            self.branch_drop = self.drop_path = nn.Identity()
        self.eval()

    @property
    def in_channels(self) -> int:
        conv = self._main()
        return conv.weight.shape[1] * conv.groups

    @property
    def out_channels(self) -> int:
        return self._main().weight.shape[0]

    @property
    def groups(self) -> int:
        return self._main().groups

    @property
    def dilation(self) -> int:
        return pair(self._main().dilation)[0]

    @property
    def padding_mode(self) -> PaddingMode:
        return self._main().padding_mode

    @property
    def bn_eps(self) -> float:
        eps: float = getattr(self._main_norm(), "eps", self._bn_eps)
        return eps

    # torch.jit.script compiles properties unless they are listed here.
    __jit_unused_properties__ = (
        "in_channels",
        "out_channels",
        "groups",
        "dilation",
        "padding_mode",
        "bn_eps",
    )

    def _place_norms(self, out_channels: int, bn_eps: float) -> None:
        """For subclasses whose BatchNorms are elsewhere."""

    def extra_repr(self) -> str:
        form = "multi-branch" if self.reparam is None else "folded"
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}, {form}"

    def _main(self) -> nn.Conv2d:
        """The convolution that determines the block's shapes."""
        if self.reparam is not None:
            return self.reparam
        assert self.branch_3x3 is not None
        return self.branch_3x3.conv

    def _main_norm(self) -> nn.Module | None:
        return None if self.branch_3x3 is None else self.branch_3x3.bn

    def _convolution(self) -> nn.Conv2d:
        """The folded convolution."""
        assert self.branch_3x3 is not None
        conv, bn = self.branch_3x3.conv, self._main_norm()
        kernel, bias = self.equivalent_kernel_bias()
        if not kernel.is_meta and not (kernel.isfinite().all() and bias.isfinite().all()):
            raise ValueError(
                "the folded weights are NaN or infinite: a weight or a statistic of a branch is "
                "so or huge, or a variance is negative"
            )
        format = torch.contiguous_format
        if not conv.weight.is_contiguous() and conv.weight.is_contiguous(
            memory_format=torch.channels_last
        ):
            format = torch.channels_last
        with torch.enable_grad():
            weight = present_value(conv, "weight")
            assert weight is not None
            trains = weight.requires_grad
        found = [getattr(part, "bias", None) for part in (conv, bn)]
        shifts = [shift for shift in found if isinstance(shift, nn.Parameter)]
        reparam = convolution_like(conv, kernel.contiguous(memory_format=format))
        reparam.weight.requires_grad_(trains)
        reparam.bias = nn.Parameter(
            bias, any(shift.requires_grad for shift in shifts) if shifts else trains
        )
        return reparam

    def _merged(self) -> Affine:
        """The sum of the branches in eval mode; in float64."""
        return merge(*self._branches().values())

    def _branches(self) -> dict[str, Affine]:
        assert self.branch_3x3 is not None
        assert self.branch_1x1 is not None
        for name in ("branch_drop", "drop_path"):
            check_drop(name, getattr(self, name))
        dense = read_branch("branch_3x3", self.branch_3x3)
        point = read_branch("branch_1x1", self.branch_1x1)
        stride = tuple(self.stride * step for step in point.geometry.stride)
        point = point._replace(geometry=point.geometry._replace(stride=stride))
        branches = {"3x3": dense.affine, "1x1": embed_branch("branch_1x1", point, dense)}
        if self.branch_identity is not None:
            same = read_identity("branch_identity", self.branch_identity, dense)
            branches["identity"] = embed_branch("branch_identity", same, dense)
        return branches

    def _forward(self, x: Tensor) -> Tensor:
        x = self._sum_of_branches(x) if self.reparam is None else self.reparam(x)
        y: Tensor = self.se_after_relu(self.relu(self.se_before_relu(x)))
        return y

    @torch.jit.unused
    def _recomputed(self, x: Tensor) -> Tensor:
        if is_traced(x) or torch.compiler.is_exporting():  # a graph holds the plain forward
            return self._forward(x)
        y: Tensor = checkpoint(
            self._forward,
            x,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), _without_statistics(self._norms())),
        )
        return y

    @torch.jit.unused
    def _norms(self) -> list[_BatchNorm]:
        return [module for module in self.modules() if isinstance(module, _BatchNorm)]

    def _sum_of_branches(self, x: Tensor) -> Tensor:
        return self._sum(x)

    def _sum(self, x: Tensor) -> Tensor:
        assert self.branch_3x3 is not None
        assert self.branch_1x1 is not None
        # On CPU the weight gradient of a strided 1x1 convolution in channels_last corrupts the heap
        # (torch 2.13 and 2.15). Subsampling first is the same function, and safe.
        point = x if self.stride == 1 else x[..., :: self.stride, :: self.stride]
        y: Tensor = self.branch_3x3(x) + self.branch_drop(self.branch_1x1(point))
        if self.branch_identity is not None:
            y = self.drop_path(y) + self.branch_drop(self.branch_identity(x))
        return y


class QARepVGGBlock(RepVGGBlock):
    """The block for int8: a plain 1x1, a plain identity, and a BatchNorm behind the sum.

    QARepVGG (Chu et al., 2022, arXiv:2212.01593), section 3 ("S4"):

        y = ReLU(BN(BN3(W3 * x) + W1 * x + x))

    Without the BatchNorms of the 1x1 and the identity branch, the variance of the folded kernels
    stays small. The BatchNorm behind the sum keeps training stable. Squeeze-and-excite follows that
    BatchNorm; the fold would not be exact otherwise.

    Shapes, arguments and errors are those of `RepVGGBlock`; `bn` is of the 3x3 branch.
    """

    def _place_norms(self, out_channels: int, bn_eps: float) -> None:
        assert self.branch_1x1 is not None
        self.branch_1x1.bn = None
        if self.branch_identity is not None:
            self.branch_identity = nn.Identity()
        self.post_bn: nn.BatchNorm2d | None = nn.BatchNorm2d(out_channels, eps=bn_eps)

    def switch_to_deploy(self) -> None:
        super().switch_to_deploy()
        self.post_bn = None

    def _main_norm(self) -> nn.Module | None:
        return self.post_bn

    def branch_affines(self) -> dict[str, Affine]:
        """As of `RepVGGBlock`; the scale of `post_bn` is in each, its shift in that of the 3x3."""
        parts = super().branch_affines()
        nothing = Affine(*(torch.zeros_like(part) for part in parts["3x3"]))
        shift = normalize("post_bn", nothing, self.post_bn).bias
        scaled = {name: normalize("post_bn", part, self.post_bn) for name, part in parts.items()}
        return {
            name: part if name == "3x3" else part._replace(bias=part.bias - shift)
            for name, part in scaled.items()
        }

    def _merged(self) -> Affine:
        return normalize("post_bn", super()._merged(), self.post_bn)

    def _sum_of_branches(self, x: Tensor) -> Tensor:
        y = self._sum(x)
        return y if self.post_bn is None else self.post_bn(y)


def compile_blocks(network: nn.Module, **options: object) -> int:
    """Compile every block of a network separately, in place; the keys of its weights stay.

    Blocks of one shape share their code, so a deep network compiles as fast as a shallow one.

    Args:
        options: of `torch.compile`.

    Returns:
        the number of blocks.
    """
    blocks = [module for module in network.modules() if isinstance(module, RepVGGBlock)]
    # All blocks call one function, and torch stops compiling a function after eight variants. Each
    # shape needs one for training and one for evaluation.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 8 + 4 * len(blocks))
    for block in blocks:
        block.compile(**options)
    return len(blocks)


def is_traced(x: Tensor) -> bool:
    """Whether torch.fx or torch.jit.trace records the operations on a tensor."""
    tracing: bool = is_tracing()  # type: ignore[no-untyped-call]
    return isinstance(x, fx.Proxy) or tracing


@contextlib.contextmanager
def _without_statistics(norms: list[_BatchNorm]) -> Iterator[None]:
    """Keep the running statistics of BatchNorms, also while they compute a batch again."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # in eval mode it would save other tensors for the backward pass
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if norm.training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked -= 1


BLOCKS: dict[str, type[RepVGGBlock]] = {"repvgg": RepVGGBlock, "qarepvgg": QARepVGGBlock}
