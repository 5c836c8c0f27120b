"""How the source of an untraceable forward uses its child modules.

A child may only be called: directly, in a loop over a container, or in another method of the class.
Any other use of a child, and any code that is not understood, may do anything with it.
"""

import ast
import contextlib
import functools
import inspect
import textwrap
from collections.abc import Iterable
from types import FunctionType, MethodType

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from repvgg.fusion.attributes import MISSING, Wrapper, attributes_of, stored

_CODE = ("__call__", "__getattr__", "__getattribute__", "forward", "_conv_forward")
_TENSORS = ("weight", "bias", "running_mean", "running_var")
_PASS_ON = (
    *(nn.Sequential, fx.GraphModule, AveragedModel),
    *(nn.DataParallel, nn.parallel.DistributedDataParallel),
)


class Reading:
    """How a forward uses modules.

    Attributes:
        called: modules that are only called, in the order of the code, unless they are in `escaped`
            too.
        escaped: modules that may be used in any way, with everything inside.
        inspected: modules with attributes that the code reads.
    """

    def __init__(self) -> None:
        self.called: dict[nn.Module, None] = {}
        self.escaped: dict[nn.Module, None] = {}
        self.inspected: dict[nn.Module, None] = {}


def read_forward(module: nn.Module) -> Reading:
    """Read the source of the forward and of every method that it uses."""
    found = Reading()
    todo, seen = [(module, "forward")], set()
    while todo:
        owner, method = todo.pop()
        if (owner, method) in seen:
            continue
        seen.add((owner, method))
        found.escaped |= dict.fromkeys(_hidden_modules(owner))
        cls = type(owner)
        plain = cls.__getattr__ is nn.Module.__getattr__ and (
            cls.__getattribute__ is nn.Module.__getattribute__
            and cls.__call__ is nn.Module.__call__
        )
        if method in vars(owner) or not plain:
            found.escaped |= dict.fromkeys(owner.children())
        for base in cls.__mro__:
            if method in vars(base) and base is not nn.Module:
                for function in _functions(vars(base)[method]):
                    try:
                        todo += _Code(function, owner, found).methods
                    except Exception:  # no source, or no method: nothing is known
                        found.escaped |= dict.fromkeys(owner.children())
    return found


def _functions(method: object) -> Iterable[object]:
    """A method and its decorators, without those of torch."""
    parts: list[object] = [method]
    if isinstance(method, property):
        parts = [method.fget, method.fset]
    while parts:
        function = parts.pop()
        if function is None:
            continue
        if isinstance(function, MethodType):
            function = function.__func__
        # functools.wraps copies the names, but not the globals.
        names = function.__globals__ if isinstance(function, FunctionType) else {}
        if not names.get("__name__", "").startswith("torch."):
            yield function
        if isinstance(function, Wrapper):
            parts.append(function.__wrapped__)


