"""Sums of parallel linear branches, in anyone's network, become one convolution.

RepVGG (Ding et al., 2021, arXiv:2101.03697), section 3.3, where the dataflow proves it applicable:
W3*x + W1*x + x, with BatchNorms or average pooling among the branches (Ding et al., 2021,
arXiv:2103.13425, section 3.2), is one convolution of x. The addition is code of some forward, so
the module it stands in is replaced by the graph of that forward.
"""

import inspect
from collections.abc import Iterator
from operator import add, getitem, iadd
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from repvgg import linear
from repvgg.dataflow import Dataflow, Tracer, has_hooks, uses
from repvgg.reparam import Affine, bare_affine, identity_kernel, merge, scale_output

ADDITIONS = (add, iadd, torch.add, "add", "add_")
POOLS = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}


class Geometry(NamedTuple):
    """How a branch moves over its input, by spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]  # padding on the low side
    after: tuple[int, ...]
    mode: str


class Branch(NamedTuple):
    """One term of a sum.

    Attributes:
        term: the step that is added.
        source: the step whose value enters it.
        call: the step that calls its module.
        module: its convolution, pool or normalization; None is the identity.
        name: of the module.
        subsampling: every how many pixels of the source enter it.
    """

    term: fx.Node
    source: fx.Node
    call: fx.Node
    module: nn.Module | None = None
    name: str = ""
    subsampling: int = 1


class Merged(NamedTuple):
    """A module whose sums were merged.

    Attributes:
        module: to stand in its place.
        sums: names of the modules that became one, the remaining one first.
    """

    module: nn.Module
    sums: list[tuple[str, ...]]


def owners(flow: Dataflow) -> Iterator[str]:
    """Modules in whose forward something is added, inner ones first."""
    found = dict.fromkeys(
        flow.callers[node][-1]
        for graph in flow.graphs
        for node in graph.nodes
        if _is_addition(node)
    )
    return iter(sorted(found, key=lambda name: -name.count(".") if name else 1))


def merge_sums(
    model: nn.Module, name: str, flow: Dataflow, *, values: bool = True
) -> Merged | None:
    """Merge what can be merged in the forward of one module.

    Args:
        model: the network, of which `flow` was made.
        name: of the module in it.
        values: as in `repvgg.linear.refusal`.

    Returns:
        None where nothing was merged.
    """
    owner = model.get_submodule(name)
    if has_hooks(owner) or not _is_only_called(owner, model, name):
        return None
    parameters = inspect.signature(owner.forward).parameters.values()
    if any(p.default is not p.empty or p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return None
    tracer = Tracer({module for module in owner.modules() if linear.is_step(module)})
    before = set(vars(owner))
    try:
        graph = tracer.trace(owner)
    except Exception:
        return None  # the whole network's own dataflow has said why
    finally:
        for constant in set(vars(owner)) - before:
            delattr(owner, constant)
    if tracer.opaque or any("_tensor_constant" in str(node.target) for node in graph.nodes):
        return None
    for node in list(graph.nodes):
        if node.op == "call_module" and type(owner.get_submodule(node.target)) is nn.Identity:
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
    sums = _Sums(model, owner, name, graph, flow, values)
    merged = sums.merge()
    if not merged:
        return None
    graph.lint()
    return Merged(_as_module(owner, graph, sums.absorbed), merged)


class _Sums:
    def __init__(
        self,
        model: nn.Module,
        owner: nn.Module,
        name: str,
        graph: fx.Graph,
        flow: Dataflow,
        values: bool,
    ) -> None:
        self.model = model
        self.owner = owner
        self.name = name
        self.graph = graph
        self.flow = flow
        self.values = values
        self.absorbed: set[nn.Module] = set()
        self.order: dict[fx.Node, int] = {}
        self.names = {module: path for path, module in model.named_modules()}
        self.calls: dict[nn.Module, int] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                module = owner.get_submodule(node.target)
                self.calls[module] = self.calls.get(module, 0) + 1

    def merge(self) -> list[tuple[str, ...]]:
        merged = []
        additions = [node for node in self.graph.nodes if _is_addition(node)]
        for node in additions:
            if not self._is_inner(node):
                self.order = {step: i for i, step in enumerate(self.graph.nodes)}
                merged += self._merge_sum(node)
        return merged

    def _is_inner(self, node: fx.Node) -> bool:
        """Whether a sum is itself one term of a sum."""
        users = uses(node)
        return len(users) == 1 and _is_addition(users[0])

    def _merge_sum(self, root: fx.Node) -> list[tuple[str, ...]]:
        nodes, terms = self._terms(root)
        branches = [self._branch(term) for term in terms]
        convolved = {b.source for b in branches if isinstance(b.module, _ConvNd)}
        merged = []
        rest: list[Any] = []
        for source in sorted(convolved, key=self.order.__getitem__):
            group = self._compatible([b for b in branches if b.source is source])
            if len(group) < 2 or self._is_disturbed(root, nodes, group):
                continue
            rest.append(self._write(root, source, group))
            merged.append(tuple(b.name for b in group if b.module is not None))
            for branch in group:
                branches.remove(branch)
        if not merged:
            return []
        with self.graph.inserting_before(root):
            total = rest[0]
            for term in [*rest[1:], *(b.term for b in branches)]:
                total = self.graph.call_function(add, (total, term))
        root.replace_all_uses_with(total)
        self._erase(root)
        return merged

    def _terms(self, root: fx.Node) -> tuple[set[fx.Node], list[fx.Node]]:
        """The additions of a sum, and what they add."""
        nodes, terms, todo = {root}, [], list(root.args)
        while todo:
            node = todo.pop(0)
            if isinstance(node, fx.Node):
                if _is_addition(node) and len(node.users) == 1:
                    nodes.add(node)
                    todo = list(node.args) + todo
                else:
                    terms.append(node)
        return nodes, terms

    def _branch(self, term: fx.Node) -> Branch:
        """Read one term; what is no branch is the identity of itself."""
        itself = Branch(term, term, term)
        node = term
        if self._is_check(node) and len(node.users) == 1:
            node = node.all_input_nodes[0]
        if node.op != "call_module" or len(node.users) != 1 or len(node.args) != 1 or node.kwargs:
            return itself
        module = self.owner.get_submodule(str(node.target))
        path = self.names[module]
        source, step = node.all_input_nodes[0], 1
        if isinstance(module, _ConvNd) and set(module.kernel_size) == {1}:
            source, step = _subsampling(source) or (source, 1)
        within = all(self.name in self.flow.callers[call] for call in self.flow.calls.get(path, []))
        known = _geometry(module) is not None
        known = known and linear.refusal(module, values=self.values) is None
        if not within or not known or self.calls[module] != 1 or path in self.flow.reached:
            return itself
        return Branch(term, source, node, module, path, step)

    def _is_check(self, node: fx.Node) -> bool:
        """Whether a step only refuses inputs of the wrong rank."""
        return (
            node.op == "call_module"
            and type(self.owner.get_submodule(str(node.target))) is linear.Rows
        )

    def _compatible(self, group: list[Branch]) -> list[Branch]:
        """Those that fit into the largest convolution of a group, which comes first."""
        convolutions = [b for b in group if isinstance(b.module, _ConvNd)]
        main = max(convolutions, key=_num_taps)
        fitting = [b for b in group if b is not main and self._kernel(b, main) is not None]
        return [main, *fitting]

    def _kernel(self, branch: Branch, main: Branch) -> Affine | None:
        """A branch as a convolution of the main one's shape, in float64; None where it is none."""
        conv = main.module
        assert isinstance(conv, _ConvNd)
        target, own = _geometry(conv), _geometry(branch.module, conv)
        assert target is not None
        padding = own and _embedding(
            own._replace(stride=tuple(s * branch.subsampling for s in own.stride)),
            target._replace(stride=tuple(s * main.subsampling for s in target.stride)),
        )
        small = _small_kernel(branch.module, conv)
        if padding is None or small is None:
            return None
        taps = [amount for pair in reversed(padding) for amount in pair]  # last dimension first
        return Affine(nn.functional.pad(small.kernel, taps), small.bias)

    def _is_disturbed(self, root: fx.Node, nodes: set[fx.Node], group: list[Branch]) -> bool:
        """Whether a value may be overwritten between its first use and the sum."""
        first = min(self.order[b.call] for b in group if b.module is not None)
        for node, position in self.order.items():
            if first < position <= self.order[root]:
                module = None
                if node.op == "call_module":
                    module = self.owner.get_submodule(str(node.target))
                if linear.may_overwrite(node, module) and not (
                    node in nodes and self._is_fresh(node.args[0], nodes)
                ):
                    return True
        return False

    def _is_fresh(self, node: Any, nodes: set[fx.Node]) -> bool:
        """Whether nobody else can see the value of a step that a sum adds to."""
        return node in nodes or self._branch(node).module is not None

    def _write(self, root: fx.Node, source: fx.Node, group: list[Branch]) -> fx.Node:
        main = group[0]
        old = main.module
        assert isinstance(old, _ConvNd)
        kernels = [self._kernel(branch, main) for branch in group]
        total = merge(*(kernel for kernel in kernels if kernel is not None))
        stride = tuple(s * main.subsampling for s in old.stride)
        # On the meta device: its numbers are replaced, and no random state is consumed.
        conv = _plain(type(old))(
            old.in_channels,
            old.out_channels,
            old.kernel_size,
            stride=stride,
            padding=old.padding,
            dilation=old.dilation,
            groups=old.groups,
            padding_mode=old.padding_mode,
            device="meta",
        )
        conv.weight = nn.Parameter(total.kernel.to(old.weight), old.weight.requires_grad)
        conv.bias = nn.Parameter(total.bias.to(old.weight), old.weight.requires_grad)
        conv.eval()
        self.absorbed |= {branch.module for branch in group if branch.module is not None}
        target = str(main.call.target)
        parent, _, leaf = target.rpartition(".")
        setattr(self.owner.get_submodule(parent), leaf, conv)
        checks = [b.term for b in group if b.module is not None and self._is_check(b.term)]
        with self.graph.inserting_before(root):
            node = self.graph.call_module(target, (source,))
            for check in checks[:1]:
                node = self.graph.call_module(str(check.target), (node,))
        return node

    def _erase(self, root: fx.Node) -> None:
        """Remove a sum and the steps that nothing else uses."""
        todo = [root]
        while todo:
            node = todo.pop()
            if not node.users and node.op != "placeholder":
                inputs = node.all_input_nodes
                self.graph.erase_node(node)
                todo += inputs


