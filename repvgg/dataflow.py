"""Which module feeds which: the graph of a network's forward, and what cannot be known of it.

`trace` follows the forward with torch.fx. A module whose forward cannot be followed (its control
flow depends on values, say) becomes one opaque step for its parent, and its code is read instead:
a child that it does nothing with but call is followed by itself, with inputs unknown; all else that
the code may reach is marked as such. Nothing is ever concluded from the order of children.
"""

import ast
import copy
import functools
import inspect
import itertools
import operator
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

MAX_VARIANTS = 16  # ways to call one forward that are followed, by its optional arguments
_ONE_TENSOR = ("activation", "batchnorm", "conv", "dropout", "linear")  # modules of torch.nn
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
METADATA = {"shape", "ndim", "dtype", "device", "size", "dim", "numel", "is_cuda", "requires_grad"}


@dataclass
class Dataflow:
    """What was found out about a network. Modules are known by their first names in it.

    Attributes:
        graphs: what was followed: the network itself, or the parts of it that could be.
        calls: the steps at which a module is called, in all graphs.
        reached: modules that may be used in ways no graph shows, or whose tensors are read from
            outside, and by what.
        untraced: modules whose forward could not be followed, and why.
        callers: the modules in whose forward a step stands, innermost last.
    """

    graphs: list[fx.Graph] = field(default_factory=list)
    calls: dict[str, list[fx.Node]] = field(default_factory=dict)
    reached: dict[str, str] = field(default_factory=dict)
    untraced: dict[str, str] = field(default_factory=dict)
    callers: dict[fx.Node, list[str]] = field(default_factory=dict)
    _names: dict[fx.Node, str] = field(default_factory=dict)

    def called(self, node: Any) -> str | None:
        """The module that a step calls."""
        return self._names.get(node)


def trace(model: nn.Module, is_step: Callable[[nn.Module], bool]) -> Dataflow:
    """Follow a network in its present mode. It is not changed, and nothing is computed.

    Args:
        model: of any kind.
        is_step: whether a module is to be taken as one step, as torch's own are.
    """
    # Following a forward runs its code, which may keep what it sees: that happens to a copy,
    # which shares the weights.
    tensors = itertools.chain(model.parameters(), model.buffers())
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    names = {module: name for name, module in model.named_modules()}
    steps = {module for module in names if is_step(module)}
    flow = Dataflow()
    done: set[nn.Module] = set()
    scopes = [(model, "")]
    while scopes:
        scope, caller = scopes.pop()
        if scope not in done:
            done.add(scope)
            scopes += _look_into(scope, caller, steps, names, flow)
        if not scopes:
            # What this forward leaves alone somebody may still call.
            idle = _uncalled(model, flow, names, done)
            scopes += [(module, "nothing calls it but the user") for module in idle]
    return flow


def _look_into(
    scope: nn.Module,
    caller: str,
    steps: set[nn.Module],
    names: dict[nn.Module, str],
    flow: Dataflow,
) -> list[tuple[nn.Module, str]]:
    """Follow one module; what else is to be followed then, and who calls it."""
    if scope in steps or is_of_torch(scope):
        if _has_forward(scope):
            flow.reached[names[scope]] = caller or "the network is this module alone"
        return []
    found: list[tuple[nn.Module, str]] = []
    for module, reason in _follow(scope, steps, names, flow).items():
        name = names[module]
        flow.untraced[name] = reason
        by = f"{name or type(module).__name__}, which could not be followed ({reason}), uses it"
        called, escaped = _read(module)
        found += [(child, by) for child in called if child in names]
        for inner in (inner for child in escaped for inner in child.modules()):
            if inner in names:
                flow.reached.setdefault(names[inner], by)
    return found


class UntraceableError(ValueError):
    """A forward asked for something that is only known when it runs."""


class _Unknown:
    """Nothing is known about a value, mostly not its type: who asks cannot be followed."""

    node: Any
    tracer: Any

    @property
    def __class__(self) -> type:
        module = sys._getframe(1).f_globals.get("__name__", "")
        if module.split(".")[0] == "torch":
            return type(self)
        if self.tracer.is_tensor(self.node):
            return torch.Tensor
        raise self.tracer.refuse("it asks for the type of a value")

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise self.tracer.refuse("it changes the type of a value")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer", "root", "attr", "_node"):
            raise self.tracer.refuse("it sets an attribute of a value")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(torch.Tensor, name):
            raise self.tracer.refuse(f"it asks a value for '{name}', which tensors do not have")
        return _Attribute(self, name)  # type: ignore[arg-type]


