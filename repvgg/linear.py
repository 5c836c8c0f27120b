"""Which modules are affine maps, and which: convolutions, linear layers, normalizations.

A module is judged by what it does. A subclass of a convolution that brings no code of its own is
one; a normalization with a forward of its own (torchvision's FrozenBatchNorm2d, timm's
BatchNormAct2d) is followed to see that it scales and shifts by channel, and what it does then.
"""

import operator
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from repvgg.dataflow import copied, uses
from repvgg.reading import is_of_torch
from repvgg.reparam import Affine, bare_affine, bn_affine, scale_input, scale_output
from repvgg.reparam import transpose_kernel as transpose
from repvgg.tracing import Tracer, has_hooks, in_a_line

Linear = _ConvNd | nn.Linear

CONVOLUTIONS: dict[type[nn.Module], int] = {  # and their spatial dimensions
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}
NORMALIZATIONS: dict[type[nn.Module], int | None] = {  # likewise; None takes any
    nn.BatchNorm1d: 1,
    nn.BatchNorm2d: 2,
    nn.BatchNorm3d: 3,
    nn.SyncBatchNorm: None,
}
_ELEMENTWISE = (
    *(operator.add, operator.sub, operator.mul, operator.truediv),
    *(torch.add, torch.sub, torch.mul, torch.div),
)
_CODE = ("__call__", "__getattr__", "__getattribute__", "forward", "_conv_forward")
_TENSORS = ("weight", "bias", "running_mean", "running_var")


class Rows(nn.Identity):
    """Stands for a BatchNorm that was folded and took inputs of several ranks.

    It normalized the second axis, whatever that was. The fold holds where that is the axis of
    channels, so only such inputs are let through.

    Shapes: any of `ndim` axes, unchanged.

    Raises:
        ValueError: an input has another number of axes.
    """

    transparent = True  # for the dataflow

    def __init__(self, ndim: int) -> None:
        super().__init__()
        self.ndim = ndim

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != self.ndim:
            raise ValueError(
                f"an input of shape {tuple(x.shape)} reached a BatchNorm that was folded for "
                f"inputs of {self.ndim} axes: run the network as it was before fuse_conv_bn on it"
            )
        return x

    def extra_repr(self) -> str:
        return f"ndim={self.ndim}"


class Tail(nn.Sequential):
    """What a normalization did besides normalizing, in its place; one step of the dataflow."""


@dataclass(frozen=True)
class Normalization:
    """x -> tail(scale * x + shift), by channel.

    Attributes:
        scale, shift: (C,), float64.
        tail: names of the children that run behind it, in order.
        dims: spatial dimensions of its inputs; None takes any.
        checks: refuses inputs of other dimensions by itself.
        dtype: of all it works on; None keeps that of its inputs, whatever its own is.
    """

    scale: Tensor
    shift: Tensor
    tail: tuple[str, ...]
    dims: int | None
    checks: bool
    dtype: torch.dtype | None = None


def is_normalization(module: nn.Module) -> bool:
    """Whether a module looks like a BatchNorm: it keeps running statistics, or is a subclass."""
    if isinstance(module, _InstanceNorm):
        return False
    statistics = (getattr(module, key, None) for key in ("running_mean", "running_var"))
    return isinstance(module, _BatchNorm) or all(isinstance(s, Tensor) for s in statistics)


def is_linear(module: nn.Module) -> TypeGuard[Linear]:
    """Whether a module is a convolution or linear layer without code of its own."""
    base = next((base for base in (*CONVOLUTIONS, nn.Linear) if isinstance(module, base)), None)
    return base is not None and not _has_own_code(module, base)


def is_step(module: nn.Module) -> bool:
    """Whether the dataflow takes a module as one step, whose inside is known."""
    if is_normalization(module):
        return isinstance(read_normalization(module), Normalization)
    return is_linear(module) or isinstance(module, Tail | Rows)