def _is_addition(node: fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method")
        and node.target in ADDITIONS
        and len(node.args) == 2
        and not node.kwargs
        and all(isinstance(a, fx.Node) or (isinstance(a, int) and a == 0) for a in node.args)
    )


def _subsampling(node: Any) -> tuple[fx.Node, int] | None:
    """Of x[..., ::s, ::s]: x and s."""
    if not isinstance(node, fx.Node) or node.target is not getitem:
        return None
    source, index = node.args
    if not isinstance(source, fx.Node) or not isinstance(index, tuple) or index[:1] != (...,):
        return None
    steps = {part.step for part in index[1:] if isinstance(part, slice)}
    plain = all(isinstance(s, slice) and s.start is None and s.stop is None for s in index[1:])
    if len(steps) != 1 or not plain or len(index) != 3:
        return None
    (step,) = steps
    return (source, step) if isinstance(step, int) and step > 0 else None


def _num_taps(branch: Branch) -> int:
    assert isinstance(branch.module, _ConvNd)
    return branch.module.weight[0, 0].numel()


def _small_kernel(module: nn.Module | None, conv: _ConvNd) -> Affine | None:
    """A branch of its own size, with the channels of a convolution; None where they differ."""
    weight = conv.weight
    if isinstance(module, _ConvNd):
        shape = (module.in_channels, module.out_channels, module.groups)
        same = shape == (conv.in_channels, conv.out_channels, conv.groups) and (
            module.weight.dtype == weight.dtype and module.weight.device == weight.device
        )
        return linear.affine(module) if same else None
    if conv.in_channels != conv.out_channels:
        return None
    dims = len(conv.kernel_size)
    eye = identity_kernel(conv.in_channels, conv.groups, dims=dims, device=weight.device)
    if module is None:
        return bare_affine(eye)
    if type(module) in POOLS:
        geometry = _geometry(module)
        assert geometry is not None
        size = torch.Size(geometry.kernel)
        return bare_affine((eye / size.numel()).expand(*eye.shape[:2], *size))
    found = linear.read_normalization(module)
    if isinstance(found, str) or found.tail or found.dims not in (None, dims):
        return None
    if len(found.scale) != len(eye) or found.scale.device != eye.device:
        return None
    return scale_output(eye, None, found.scale, found.shift)


