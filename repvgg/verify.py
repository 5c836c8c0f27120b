"""How far a candidate is from its reference: errors, agreement, a verdict.

A predictor is any callable that takes images (N, C, H, W), float32 in [0, 1], to logits (N, K).
The reference of a verification is the multi-branch network in float64. Candidates are compared
with that, not with each other, so that errors cannot cancel.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Predictor = Callable[[Tensor], Tensor]

# The largest error, relative to the largest value of the reference, by the precision of the
# candidate. A multi-branch float32 network is about 2e-6 from its own float64 value.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}

# Two networks that should compute the same, by the precision of the comparison.
SAME = {torch.float64: 1e-9, torch.float32: 1e-4}

# A restored network must reproduce logits that were recorded in float32, perhaps elsewhere.
PROBE_TOLERANCE = 1e-4


# An ill-conditioned network has a larger error of its own in float32, which no fold can take away.
OWN_ERRORS = 4
LARGEST_BOUND = 1e-2


def float32_bound(own: float) -> float:
    """The largest error of a float32 candidate that passes: 1e-5 for a well-conditioned network.

    Args:
        own: error of the multi-branch network in float32 against its own float64 value. Four times
            it is allowed where that is more, up to 1e-2.
    """
    usual = TOLERANCE[torch.float32]
    return max(usual, min(OWN_ERRORS * own, LARGEST_BOUND)) if math.isfinite(own) else usual


@dataclass(frozen=True)
class Verdict:
    """What `compare` found.

    Attributes:
        error: largest absolute difference divided by the largest absolute reference value.
        tolerance: the largest error that passes.
        agreement: share of rows whose largest entry is the same class, in [0, 1]; None where the
            outputs are no logits.
    """

    error: float
    tolerance: float
    agreement: float | None = None

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # false for NaN


def relative_error(reference: Tensor, candidate: Tensor) -> float:
    """Largest absolute difference over the largest absolute reference value, in float64.

    Infinite where the candidate differs in shape or holds a NaN or an infinity; 0 of nothing.
    """
    reference, candidate = reference.double(), candidate.double()
    if reference.shape != candidate.shape or not candidate.isfinite().all():
        return math.inf
    if reference.numel() == 0:
        return 0.0
    scale = reference.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return ((reference - candidate).abs().max() / scale).item()


def agreement(expected: Tensor, given: Tensor) -> float:
    """Share of rows (N, K) whose largest entry is the same class."""
    return (expected.argmax(1) == given.argmax(1)).double().mean().item()


@torch.no_grad()
def compare(
    reference: Predictor, candidate: Predictor, images: Tensor, *, tolerance: float | None = None
) -> Verdict:
    """Hold a candidate against its reference on the same images.

    Args:
        reference: called with the images in float64.
        candidate: called with the images as they are.
        images: (N, C, H, W), float32 or float64.
        tolerance: the largest error that passes; by default that of the images' precision,
            1e-5 for float32 and 1e-10 for float64.
    """
    images = images.contiguous()
    expected, given = reference(images.double()), candidate(images)
    error = relative_error(expected, given)
    same = agreement(expected, given) if expected.shape == given.shape else 0.0
    return Verdict(error, TOLERANCE[images.dtype] if tolerance is None else tolerance, same)


@torch.no_grad()
def compare_blocks(reference: nn.Module, candidate: nn.Module, images: Tensor) -> dict[str, float]:
    """Measure the error of every folded block by itself.

    Each block of the candidate is given what its namesake sees inside the reference on `images`,
    so errors do not add up along the network, and a faulty block is known by name.

    Args:
        reference: the multi-branch network in float64 and eval mode.
        candidate: the same network switched to deploy, in any precision.
        images: (N, C, H, W).

    Returns:
        the relative error of each block's output, by the block's name.
    """
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
    inputs: Sequence[Any],
    *,
    moved: Collection[str] = (),
) -> dict[str, float]:
    """Measure how far the output of every module is from that of its namesake.

    Both networks run on the same inputs. A module counts if both have one of its name that is
    called as often and gives tensors; of several calls the worst counts.

    Args:
        inputs: positional arguments of both networks.
        moved: modules that are left out, as their outputs differ by design: in the candidate they
            do what another one does in the reference. So are those that only pass them on.

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
        expected.setdefault(name, []).append(output.clone())  # somebody may overwrite it

    def measure(name: str, output: Tensor) -> None:
        if expected.get(name):
            errors.setdefault(name, []).append(relative_error(expected[name].pop(0), output))
        else:
            expected.pop(name, None)  # more than the reference gave

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
    """Find the first module whose output differs from that of its namesake, in order of the run.

    Args:
        images: what both networks are called with, in their precision.
        tolerance: the largest relative error that passes.
        among: names of the modules that are compared, besides the network itself.

    Returns:
        its name ("" is the network) and error; None where all are equal. A network that does not
        give as many tensors as its reference has an infinite error.
    """
    errors = compare_modules(reference, candidate, [images])
    errors.setdefault("", math.inf)
    wrong = (name for name, error in errors.items() if not error <= tolerance)
    return next(((name, errors[name]) for name in wrong if name in among or not name), None)


def _listen(
    network: nn.Module, inputs: Sequence[Any], listener: Callable[[str, Tensor], None]
) -> None:
    """Run a network and tell of every tensor that a module gives."""

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def tell(_: nn.Module, __: Any, output: Any) -> None:
            for tensor in tensors(output):
                listener(name, tensor)

        return tell

    hooks = [module.register_forward_hook(hook(name)) for name, module in network.named_modules()]
    try:
        network(*inputs)
    finally:
        for handle in hooks:
            handle.remove()


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of any nest of lists and dictionaries, in order."""
    return [
        leaf
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
