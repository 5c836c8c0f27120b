"""The forward of a module, run once along each path that its decisions and flags allow."""

import contextlib
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from repvgg.fusion.decisions import DecidingTracer, Frame, NoTensor
from repvgg.fusion.errors import UntraceableError, is_deliberate
from repvgg.fusion.flags import TRACKED, Values, setting, tracked, value_of
from repvgg.fusion.kinds import either, other_output
from repvgg.fusion.proxies import is_value

MAX_PATHS = 16  # through one forward
_CONTAINERS = (list, dict, set)  # subclasses are shared


class PathTracer(DecidingTracer):
    """A tracer that runs a forward along each path and joins the results.

    A path that ends in an exception of the forward's own has no result. Where paths return
    different values, a node `either` stands for them.

    Args:
        flags: for some modules, attributes and other values to try.
        assume: if the first argument may be other than a tensor, and that cannot be traced, it is
            assumed to be a tensor.
    """

    def __init__(
        self,
        leaves: Collection[nn.Module],
        *,
        flags: Mapping[nn.Module, Sequence[Values]],
        exact: bool,
        tensors: bool,
        assume: bool,
    ) -> None:
        super().__init__(leaves, exact=exact, tensors=tensors)
        self.flags = flags
        self.assume = assume
        self.opaque: dict[nn.Module, str] = {}  # what could not be traced, and why
        self.assumed: set[str] = set()  # arguments that must be tensors
        self.inputs: dict[fx.Node, str] = {}  # those of which that may be assumed
        self._numbers = itertools.count()
        self._flipping = False  # a flag has another value

    def explore(self, module: nn.Module, run: Callable[[], object]) -> list[object]:
        """The results of a forward, one for each path, with all values of its flags."""
        if self.exact:
            return [run()]
        state = State(module)
        call = next(self._numbers)
        results = self._follow_paths(run, state, call)
        if self._flipping or module not in self.flags:
            return results
        after = State(module)
        self._flipping = True
        for values in self.flags[module]:
            state.restore()
            results += self._results_with(module, values, run, call, results)
        self._flipping = False
        after.restore()
        return results

    def _results_with(
        self,
        module: nn.Module,
        values: Values,
        run: Callable[[], object],
        call: int,
        usual: list[object],
    ) -> list[object]:
        """The results with other values of flags that the caller can handle like the usual ones."""
        opaque, num_failures = dict(self.opaque), len(self.failures)
        stack, frames = self.module_stack.copy(), len(self.frames)
        results: list[object] = []
        try:
            with contextlib.ExitStack() as changes:
                for path, value in values:
                    if value is TRACKED:
                        value = tracked(value_of(module, path), path, self)
                    changes.enter_context(setting(module, path, value))
                found = self._follow_paths(run, State(module), call)
            known = {structure_of(result) for result in usual}
            results += [result for result in found if structure_of(result) in known]
            for result in found:
                leaves = [leaf for leaf in tree_leaves(result) if is_value(leaf)]
                if structure_of(result) not in known and leaves:
                    self.create_proxy("call_function", other_output, tuple(leaves), {})
        except Exception:  # the forward does not run with this value, or cannot be traced
            self.module_stack = stack
            del self.frames[frames:]
        self.opaque = opaque
        del self.failures[num_failures:]
        return results

    def _follow_paths(self, run: Callable[[], object], state: "State", call: int) -> list[object]:
        results: list[object] = []
        script: list[bool] = []
        ended: Exception | None = None
        after: State | None = None
        for _ in range(MAX_PATHS):
            frame = Frame(script, call, next(self._numbers))
            found, error = self._follow_path(run, frame)
            results += found
            ended = ended if error is None else error
            taken = frame.taken
            while taken and taken[-1][0] != taken[-1][1]:  # both answers were given
                taken.pop()
            if not taken:
                break
            script = [answer for answer, _ in taken]
            script[-1] = not script[-1]
            after = after or State(state.module)
            state.restore()
        else:
            raise self.untraceable("its control flow has too many paths")
        if after is not None:
            after.restore()
        if not results and ended is not None:
            raise ended
        return results

    def _follow_path(
        self, run: Callable[[], object], frame: Frame
    ) -> tuple[list[object], Exception | None]:
        """The result of one path in a list, or the error that the forward itself raised on it.

        A path that only arguments take which are assumed not to occur has neither.
        """
        self.frames.append(frame)
        depth = len(self.frames)
        stack, num_failures, opaque = self.module_stack.copy(), len(self.failures), self.opaque
        self.opaque = dict(opaque)
        try:
            result = run()
            if len(self.failures) > num_failures and self._assumes(frame):
                raise UntraceableError(self.failures[-1])
            return [result], None
        except Exception as error:
            self.module_stack = stack
            assumed = self._assumes(frame)
            untraceable = len(self.failures) > num_failures or not is_deliberate(error)
            if assumed and untraceable:
                del self.failures[num_failures:]
                self.opaque = opaque
                self.assumed |= assumed
                return [], None
            if untraceable or not frame.taken:
                raise
            return [], error
        finally:
            del self.frames[depth - 1 :]

    def _assumes(self, frame: Frame) -> set[str]:
        """Arguments that are no tensors on this path, where that can be ruled out."""
        return {
            self.inputs[node]
            for node, kind in frame.kinds.items()
            if kind is NoTensor and node in self.inputs
        }

    def choose(self, results: list[object]) -> object:
        """One value for the results of all paths; a decision where their structures differ."""
        *others, last = group_alike(results)
        for group in others:
            if self.decide(object(), "the output of a module depends on a value", first=True):
                return self.join(group)
        return self.join(last)

    def join(self, results: list[object]) -> object:
        """One value for results of the same structure."""
        if len(results) == 1:
            return results[0]
        flat = [tree_flatten(result) for result in results]
        joined = []
        for alternatives in zip(*(leaves for leaves, _ in flat), strict=True):
            nodes = [leaf.node for leaf in alternatives if is_value(leaf)]
            if len(set(nodes)) < 2:
                joined.append(alternatives[0])
            else:
                distinct = [alternatives[nodes.index(node)] for node in dict.fromkeys(nodes)]
                joined.append(self.create_proxy("call_function", either, tuple(distinct), {}))
        return tree_unflatten(joined, flat[0][1])


