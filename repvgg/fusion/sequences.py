"""Writes two layers in sequence as one, where that takes no more multiplications."""

import math

from torch import fx, nn

from repvgg.fusion import dataflow, foldable
from repvgg.fusion.attributes import has_trainable_bias
from repvgg.fusion.batchnorms import Folding
from repvgg.fusion.chains import Layer, has_class, new_layer, of_layer
from repvgg.fusion.surgery import put
from repvgg.reparam import compose


def merge_sequences(folding: Folding) -> None:
    """Merge every layer into the one after it, if nothing else uses its output.

    The first one becomes an identity. `report.merged` gets both names, `report.costlier` the layers
    that could be one and stay two.
    """
    for name in reversed([name for name, m in folding.modules.items() if isinstance(m, Layer)]):
        while (before := _before(folding, name)) is not None:
            if not _merge(folding, before, name):
                break


def _before(folding: Folding, name: str) -> str | None:
    """The layer whose output is the input of another one, and of nothing else."""
    flow, modules = folding.flow, folding.modules
    calls = flow.calls.get(name, [])
    names = set()
    for call in calls:
        source = call.args[0] if len(call.args) == 1 and not call.kwargs else None
        names.add(flow.called(source) if isinstance(source, fx.Node) else None)
    before = names.pop() if len(names) == 1 else None
    if before is None or not isinstance(modules.get(before), Layer):
        return None
    inputs = flow.calls.get(before, [])
    plain = all(
        len(call.args) == 1 and not call.kwargs and call not in flow.checked for call in inputs
    )
    used = {user for call in inputs for user in dataflow.uses(call) or [call]}
    free = all(
        each not in flow.reached
        and folding.obstacle(each) is None
        and foldable.is_linear(folding.modules[each])
        for each in (before, name)
    )
    disturbed = any(
        folding.is_overwritten_between(call, user)
        for call in inputs
        for user in dataflow.uses(call)
    )
    return before if plain and used == set(calls) and free and not disturbed else None


def _merge(folding: Folding, first: str, second: str) -> bool:
    before, after = folding.modules[first], folding.modules[second]
    assert isinstance(before, Layer)
    assert isinstance(after, Layer)
    inner, outer = (
        of_layer(m, folding.values.get(n)) for m, n in ((before, first), (after, second))
    )
    if inner is None or outer is None or before.weight.dtype != after.weight.dtype:
        return False
    try:
        whole = compose(inner, outer)
    except ValueError:
        return False
    now = before.weight.numel() * math.prod(outer.geometry.stride) + after.weight.numel()
    then = whole.affine.kernel.numel()
    if then > now:
        folding.report.costlier[second] = (
            f"as one layer with {first} it would take {then:,} multiplications for each position "
            f"of the output, in place of {now:,}"
        )
        return False
    if not has_class(after, whole) or foldable.misfit(after, whole.affine) is not None:
        return False
    trains = any(has_trainable_bias(module) for module in (before, after))
    layer = new_layer(after, whole, whole.affine, bias_trains=trains)
    for name, new in ((first, nn.Identity()), (second, layer)):
        put(folding.model, folding.modules[name], new.eval())
        folding.modules[name] = new
        folding.changed.discard(name)
    folding.values.pop(first, None)
    folding.values[second] = whole.affine
    for call in folding.flow.calls.pop(first):
        dataflow.erase(call)
    folding.report.costlier.pop(second, None)
    folding.report.merged.append((second, first))
    return True