class _Code:
    """The source of one method."""

    def __init__(self, function: object, module: nn.Module, found: Reading) -> None:
        if isinstance(function, staticmethod | classmethod | MethodType):
            function = function.__func__
        if not isinstance(function, FunctionType):
            raise TypeError("not written in Python")
        wrapped = vars(function).pop(
            "__wrapped__", None
        )  # else getsource returns the innermost one
        try:
            source = textwrap.dedent(inspect.getsource(function))
        finally:
            if wrapped is not None:
                vars(function)["__wrapped__"] = wrapped
        tree = ast.parse(source).body[0]
        assert isinstance(tree, ast.FunctionDef)
        self.tree = tree
        self.module = module
        self.found = found
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

    def _escape(self, *modules: nn.Module) -> None:
        self.found.escaped |= dict.fromkeys(modules)

    def _own(self, parent: ast.AST, node: ast.AST) -> None:
        """One use of `self`."""
        if not isinstance(parent, ast.Attribute) or parent.value is not node:
            if not (isinstance(parent, ast.Call) and _is_super(parent)):
                self._escape(*self.module.children())
        elif parent.attr in self.module._modules:
            child = self.module._modules[parent.attr]
            if child is not None:
                self._use(parent, child)
        elif stored(nn.Module, parent.attr) is not MISSING or parent.attr in (
            "__dict__",
            "_modules",
        ):
            if parent.attr not in ("training",):
                self._escape(*self.module.children())
        elif (own := stored(type(self.module), parent.attr)) is not MISSING and not _is_plain(own):
            self.methods.append((self.module, parent.attr))

    def _use(self, expression: ast.expr, module: nn.Module) -> None:
        """One use of an expression whose value is `module`."""
        parent = self.parents[expression]
        if isinstance(parent, ast.Call) and parent.func is expression:
            self.found.called[module] = None
        elif isinstance(parent, ast.Attribute) and parent.attr in module._modules:
            self._use(parent, module._modules[parent.attr] or nn.Identity())
        elif isinstance(parent, ast.Attribute) and _is_plain(stored(module, parent.attr)):
            self.found.inspected[module] = None
        elif isinstance(parent, ast.Attribute) and _is_own_method(module, parent.attr):
            self.found.inspected[module] = None
            self.methods.append((module, parent.attr))
        elif isinstance(parent, ast.Compare) and all(
            isinstance(test, ast.Is | ast.IsNot) for test in parent.ops
        ):
            pass
        elif isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            self._use_elements(expression, parent, module)
        else:
            self._escape(module)

    def _use_elements(self, expression: ast.expr, parent: ast.AST, container: nn.Module) -> None:
        """One use of a container: `c[i](x)`, `for m in c: m(x)`, enumerate, zip, reversed, len."""
        if isinstance(parent, ast.Subscript) and parent.value is expression:
            call = self.parents[parent]
            if isinstance(call, ast.Call) and call.func is parent:
                self.found.called |= dict.fromkeys(container.children())
                return
        positions: list[int] = []  # of the module in the loop's target, innermost first
        while True:
            if isinstance(parent, ast.Attribute) and parent.attr in ("items", "values"):
                positions += [1] * (parent.attr == "items")
                call = self.parents[parent]
                if not isinstance(call, ast.expr):
                    break
                expression = call
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
                self.found.called |= dict.fromkeys(container.children())
                return
        self._escape(container)

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
    """Whether a name is a method or property of the user's class, not of nn.Module."""
    own = stored(type(module), name)
    return (
        isinstance(own, FunctionType | property | staticmethod | classmethod)
        and stored(nn.Module, name) is MISSING
        and not is_of_torch(module)
    )


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | int | float | str) or (
        isinstance(value, tuple | list) and all(_is_plain(item) for item in value)
    )


def _hidden_modules(module: nn.Module) -> Iterable[nn.Module]:
    """Modules in plain attributes of a module, which are not registered as children."""
    registries = ("_modules", "_parameters", "_buffers")
    todo: list[object] = [value for key, value in vars(module).items() if key not in registries]
    seen: set[int] = set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            todo += value
        elif isinstance(value, functools.partial):
            todo += [value.func, value.args, value.keywords]
        elif inspect.ismethod(value):
            todo.append(value.__self__)
        elif inspect.isfunction(value):
            todo += [cell.cell_contents for cell in value.__closure__ or ()]
        elif not isinstance(value, Tensor | type):
            for slot in [s for cls in type(value).__mro__ for s in vars(cls).get("__slots__", ())]:
                with contextlib.suppress(AttributeError):  # the slot is empty
                    todo.append(getattr(value, slot))
            todo += attributes_of(value).values()


def is_of_torch(module: nn.Module) -> bool:
    """Whether the class of a module belongs to torch and is no container or wrapper."""
    passes_on = isinstance(module, _PASS_ON) or type(module).__name__ == "OptimizedModule"
    return type(module).__module__.startswith("torch.") and not passes_on


def has_own_code(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a subclass of a layer of torch overrides its code or tensors."""
    own, cls = vars(module), type(module)
    return any(
        key in own or (cls is not base and stored(cls, key) is not stored(base, key))
        for key in (*_CODE, *_TENSORS)
    ) and not parametrize.is_parametrized(module)
