"""Train one kernel as its branches would be trained: RepOptimizer.

Ding et al., 2022, arXiv:2205.15242. A block of branches with constant scales,

    y = s_1 (W_1 * x) + s_2 (W_2 * x) + ... (+ v x, with a trainable or a constant v by channel),

is one convolution of the kernel K = sum of E_j(s_j W_j) + diag(v), where E_j places a kernel among
the taps of the largest one. Under SGD (momentum, Nesterov, weight decay), training every W_j and v
is, exactly, training K from that start with its gradient multiplied by M = sum of E_j(s_j^2) +
diag(1), element by element. So a hook on the gradient is all: the cost of a step is that of a plain
convolution. Adam's update does not depend on the scale of the gradient, and clipping by norm sees
another norm: there the two are not the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from repvgg.reparam import Geometry, embed, identity_kernel, point_geometry


class ScaledBranch(NamedTuple):
    """A branch of a block with constant scales.

    Attributes:
        kernel: (O, I / groups, *size), as a branch of its own would start.
        geometry: of the branch; it fits into that of the block's convolution.
        scale: (O,), constant.
    """

    kernel: Tensor
    geometry: Geometry
    scale: Tensor


class MergedBranches(NamedTuple):
    """What makes the training of one kernel that of its branches.

    Attributes:
        kernel: where the training starts.
        mask: by which the gradient is multiplied.
        centre: what weight decay pulls towards, beside zero: a constant identity, else zeros.
    """

    kernel: Tensor
    mask: Tensor
    centre: Tensor


def merge_branches(
    branches: Sequence[ScaledBranch],
    geometry: Geometry,
    groups: int,
    *,
    identity: Tensor | None = None,
    trained: bool = True,
) -> MergedBranches:
    """Compute the start, the mask and the centre of one kernel.

    Args:
        branches: at least one; the largest has `geometry`.
        geometry: of the block's convolution.
        identity: (C,), v of the identity branch at the start; None for no such branch.
        trained: whether v trains. The sources of the method train it, without saying so; if it is
            constant, the mask has no 1 for it, and weight decay must spare it.

    Raises:
        ValueError: a branch does not fit into the geometry, or an identity is asked for between
            other channels or at a stride.
    """
    first = branches[0].kernel
    if identity is not None and first.shape[0] != first.shape[1] * groups:
        raise ValueError(
            f"there is no identity from {first.shape[1] * groups} to {first.shape[0]} channels"
        )
    kernel = mask = centre = torch.zeros(())
    for branch in branches:
        scale = branch.scale.double().reshape(-1, *[1] * (branch.kernel.ndim - 1))
        part = embed(branch.kernel.double() * scale, branch.geometry, geometry)
        squares = torch.ones_like(branch.kernel).double() * scale**2
        factor = embed(squares, branch.geometry, geometry)
        if part is None or factor is None:
            raise ValueError(f"a branch of {branch.geometry} does not fit into {geometry}")
        kernel, mask = kernel + part, mask + factor
    centre = torch.zeros_like(kernel)
    if identity is not None:
        dims = len(geometry.kernel)
        eye = identity_kernel(first.shape[0], groups, dims=dims, device=first.device)
        placed = embed(eye, point_geometry(dims), geometry)
        if placed is None:
            raise ValueError(f"an identity does not fit into {geometry}")
        added = placed * identity.double().reshape(-1, *[1] * (dims + 1))
        kernel = kernel + added
        if trained:
            mask = mask + placed
        else:
            centre = added
    return MergedBranches(*(part.to(first.dtype) for part in (kernel, mask, centre)))


def train_as_branches(
    weight: nn.Parameter, merged: MergedBranches, *, weight_decay: float = 0.0
) -> RemovableHandle:
    """Start a kernel from its merged branches, and multiply its gradients by the mask.

    The optimizer is any SGD of torch, with this weight decay. Call it on the parameters that the
    optimizer has; a copy of the network, or one that was moved to another dtype, needs a new call.

    Returns:
        what removes the hook.

    Raises:
        ValueError: the kernel has another shape.
    """
    if weight.shape != merged.kernel.shape:
        raise ValueError(
            f"the weight has the shape {tuple(weight.shape)}, the branches "
            f"{tuple(merged.kernel.shape)}"
        )
    with torch.no_grad():
        weight.copy_(merged.kernel)
    return multiply_gradients(weight, merged.mask, merged.centre * weight_decay)


def multiply_gradients(
    weight: Tensor, mask: Tensor, subtracted: Tensor | None = None
) -> RemovableHandle:
    """Multiply the gradients of a weight, element by element; before that, it may train already."""
    mask = mask.to(weight)
    less = torch.zeros_like(mask) if subtracted is None else subtracted.to(weight)

    def follow_branches(gradient: Tensor) -> Tensor:
        return gradient * mask - less

    handle: RemovableHandle = weight.register_hook(follow_branches)  # type: ignore[no-untyped-call]
    return handle
