"""Which modules normalize by running statistics, and what they compute in eval mode.

Those of torch are known. The forward of others (torchvision's FrozenBatchNorm2d, timm's
BatchNormAct2d) is traced: it must scale and shift each channel, and may then run child modules.
"""

import contextlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from repvgg.fusion.attributes import tensor_of
from repvgg.fusion.copying import copied
from repvgg.fusion.dataflow import uses
from repvgg.fusion.errors import in_a_line
from repvgg.fusion.hooks import has_hooks
from repvgg.fusion.source import has_own_code
from repvgg.fusion.tracer import Tracer
from repvgg.reparam import bn_affine

NORMALIZATIONS: dict[type[nn.Module], int | None] = {  # and their spatial dimensions; None: any
    nn.BatchNorm1d: 1,
    nn.BatchNorm2d: 2,
    nn.BatchNorm3d: 3,
    nn.SyncBatchNorm: None,
}
_ELEMENTWISE = (
    *(operator.add, operator.sub, operator.mul, operator.truediv),
    *(torch.add, torch.sub, torch.mul, torch.div),
)


@dataclass(frozen=True)
class Normalization:
    """x -> tail(scale * x + shift), by channel.

    Attributes:
        scale, shift: (C,), float64.
        tail: names of the children that run after it, in order.
        dims: spatial dimensions of its inputs; None for any.
        checks: whether the module raises on inputs of other dimensions.
        dtype: of its computation and output; None for that of its input.
    """

    scale: Tensor
    shift: Tensor
    tail: tuple[str, ...]
    dims: int | None
    checks: bool
    dtype: torch.dtype | None = None


def is_normalization(module: nn.Module | None) -> bool:
    """Whether a module is a BatchNorm, or has running statistics like one."""
    if module is None or isinstance(module, _InstanceNorm):
        return False
    return isinstance(module, _BatchNorm) or has_statistics(module)


def has_statistics(module: nn.Module) -> bool:
    """Whether a module has a running mean and variance."""
    return all(tensor_of(module, key) is not None for key in ("running_mean", "running_var"))


def is_never_updated(module: nn.Module) -> bool:
    """Whether the running statistics are the initial ones, mean 0 and variance 1."""
    count, mean, variance = (
        tensor_of(module, key) for key in ("num_batches_tracked", "running_mean", "running_var")
    )
    if mean is None or variance is None or mean.is_meta:
        return True
    counted = count is not None and int(count) != 0
    return not counted and not mean.any() and bool((variance == 1).all())


def read_scaling(module: nn.Module | None) -> Tensor | None:
    """The factors by channel of a module that only multiplies images by its one parameter.

    As layer scale does (Touvron et al., 2021, arXiv:2103.17239, section 2).

    Returns:
        (C, 1, 1), in float64; None for any other module.
    """
    if module is None or type(module).__module__.startswith("torch.") or has_hooks(module):
        return None
    parameters, rest = list(module.parameters()), [*module.children(), *module.buffers()]
    if len(parameters) != 1 or rest or not parameters[0].is_floating_point():
        return None
    module = copied(module).eval()
    try:
        graph = Tracer(set()).trace(module)
    except Exception:  # whatever the code of the module raises
        return None
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    users = uses(inputs[0]) if len(inputs) == 1 else []
    if len(users) != 1 or not _scales_and_shifts(users[0], inputs[0], {inputs[0], users[0]}):
        return None
    if [user.op for user in users[0].users] != ["output"]:
        return None
    if users[0].target not in (operator.mul, torch.mul):
        return None
    ones = torch.ones(1, parameters[0].numel(), 1, 1, dtype=torch.float64)
    ones = ones.to(parameters[0].device)
    with torch.no_grad():
        try:
            scaled = fx.GraphModule(module.double(), graph)(ones)
        except Exception:
            return None
    found = isinstance(scaled, Tensor) and scaled.shape == ones.shape
    return scaled[0] if found else None


