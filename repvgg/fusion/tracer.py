"""The graph of a network's forward, along every path that it may take.

A test with few outcomes (is it a tensor, is its size even) is answered both ways, one after the
other. Any other test of a value ends the tracing of the module that makes it. Catching the error
does not help the module.
"""

import contextlib
import inspect
import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument, Target
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from repvgg.fusion.bytecode import compares_identities, compares_with_none
from repvgg.fusion.copying import inside_wrapper
from repvgg.fusion.errors import in_a_line, is_deliberate
from repvgg.fusion.flags import Values
from repvgg.fusion.patching import genuine, patched
from repvgg.fusion.paths import PathTracer, group_alike
from repvgg.fusion.proxies import is_value
from repvgg.fusion.source import is_of_torch

VAR_ARGUMENTS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
_is_grad_enabled = torch.is_grad_enabled  # the name in torch is patched while a forward is traced


class Tracer(PathTracer):
    """Traces a forward along every path of its decisions.

    A decision (`if x.shape[2] % 2:`) is taken both ways, one after the other, in the module that
    makes it. A node `either` joins the results, so a fold must hold for all of them. A module that
    cannot be traced becomes one node, and is recorded in `opaque`.

    Args:
        leaves: modules that become one node each.
        flags: for some modules, attributes and other values to try.
        exact: the graph will be run: decisions and unknown counts end the tracing.
        reads: attributes of the root that the graph will read when it runs.
        tensors: all arguments are tensors.
        assume: if the first argument may be other than a tensor, and that cannot be traced, it is
            assumed to be a tensor.

    Attributes:
        read_storages: of tensors that the forward computes with outside of modules.
        changed: leaf modules, and the attribute that the forward sets.
        switches_context: whether a node runs with other gradient or autocast settings.
        queries: functions of torch that the forward calls to learn how it runs.
        has_side_effects: whether the forward changes something outside of the network.
        num_layers: calls of modules so far.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        leaves: Collection[nn.Module],
        *,
        flags: Mapping[nn.Module, Sequence[Values]] | None = None,
        exact: bool = False,
        reads: Collection[str] = (),
        tensors: bool = False,
        assume: bool = False,
    ) -> None:
        super().__init__(leaves, flags=flags or {}, exact=exact, tensors=tensors, assume=assume)
        self.reads = reads
        self.read_storages: set[int] = set()
        self.changed: dict[nn.Module, str] = {}
        self.switches_context = False
        self.queries: set[str] = set()
        self.has_side_effects = False
        self.num_layers = 0

    def trace(
        self,
        root: nn.Module | Callable[..., object],
        concrete_args: dict[str, object] | None = None,
    ) -> fx.Graph:
        assert isinstance(root, nn.Module)
        self.modules = dict(root.named_modules(remove_duplicate=False))
        before = set(vars(root))
        with torch.enable_grad():
            self._context = _context()
        try:
            quiet = contextlib.redirect_stdout(io.StringIO())
            with quiet, torch.enable_grad(), _Reads() as reads, patched(root, self):
                return super().trace(root, concrete_args)
        finally:
            self.read_storages = reads.storages
            for constant in set(vars(root)) - before:
                if constant.startswith("_tensor_constant"):
                    delattr(root, constant)

    def create_args_for_root(
        self,
        root_fn: Callable[..., object],
        is_module: bool,
        concrete_args: dict[str, object] | tuple[object, ...] | None = None,
    ) -> tuple[Callable[..., object], list[object]]:
        function = inspect.unwrap(root_fn)
        code = function.__code__
        parameters = inspect.signature(function).parameters.values()
        open_ended = code.co_flags & VAR_ARGUMENTS and code.co_argcount > 1
        decorated = function is not root_fn and (open_ended or code.co_kwonlyargcount)
        self.switches = {p.name for p in parameters if isinstance(p.default, bool)}
        args: list[object]
        if code.co_argcount == 0 and code.co_flags & inspect.CO_VARARGS:  # wrapper(*args, **kwargs)
            args = [self.root, self.create_proxy("placeholder", "x", (), {})]
        elif decorated or (open_ended and self.assume):
            root_fn, args = self._named_arguments(root_fn, list(parameters)[is_module:])
        else:
            root_fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        root = self.root
        for name in self.reads:
            vars(root)[name] = self.create_proxy("get_attr", name, (), {})
        arguments = [value.node for value in args if is_value(value)]
        first = arguments[:1] if self.assume else []
        self.inputs = {node: str(node.target) for node in first}

        def run(*given: object) -> object:
            results = self.explore(root, lambda: root_fn(*given))
            joined = [self.join(group) for group in group_alike(results)]
            return joined[0] if len(joined) == 1 else joined

        return run, args

    def _named_arguments(
        self, root_fn: Callable[..., object], parameters: list[inspect.Parameter]
    ) -> tuple[Callable[..., object], list[object]]:
        """Placeholders for the arguments that a forward names; `*args` and `**kwargs` stay empty.

        torch.fx puts placeholders for those into the code of the outermost function, which belongs
        to the decorator of a decorated forward. Arguments with a default are passed by name.
        """
        args: list[object] = [self.root]
        keys: list[str] = []
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                if not self.assume:
                    raise self.untraceable("it takes any arguments (*args, **kwargs)")
                stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
                self.assumed.add(stars + parameter.name)
                continue
            default = () if parameter.default is parameter.empty else (parameter.default,)
            args.append(self.create_proxy("placeholder", parameter.name, default, {}))
            if default or parameter.kind is parameter.KEYWORD_ONLY:
                keys.append(parameter.name)

        def called(*given: object) -> object:
            num_positional = len(given) - len(keys)
            named = dict(zip(keys, given[num_positional:], strict=True))
            return root_fn(*given[:num_positional], **named)

        return called, args

    def create_node(
        self,
        kind: str,
        target: Target,
        args: tuple[Argument, ...],
        kwargs: dict[str, Argument],
        name: str | None = None,
        type_expr: object = None,
    ) -> fx.Node:
        if _context() != self._context:
            self.switches_context = True
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        self.num_layers += node.op == "call_module"
        node.meta["path"] = tuple((frame.call, frame.number) for frame in self.frames)
        return node

    def create_arg(self, a: object) -> Argument:
        return super().create_arg(genuine(a))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.opaque or m in self.leaves or is_of_torch(m)

    def getattr(
        self, attr: str, attr_val: object, parameter_proxy_cache: dict[str, fx.Proxy]
    ) -> object:
        # torch's proxies of constant shape are for parameters alone.
        self.param_shapes_constant = isinstance(attr_val, nn.Parameter)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., object],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> object:
        if m not in (self.submodule_paths or {}):  # a forward created it, and so it is part of that
            return forward(*args, **kwargs)
        stack, num_failures = self.module_stack.copy(), len(self.failures)
        num_opaque = len(self.opaque)
        inner = inside_wrapper(m)
        run = forward if inner is None else inner

        def explored(*args: object, **kwargs: object) -> object:
            return self.choose(self.explore(m, _Call(run, args, kwargs)))

        try:
            result = super().call_module(m, explored, args, kwargs)
            if not self.is_leaf_module(m, ""):
                self._check_comparisons(m, (args, kwargs), len(self.opaque) > num_opaque)
            if len(self.failures) == num_failures:
                return result
            reason = self.failures[-1]
        except Exception as error:
            reason = in_a_line(error)
            decided = any(frame.taken for frame in self.frames)
            if is_deliberate(error) and len(self.failures) == num_failures and decided:
                raise  # this path ends here
        # The nodes created before the failure stay in the graph as uses of their inputs. They can
        # only prevent a fold.
        del self.failures[num_failures:]
        self.module_stack = stack
        self.opaque[m] = reason
        return super().call_module(m, run, args, kwargs)

    def _check_comparisons(self, module: nn.Module, given: object, has_opaque: bool) -> None:
        """Record a failure where a forward compares values in ways that proxies cannot notice."""
        nodes = [value.node for value in tree_leaves(given) if is_value(value)]
        unknown = any(
            node.op == "call_module" and self.modules[str(node.target)] in self.opaque
            for node in nodes
        )
        if compares_identities(module):
            self.untraceable("it compares values by identity (is)")
        elif (unknown or has_opaque) and compares_with_none(module):
            self.untraceable("it compares the output of an untraceable module with None")


class _Call:
    """A call that can be repeated: each time but the first it gets its own lists and dictionaries.

    A path may change the containers that it is given.
    """

    def __init__(
        self,
        run: Callable[..., object],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> None:
        self.run = run
        self.given: Iterator[tuple[tuple[object, ...], dict[str, object]]] = iter([(args, kwargs)])
        self.kept = tree_map(lambda leaf: leaf, (args, kwargs))

    def __call__(self) -> object:
        args, kwargs = next(self.given, None) or tree_map(lambda leaf: leaf, self.kept)
        return self.run(*args, **kwargs)


# Strict mypy rejects TorchDispatchMode, which torch does not annotate.
class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records which tensors a forward computes with; proxies compute nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Collection[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        for value in tree_leaves((args, kwargs or {})):
            if type(value) in (Tensor, nn.Parameter):
                self.storages.add(storage_of(value))
        return func(*args, **(kwargs or {}))


def storage_of(tensor: Tensor) -> int:
    """The identity of a tensor's memory, which tied weights share."""
    pointer: int = tensor.untyped_storage()._cdata
    return pointer


def _context() -> tuple[object, ...]:
    """Settings that a forward may switch, and that no graph shows."""
    return (
        _is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.get_default_dtype(),
    )
