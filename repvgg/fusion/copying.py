"""Copies of networks, where `copy.deepcopy` fails or loses something.

`copy.deepcopy` fails on a tensor that an earlier forward left in a network, on a lock and on an
open file. It loses the modes and graphs of torchvision's feature extractors, and copies the buckets
of a `DistributedDataParallel`.
"""

import copy
from collections import OrderedDict, deque
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _WrappedHook
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import (
    SpectralNorm,
    SpectralNormLoadStateDictPreHook,
    SpectralNormStateDictHook,
)
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves

from repvgg.fusion.attributes import attributes_of

WeightHook = BasePruningMethod | WeightNorm | SpectralNorm
_OF_SPECTRAL_NORM = (SpectralNormStateDictHook, SpectralNormLoadStateDictPreHook)
_CONTAINERS = (list, tuple, set, frozenset, deque)
_PLAIN = (bool, int, float, str, type(None))


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside `DistributedDataParallel` and `torch.compile`, nested or not.

    `DataParallel` stays around the network, so that the copy runs on several devices too.
    """
    while not isinstance(model, nn.DataParallel) and (inner := inside_wrapper(model)) is not None:
        model = inner
    return model


def inside_wrapper(module: nn.Module) -> nn.Module | None:
    """The network in a wrapper of torch that only determines how it runs; None for no wrapper."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return module._modules["module"]
    if type(module).__name__ == "OptimizedModule":
        return module._modules.get("_orig_mod")
    return None


def require_network(model: object) -> None:
    """Raise a ValueError unless `model` is an nn.Module."""
    if not isinstance(model, nn.Module):
        what = model.__name__ if isinstance(model, type) else type(model).__name__
        raise ValueError(f"model is a {what}, which is no network: pass an instance of nn.Module")


def require_images(images: object) -> None:
    """Raise a ValueError unless `images` is None or a tensor of finite numbers, not empty."""
    if images is None:
        return
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images is a {type(images).__name__}: pass an input tensor of the network, such as "
            "(N, C, H, W)"
        )
    if not images.numel():
        raise ValueError(f"images has shape {tuple(images.shape)}: there is nothing to compare")
    if images.is_floating_point() and not images.isfinite().all():
        raise ValueError("images contains NaN or inf, on which no outputs can be compared")


def copied(model: nn.Module, memo: dict[int, object] | None = None) -> nn.Module:
    """Copy a network, with its modes, memory formats and tied weights.

    `DistributedDataParallel` and `torch.compile` are removed first. Tensors that an earlier forward
    left in the network are detached. The copy shares what cannot be copied: locks, open files,
    generators, process groups. No tensor of the copy is an inference tensor, even under
    `torch.inference_mode()`.

    Args:
        memo: as for `copy.deepcopy`: replacements of objects, by their ids. It is not changed.

    Raises:
        ValueError: a lazy module was never initialized, or the network cannot be copied.
    """
    require_network(model)
    model = unwrapped(model)
    memo = {} if memo is None else dict(memo)
    with torch.inference_mode(False), torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            tensors = [*module._parameters.values(), *module._buffers.values()]
            if any(isinstance(t, UninitializedBuffer | UninitializedParameter) for t in tensors):
                raise ValueError(
                    f"{name or type(model).__name__}, a {type(module).__name__}, has weights that "
                    "are not initialized: run the network once on images first"
                )
            held = [value for value in vars(module).values() if type(value) not in _PLAIN]
            for value in held:
                if type(value) is OrderedDict and not value:  # of hooks; slow to copy by deepcopy
                    memo.setdefault(id(value), OrderedDict())
            for value in tree_leaves([value for value in held if id(value) not in memo]):
                if isinstance(value, Tensor):
                    _detach(value, memo)
        try:
            try:
                found = _deepcopy(model, memo)
            except Exception:
                _share(model, memo)
                found = _deepcopy(model, memo)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}"
            ) from error
        for old, new in zip(model.modules(), found.modules(), strict=False):
            if type(old) is type(new) and old.training != new.training:
                new.training = old.training
    return found


def _detach(tensor: Tensor, memo: dict[int, object]) -> None:
    """Replace a tensor with a history, or an inference tensor, by a plain one."""
    if tensor.grad_fn is not None:
        memo.setdefault(id(tensor), tensor.detach().clone())
    elif tensor.is_inference() and id(tensor) not in memo:
        normal = tensor.clone()
        wrap = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(normal, tensor.requires_grad) if wrap else normal


def _deepcopy(model: nn.Module, memo: dict[int, object]) -> nn.Module:
    memo = dict(memo)
    for module in reversed(list(model.modules())):  # inner ones first
        if isinstance(module, fx.GraphModule):
            _copy_graph_module(module, memo)
    return copy.deepcopy(model, memo)


def _copy_graph_module(module: fx.GraphModule, memo: dict[int, object]) -> None:
    """Copy all attributes and every graph. `GraphModule.__deepcopy__` copies only one graph.

    torchvision's feature extractors have two, and swap them in `train` and `eval`.
    """
    if id(module) in memo:
        return
    new = type(module).__new__(type(module))
    memo[id(module)] = new
    vars(new).update(copy.deepcopy(vars(module), memo))
    type(new).__name__ = type(module).__name__
    new.graph = new._graph  # writes the code of its forward