_Key = tuple[type[nn.Module], object, tuple[int, ...]]
_read: dict[_Key, tuple[list[Tensor | None], Normalization | str]] | None = None


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Cache `read_normalization` within a `with` block, also for copies with the same tensors.

    No tensor or setting of a normalization may change in the block.
    """
    global _read
    before, _read = _read, {}
    try:
        yield
    finally:
        _read = before


def read_normalization(module: nn.Module) -> Normalization | str:
    """What a normalization computes in eval mode, or why that is unknown."""
    if _read is None or not has_statistics(module):
        return _read_normalization(module)
    parts = [tensor_of(module, key) for key in ("running_mean", "running_var", "weight", "bias")]
    key = (type(module), vars(module).get("eps"), tuple(map(id, parts)))
    if key not in _read:
        _read[key] = parts, _read_normalization(module)
    return _read[key][1]


def _read_normalization(module: nn.Module) -> Normalization | str:
    if not has_statistics(module):
        return "it has no running statistics, so its output depends on the batch"
    base = next((base for base in NORMALIZATIONS if isinstance(module, base)), None)
    dims = None if base is None else NORMALIZATIONS[base]
    if base is None or has_own_code(module, base):
        return _trace_normalization(module, dims)
    assert isinstance(module, _BatchNorm)
    scale, shift = bn_affine(module)
    checks = base in (nn.BatchNorm2d, nn.BatchNorm3d)
    return Normalization(scale.detach(), shift.detach(), (), dims, checks)


def _trace_normalization(module: nn.Module, dims: int | None) -> Normalization | str:
    """Trace a forward: nodes that scale and shift, then child modules in a chain."""
    kind = type(module).__name__
    assert isinstance(module.running_mean, Tensor)
    dtype = None if isinstance(module, _BatchNorm) else module.running_mean.dtype
    module = copied(module).eval()
    try:
        graph = Tracer(set(module.children())).trace(module)
    except Exception as error:
        return f"{kind} has its own forward, which could not be traced ({in_a_line(error)})"
    unknown = f"{kind} has its own forward, which does more than scale and shift"
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


def _scales_and_shifts(node: fx.Node, source: fx.Node, varying: set[fx.Node]) -> bool:
    """Whether a node scales and shifts its source by values that do not vary with the input."""
    if node.op != "call_function":
        return False
    if node.target is F.batch_norm:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training")
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        others = [value for key, value in given.items() if key != "input"]
        return (
            given["input"] is source
            and given.get("training", False) is False
            and not any(isinstance(value, fx.Node) and value in varying for value in others)
        )
    if node.target not in _ELEMENTWISE:
        return False
    first, *rest = node.args
    if node.kwargs or len(rest) != 1:
        return False
    divides = node.target in (operator.truediv, torch.div)
    return (first is source and rest[0] not in varying) or (
        rest[0] is source and first not in varying and not divides
    )


@torch.no_grad()
def _measure(
    module: nn.Module, graph: fx.Graph, head: fx.Node, tail: tuple[str, ...], dims: int | None
) -> Normalization | None:
    """Read scale and shift off an affine head f: f(0) is the shift, (f(t) - f(0)) / t the scale."""
    mean = module.running_mean
    assert isinstance(mean, Tensor)
    # A class that accepts any dimensions is measured on images.
    dims = 2 if dims is None else dims
    ones = torch.ones(1, len(mean), *[1] * dims).to(mean)
    large = 2.0**20  # a power of two, so that the scale loses little precision next to the shift
    shift, far = (_Head(module, graph, head).value_for(t * ones) for t in (0.0, large))
    if shift.shape != ones.shape or far.shape != ones.shape:
        return None
    scale = (far - shift) / large
    return Normalization(scale.flatten(), shift.flatten(), tail, dims, checks=True)


class _Head(fx.Interpreter):
    """Runs a graph up to one node."""

    def __init__(self, module: nn.Module, graph: fx.Graph, head: fx.Node) -> None:
        super().__init__(module, graph=graph)
        self.head = head

    def value_for(self, x: Tensor) -> Tensor:
        self.args_iter = iter([x])
        for node in self.graph.nodes:
            self.env[node] = self.run_node(node)
            if node is self.head:
                break
        value = self.env.pop(self.head)
        assert isinstance(value, Tensor)
        return value
