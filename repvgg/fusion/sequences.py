"""Writes two layers in sequence as one, where that takes no more multiplications."""

import math

from torch import fx, nn

from repvgg.fusion import dataflow, foldable
from repvgg.fusion.attributes import has_trainable_bias
from repvgg.fusion.batchnorms import Folding
from repvgg.fusion.chains import Layer, has_class, in_format_of, new_layer
from repvgg.fusion.geometry import read_geometry
from repvgg.fusion.surgery import put
from repvgg.reparam import Convolution, compose


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
    parts = [_convolution(folding, name) for name in (first, second)]
    before, after = folding.modules[first], folding.modules[second]
    assert isinstance(before, Layer)
    assert isinstance(after, Layer)
    if None in parts or before.weight.dtype != after.weight.dtype:
        return False
    try:
        whole = compose(*(part for part in parts if part is not None))
    except ValueError:
        return False
    geometry = read_geometry(after)
    assert geometry is not None
    now = before.weight.numel() * math.prod(geometry.stride) + after.weight.numel()
    then = whole.affine.kernel.numel()
    if then > now:
        folding.report.costlier[second] = (
            f"as one layer with {first} it would take {then:,} multiplications for each position "
            f"of the output, in place of {now:,}"
        )
        return False
    if not has_class(after, whole) or foldable.misfit(after, whole.affine) is not None:
        return False
    layer = new_layer(after, whole)
    kernel, bias = whole.affine
    trains = any(has_trainable_bias(module) for module in (before, after))
    layer.weight = nn.Parameter(in_format_of(after.weight, kernel), after.weight.requires_grad)
    layer.bias = nn.Parameter(bias.to(after.weight), trains)
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


def _convolution(folding: Folding, name: str) -> Convolution | None:
    module = folding.modules[name]
    geometry = read_geometry(module)
    if geometry is None or not isinstance(module, Layer):
        return None
    groups = 1 if isinstance(module, nn.Linear) else module.groups
    return Convolution(folding.value(name), geometry, groups, module.bias is not None)