class _Value(_Unknown, fx.Proxy):
    pass


class _Attribute(_Unknown, fx.proxy.Attribute):
    pass


def _in_place(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """torch's proxies take `x += y` for `x = x + y`, and so lose that x changes."""

    def method(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


def _refused(name: str) -> Callable[..., Any]:
    def method(self: Any, *_: Any) -> Any:
        raise self.tracer.refuse(f"it needs a value when it calls {name}")

    return method


_AUGMENTED = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
)
for _name in _AUGMENTED:
    setattr(_Unknown, f"__i{_name}__", _in_place(getattr(operator, f"__i{_name}__")))
for _name in ("len", "int", "float", "complex", "index", "contains", "setitem", "delitem"):
    setattr(_Unknown, f"__{_name}__", _refused(f"__{_name}__"))


class Tracer(fx.Tracer):
    """Takes a module that cannot be followed as one step, and remembers it."""

    proxy_buffer_attributes = True

    def __init__(self, steps: Collection[nn.Module]) -> None:
        super().__init__(param_shapes_constant=True)
        self.steps = steps
        self.opaque: dict[nn.Module, str] = {}
        self.refusals: list[str] = []

    def refuse(self, reason: str) -> UntraceableError:
        """The error to raise. It counts even where the network's own code catches it."""
        self.refusals.append(reason)
        return UntraceableError(reason)

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether a step is sure to give one tensor."""
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            home = type(module).__module__
            plain = home in (f"torch.nn.modules.{name}" for name in _ONE_TENSOR)
            return module in self.steps or (plain and not isinstance(module, nn.MultiheadAttention))
        adds = node.op == "call_function" and node.target in (operator.add, operator.mul)
        return adds and any(self.is_tensor(given) for given in node.all_input_nodes)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.opaque or m in self.steps or is_of_torch(m)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        # torch's proxies of constant shape are for parameters alone.
        self.param_shapes_constant = isinstance(attr_val, nn.Parameter)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise self.refuse("its control flow depends on a value")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        raise self.refuse("it iterates over a value")

    def keys(self, obj: fx.Proxy) -> Any:
        raise self.refuse("it asks for the keys of a value")

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        stack, num_refusals = self.module_stack.copy(), len(self.refusals)
        try:
            result = super().call_module(m, forward, args, kwargs)
            if len(self.refusals) == num_refusals:
                return result
            reason = self.refusals[-1]
        except Exception as error:
            reason = in_a_line(error)
        # What it did before it failed stays in the graph, as uses that nobody needs: they can
        # only forbid a fusion.
        del self.refusals[num_refusals:]
        self.module_stack = stack
        self.opaque[m] = reason
        return super().call_module(m, forward, args, kwargs)


def _follow(
    scope: nn.Module, steps: set[nn.Module], names: dict[nn.Module, str], flow: Dataflow
) -> dict[nn.Module, str]:
    """Add the graphs of one module, called with unknown inputs; what was opaque, and why."""
    opaque: dict[nn.Module, str] = {}
    try:
        variants = _variants(scope)
    except UntraceableError as error:
        return {scope: str(error)}
    for fixed in variants:
        tracer = Tracer(steps)
        before = set(vars(scope))
        try:
            graph = tracer.trace(scope, fixed)
        except Exception as error:
            return opaque | tracer.opaque | {scope: in_a_line(error)}
        finally:
            for constant in set(vars(scope)) - before:
                delattr(scope, constant)
        opaque |= tracer.opaque
        if tracer.refusals:
            return opaque | {scope: tracer.refusals[-1]}
        _add(graph, scope, names, flow)
    return opaque


def _add(graph: fx.Graph, scope: nn.Module, names: dict[nn.Module, str], flow: Dataflow) -> None:
    flow.graphs.append(graph)
    for node in list(graph.nodes):
        stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        flow.callers[node] = [names[scope.get_submodule(path)] for path in ["", *stack]]
        if node.op == "call_module":
            module = scope.get_submodule(node.target)
            if type(module) is nn.Identity and not has_hooks(module):
                node.replace_all_uses_with(node.all_input_nodes[0])
                graph.erase_node(node)
                continue
            flow.calls.setdefault(names[module], []).append(node)
            flow._names[node] = names[module]
        elif node.op == "get_attr":
            owner = scope.get_submodule(node.target.rpartition(".")[0])
            flow.reached.setdefault(names[owner], f"its {node.target.rpartition('.')[2]} is read")


def _variants(scope: nn.Module) -> list[dict[str, Any]]:
    """Ways to call a forward: every optional argument as it is by default, and otherwise."""
    if "forward" in vars(scope):
        raise UntraceableError("its forward was replaced by hand")
    parameters = inspect.signature(scope.forward).parameters.values()
    fixed: dict[str, list[Any]] = {}
    for parameter in parameters:
        if isinstance(parameter.default, bool):
            fixed[parameter.name] = [True, False]
        elif parameter.default is not inspect.Parameter.empty:
            fixed[parameter.name] = [parameter.default, fx.PH]
    if 2 ** len(fixed) > MAX_VARIANTS:
        raise UntraceableError(f"it has {len(fixed)} optional arguments")
    return [
        {name: value for name, value in zip(fixed, values, strict=True) if value is not fx.PH}
        for values in itertools.product(*fixed.values())
    ]


def _uncalled(
    model: nn.Module, flow: Dataflow, names: dict[nn.Module, str], done: set[nn.Module]
) -> list[nn.Module]:
    """The outermost modules below which nothing is called or reached, the untraced apart."""
    busy = {"", *flow.untraced}
    for name in [*flow.calls, *flow.reached, *(names[module] for module in done)]:
        parts = name.split(".")
        busy |= {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    found: list[nn.Module] = []
    todo = list(model.children()) if "" in busy else [model]
    while todo:
        module = todo.pop()
        if names[module] not in busy and _has_forward(module):
            found.append(module)
        elif module not in done or names[module] in busy:
            todo += [child for child in module.children() if child not in done]
    return found


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to a module's calls, or changes what goes in or comes out."""
    return any(getattr(module, key) for key in _HOOKS)


def is_metadata(node: fx.Node) -> bool:
    """Whether a step asks a tensor for its shape or kind, not for its values."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in METADATA
    return node.op == "call_method" and node.target in METADATA


def uses(node: fx.Node) -> list[fx.Node]:
    """The steps that need the values of this one."""
    return [user for user in node.users if not is_metadata(user)]


def is_of_torch(module: nn.Module) -> bool:
    """Whether a module is one of torch's own, other than a mere sequence."""
    return type(module).__module__.startswith("torch.") and not isinstance(
        module, nn.Sequential | fx.GraphModule
    )


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text if isinstance(error, UntraceableError) else f"{type(error).__name__}: {text}")[
        :200
    ]


