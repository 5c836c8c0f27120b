"""The terms of a sum, and the factors by which it multiplies them."""

import operator
from collections.abc import Callable

import torch
from torch import fx

from repvgg.fusion.chains import Factor
from repvgg.fusion.kinds import is_finite_number

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
SUBTRACTIONS = (operator.sub, torch.sub, "sub")
PRODUCTS = (operator.mul, torch.mul, "mul")
QUOTIENTS = (operator.truediv, torch.div, "div")
NEGATIONS = (operator.neg, torch.neg, "neg")


def read_terms(
    root: fx.Node, factor: Callable[[object], Factor | None]
) -> tuple[set[fx.Node], list[tuple[fx.Node, tuple[Factor, ...]]]]:
    """The nodes of a sum, and its terms with the factors by which it multiplies them."""
    nodes: set[fx.Node] = set()
    terms: list[tuple[fx.Node, tuple[Factor, ...]]] = []
    todo: list[tuple[object, tuple[Factor, ...]]] = [(root, ())]
    while todo:
        node, factors = todo.pop(0)
        if not isinstance(node, fx.Node):
            continue
        inner = node is root or len(node.users) == 1
        if inner and is_sum(node):
            nodes.add(node)
            first, second = node.args
            sign = (-1.0,) if node.target in SUBTRACTIONS else ()
            todo = [(first, factors), (second, (*sign, *factors)), *todo]
        elif inner and (scaled := read_factor(node, factor)) is not None:
            nodes.add(node)
            todo.insert(0, (scaled[0], (scaled[1], *factors)))
        else:
            terms.append((node, factors))
    return nodes, terms


def is_sum(node: fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method")
        and node.target in (*ADDITIONS, *SUBTRACTIONS)
        and len(node.args) == 2
        and not node.kwargs
        and all(isinstance(a, fx.Node) or (isinstance(a, int) and a == 0) for a in node.args)
        and (isinstance(node.args[0], fx.Node) or node.target not in SUBTRACTIONS)
    )


def adds_zero(node: fx.Node) -> bool:
    """Whether a node adds the integer 0, as the sum of a missing branch is."""
    return is_sum(node) and len(node.all_input_nodes) == 1 and node.args[0] is not node.args[1]


def read_factor(
    node: fx.Node, factor: Callable[[object], Factor | None]
) -> tuple[fx.Node, Factor] | None:
    """The value that a node multiplies, and by what."""
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        value, scale = node.args[0], factor(node)
        return (value, scale) if isinstance(value, fx.Node) and scale is not None else None
    if node.op not in ("call_function", "call_method") or node.kwargs:
        return None
    if node.target in NEGATIONS and len(node.args) == 1 and isinstance(node.args[0], fx.Node):
        return node.args[0], -1.0
    if len(node.args) != 2 or node.target not in (*PRODUCTS, *QUOTIENTS):
        return None
    first, second = node.args
    divides = node.target in QUOTIENTS
    for value, other in ((first, second), (second, first)):
        if isinstance(value, fx.Node) and value.op != "get_attr":
            if divides and is_finite_number(other) and other != 0 and value is first:
                return value, 1 / float(other)
            if not divides and (found := factor(other)) is not None:
                return value, found
    return None
