"""The type of a node's value: a tensor, a size, a number, or None if unknown.

torch.fx does not know types. A forward may test them (`isinstance(x, torch.Tensor)`), and functions
of torch do. Here the type follows from the operation.
"""

import math
import operator
from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, fx
from torch.nn import functional as F

# Functions and methods that return one tensor for all arguments.
_TENSOR = frozenset(
    """
    abs absolute acos adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d add add_
    addcdiv addcmul addmm affine_grid alpha_dropout amax amin arange argmax argmin as_tensor
    atan atan2 avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bilinear bitwise_and
    bitwise_not bitwise_or bmm byte cat ceil celu channel_shuffle clamp clamp_ clamp_max
    clamp_max_ clamp_min clamp_min_ clip clone column_stack concat concatenate constant_pad_nd
    contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d copy_ cos
    cosine_similarity cpu cross cuda cumprod cumsum detach detach_ diag diag_embed diagonal dist
    div div_ divide dot double dropout dropout1d dropout2d dropout3d dropout_ einsum elu elu_
    embedding empty empty_like eq erf erfc exp exp_ expand expand_as expm1 eye
    feature_alpha_dropout feature_dropout fill_ flatten flip fliplr flipud float floor
    floor_divide fmod fold full full_like gather ge gelu glu grid_sample group_norm gt half
    hardsigmoid hardshrink hardswish hardtanh hardtanh_ index_select instance_norm int
    interpolate isfinite isinf isnan layer_norm le leaky_relu leaky_relu_ lerp linear linspace
    local_response_norm log log10 log1p log2 log_softmax logaddexp logical_and logical_not
    logical_or logit logsigmoid logsumexp long lt masked_fill masked_fill_ matmul max_unpool1d
    max_unpool2d max_unpool3d maximum mean minimum mish mm movedim mul mul_ multiply mv narrow
    ne neg negative new_empty new_full new_ones new_zeros normal normalize numpy_T one_hot ones
    ones_like outer pad pairwise_distance permute pixel_shuffle pixel_unshuffle polar pow pow_
    prelu prod rand rand_like randint randn randn_like randperm real reciprocal relu relu6 relu_
    remainder repeat repeat_interleave requires_grad_ reshape reshape_as resize_ rms_norm roll
    rot90 round rrelu rrelu_ rsqrt rsub scaled_dot_product_attention scatter scatter_
    scatter_add select selu selu_ sigmoid sigmoid_ sign silu sin sinh softmax softmin softplus
    softshrink softsign sqrt square squeeze squeeze_ stack std sub sub_ subtract sum swapaxes
    swapdims t take tan tanh tanh_ tanhshrink tensor threshold tile to transpose tril triu
    true_divide trunc type type_as unflatten unfold unsqueeze unsqueeze_ upsample var view
    view_as vstack hstack dstack where xlogy zero_ zeros zeros_like
    """.split()  # noqa: SIM905
)
_PARTS = frozenset(
    (
        *("chunk", "split", "unbind", "tensor_split", "split_with_sizes"),
        *("meshgrid", "broadcast_tensors"),
    )
)
_ATTRIBUTES: dict[str, type] = {
    "shape": torch.Size,
    "ndim": int,
    "dtype": torch.dtype,
    "device": torch.device,
    "is_cuda": bool,
    "requires_grad": bool,
    "is_sparse": bool,
    "is_quantized": bool,
    "is_mkldnn": bool,
    "is_meta": bool,
}
_TENSOR_ATTRIBUTES = frozenset(("T", "mT", "H", "mH", "data", "real", "imag"))
_COUNTS = frozenset(("dim", "ndimension", "numel", "nelement", "element_size"))
_ANSWERS = frozenset(
    ("is_floating_point", "is_complex", "is_contiguous", "numel", "equal", "allclose")
)
_COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
_ARITHMETIC = (
    *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.pow),
    *(operator.neg, operator.pos, operator.truediv, operator.matmul, operator.and_, operator.or_),
    *(operator.xor, operator.invert, operator.abs, operator.iadd, operator.isub, operator.imul),
    *(operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow, operator.iand),
    *(operator.ior, operator.ixor, operator.imatmul, operator.lshift, operator.rshift),
)
NUMBERS = (int, float, bool)


def either(first: object, *others: object) -> object:
    """One of several values, by a decision, as a node of a graph. It never runs."""
    return first


