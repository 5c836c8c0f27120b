"""Two predictions of one network for each image, in one forward.

R-Drop (Liang et al., 2021, arXiv:2106.14448) compares two predictions with different random masks
of stochastic layers such as dropout. Its authors run the network twice. Here, if only the head is
stochastic, the backbone runs once and its features enter the head twice. That costs about as much
as a plain step. Otherwise each image appears twice in one batch. There is only one call, so the
statistics of BatchNorms advance once, and DDP sees one forward.

A network is split at `forward_features` and `forward_head` if it has them (ours, timm's), otherwise
before its last child (torchvision's).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode


class StochasticLayers(NamedTuple):
    """Where a network draws random numbers in its present mode.

    Attributes:
        backbone: before the head, or anywhere in a network that cannot be split.
        head: in the head.
    """

    backbone: bool
    head: bool


class Predictions(NamedTuple):
    """Two predictions for each image.

    Attributes:
        first: logits (N, K).
        second: logits (N, K).
        auxiliary: logits of auxiliary classifiers, (N, K) or, for both predictions, (2N, K).
    """

    first: Tensor
    second: Tensor
    auxiliary: list[Tensor]


@runtime_checkable
class _Split(Protocol):
    """A network in two parts, as ours and timm's."""

    def forward_features(self, images: Tensor, /) -> Tensor: ...

    def forward_head(self, features: Tensor, /) -> Tensor: ...


@runtime_checkable
class _HasAuxiliary(Protocol):
    """A network with auxiliary classifiers: see `repvgg.RepVGG.forward_auxiliary`."""

    def forward_auxiliary(self, images: Tensor, /) -> tuple[Tensor, list[Tensor]]: ...


def predict(
    network: nn.Module, images: Tensor, *, between: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Run a network once, with its auxiliary classifiers if it has `forward_auxiliary`.

    Args:
        images: (N, C, H, W).
        between: changes the features before the head.

    Returns:
        logits (N, K) and those of the auxiliary classifiers.

    Raises:
        ValueError: the network returns something other than one tensor of logits.
    """
    auxiliary: list[Tensor] = []
    if isinstance(network, _Split):
        if isinstance(network, _HasAuxiliary):
            features, auxiliary = network.forward_auxiliary(images)
        else:
            features = network.forward_features(images)
        logits = network.forward_head(features if between is None else between(features))
    elif between is None:
        logits = network(images)
    else:
        *_, head = network.children()
        hook = head.register_forward_pre_hook(lambda _, inputs: (between(inputs[0]), *inputs[1:]))
        try:
            logits = network(images)
        finally:
            hook.remove()
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ValueError(
            f"{type(network).__name__} returns {type(logits).__name__}, but one tensor of logits "
            "(N, K) is needed; switch off its auxiliary outputs"
        )
    return logits, auxiliary


def find_stochastic_layers(network: nn.Module, images: Tensor) -> StochasticLayers:
    """Find out where a network is random, from a forward on the meta device.

    That computes nothing, draws no random number and changes no statistics. Every operation counts
    that depends on torch's generators, in modules and functions; Python's `random` and NumPy are
    not detected. A network that does not run on the meta device counts as random in its backbone:
    this is always correct, and costs twice the time.

    Args:
        images: (N, C, H, W); only shape and dtype matter.
    """
    rows = 3
    probe = torch.empty((rows, *images.shape[1:]), dtype=images.dtype, device="meta")
    operations = _RandomOperations()
    in_backbone = None

    def split(features: Tensor) -> Tensor:
        nonlocal in_backbone
        in_backbone = operations.count
        return _twice(features)

    logits = _run_on_meta(network, probe, operations, split)
    if in_backbone is not None and logits is not None and len(logits) == 2 * rows:
        return StochasticLayers(in_backbone > 0, operations.count > in_backbone)
    operations.count = 0
    runs = _run_on_meta(network, probe, operations, None) is not None
    return StochasticLayers(operations.count > 0 or not runs, False)


def predict_twice(
    network: nn.Module, images: Tensor, *, stochastic: StochasticLayers | None = None
) -> Predictions:
    """Predict every image twice, with different random masks, in one forward.

    Args:
        network: in training mode.
        images: (N, C, H, W).
        stochastic: from `find_stochastic_layers`; None calls it, which takes milliseconds.

    Raises:
        ValueError: the network has no stochastic layer, so the predictions would be equal.
    """
    stochastic = find_stochastic_layers(network, images) if stochastic is None else stochastic
    if stochastic.backbone:
        logits, auxiliary = predict(network, _twice(images))
    elif stochastic.head:
        logits, auxiliary = predict(network, images, between=_twice)
    else:
        raise ValueError(
            f"this {type(network).__name__} has no stochastic layer, so two predictions are equal: "
            "R-Drop needs one, for example dropout=0.2"
        )
    first, second = logits.chunk(2)
    return Predictions(first, second, auxiliary)


class _RandomOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that draw from torch's generators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.count = 0

    def __torch_dispatch__(
        self,
        func: OpOverload[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        self.count += torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class _Predict(nn.Module):
    """`predict` as a module, whose parameters `functional_call` can replace."""

    def __init__(self, network: nn.Module, between: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.network = network
        self.between = between

    def forward(self, images: Tensor) -> Tensor:
        return predict(self.network, images, between=self.between)[0]


def _run_on_meta(
    network: nn.Module,
    images: Tensor,
    operations: _RandomOperations,
    between: Callable[[Tensor], Tensor] | None,
) -> Tensor | None:
    """The logits on the meta device; None if the network does not run there, or not in two."""
    module = _Predict(network, between)
    tensors = {
        name: tensor.to("meta")
        for named in (module.named_parameters(), module.named_buffers())
        for name, tensor in named
    }
    try:
        with torch.no_grad(), operations:
            logits: Tensor = torch.func.functional_call(module, tensors, (images,))
            return logits
    except Exception:  # any: the network may be anybody's, and the caller handles None
        return None


def _twice(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows])