def _share(model: nn.Module, memo: dict[int, object]) -> None:
    """Let the copy share all attributes of modules that cannot be copied."""
    trial = dict(memo)
    for module in model.modules():
        trial[id(module)] = module
        if not isinstance(module, torch.jit.ScriptModule):
            for tensor in [*module._parameters.values(), *module._buffers.values()]:
                if tensor is not None:
                    trial.setdefault(id(tensor), tensor)
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                _share_inside(value, memo, trial, set())


def _share_inside(
    value: object, memo: dict[int, object], trial: dict[int, object], seen: set[int]
) -> None:
    """Share the innermost objects that cannot be copied."""
    if id(value) in seen or _can_be_copied(value, trial):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        _detach(value, memo)
        trial[id(value)] = memo.setdefault(id(value), value)
        return
    parts: list[object] = []
    if isinstance(value, dict):
        parts += [*value.keys(), *value.values()]
    elif isinstance(value, _CONTAINERS):
        parts += value
    parts += attributes_of(value).values()
    for part in parts:
        _share_inside(part, memo, trial, seen)
    if not _can_be_copied(value, trial):
        memo[id(value)] = trial[id(value)] = value


def _can_be_copied(value: object, memo: dict[int, object]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:
        return False
    return True


@torch.no_grad()
def plain_weights(model: nn.Module) -> None:
    """Replace weights that are computed from others by their values, in place.

    These are pruned weights (`torch.nn.utils.prune`), weight and spectral normalization, old and
    new, and any `torch.nn.utils.parametrize`. They get the value of the next forward in eval mode.
    `requires_grad` and all other hooks stay.
    """
    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            _remove_parametrizations(module)
            for key, hook in list(module._forward_pre_hooks.items()):
                if computes_weights(hook):
                    _remove_hook(module, key, hook)


def computes_weights(hook: object) -> TypeGuard[WeightHook]:
    """Whether a forward pre-hook is one of those that `plain_weights` removes."""
    return isinstance(hook, WeightHook)


def has_computed_weights(module: nn.Module) -> bool:
    """Whether `plain_weights` would change a module, apart from its children."""
    hooks = module._forward_pre_hooks.values()
    return parametrize.is_parametrized(module) or any(map(computes_weights, hooks))


def present_value(module: nn.Module, name: str) -> Tensor | None:
    """A weight of a module as its next forward in eval mode uses it; differentiable."""
    value: Tensor | None
    if parametrize.is_parametrized(module, name):
        parts = list(module.get_submodule(f"parametrizations.{name}").modules())
        modes = [part.training for part in parts]
        try:
            for part in parts:
                part.training = False
            value = getattr(module, name)
        finally:
            for part, training in zip(parts, modes, strict=True):
                part.training = training
        return value
    for hook in module._forward_pre_hooks.values():
        if computes_weights(hook) and _name(hook) == name:
            return _computed(hook, module)
    value = getattr(module, name)
    return value


def _remove_parametrizations(module: nn.Module) -> None:
    if not parametrize.is_parametrized(module):
        return
    # torch.nn.utils.parametrize.remove_parametrizations deletes the weight from the class, which
    # copies share, and writes into the original, which may be tied to another layer.
    lists = module.get_submodule("parametrizations").eval()
    values = {name: getattr(module, name).detach().clone() for name, _ in lists.named_children()}
    module.__class__ = type(module).__bases__[0]
    del module._modules["parametrizations"]
    for name, value in values.items():
        parts = lists.get_submodule(name)
        if any(True for _ in parts.parameters(recurse=False)):
            requires_grad = any(p.requires_grad for p in parts.parameters(recurse=False))
            module.register_parameter(name, nn.Parameter(value, requires_grad))
        else:
            module.register_buffer(name, value)


def _remove_hook(module: nn.Module, key: int, hook: WeightHook) -> None:
    name = _name(hook)
    value = _computed(hook, module).detach().clone()
    ends: tuple[str, ...]
    if isinstance(hook, BasePruningMethod):
        ends = ("_orig", "_mask")
    elif isinstance(hook, WeightNorm):
        ends = ("_g", "_v")
    else:
        ends = ("_orig", "_u", "_v")
        for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
            for other, found in list(hooks.items()):
                part = found.hook if isinstance(found, _WrappedHook) else found
                if isinstance(part, _OF_SPECTRAL_NORM) and part.fn.name == name:
                    del hooks[other]
    requires_grad = any(getattr(module, name + end).requires_grad for end in ends)
    del module._forward_pre_hooks[key]
    for holder in (module._parameters, module._buffers, vars(module)):
        for end in ends:
            holder.pop(name + end, None)
    vars(module).pop(name, None)
    module._buffers.pop(name, None)
    module.register_parameter(name, nn.Parameter(value, requires_grad))


def _name(hook: WeightHook) -> str:
    name: str = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
    return name


def _computed(hook: WeightHook, module: nn.Module) -> Tensor:
    weight: Tensor
    if isinstance(hook, BasePruningMethod):
        # torch does not annotate it.
        weight = hook.apply_mask(module)  # type: ignore[no-untyped-call]
    elif isinstance(hook, WeightNorm):
        weight = hook.compute_weight(module)
    else:
        weight = hook.compute_weight(module, do_power_iteration=False)
    return weight
