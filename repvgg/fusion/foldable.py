"""Foldable layers: which they are, and how their kernels and biases are read and written.

A subclass of a convolution that overrides no code is a convolution. Normalizations are read in
`repvgg.fusion.normalizations`.
"""

import operator
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from repvgg.fusion.dataflow import Transparent
from repvgg.fusion.hooks import has_hooks
from repvgg.fusion.kinds import target_home, target_name
from repvgg.fusion.normalizations import (
    Normalization,
    is_never_updated,
    is_normalization,
    read_normalization,
    read_scaling,
)
from repvgg.fusion.source import has_own_code, is_of_torch
from repvgg.reparam import Affine, bare_affine, scale_input, scale_output
from repvgg.reparam import transpose_kernel as transpose

Linear = _ConvNd | nn.Linear

CONVOLUTIONS: dict[type[nn.Module], int] = {  # and their spatial dimensions
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}


# torch.jit exports neither for mypy, and torch.jit.script reads "# type:" in a function as a type.
_is_scripting: Callable[[], bool] = vars(torch.jit)["is_scripting"]
_is_tracing: Callable[[], bool] = vars(torch.jit)["is_tracing"]


@fx.wrap
def require_axes(x: Tensor, ndim: int, channels: int) -> Tensor:
    """Return a tensor that has `ndim` axes, the second one of `channels` channels.

    Raises:
        ValueError: it has another shape.
    """
    # torch.jit.trace warns of such tests, and records the present sizes as constants.
    known = _is_scripting() or not _is_tracing()
    if known and (x.ndim != ndim or x.shape[1] != channels):
        raise ValueError(
            f"an input of shape {x.shape} reached a BatchNorm that was folded for inputs of {ndim} "
            f"axes, the second one of {channels} channels: use the network that was passed to "
            "fuse_conv_bn"
        )
    return x


class Rows(Transparent):
    """Replaces a folded BatchNorm that accepted inputs of several ranks.

    The BatchNorm normalized the second axis of any input. The fold holds only if that is the axis
    of channels, so every other input is an error.

    Shapes: `ndim` axes, the second one of `channels`; unchanged.

    Raises:
        ValueError: an input has other axes.
    """

    def __init__(self, ndim: int, channels: int) -> None:
        super().__init__()
        self.ndim = ndim
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return require_axes(x, self.ndim, self.channels)

    def extra_repr(self) -> str:
        return f"ndim={self.ndim}, channels={self.channels}"


@runtime_checkable
class _MayOverwrite(Protocol):
    """A module with a flag that lets it overwrite its input."""

    inplace: bool


class Tail(nn.Sequential):
    """Replaces a folded normalization that had more modules inside, timm's activation say."""


def is_linear(module: nn.Module) -> TypeGuard[Linear]:
    """Whether a module is a convolution or linear layer of torch that overrides no code."""
    base = next((base for base in (*CONVOLUTIONS, nn.Linear) if isinstance(module, base)), None)
    return base is not None and not has_own_code(module, base)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one node of the dataflow, because its function is known."""
    if is_normalization(module):
        return isinstance(read_normalization(module), Normalization)
    known = is_linear(module) or isinstance(module, Tail | Rows)
    return known or read_scaling(module) is not None


def obstacle(module: nn.Module, *, values: bool = True) -> str | None:
    """Why the tensors of a module cannot be folded in any network, or None.

    Args:
        values: whether the numbers matter, or only the architecture (meta device).
    """
    tensors = [*module.parameters(), *module.buffers()]
    if parametrize.is_parametrized(module):
        return "it is parametrized: see torch.nn.utils.parametrize.remove_parametrizations"
    if any(has_hooks(part) for part in module.modules()):
        return "it has hooks (weight_norm, spectral_norm and pruning use them): remove them first"
    if any(not tensor.is_floating_point() for tensor in module.parameters()):
        return "its parameters are not real numbers"
    if values and any(tensor.is_meta for tensor in tensors):
        return "it is on the meta device, where tensors have no values"
    if values and is_normalization(module) and is_never_updated(module):
        return "its statistics were never updated: train it or load weights"
    return None


def replacement(module: nn.Module, found: Normalization, ndim: int) -> nn.Module:
    """The module in the place of a folded normalization, whose inputs had `ndim` axes."""
    if found.tail:
        tail = OrderedDict((name, module.get_submodule(name)) for name in found.tail)
        return Tail(tail).eval()
    return (nn.Identity() if found.checks else Rows(ndim, len(found.scale))).eval()


def dimensions(module: Linear) -> int:
    """Spatial dimensions of a convolution's inputs; 0 for a linear layer."""
    return next((dims for base, dims in CONVOLUTIONS.items() if isinstance(module, base)), 0)


