"""Two predictions of one network for each image, in one forward.

R-Drop (Liang et al., 2021, arXiv:2106.14448) compares two predictions made under different noise,
and its authors run the network twice. What comes before the first random operation is the same in
both: here that trunk runs once and its features enter the head twice, at about the price of a
plain step. A network with noise in its trunk takes every image twice in one batch. There are never
two calls: BatchNorm's running statistics advance once, and DDP sees one forward.

A network is cut at `forward_features` and `forward_head` where it has them (ours, timm's), and in
front of its last child otherwise (torchvision's).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Noise(NamedTuple):
    """Where a network draws random numbers in its present mode.

    Attributes:
        trunk: before the head, or anywhere in a network that cannot be cut.
        head: in the head.
    """

    trunk: bool
    head: bool


class Predictions(NamedTuple):
    """Two predictions for each image.

    Attributes:
        first, second: logits (N, K).
        auxiliary: logits of auxiliary classifiers, (N, K) or, for both predictions, (2N, K).
    """

    first: Tensor
    second: Tensor
    auxiliary: list[Tensor]


def predict(
    network: Any, images: Tensor, *, between: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Run a network once, with its auxiliary classifiers if it has `forward_auxiliary`.

    Args:
        images: (N, C, H, W).
        between: changes what goes from the trunk into the head.

    Returns:
        logits (N, K) and those of the auxiliary classifiers.

    Raises:
        ValueError: the network returns something other than one tensor of logits.
    """
    auxiliary: list[Tensor] = []
    if hasattr(network, "forward_features") and hasattr(network, "forward_head"):
        if hasattr(network, "forward_auxiliary"):
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
            f"{type(network).__name__} returns {type(logits).__name__} where one tensor of logits "
            "(N, K) is needed; switch its auxiliary outputs off"
        )
    return logits, auxiliary


def find_noise(network: nn.Module, images: Tensor) -> Noise:
    """Ask a network where it is random, by watching a forward that has no data.

    It runs on the meta device: nothing is computed, no random number is drawn and no statistics
    change. Random is every operation that torch declares to depend on its generators, in modules
    and functions alike; Python's `random` and NumPy are not seen. A network that does not run there
    cannot be asked and counts as random in its trunk: twice the price, and right if it is random
    anywhere.

    Args:
        images: (N, C, H, W), of which shape and type matter.
    """
    rows = 3
    probe = torch.empty((rows, *images.shape[1:]), dtype=images.dtype, device="meta")
    operations = _RandomOperations()
    in_trunk = None

    def cut(features: Tensor) -> Tensor:
        nonlocal in_trunk
        in_trunk = operations.count
        return _twice(features)

    logits = _run_on_meta(network, probe, operations, cut)
    if in_trunk is not None and logits is not None and len(logits) == 2 * rows:
        return Noise(in_trunk > 0, operations.count > in_trunk)
    operations.count = 0
    runs = _run_on_meta(network, probe, operations, None) is not None
    return Noise(operations.count > 0 or not runs, False)


def predict_twice(network: nn.Module, images: Tensor, *, noise: Noise | None = None) -> Predictions:
    """Predict every image twice, under different noise, in one forward.

    Args:
        network: in training mode.
        images: (N, C, H, W).
        noise: of the network, from `find_noise`; None asks anew, which takes milliseconds.

    Raises:
        ValueError: the network says that nothing in it is random: the predictions would be equal.
    """
    noise = find_noise(network, images) if noise is None else noise
    if noise.trunk:
        logits, auxiliary = predict(network, _twice(images))
    elif noise.head:
        logits, auxiliary = predict(network, images, between=_twice)
    else:
        raise ValueError(
            f"nothing in this {type(network).__name__} is random, so two predictions are equal and "
            "R-Drop has nothing to compare: give it dropout, as with model.dropout=0.2, or set "
            "rdrop=false"
        )
    first, second = logits.chunk(2)
    return Predictions(first, second, auxiliary)


class _RandomOperations(TorchDispatchMode):
    """Counts operations that draw from torch's generators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
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
    """The logits on the meta device, or None for a network that does not run there, or not cut."""
    module = _Predict(network, between)
    tensors = {
        name: tensor.to("meta")
        for named in (module.named_parameters(), module.named_buffers())
        for name, tensor in named
    }
    try:
        with torch.no_grad(), operations:
            return torch.func.functional_call(module, tensors, (images,))
    except Exception:  # whatever a foreign network raises; the caller has an answer for it
        return None


def _twice(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows])
