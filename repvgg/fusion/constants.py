"""The values in a graph that follow from the tensors of a module alone."""

from torch import Tensor, fx, nn

from repvgg.fusion.attributes import tensor_of
from repvgg.fusion.kinds import target_home, target_name

PURE = frozenset(  # functions and methods that give the same for the same tensors
    """
    add sub mul div truediv neg pow matmul mm bmm einsum getitem view reshape flatten unsqueeze
    squeeze expand expand_as permute transpose t contiguous clone detach sqrt rsqrt reciprocal abs
    sum mean stack cat flip repeat conv1d conv2d conv3d pad
    """.split()  # noqa: SIM905
)
HOMES = ("torch", "_operator", "_VariableFunctions", "_nn", "builtins")  # of pure functions


def read_tensor(owner: nn.Module, node: fx.Node) -> tuple[nn.Module, str, Tensor | None]:
    """The module that holds the tensor of a node `get_attr`, its name there, and the tensor."""
    path, _, key = str(node.target).rpartition(".")
    holder = owner.get_submodule(path)
    return holder, key, tensor_of(holder, key)


class Constants:
    """Evaluates nodes in float64; each once."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self._values: dict[fx.Node, Tensor | None] = {}

    def value(self, node: object) -> Tensor | None:
        """The tensor of a node, or None if it follows from anything else."""
        if not isinstance(node, fx.Node):
            return None
        if node not in self._values:
            self._values[node] = self._evaluate(node)
        return self._values[node]

    def _evaluate(self, node: fx.Node) -> Tensor | None:
        if node.op == "get_attr":
            _, _, tensor = read_tensor(self.owner, node)
            plain = tensor is not None and tensor.is_floating_point()
            return tensor.detach().double() if tensor is not None and plain else None
        calls = node.op in ("call_function", "call_method")
        if not calls or target_name(node) not in PURE or not node.all_input_nodes:
            return None
        if node.op == "call_function" and target_home(node).split(".")[0] not in HOMES:
            return None
        inputs = {each: self.value(each) for each in node.all_input_nodes}
        if any(found is None for found in inputs.values()):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: inputs[each])
        try:
            if node.op == "call_method":
                found = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                assert callable(node.target)
                found = node.target(*args, **kwargs)
        except Exception:  # whatever torch says of these arguments; the forward would say it too
            return None
        return found if isinstance(found, Tensor) else None
