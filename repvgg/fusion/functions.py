"""Turns what a forward computes with its own tensors into layers, which can be folded.

- A convolution that is called as a function, whose weights follow from parameters alone (OREPA, Hu
  et al., 2022, arXiv:2204.00826; ECBSR's fixed filters), becomes a layer with those weights.
- A normalization or convolution whose output is padded by its own value for an input of zeros (DBB,
  Ding et al., 2021, arXiv:2103.13425) pads its input with zeros instead: a 1x1 layer with padding.
- A leaky ReLU of slope 1 (VanillaNet at the end of its training) disappears.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from repvgg.fusion.attributes import tensor_of
from repvgg.fusion.chains import by_channel
from repvgg.fusion.constants import Constants, read_tensor
from repvgg.fusion.dataflow import Dataflow
from repvgg.fusion.kinds import target_name
from repvgg.fusion.normalizations import is_normalization, read_normalization
from repvgg.fusion.rewriting import Place, Rewriter
from repvgg.fusion.surgery import erase_unused, put
from repvgg.reparam import Convolution, Geometry, bare_affine

FUNCTIONS: dict[object, Callable[..., _ConvNd]] = {
    torch.conv1d: nn.Conv1d,
    torch.conv2d: nn.Conv2d,
    torch.conv3d: nn.Conv3d,
}
ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
EQUAL = 1e-6  # of a padding and the value that it must be; the network computes in float32


class NewLayer(NamedTuple):
    """A layer to make.

    Attributes:
        whole: what it computes.
        last: the node whose value it computes.
        like: a tensor of its dtype and device.
        trains: whether its weights require gradients.
        kind: its class.
    """

    whole: Convolution
    last: fx.Node
    like: Tensor
    trains: bool
    kind: Callable[..., _ConvNd]


class Functions(Rewriter):
    """The functional layers in one graph of a module's forward."""

    of_numbers = True

    def __init__(self, place: Place, graph: fx.Graph) -> None:
        super().__init__(place, graph)
        self.layers: dict[str, _ConvNd] = {}  # new ones, by their names in the owner
        self.replaced: list[nn.Module] = []  # normalizations
        self.constants = Constants(place.owner)

    def merge(self) -> list[tuple[str, ...]]:
        """Rewrite the graph; the names of the new layers. `write` adds them."""
        found: list[tuple[str, ...]] = []
        for node in list(self.graph.nodes):
            if node.graph is not self.graph or not node.users:
                continue
            if _is_straight(node):
                node.replace_all_uses_with(node.all_input_nodes[0])
                erase_unused(node)
                found.append(())
                continue
            layer = self._functional(node) or self._padded_layer(node)
            if layer is not None:
                found.append((self._put(node, layer),))
        return found

    def _functional(self, node: fx.Node) -> NewLayer | None:
        """A convolution of a value, called as a function with constant weights."""
        kind = FUNCTIONS.get(node.target)
        if node.op != "call_function" or kind is None or not node.args:
            return None
        value = node.args[0]
        if not isinstance(value, fx.Node) or self.constants.value(value) is not None:
            return None  # a kernel that is computed from another one
        given: dict[str, Any] = dict(zip(ARGUMENTS, node.args, strict=False)) | node.kwargs
        weight = self.constants.value(given.get("weight"))
        shift = given.get("bias")
        bias = None if shift is None else self.constants.value(shift)
        if weight is None or (bias is None) != (shift is None):
            return None
        sources = self._sources([given["weight"], *([] if shift is None else [shift])])
        if sources is None or len({(each.dtype, each.device) for each in sources}) != 1:
            return None
        dims = weight.ndim - 2
        plain = [_each(given.get(key, least), dims) for key, least in _LEAST]
        groups = given.get("groups", 1)
        if None in plain or not isinstance(groups, int):
            return None
        stride, padding, dilation = (part for part in plain if part is not None)
        geometry = Geometry(tuple(weight.shape[2:]), stride, dilation, padding, padding)
        affine = bare_affine(weight.double(), None if bias is None else bias.double())
        whole = Convolution(affine, geometry, groups, bias is not None)
        last, whole = self._with_border(node, whole)
        trains = any(each.requires_grad for each in sources)
        return NewLayer(whole, last, sources[0], trains, kind)

    def _padded_layer(self, node: fx.Node) -> NewLayer | None:
        """A normalization whose output is padded by what it gives for zeros."""
        module = self.module(node)
        if module is None or not is_normalization(module) or not self.is_own(module):
            return None
        found, mean = read_normalization(module), tensor_of(module, "running_mean")
        if isinstance(found, str) or found.tail or found.dims is None or found.dtype is not None:
            return None
        assert mean is not None
        last, whole = self._with_border(node, by_channel(found.scale, found.shift, found.dims))
        if last is node:
            return None
        self.replaced.append(module)
        trains = any(parameter.requires_grad for parameter in module.parameters())
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[found.dims]
        return NewLayer(whole, last, mean, trains, kind)

    def _with_border(self, node: fx.Node, whole: Convolution) -> tuple[fx.Node, Convolution]:
        """A layer and the padding behind it by what it gives for zeros, if there is one."""
        padding = self._padding(node)
        if padding is None or not self._pads_by(*padding, whole):
            return node, whole
        pad, amounts = padding
        stride = whole.geometry.stride
        around = tuple(s * p for s, p in zip(stride, amounts, strict=True))
        return pad, whole._replace(geometry=whole.geometry._replace(before=around, after=around))

    def _put(self, node: fx.Node, new: NewLayer) -> str:
        """Call a new layer in the place of a node, and of the padding behind it."""
        (kernel, bias), geometry, groups, biased = new.whole
        name = f"folded_{len(self.layers)}" if self.layers else "folded"
        while hasattr(self.place.owner, name):
            name += "_"
        layer = new.kind(
            new.whole.in_channels,
            len(kernel),
            geometry.kernel,
            stride=geometry.stride,
            padding=geometry.before,
            dilation=geometry.dilation,
            groups=groups,
            device="meta",
        )
        layer.weight = nn.Parameter(kernel.to(new.like, copy=True), new.trains)
        shift = nn.Parameter(bias.to(new.like, copy=True), new.trains)
        layer.bias = shift if biased else None
        self.layers[name] = layer.eval()
        full = f"{self.place.name}.{name}".removeprefix(".")
        self.totals[full] = new.whole.affine
        with self.graph.inserting_before(node):
            call = self.graph.call_module(name, (node.args[0],))
        for user in list(new.last.users):
            if user.target is operator.setitem:
                erase_unused(user)
        new.last.replace_all_uses_with(call)
        erase_unused(new.last)
        return full

    def _padding(self, node: fx.Node) -> tuple[fx.Node, tuple[int, ...]] | None:
        """The node that pads the output of another one on all sides, and by how much."""
        users = list(node.users)
        if len(users) != 1 or users[0].target is not F.pad or users[0].args[0] is not node:
            return None
        pad = users[0]
        amounts = pad.args[1] if len(pad.args) > 1 else pad.kwargs.get("pad")
        rest = (*pad.args[2:], *(v for k, v in pad.kwargs.items() if k != "pad"))
        if any(value not in ("constant", None, 0, 0.0) for value in rest):
            return None
        if not isinstance(amounts, tuple | list) or not all(type(a) is int for a in amounts):
            return None
        low, high = list(amounts[::2])[::-1], list(amounts[1::2])[::-1]
        if low != high or not all(amount > 0 for amount in low):
            return None
        return pad, cast(tuple[int, ...], tuple(low))

    def _pads_by(self, pad: fx.Node, amounts: Sequence[int], whole: Convolution) -> bool:
        """Whether the border of a padded output is set to what the layer gives for zeros."""
        geometry = whole.geometry
        if any(k > 1 for k in geometry.kernel) or geometry.pads:
            return False
        if len(amounts) != len(geometry.kernel):
            return False
        bias = whole.affine.bias
        order = list(self.graph.nodes)
        setting = [user for user in pad.users if user.target is operator.setitem]
        reading = [user for user in pad.users if user not in setting]
        if any(order.index(user) < order.index(last) for user in reading for last in setting):
            return False
        sides: set[tuple[int, bool]] = set()
        for user in setting:
            _, index, value = user.args
            side = _side(index, amounts)
            found = self.constants.value(value)
            if user.users or side is None or found is None:
                return False
            shape = (1, len(bias), *[1] * len(amounts))
            if tuple(found.shape) != shape:
                return False
            if self.place.check_values and not bias.is_meta:
                scale = bias.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
                if (found.reshape(-1).double() - bias).abs().max() > EQUAL * scale:
                    return False
            sides.add(side)
        return len(sides) == 2 * len(amounts)

    def _sources(self, nodes: list[fx.Node]) -> list[Tensor] | None:
        """The tensors from which nodes are computed; None if anything else uses one of them."""
        found, todo = [], [*nodes]
        while todo:
            node = todo.pop()
            todo += node.all_input_nodes
            if node.op == "get_attr":
                holder, key, tensor = read_tensor(self.place.owner, node)
                if tensor is None or self.is_used_elsewhere(holder, key):
                    return None
                found.append(tensor)
        return found

    def layer(self, name: str) -> _ConvNd:
        return self.layers[name.removeprefix(f"{self.place.name}.")]

    def write(self) -> None:
        """Add the new layers, and remove the tensors and layers that only they replace."""
        for name, layer in self.layers.items():
            self.place.owner.add_module(name, layer)
        self.place.values.update(self.totals)
        for module in self.replaced:
            put(self.place.model, module, nn.Identity())
        self.drop_unread()