def refusal(module: nn.Module, *, values: bool = True) -> str | None:
    """Why the tensors of a module may not be folded, whatever surrounds it.

    Args:
        values: whether the numbers count too; else the form alone, which the meta device has.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if parametrize.is_parametrized(module):
        return "it is parametrized: see torch.nn.utils.parametrize.remove_parametrizations"
    if any(has_hooks(part) for part in module.modules()):
        return "it has hooks (weight_norm, spectral_norm and pruning use them): remove them first"
    if any(not tensor.is_floating_point() for tensor in module.parameters()):
        return "its parameters are not real numbers"
    if values and any(tensor.is_meta for tensor in tensors):
        return "it is on the meta device, where it has no values"
    if values and is_normalization(module) and is_never_updated(module):
        return "its statistics were never updated: train it or load weights"
    return None


def is_never_updated(module: nn.Module) -> bool:
    """Whether the running statistics of a normalization are the initial ones, mean 0 and var 1."""
    count, mean, variance = (
        getattr(module, key, None) for key in ("num_batches_tracked", "running_mean", "running_var")
    )
    if mean is None or variance is None or mean.is_meta:
        return True
    return (count is None or int(count) == 0) and not mean.any() and bool((variance == 1).all())


def read_normalization(module: nn.Module) -> Normalization | str:
    """What a module that looks like a BatchNorm computes in eval mode, or why that is not known."""
    if any(getattr(module, key, None) is None for key in ("running_mean", "running_var")):
        return "it has no running statistics, so its output depends on the batch"
    base = next((base for base in NORMALIZATIONS if isinstance(module, base)), None)
    dims = None if base is None else NORMALIZATIONS[base]
    if base is None or _has_own_code(module, base):
        return _follow_normalization(module, dims)
    assert isinstance(module, _BatchNorm)
    scale, shift = bn_affine(module)
    checks = base in (nn.BatchNorm2d, nn.BatchNorm3d)
    return Normalization(scale.detach(), shift.detach(), (), dims, checks)


def replacement(module: nn.Module, found: Normalization, ndim: int) -> nn.Module:
    """What stands where a normalization of inputs with `ndim` axes was folded away."""
    if found.tail:
        tail = OrderedDict((name, module.get_submodule(name)) for name in found.tail)
        return Tail(tail).eval()
    stands = nn.Identity() if found.checks else Rows(ndim)
    return stands.eval()


def dimensions(module: Linear) -> int:
    """Spatial dimensions of a convolution's inputs; 0 for a linear layer."""
    return next((dims for base, dims in CONVOLUTIONS.items() if isinstance(module, base)), 0)


def affine(module: Linear) -> Affine:
    """The kernel (O, I / groups, *size) and bias of a convolution or linear layer, in float64."""
    kernel = module.weight.detach().double()
    if isinstance(module, _ConvTransposeNd):
        kernel = transpose(kernel, module.groups)
    return bare_affine(kernel, None if module.bias is None else module.bias.detach().double())


def write(module: Linear, value: Affine) -> None:
    """Give a module a kernel and a bias; its other attributes, dtype and device stay."""
    kernel = value.kernel
    if isinstance(module, _ConvTransposeNd):
        kernel = transpose(kernel, module.groups)
    old = module.weight
    module.weight = nn.Parameter(kernel.to(old).contiguous(), old.requires_grad)
    module.bias = nn.Parameter(value.bias.to(old), old.requires_grad)


def fits(module: Linear, value: Affine) -> bool:
    """Whether numbers stay finite in the precision of a module."""
    dtype = module.weight.dtype
    return all(part.is_meta or bool(part.to(dtype).isfinite().all()) for part in value)


def absorb_behind(value: Affine, found: Normalization) -> Affine:
    """The affine map that also normalizes."""
    return scale_output(value.kernel, value.bias, found.scale, found.shift)


def absorb_before(module: Linear, value: Affine, found: Normalization) -> Affine:
    """The affine map of normalized inputs."""
    groups = getattr(module, "groups", 1)
    return scale_input(value.kernel, value.bias, found.scale, found.shift, groups=groups)


def pads_with_zeros(module: Linear) -> bool:
    """Whether a border is made up that a shift of the input would not reach."""
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
    """Whether a step may change a tensor that it is given; `module` is what it calls."""
    if module is not None:
        in_place = any(getattr(part, "inplace", False) for part in module.modules())
        return in_place or not (is_of_torch(module) or is_step(module))
    name = str(getattr(node.target, "__name__", node.target))
    if node.op == "call_method":
        return name.endswith("_")
    if node.op != "call_function":
        return False
    home = getattr(node.target, "__module__", None) or "torch"  # torch's built-ins have none
    if home == "_operator":
        return name[0] == "i" and hasattr(operator, name[1:])  # iadd
    in_place = node.kwargs.get("inplace", False) is not False or "out" in node.kwargs
    return in_place or name.endswith("_") or home.split(".")[0] not in ("torch", "builtins", "math")