class State:
    """The attributes of a module and all inside it, so that each path starts from the same."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.held = {
            part: with_own_containers(vars(part))
            for part in module.modules()
            if not isinstance(part, torch.jit.ScriptModule)
        }

    def restore(self) -> None:
        for part, held in self.held.items():
            vars(part).clear()
            vars(part).update(with_own_containers(held))


def with_own_containers(held: dict[str, object]) -> dict[str, object]:
    """Attributes of a module, with copies of its lists, dictionaries and sets."""
    own = held.copy()
    for key, value in held.items():
        if type(value) in _CONTAINERS and isinstance(value, list | dict | set):
            own[key] = value.copy()
    return own


def group_alike(results: list[object]) -> list[list[object]]:
    """Results, grouped by their structure and the constants in it."""
    groups: dict[tuple[object, ...], list[object]] = {}
    for result in results:
        groups.setdefault(structure_of(result), []).append(result)
    return list(groups.values())


def structure_of(result: object) -> tuple[object, ...]:
    """A result without the values in it."""
    leaves, structure = tree_flatten(result)
    constants = (None if is_value(leaf) else (type(leaf), _plain(leaf)) for leaf in leaves)
    return (str(structure), *constants)


def _plain(value: object) -> object:
    return value if isinstance(value, bool | int | float | str | None) else id(value)


def exclude_each_other(first: fx.Node, second: fx.Node) -> bool:
    """Whether two nodes stand on different paths of one call, so that only one of them runs."""
    paths = zip(first.meta.get("path", ()), second.meta.get("path", ()), strict=False)
    differing = next((pair for pair in paths if pair[0] != pair[1]), None)
    return differing is not None and differing[0][0] == differing[1][0]