def other_output(*values: object) -> None:
    """The output of a forward when a flag is set, as a node of a graph. It never runs."""


def iteration(count: object, number: int) -> int:
    """An index below an unknown count, as a node of a graph. It never runs."""
    return number


def target_name(node: fx.Node) -> str:
    """The name of what a node calls. A function may lack one (`functools.partial`)."""
    target = node.target
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def target_home(node: fx.Node) -> str:
    """The Python module of the function that a node calls. Built-in functions of torch lack it."""
    return str(getattr(node.target, "__module__", None) or "torch")


def kind_of(node: object, known: Callable[[fx.Node], type | None]) -> type | None:
    """The type of a node's value, or None if unknown.

    Args:
        node: a node, or a constant.
        known: the type of a node that calls a module or is an input.
    """
    if not isinstance(node, fx.Node):
        return type(node)
    if node.op == "get_attr":
        return Tensor
    if node.op in ("call_module", "placeholder"):
        return known(node)

    def of(index: int) -> type | None:
        return kind_of(node.args[index], known) if len(node.args) > index else None

    name = target_name(node)
    if node.op == "call_method":
        return _kind_of_method(name, of(0), len(node.args))
    if node.op != "call_function":
        return None
    target = node.target
    if target is getattr:
        attribute = str(node.args[1])
        if of(0) is not Tensor:
            return _ATTRIBUTES.get(attribute) if attribute in ("shape", "ndim") else None
        return Tensor if attribute in _TENSOR_ATTRIBUTES else _ATTRIBUTES.get(attribute)
    if target is operator.getitem:
        return _kind_of_item(node, of(0))
    if target in _COMPARISONS or target in _ARITHMETIC:
        kinds = [of(index) for index in range(len(node.args))]
        return _kind_of_operation(target, kinds)
    if target is either:
        kinds = [kind_of(alternative, known) for alternative in node.args]
        return kinds[0] if len(set(kinds)) == 1 else None
    home = target_home(node)
    if home == "math":
        return int if name in ("ceil", "floor", "trunc", "gcd", "isqrt", "prod") else float
    if target in (len, int):
        return int
    if target in (max, min):
        chosen = {of(index) for index in range(len(node.args))}
        return chosen.pop() if len(chosen) == 1 else None
    if not _is_of_torch(home) and target is not vars(F).get(name):
        return None
    if name in ("is_tensor", "is_floating_point", "is_complex"):
        return bool
    if name in ("max_pool1d", "max_pool2d", "max_pool3d", "boolean_dispatch", "fn"):
        return None if node.kwargs.get("return_indices", False) else Tensor
    if name in ("max", "min") and len(node.args) == 1 and not node.kwargs:
        return Tensor
    return Tensor if name in _TENSOR else None


def _is_of_torch(home: str) -> bool:
    return home.split(".")[0] in ("torch", "_VariableFunctions", "builtins", "_nn", "special")


def _kind_of_method(name: str, of: type | None, num_args: int) -> type | None:
    if name == "size":
        return torch.Size if num_args == 1 else int
    if name in _COUNTS:
        return int if of is Tensor or name in ("dim", "numel") else None
    if of is not Tensor:
        return None
    if name in _ANSWERS:
        return bool
    if name in ("max", "min") and num_args == 1:
        return Tensor
    return Tensor if name in _TENSOR or name in ("any", "all") else None


def _kind_of_item(node: fx.Node, of: type | None) -> type | None:
    source, index = node.args[:2]
    if of is Tensor:
        return Tensor
    if of is torch.Size:
        return torch.Size if isinstance(index, slice) else int
    if not isinstance(source, fx.Node) or not isinstance(index, int):
        return None
    calls = source.op in ("call_function", "call_method")
    return Tensor if calls and target_name(source) in _PARTS else None


def _kind_of_operation(target: object, kinds: list[type | None]) -> type | None:
    if Tensor in kinds:
        return Tensor
    if target in _COMPARISONS and None not in kinds:
        return bool
    if torch.Size in kinds or tuple in kinds or list in kinds:
        return torch.Size if target in (operator.add, operator.iadd) else None
    if any(kind not in NUMBERS for kind in kinds):
        return None
    return float if float in kinds or target in (operator.truediv, operator.itruediv) else int


def is_finite_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a plain finite number, not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