def _has_own_code(module: nn.Module, base: type[nn.Module]) -> bool:
    own = vars(module)
    return any(
        key in own or getattr(type(module), key, None) is not getattr(base, key, None)
        for key in (*_CODE, *_TENSORS)
    ) and not parametrize.is_parametrized(module)


def _follow_normalization(module: nn.Module, dims: int | None) -> Normalization | str:
    """Follow a forward of its own: operations that scale and shift, then children, one by one."""
    kind = type(module).__name__
    assert isinstance(module.running_mean, Tensor)
    dtype = None if isinstance(module, _BatchNorm) else module.running_mean.dtype
    module = copied(module).eval()
    try:
        graph = Tracer(set(module.children())).trace(module)
    except Exception as error:
        return f"{kind} has a forward of its own that could not be followed ({in_a_line(error)})"
    unknown = f"{kind} has a forward of its own that does not only scale and shift"
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        return unknown
    node = inputs[0]
    varying = {node}
    for other in graph.nodes:
        if varying & set(other.all_input_nodes):
            varying.add(other)
    tail: list[str] = []
    head = node
    while True:
        users = uses(node)
        if len(users) != 1:
            return unknown
        user = users[0]
        if user.op == "output":
            break
        if user.op == "call_module" and user.args == (node,) and not user.kwargs:
            child = module.get_submodule(str(user.target))
            if user.target in tail:
                return unknown
            if type(child) is not nn.Identity or has_hooks(child):
                tail.append(str(user.target))
        elif not tail and _scales_and_shifts(user, node, varying):
            head = user
        else:
            return unknown
        node = user
    found = _measure(module.double(), graph, head, tuple(tail), dims)
    return unknown if found is None else replace(found, dtype=dtype)


def _scales_and_shifts(step: fx.Node, node: fx.Node, varying: set[fx.Node]) -> bool:
    if step.op != "call_function":
        return False
    if step.target is F.batch_norm:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training")
        given = dict(zip(names, step.args, strict=False)) | step.kwargs
        others = [value for key, value in given.items() if key != "input"]
        return (
            given["input"] is node
            and given.get("training", False) is False
            and not any(isinstance(value, fx.Node) and value in varying for value in others)
        )
    if step.target not in _ELEMENTWISE:
        return False
    first, *rest = step.args
    if step.kwargs or len(rest) != 1:
        return False
    divides = step.target in (operator.truediv, torch.div)
    return (first is node and rest[0] not in varying) or (
        rest[0] is node and first not in varying and not divides
    )


@torch.no_grad()
def _measure(
    module: nn.Module, graph: fx.Graph, head: fx.Node, tail: tuple[str, ...], dims: int | None
) -> Normalization | None:
    """Read scale and shift off an affine head f: f(0) is the shift, (f(t) - f(0)) / t the scale."""
    mean = module.running_mean
    assert isinstance(mean, Tensor)
    # Only images can be meant by a form that says nothing of dimensions.
    dims = 2 if dims is None else dims
    ones = torch.ones(1, len(mean), *[1] * dims).to(mean)
    large = 2.0**20  # a power of two, so that little of the scale is lost beside the shift
    shift, far = (_Head(module, graph, head).run(t * ones) for t in (0.0, large))
    if shift.shape != ones.shape or far.shape != ones.shape:
        return None
    scale = (far - shift) / large
    return Normalization(scale.flatten(), shift.flatten(), tail, dims, checks=True)


class _Head(fx.Interpreter):
    """Runs a graph up to one node."""

    def __init__(self, module: nn.Module, graph: fx.Graph, head: fx.Node) -> None:
        super().__init__(module, graph=graph)
        self.head = head

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.args_iter = iter(args)
        for node in self.graph.nodes:
            self.env[node] = self.run_node(node)
            if node is self.head:
                break
        return self.env.pop(self.head)
