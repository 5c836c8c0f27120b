"""What the source of a forward does with modules, and what a trace leaves outside of a network."""

import functools
import linecache
import types

import pytest
import torch
from torch import fx, nn

from repvgg.fusion.errors import UntraceableError, in_a_line, is_deliberate
from repvgg.fusion.hooks import ArgumentGuard, has_hooks
from repvgg.fusion.outside import Outside, globals_of
from repvgg.fusion.paths import exclude_each_other
from repvgg.fusion.source import read_forward


class Inner(nn.Module):
    scale = 2

    def __init__(self):
        super().__init__()
        self.layer = nn.ReLU()
        self.name = "inner"

    def forward(self, x):
        return self.layer(x)

    def other(self, x):
        return self.layer(x)


class Base(nn.Module):
    plain = 3

    def __init__(self):
        super().__init__()
        self.a = nn.ReLU()
        self.b = nn.ReLU()
        self.inner = Inner()
        self.list = nn.ModuleList([nn.ReLU(), nn.ReLU()])
        self.dict = nn.ModuleDict({"x": nn.ReLU()})
        self.none = None

    def step(self, x):
        return self.a(x)

    @property
    def first(self):
        return self.a


def names(network: nn.Module, modules) -> set[str]:
    known = {module: name for name, module in network.named_modules()}
    return {known[module] for module in modules}


ALL = {"a", "b", "inner", "list", "dict"}
READ = {  # an expression: modules that are called, that escape, whose attributes are read
    "a call": ("self.a(x)", {"a"}, set(), set()),
    "a method": ("self.step(x)", {"a"}, set(), set()),
    "an attribute": ("self.a(x) * self.plain", {"a"}, set(), set()),
    "a mode": ("self.a(x) if self.training else x", {"a"}, set(), set()),
    "an argument": ("torch.compile(self.a)(x)", set(), {"a"}, set()),
    "itself": ("len([self]) * x", set(), ALL, set()),
    "a registry": ("self._modules['a'](x)", set(), ALL, set()),
    "a method of torch": ("[*self.children()][0](x)", set(), ALL, set()),
    "compared with None": ("x if self.a is None else self.b(x)", {"b"}, set(), set()),
    "compared": ("x if self.a == self.b else x", set(), {"a", "b"}, set()),
    "a part": ("self.inner.layer(x)", {"inner.layer"}, set(), set()),
    "a plain part": ("x * self.inner.scale", set(), set(), {"inner"}),
    "a text": ("x * len(self.inner.name)", set(), set(), {"inner"}),
    "another method": ("self.inner.other(x)", {"inner.layer"}, set(), {"inner"}),
    "a weight": ("x * self.inner.weight", set(), {"inner"}, set()),
    "an element": ("self.list[0](x)", {"list.0", "list.1"}, set(), set()),
    "a length": ("x * len(self.list)", set(), set(), set()),
    "all": ("[m(x) for m in self.list]", {"list.0", "list.1"}, set(), set()),
    "counted": ("[m(x) + i for i, m in enumerate(self.list)]", {"list.0", "list.1"}, set(), set()),
    "count alone": ("[i * x for i, m in enumerate(self.list)]", {"list.0", "list.1"}, set(), set()),
    "reversed": ("[m(x) for m in reversed(self.list)]", {"list.0", "list.1"}, set(), set()),
    "values": ("[m(x) for m in self.dict.values()]", {"dict.x"}, set(), set()),
    "items": ("[m(x) for k, m in self.dict.items()]", {"dict.x"}, set(), set()),
    "keys": ("[m(x) for m in self.dict.keys()]", set(), {"dict"}, set()),
    "second of a zip": (
        "[m(i) for i, m in zip(x, self.list, strict=True)]",
        {"list.0", "list.1"},
        set(),
        set(),
    ),
    "sorted": ("[m(x) for m in sorted(self.list)]", set(), {"list"}, set()),
    "kept": ("[m for m in self.list]", set(), {"list"}, set()),
    "an element kept": ("self.list[0]", set(), {"list"}, set()),
    "pairs kept": ("[p for p in enumerate(self.list)]", set(), {"list"}, set()),
    "of a part": ("[m.weight * x for m in self.list]", set(), {"list"}, set()),
}


def forward_of(expression: str) -> types.FunctionType:
    """A forward that returns an expression, with a source that can be read."""
    source = f"def forward(self, x):\n    return {expression}\n"
    place = f"<{expression}>"
    linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
    namespace = {"__name__": __name__, "torch": torch}
    exec(compile(source, place, "exec"), namespace)
    return namespace["forward"]


@pytest.mark.parametrize("case", READ)
def test_the_source_of_a_forward_shows_what_it_does_with_modules(case):
    expression, *expected = READ[case]
    network = type("Network", (Base,), {"forward": forward_of(expression)})()

    found = read_forward(network)

    used = (found.called, found.escaped, found.inspected)
    assert [names(network, modules) for modules in used] == expected


class Decorated(Base):
    @functools.lru_cache  # noqa: B019
    def forward(self, x):
        return self.a(x)


class Hidden(Base):
    def __init__(self, hide):
        super().__init__()
        self.kept = hide(self.b)

    def forward(self, x):
        return self.a(x)


class Slots:
    __slots__ = ("empty", "module")

    def __init__(self, module):
        self.module = module