def _read(module: nn.Module) -> tuple[set[nn.Module], set[nn.Module]]:
    """What the code of a forward does with modules: which it calls, and which it may do more to."""
    called: set[nn.Module] = set()
    escaped: set[nn.Module] = set()
    todo, seen = [(module, "forward")], set()
    while todo:
        owner, method = todo.pop()
        if (owner, method) in seen:
            continue
        seen.add((owner, method))
        escaped |= set(_hidden_modules(owner))
        functions = [
            vars(cls)[method]
            for cls in type(owner).__mro__
            if method in vars(cls) and cls is not nn.Module
        ]
        if method in vars(owner):
            escaped |= set(owner.children())
        for function in functions:
            try:
                code = _Code(function, owner)
            except (OSError, TypeError, SyntaxError, IndexError):
                escaped |= set(owner.children())
                continue
            called |= code.called
            escaped |= code.escaped
            todo += code.methods
    return called, escaped


class _Code:
    """One method, read: it may call a child, iterate over a container to call its children."""

    def __init__(self, function: Any, module: nn.Module) -> None:
        if isinstance(function, property):
            function = function.fget
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
        tree = ast.parse(source).body[0]
        assert isinstance(tree, ast.FunctionDef)
        self.tree = tree
        self.module = module
        self.called: set[nn.Module] = set()
        self.escaped: set[nn.Module] = set()
        self.methods: list[tuple[nn.Module, str]] = []
        self.parents = {
            child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)
        }
        itself = tree.args.args[0].arg
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id == itself:
                self._own(self.parents[node], node)
            elif _is_super(node):
                parent = self.parents[node]
                assert isinstance(parent, ast.Attribute)
                self.methods.append((module, parent.attr))

    def _own(self, parent: ast.AST, node: ast.AST) -> None:
        """`self.something`, or something else that is done with self."""
        if not isinstance(parent, ast.Attribute) or parent.value is not node:
            if not (isinstance(parent, ast.Call) and _is_super(parent)):
                self.escaped |= set(self.module.children())
        elif parent.attr in self.module._modules:
            child = self.module._modules[parent.attr]
            if child is not None:
                self._use(parent, child)
        elif hasattr(nn.Module, parent.attr) or parent.attr in ("__dict__", "_modules"):
            if parent.attr not in ("training",):
                self.escaped |= set(self.module.children())
        elif not _is_plain(getattr(type(self.module), parent.attr, 0)):
            self.methods.append((self.module, parent.attr))

    def _use(self, expression: ast.expr, module: nn.Module) -> None:
        """An expression whose value is `module`."""
        parent = self.parents[expression]
        if isinstance(parent, ast.Call) and parent.func is expression:
            self.called.add(module)
        elif isinstance(parent, ast.Attribute) and parent.attr in module._modules:
            self._use(parent, module._modules[parent.attr] or nn.Identity())
        elif isinstance(parent, ast.Attribute) and _is_plain(getattr(module, parent.attr, None)):
            pass
        elif isinstance(parent, ast.Attribute) and _is_own_method(module, parent.attr):
            self.methods.append((module, parent.attr))
        elif isinstance(parent, ast.Compare) and all(
            isinstance(test, ast.Is | ast.IsNot) for test in parent.ops
        ):
            pass
        elif isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            self._use_elements(expression, parent, module)
        else:
            self.escaped.add(module)

    def _use_elements(self, expression: ast.expr, parent: ast.AST, container: nn.Module) -> None:
        """A container: `c[i](x)`, `for m in c: m(x)`, also in enumerate, zip, reversed, len."""
        if isinstance(parent, ast.Subscript) and parent.value is expression:
            call = self.parents[parent]
            if isinstance(call, ast.Call) and call.func is parent:
                self.called |= set(container.children())
                return
        positions: list[int] = []  # of the module in the loop's target, innermost first
        while True:
            if isinstance(parent, ast.Attribute) and parent.attr in ("items", "values"):
                positions += [1] * (parent.attr == "items")
                expression = self.parents[parent]  # type: ignore[assignment]
            elif isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
                function = parent.func.id
                if function == "len":
                    return
                if (
                    function not in ("enumerate", "zip", "reversed")
                    or expression not in parent.args
                ):
                    break
                if function != "reversed":
                    positions.append(
                        1 if function == "enumerate" else parent.args.index(expression)
                    )
                expression = parent
            else:
                break
            parent = self.parents[expression]
        if isinstance(parent, ast.For | ast.comprehension) and parent.iter is expression:
            target = parent.target
            for position in reversed(positions):
                if isinstance(target, ast.Tuple) and len(target.elts) > position:
                    target = target.elts[position]
            if isinstance(target, ast.Name) and self._is_only_called(target.id):
                self.called |= set(container.children())
                return
        self.escaped.add(container)

    def _is_only_called(self, name: str) -> bool:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load):
                parent = self.parents[node]
                if not (isinstance(parent, ast.Call) and parent.func is node):
                    return False
        return True


def _is_super(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    )


def _is_own_method(module: nn.Module, name: str) -> bool:
    """Whether a class has a method of its own, which torch's do not have."""
    return (
        inspect.isfunction(getattr(type(module), name, None))
        and not hasattr(nn.Module, name)
        and not is_of_torch(module)
    )


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | int | float | str) or (
        isinstance(value, tuple | list) and all(_is_plain(item) for item in value)
    )


def _hidden_modules(module: nn.Module) -> Iterable[nn.Module]:
    """Modules that a module holds in plain attributes, where no registry knows of them."""
    registries = ("_modules", "_parameters", "_buffers")
    todo: list[Any] = [value for key, value in vars(module).items() if key not in registries]
    seen: set[int] = set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            todo += value
        elif isinstance(value, functools.partial):
            todo += [value.func, value.args, value.keywords]
        elif inspect.ismethod(value):
            todo.append(value.__self__)
        elif inspect.isfunction(value):
            todo += [cell.cell_contents for cell in value.__closure__ or ()]
