"""Changes a network in place: replaces modules under the same names, and the forward of one."""

import hashlib
import importlib
import linecache
import re
from collections.abc import Sequence
from types import ModuleType

from torch import fx, nn

from repvgg.fusion.bytecode import GENERATED
from repvgg.fusion.flags import Values, expression

Case = tuple[Values, fx.Graph]  # values of flags, and the graph for them


def put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module under each of its names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


def erase_unused(root: fx.Node) -> None:
    """Remove a node, and those before it, that nothing uses any more."""
    todo, erased = [root], set[fx.Node]()
    while todo:
        node = todo.pop()
        if not node.users and node.op != "placeholder" and node not in erased:
            erased.add(node)
            todo += node.all_input_nodes
            node.graph.erase_node(node)


def set_forward(owner: nn.Module, cases: Sequence[Case], fixed: dict[str, object]) -> None:
    """Let a module run graphs. All its attributes and other methods stay.

    Its class becomes a subclass of the same name.

    Args:
        cases: values of flags and the graph to run, first the present values.
        fixed: attributes that are constants in the graphs, so that the forward raises if they
            change.
    """
    if isinstance(owner, fx.GraphModule):
        owner.graph = cases[0][1]
        return
    names: dict[str, object] = {}
    parts = []
    for place, (_, graph) in enumerate(cases):
        for node in graph.nodes:
            node.type = None  # a string annotation may mean something else in this code
        code = graph.python_code("self")
        names |= {
            key: value.__name__ if isinstance(value, ModuleType) else value
            for key, value in code.globals.items()
        }
        name = "forward" if len(cases) == 1 and not fixed else f"_forward_{place}"
        parts.append(re.sub(r"def forward\(", f"def {name}(", code.src.strip(), count=1))
    names |= {f"_kept_{i}": value for i, value in enumerate(fixed.values()) if callable(value)}
    if len(parts) > 1 or fixed:
        parts.append(_dispatch(cases, fixed, type(owner).__name__))
    owner.__class__ = _specialized(type(owner), "\n\n".join(parts) + "\n", names)


def _dispatch(cases: Sequence[Case], fixed: dict[str, object], owner: str) -> str:
    """The source of a forward that checks the fixed attributes and chooses a graph."""
    x = next(str(node.target) for node in cases[0][1].nodes if node.op == "placeholder")
    lines = [f"def forward(self, {x}):"]
    for place, (path, value) in enumerate(fixed.items()):
        kept = repr(value) if not callable(value) else f"_kept_{place}"
        unequal = "is not" if callable(value) or value is None else "!="
        lines += [
            f"    if {expression(path)} {unequal} {kept}:",
            f"        raise ValueError({_changed(owner, path)!r})",
        ]
    flags = dict.fromkeys(attribute for values, _ in cases for attribute, _ in values)
    for place, (values, _) in enumerate(cases):
        test = " and ".join(f"{expression(path)} == {value!r}" for path, value in values)
        lines += [f"    if {test or 'True'}:", f"        return self._forward_{place}({x})"]
    if flags:
        message = (
            f"{owner}: its branches were not merged for this value of {', '.join(flags)}; "
            "set it before fuse_conv_bn"
        )
        lines.append(f"    raise ValueError({message!r})")
    return "\n".join(lines)


def _changed(owner: str, path: str) -> str:
    return (
        f"{owner}.{path} was changed after its branches were merged, but the merge holds only for "
        "the old value: set it before fuse_conv_bn"
    )


def _specialized(base: type[nn.Module], source: str, names: dict[str, object]) -> type[nn.Module]:
    """A subclass with another forward. Its instances can be pickled and scripted."""
    namespace = {
        key: importlib.import_module(value) if isinstance(value, str) else value
        for key, value in names.items()
    }
    namespace["__name__"] = base.__module__
    # torch.jit.script and tracebacks look for the source here.
    place = f"{GENERATED}{base.__name__} {hashlib.sha1(source.encode()).hexdigest()[:12]}>"
    linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
    exec(compile(source, place, "exec"), namespace)

    def reduce(self: nn.Module, _: object) -> tuple[object, ...]:
        return _restore, (base, source, names), vars(self)

    members = {
        key: value
        for key, value in namespace.items()
        if key == "forward" or key.startswith("_forward_")
    }
    members |= {"__reduce_ex__": reduce, "__module__": base.__module__}
    return type(base.__name__, (base,), members)


def _restore(base: type[nn.Module], source: str, names: dict[str, object]) -> nn.Module:
    cls = _specialized(base, source, names)
    return cls.__new__(cls)