def in_channels(module: Linear) -> int:
    """Channels of a layer's inputs."""
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels


def out_channels(module: Linear) -> int:
    """Channels of a layer's outputs."""
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def affine(module: Linear) -> Affine:
    """The kernel (O, I / groups, *size) and bias of a convolution or linear layer, in float64."""
    kernel = module.weight.detach().double()
    if isinstance(module, _ConvTransposeNd):
        kernel = transpose(kernel, module.groups)
    return bare_affine(kernel, None if module.bias is None else module.bias.detach().double())


def write(module: Linear, value: Affine, bias_trains: bool) -> None:
    """Set the kernel and bias of a layer. Its dtype, device and memory format stay.

    Args:
        bias_trains: whether a new bias requires gradients.
    """
    kernel = value.kernel
    if isinstance(module, _ConvTransposeNd):
        kernel = transpose(kernel, module.groups)
    old, bias = module.weight, module.bias
    trains = bias_trains if bias is None else bias.requires_grad
    module.weight = nn.Parameter(in_format_of(old, kernel), old.requires_grad)
    module.bias = nn.Parameter(value.bias.to(old), trains)


def in_format_of(old: Tensor, kernel: Tensor) -> Tensor:
    """A kernel in the dtype, device and memory format (channels_last, say) of another tensor."""
    if old.shape == kernel.shape:
        return torch.empty_like(old, requires_grad=False).copy_(kernel)
    last = old.ndim == 4 and not old.is_contiguous()
    last = last and old.is_contiguous(memory_format=torch.channels_last)
    format = torch.channels_last if last else torch.contiguous_format
    return kernel.to(old).contiguous(memory_format=format)


def misfit(module: Linear, value: Affine) -> str | None:
    """Why a kernel and bias cannot be written in the dtype of a layer, or None."""
    dtype = module.weight.dtype
    if all(part.is_meta or bool(part.to(dtype).isfinite().all()) for part in value):
        return None
    return f"the folded weights are NaN or too large for {dtype}"


def fold_following(value: Affine, found: Normalization) -> Affine:
    """Fold a normalization into the layer before it."""
    return scale_output(value.kernel, value.bias, found.scale, found.shift)


def fold_preceding(module: Linear, value: Affine, found: Normalization) -> Affine:
    """Fold a normalization into the layer after it."""
    groups = 1 if isinstance(module, nn.Linear) else module.groups
    return scale_input(value.kernel, value.bias, found.scale, found.shift, groups=groups)


def pads_with_zeros(module: Linear) -> bool:
    """Whether a layer pads its input with zeros, which a normalization would have shifted."""
    if isinstance(module, nn.Linear):
        return False
    if isinstance(module, _ConvTransposeNd):
        return True
    if module.padding_mode != "zeros" or module.padding == "valid":
        return False
    if module.padding == "same":
        return any(size > 1 for size in module.kernel_size)
    return any(module.padding)


def may_overwrite(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node may overwrite one of its inputs. `module` is what it calls."""
    if module is not None:
        in_place = any(isinstance(m, _MayOverwrite) and m.inplace for m in module.modules())
        return in_place or not (is_of_torch(module) or is_leaf(module))
    name = target_name(node)
    if node.op == "call_method":
        return name.endswith("_")
    if node.op != "call_function":
        return False
    home = target_home(node)
    if home == "_operator":
        return name == "setitem" or (name[0] == "i" and name[1:] in vars(operator))  # iadd
    in_place = node.kwargs.get("inplace", False) is not False or "out" in node.kwargs
    return in_place or name.endswith("_") or home.split(".")[0] not in ("torch", "builtins", "math")