HIDDEN = {
    "a list": lambda module: [module],
    "a nested tuple": lambda module: ((1, {"k": [module]}),),
    "a key": lambda module: {module: 1},
    "a set": lambda module: {module},
    "a partial": lambda module: functools.partial(print, module),
    "a keyword of a partial": lambda module: functools.partial(print, sep=module),
    "a method": lambda module: module.extra_repr,
    "a closure": lambda module: lambda: module,
    "an object": lambda module: types.SimpleNamespace(inner=module),
    "a slot": Slots,
}


@pytest.mark.parametrize("case", HIDDEN)
def test_modules_in_plain_attributes_escape(case):
    network = Hidden(HIDDEN[case])

    found = read_forward(network)

    assert names(network, found.escaped) == {"b"}
    assert names(network, found.called) == {"a"}


def test_a_forward_without_source_may_use_all_modules():
    network = Decorated()

    assert names(network, read_forward(network).escaped) == ALL


def test_a_forward_that_was_replaced_may_use_all_modules():
    network = type("Network", (Base,), {"forward": forward_of("self.a(x)")})()
    network.forward = lambda x: x

    assert names(network, read_forward(network).escaped) == ALL


class Counter(nn.Module):
    calls = 0
    seen: list = []  # noqa: RUF012
    table: dict = {}  # noqa: RUF012
    kinds: set = set()  # noqa: RUF012

    def forward(self, x):
        return helper(x)


def helper(x):
    return HELD, x


HELD = [1, 2]


def change_class():
    Counter.calls = 5


def add_to_class():
    Counter.added = 1


def change_list():
    Counter.seen.append(1)


def replace_item():
    HELD[0] = 9


def shorten_list():
    HELD.clear()


def change_table():
    Counter.table["k"] = 1


def change_set():
    Counter.kinds.add(1)


def change_global():
    globals()["HELD"] = None


def add_global():
    globals()["ADDED"] = 1


def change_nothing():
    HELD[0] = HELD[0]
    Counter.calls = 0


@pytest.mark.parametrize(
    "change",
    [
        *(change_class, add_to_class, change_list, replace_item, shorten_list, change_table),
        *(change_set, change_global, add_global, change_nothing),
    ],
)
def test_what_a_forward_changes_outside_is_undone(change):
    homes = globals_of([Counter])
    assert any(home is globals() for home in homes)
    outside = Outside(homes, [Counter])
    held, table, seen, kinds = HELD, Counter.table, Counter.seen, Counter.kinds

    change()

    assert outside.restore() is (change is not change_nothing)
    assert outside.restore() is False
    assert HELD is held
    assert (held, table, seen, kinds, Counter.calls) == ([1, 2], {}, [], set(), 0)
    assert not hasattr(Counter, "added")
    assert "ADDED" not in globals()


def node_on(*path: tuple[int, int]) -> fx.Node:
    node = fx.Graph().placeholder("x")
    node.meta["path"] = path
    return node


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (((1, 1),), ((1, 2),), True),
        (((1, 1),), ((2, 1),), False),
        (((1, 1),), ((1, 1),), False),
        (((1, 1), (2, 3)), ((1, 1), (2, 4)), True),
        (((1, 1), (2, 3)), ((1, 1),), False),
        (((1, 1), (2, 3)), ((1, 2), (5, 3)), True),
        ((), ((1, 2),), False),
    ],
)
def test_nodes_of_two_runs_of_one_call_exclude_each_other(first, second, expected):
    assert exclude_each_other(node_on(*first), node_on(*second)) is expected
    assert not exclude_each_other(fx.Graph().placeholder("x"), node_on((1, 1)))


def raises():
    raise KeyError("x")


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (raises, True),
        (lambda: 1 / 0, True),
        (lambda: [][1], False),
        (lambda: torch.zeros(2).sum(3), False),
        (lambda: torch.zeros(2, 3).unbind(5), False),
        (lambda: nn.Linear(2, 2)(torch.zeros(3)), False),
    ],
)
def test_an_error_is_deliberate_if_the_code_of_the_network_raises_it(call, expected):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()

    assert is_deliberate(caught.value) is expected
    assert not is_deliberate(ValueError("never raised"))


def test_errors_are_shown_in_a_line_of_200_characters():
    assert in_a_line(KeyError("a\n  b")) == r"KeyError: 'a\n b'"
    assert in_a_line(UntraceableError("it\n tests")) == "it tests"
    assert in_a_line(ValueError("x" * 300)) == "ValueError: " + "x" * 188


class Options(nn.Module):
    def forward(self, x, y=None, *args, **kwargs):
        return x


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.ones(1), torch.ones(1)), {}, None),
        ((torch.ones(1),), {"y": torch.ones(1)}, None),
        ((torch.ones(1), torch.ones(1), None, False), {"z": None, "w": False}, None),
        ((torch.ones(1),), {}, "for a tensor as y, which is a NoneType"),
        ((torch.ones(1), 3), {}, "for a tensor as y, which is a int"),
        ((torch.ones(1), torch.ones(1), 0), {}, "but 0 is a int"),
        ((torch.ones(1), torch.ones(1)), {"z": "on"}, "but z is a str"),
    ],
)
def test_arguments_that_were_not_traced_are_an_error(args, kwargs, message):
    network = Options()
    network.register_forward_pre_hook(ArgumentGuard(["y", "*args", "**kwargs"]), with_kwargs=True)
    assert not has_hooks(network)

    if message is None:
        assert torch.equal(network(*args, **kwargs), args[0])
    else:
        with pytest.raises(ValueError, match=f"^Options was folded .*{message}"):
            network(*args, **kwargs)