_LEAST = (("stride", 1), ("padding", 0), ("dilation", 1))


def _each(value: object, dims: int) -> tuple[int, ...] | None:
    """A setting for each dimension, or None if it is no number."""
    numbers = (value,) * dims if isinstance(value, int) else value
    if not isinstance(numbers, tuple | list) or not all(type(n) is int for n in numbers):
        return None
    return cast(tuple[int, ...], tuple(numbers)) * (dims if len(numbers) == 1 < dims else 1)


def _side(index: object, amounts: Sequence[int]) -> tuple[int, bool] | None:
    """Which side of a padded tensor an index means: the dimension, and whether the low one."""
    if not isinstance(index, tuple) or len(index) != 2 + len(amounts):
        return None
    sides = []
    for axis, part in enumerate(index):
        if part == slice(None):
            continue
        amount = amounts[axis - 2] if axis > 1 else math.nan
        low, high = (slice(0, amount), slice(None, amount)), (slice(-amount, None),)
        if part not in (*low, *high):
            return None
        sides.append((axis - 2, part in low))
    return sides[0] if len(sides) == 1 else None


def _is_straight(node: fx.Node) -> bool:
    """Whether a node is a leaky ReLU of slope 1, which returns its input."""
    if node.op != "call_function" or target_name(node) != "leaky_relu" or len(node.args) < 1:
        return False
    slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope")
    return isinstance(slope, int | float) and slope == 1 and isinstance(node.args[0], fx.Node)


def owners(flow: Dataflow, model: nn.Module) -> list[str]:
    """Modules whose forward calls convolutions as functions, or sets the border of a padding."""
    found = dict.fromkeys(
        list(flow.callers[node])[-1]
        for graph in flow.graphs
        for node in graph.nodes
        if node.target in FUNCTIONS or node.target is operator.setitem or _is_straight(node)
    )
    for name in list(found):  # a layer with code of its own stays one
        module = model.get_submodule(name)
        if isinstance(module, _ConvNd | nn.Linear) or is_normalization(module):
            del found[name]
    return sorted(found, key=lambda name: -name.count(".") if name else 1)