def _geometry(module: nn.Module | None, like: _ConvNd | None = None) -> Geometry | None:
    """How a module moves over its input; None where it is no branch."""
    if isinstance(module, _ConvNd):
        known = linear.is_linear(module)
        if isinstance(module, _ConvTransposeNd) or not known:
            return None
        size, stride, dilation = module.kernel_size, module.stride, module.dilation
        if module.padding == "same":
            total = [d * (k - 1) for k, d in zip(size, dilation, strict=True)]
            before = tuple(t // 2 for t in total)
            after = tuple(t - b for t, b in zip(total, before, strict=True))
        elif module.padding == "valid":
            before = after = (0,) * len(size)
        else:
            before = after = tuple(int(amount) for amount in module.padding)
        return Geometry(size, stride, dilation, before, after, module.padding_mode)
    dims = POOLS.get(type(module)) if module is not None else None
    if dims is not None:
        assert isinstance(module, nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d)
        exact = module.count_include_pad and not module.ceil_mode
        if not exact or getattr(module, "divisor_override", None) is not None:
            return None

        def each(value: Any) -> tuple[int, ...]:
            return tuple(value) if isinstance(value, tuple | list) else (value,) * dims

        pad = each(module.padding)
        ones = (1,) * dims
        return Geometry(each(module.kernel_size), each(module.stride), ones, pad, pad, "zeros")
    if module is None or linear.is_normalization(module):
        ones = (1,) * (2 if like is None else len(like.kernel_size))
        zeros = (0,) * len(ones)
        return Geometry(ones, ones, ones, zeros, zeros, "zeros")
    return None


def _embedding(own: Geometry, target: Geometry) -> list[tuple[int, int]] | None:
    """Taps to add in front of and behind a kernel so that it does the same as one of the target.

    None where no taps do: the outputs would differ in size or place, or at the border.
    """
    if len(own.kernel) != len(target.kernel) or own.stride != target.stride:
        return None
    if any(own.before + own.after) and own.mode != target.mode:
        return None
    padding = []
    for i, (size, large) in enumerate(zip(own.kernel, target.kernel, strict=True)):
        step = target.dilation[i]
        if size > 1 and own.dilation[i] != step:
            return None
        before, odd = divmod(target.before[i] - own.before[i], step)
        after = large - size - before
        if odd or before < 0 or after < 0 or target.after[i] - own.after[i] != after * step:
            return None
        padding.append((before, after))
    return padding


def _plain(cls: type[nn.Module]) -> Any:
    """Torch's own class of a convolution."""
    return next(base for base in linear.CONVOLUTIONS if issubclass(cls, base))


def _is_only_called(owner: nn.Module, model: nn.Module, name: str) -> bool:
    """Whether no other forward names a method that only the owner's class has."""
    methods = {
        key
        for cls in type(owner).__mro__
        for key, value in vars(cls).items()
        if cls not in nn.Module.__mro__ and inspect.isfunction(value) and not key.startswith("_")
    } - {"forward", "extra_repr", "reset_parameters"}
    if not name:
        return not methods
    classes = {type(module) for module in model.modules()} - {type(owner)}
    return not any(methods & _names_in_forward(cls) for cls in classes)


def _names_in_forward(cls: type) -> set[str]:
    """Names that a class's forward uses, and the methods it calls."""
    names: set[str] = set()
    todo = ["forward"]
    while todo:
        method = todo.pop()
        for base in cls.__mro__:
            function = inspect.unwrap(vars(base).get(method, None) or object)
            codes = [function.__code__] if inspect.isfunction(function) else []
            while codes:
                code = codes.pop()
                codes += [const for const in code.co_consts if inspect.iscode(const)]
                todo += [key for key in code.co_names if key not in names]
                names |= set(code.co_names)
    return names


def _as_module(owner: nn.Module, graph: fx.Graph, absorbed: set[nn.Module]) -> nn.Module:
    """The graph as a module that keeps what the owner had, but for what was merged."""
    graph._tracer_cls = fx.Tracer  # by which the module is unpickled
    module = fx.GraphModule(owner, graph, class_name=type(owner).__name__)
    for name, child in owner.named_children():
        if not hasattr(module, name) and not absorbed & set(child.modules()):
            setattr(module, name, child)
    for name, value in vars(owner).items():
        if not name.startswith("_") and not hasattr(module, name):
            setattr(module, name, value)
    return module.eval()
