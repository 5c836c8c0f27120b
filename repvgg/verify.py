"""Compare a candidate with its reference: errors, agreement, a verdict.

A predictor is any callable from images (N, C, H, W), float32 in [0, 1], to logits (N, K). The
reference is the multi-branch network in float64. Every candidate is compared with the reference,
not with another candidate, so errors cannot cancel.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Predictor = Callable[[Tensor], Tensor]

# The largest error, relative to the largest value of the reference, by the precision of the
# candidate. A multi-branch network in float32 has an error of about 2e-6.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}

# For two networks with the same function, by the precision of the comparison.
SAME = {torch.float64: 1e-9, torch.float32: 1e-4}

# For a restored network against recorded float32 logits, maybe from another machine.
PROBE_TOLERANCE = 1e-4

# An ill-conditioned network has a larger error in float32 even before the fold.
OWN_ERRORS = 4
LARGEST_BOUND = 1e-2


def float32_bound(own: float) -> float:
    """The largest error of a float32 candidate that passes: usually 1e-5.

    Args:
        own: error of the multi-branch network in float32 against float64. If four times that is
            more than 1e-5, it is the bound, up to 1e-2.
    """
    usual = TOLERANCE[torch.float32]
    return max(usual, min(OWN_ERRORS * own, LARGEST_BOUND)) if math.isfinite(own) else usual


@dataclass(frozen=True)
class Verdict:
    """The result of `compare`.

    Attributes:
        error: largest absolute difference divided by the largest absolute reference value.
        tolerance: the largest error that passes.
        agreement: top-1 agreement, in [0, 1]; None if the outputs are not logits.
    """

    error: float
    tolerance: float
    agreement: float | None = None

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # false for NaN


def relative_error(reference: Tensor, candidate: Tensor) -> float:
    """Largest absolute difference over the largest absolute reference value, in float64.

    Infinite if the shapes differ, or a value of either is NaN or inf; 0 for empty tensors.
    """
    reference, candidate = reference.double(), candidate.double()
    finite = reference.isfinite().all() and candidate.isfinite().all()
    if reference.shape != candidate.shape or not finite:
        return math.inf
    if reference.numel() == 0:
        return 0.0
    scale = reference.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return ((reference - candidate).abs().max() / scale).item()


def agreement(expected: Tensor, given: Tensor) -> float:
    """Top-1 agreement: the share of rows (N, K) with the same class as largest entry.

    A row with NaN agrees with none.
    """
    same = expected.argmax(1) == given.argmax(1)
    known = ~(expected.isnan().any(1) | given.isnan().any(1))
    return (same & known).double().mean().item()


def _require_images(images: Tensor) -> None:
    if not len(images):
        raise ValueError(f"images of shape {tuple(images.shape)}: there is nothing to compare")


@torch.no_grad()
def compare(
    reference: Predictor, candidate: Predictor, images: Tensor, *, tolerance: float | None = None
) -> Verdict:
    """Compare a candidate with its reference on the same images.

    Args:
        reference: called with the images in float64.
        candidate: called with the images as they are.
        images: (N, C, H, W), float32 or float64.
        tolerance: the largest error that passes; by default that of the images' precision,
            1e-5 for float32 and 1e-10 for float64.

    Raises:
        ValueError: there are no images, or no tolerance for their dtype.
    """
    _require_images(images)
    if tolerance is None and images.dtype not in TOLERANCE:
        raise ValueError(f"images are {images.dtype}: pass float32 or float64, or a tolerance")
    images = images.contiguous()
    expected, given = reference(images.double()), candidate(images)
    error = relative_error(expected, given)
    same = agreement(expected, given) if expected.shape == given.shape else 0.0
    return Verdict(error, TOLERANCE[images.dtype] if tolerance is None else tolerance, same)


@torch.no_grad()
def compare_blocks(reference: nn.Module, candidate: nn.Module, images: Tensor) -> dict[str, float]:
    """Measure the error of every folded block separately.

    Each block of the candidate gets the input of the block of the same name in the reference. So
    errors do not add up along the network, and a faulty block is known by name.

    Args:
        reference: the multi-branch network in float64 and eval mode.
        candidate: the same network switched to deploy, in any precision.
        images: (N, C, H, W).

    Returns:
        the relative error of each block's output, by the block's name.

    Raises:
        ValueError: there are no images.
    """
    _require_images(images)
    dtype = next(candidate.parameters()).dtype
    blocks = dict(candidate.named_modules())
    errors: dict[str, float] = {}

    def measure(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            errors[name] = relative_error(output, blocks[name](inputs[0].to(dtype)))

        return hook

    hooks = [
        module.register_forward_hook(measure(name))
        for name, module in reference.named_modules()
        if hasattr(module, "equivalent_kernel_bias")
    ]
    try:
        reference(images.double())
    finally:
        for handle in hooks:
            handle.remove()
    return errors


@torch.no_grad()
def compare_modules(
    reference: nn.Module,
    candidate: nn.Module,
    inputs: Sequence[object],
    *,
    moved: Collection[str] = (),
) -> dict[str, float]:
    """Compare the outputs of every module with those of the module of the same name.

    Both networks run on the same inputs. A module is compared if both networks call it equally
    often and it returns tensors. Of several calls the largest error is reported.

    Args:
        inputs: positional arguments of both networks.
        moved: modules whose outputs differ by design, as other modules of the candidate compute
            them. They are left out, and so are modules that only pass these outputs on.

    Returns:
        the relative error of each module's output, by the module's name; "" is the network.
    """
    expected: dict[str, list[Tensor]] = {}
    errors: dict[str, list[float]] = {}
    left_out: set[str] = set()
    passed_on: list[Tensor] = []

    def keep(name: str, output: Tensor) -> None:
        if name in moved or any(output is tensor for tensor in passed_on):
            left_out.add(name)
            passed_on.append(output)
        expected.setdefault(name, []).append(output.clone())  # a later module may overwrite it

    def measure(name: str, output: Tensor) -> None:
        if expected.get(name):
            errors.setdefault(name, []).append(relative_error(expected[name].pop(0), output))
        else:
            expected.pop(name, None)  # the reference has fewer outputs

    _listen(reference, inputs, keep)
    num_tensors = {name: len(outputs) for name, outputs in expected.items()}
    _listen(candidate, inputs, measure)
    return {
        name: max(errors[name])
        for name, num in num_tensors.items()
        if name not in left_out and name in expected and len(errors.get(name, [])) == num
    }


def first_difference(
    reference: nn.Module,
    candidate: nn.Module,
    images: Tensor,
    *,
    tolerance: float,
    among: Collection[str],
) -> tuple[str, float] | None:
    """Find the first module whose output differs from that of the same name, in execution order.

    Args:
        images: the input of both networks, in their precision.
        tolerance: the largest relative error that passes.
        among: names of the modules to compare, besides the network itself.

    Returns:
        its name ("" is the network) and error; None if all are equal. The error is infinite if the
        networks return different numbers of tensors.
    """
    errors = compare_modules(reference, candidate, [images])
    errors.setdefault("", math.inf)
    wrong = (name for name, error in errors.items() if not error <= tolerance)
    return next(((name, errors[name]) for name in wrong if name in among or not name), None)


def _listen(
    network: nn.Module, inputs: Sequence[object], listener: Callable[[str, Tensor], None]
) -> None:
    """Run a network and call the listener with every tensor that a module returns."""

    def hook(name: str) -> Callable[[nn.Module, object, object], None]:
        def pass_on(_: nn.Module, __: object, output: object) -> None:
            for tensor in tensors(output):
                listener(name, tensor)

        return pass_on

    hooks = [module.register_forward_hook(hook(name)) for name, module in network.named_modules()]
    try:
        network(*inputs)
    finally:
        for handle in hooks:
            handle.remove()


def tensors(output: object) -> list[Tensor]:
    """The floating-point tensors in nested lists and dictionaries, in order."""
    return [
        leaf
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
