"""What a forward may learn about its values while it is traced.

torch.fx raises where a forward tests a value (`if x.shape[2] % 2:`). Here a test with few outcomes
is a decision: it gets one answer on each path (`repvgg.fusion.paths`). Every other test ends the
tracing of the module that makes it.
"""

import operator
import types
from collections.abc import Collection, Hashable, Iterator

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from repvgg.fusion.errors import UntraceableError
from repvgg.fusion.kinds import kind_of, target_name
from repvgg.fusion.proxies import Value

MAX_DECISIONS = 12  # on one path
_ONE_TENSOR = (  # modules of torch.nn that return one tensor
    *("activation", "batchnorm", "conv", "dropout", "linear", "flatten", "padding", "pooling"),
    *("pixelshuffle", "upsampling", "normalization", "instancenorm", "channelshuffle"),
)
_TYPE_TESTS = {"isinstance", "issubclass", "__class__", "is_tensor", "is_torch_tensor"}
_METADATA = (int, float, bool, torch.Size, torch.dtype, torch.device)


class NoTensor:
    """The class of an argument that is no tensor."""


class Frame:
    """One run of the forward of one module, with the decisions on its path.

    Attributes:
        script: the answers to give first.
        call: the call of the forward, by a number. Its paths share it.
        number: of this run.
        taken: each answer given, and the answer that is tried first.
        answers: by question, so that the same question gets the same answer.
        kinds: types of values, as decided on this path.
    """

    def __init__(self, script: list[bool], call: int, number: int) -> None:
        self.script = script
        self.call = call
        self.number = number
        self.taken: list[tuple[bool, bool]] = []
        self.answers: dict[object, bool] = {}
        self.kinds: dict[fx.Node, type] = {}


class DecidingTracer(fx.Tracer):
    """A tracer that answers tests of values, or records why it cannot.

    Args:
        leaves: modules that become one node each.
        exact: the graph will be run, so every decision is an error.
        tensors: all arguments are tensors.
    """

    def __init__(self, leaves: Collection[nn.Module], *, exact: bool, tensors: bool) -> None:
        super().__init__(param_shapes_constant=True)
        self.leaves = leaves
        self.exact = exact
        self.tensors = tensors
        self.failures: list[str] = []
        self.frames: list[Frame] = []
        self.switches: set[str] = set()  # arguments that are true or false
        self.modules: dict[str, nn.Module] = {}
        self._kinds: dict[fx.Node, type] = {}  # those that depend on no decision
        self._decided = False

    def untraceable(self, reason: str) -> UntraceableError:
        """The error to raise. It counts even if the network's own code catches it."""
        self.failures.append(reason)
        return UntraceableError(reason)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Value(node, self)

    def kind(self, node: fx.Node) -> type | None:
        """The type of a node's value, None if unknown."""
        found = self._kinds.get(node)
        if found is None:
            self._decided = False
            found = kind_of(node, self._kind_of_source)
            if found is not None and not self._decided:
                self._kinds[node] = found
        return found

    def _kind_of_source(self, node: fx.Node) -> type | None:
        for frame in self.frames:
            if node in frame.kinds:
                self._decided = True
                return frame.kinds[node]
        if node.op == "placeholder":
            if str(node.target) in self.switches:
                return bool
            return Tensor if self.tensors else None
        if node.op != "call_module":
            return None
        module = self.modules[str(node.target)]
        home = type(module).__module__
        plain = home in (f"torch.nn.modules.{name}" for name in _ONE_TENSOR)
        plain = plain and not vars(module).get("return_indices", False)
        if module in self.leaves or (plain and not isinstance(module, nn.MultiheadAttention)):
            return Tensor
        return None

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self.decide(self._meaning(obj.node), "its control flow depends on a value")

    def _meaning(self, node: fx.Node) -> Hashable:
        """A key that is equal for equal questions about sizes."""
        if node.op == "placeholder" or self.kind(node) not in _METADATA:
            return node
        arguments = [
            self._meaning(value) if isinstance(value, fx.Node) else repr(value)
            for value in tree_leaves((node.args, node.kwargs))
        ]
        return (node.op, str(node.target), *arguments)

    def decide(self, question: Hashable, reason: str, *, first: bool = False) -> bool:
        """Answer a test of the forward, differently on each path.

        Raises:
            UntraceableError: with `reason`, where no decision is allowed or there are too many.
        """
        if self.exact or not self.frames:
            raise self.untraceable(reason)
        # An argument of the network is the same everywhere. The rest is decided per module call.
        about = question[0] if isinstance(question, tuple) else question
        outer = isinstance(about, fx.Node) and about.op == "placeholder"
        frame = self.frames[0 if outer else -1]
        for known in self.frames:
            if question in known.answers:
                return known.answers[question]
        if len(frame.taken) >= MAX_DECISIONS:
            raise self.untraceable(reason)
        place = len(frame.taken)
        answer = frame.script[place] if place < len(frame.script) else first
        frame.taken.append((answer, first))
        frame.answers[question] = answer
        return answer

    def is_instance(self, node: fx.Node, classes: tuple[type, ...]) -> bool:
        """`isinstance` of a value of the forward."""
        kind = self.kind(node)
        if kind is None:
            kind = self._decide_kind(node)
        if kind is not NoTensor:
            return issubclass(kind, classes)
        others = tuple(c for c in classes if c is not Tensor and c is not nn.Parameter)
        reason = "it depends on the type of an argument"
        return bool(others) and self.decide((node, others), reason)

    def _decide_kind(self, node: fx.Node) -> type:
        reason = "it depends on the type of an argument"
        kind = Tensor if self.decide((node, Tensor), reason, first=True) else NoTensor
        self.frames[0 if node.op == "placeholder" else -1].kinds[node] = kind
        return kind

    def exact_class(self, node: fx.Node) -> type:
        """`type` of a value of the forward."""
        kind = self.kind(node) or self._decide_kind(node)
        if kind is NoTensor:
            raise self.untraceable("it depends on the type of an argument")
        return kind

    def class_of(self, value: fx.Proxy, reader: types.FrameType) -> type:
        """`__class__` of a value, which `isinstance` reads too, for the code of `reader`."""
        if _TYPE_TESTS.isdisjoint(reader.f_code.co_names):
            return type(value)  # a function of torch that is written in C
        return self.exact_class(value.node)

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        count = self._num_parts(obj.node)
        if count is None:
            raise self.untraceable("it iterates over a value")
        return iter([obj[i] for i in range(count)])  # type: ignore[index]  # set by torch.fx later

    def _num_parts(self, node: fx.Node) -> int | None:
        """The length of `x.shape[a:b]` or of a split tensor, where the forward states it."""
        if self.kind(node) is torch.Size and node.target is operator.getitem:
            part = node.args[1]
            if isinstance(part, slice) and part.step is None:
                if part.start is None and isinstance(part.stop, int) and part.stop > 0:
                    return part.stop
                if part.stop is None and isinstance(part.start, int) and part.start < 0:
                    return -part.start
        name = target_name(node)
        if name not in ("chunk", "split", "split_with_sizes", "tensor_split"):
            return None
        parts = node.args[1] if len(node.args) > 1 else None
        if isinstance(parts, list | tuple):
            return len(parts) + (name == "tensor_split")
        return parts if name in ("chunk", "tensor_split") and isinstance(parts, int) else None

    def keys(self, obj: fx.Proxy) -> fx.Proxy:
        raise self.untraceable("it calls keys() on a value")
