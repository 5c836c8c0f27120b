"""RepVGG training for any network: eligible 3x3 convolutions become RepVGG blocks.

After training, `repvgg.switch_to_deploy` turns every block into a convolution and BatchNorm again.
The network then has its original layers, names and shapes.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg.fusion import dataflow, foldable
from repvgg.fusion.copying import copied
from repvgg.fusion.normalizations import (
    Normalization,
    is_never_updated,
    read_normalization,
    read_once,
)
from repvgg.fusion.surgery import put
from repvgg.models.block import KERNEL_SIZE, RepVGGBlock
from repvgg.models.branches import conv_geometry, set_geometry
from repvgg.models.network import RepVGG
from repvgg.reparam import identity_kernel, is_reparameterizable, pad_kernel


class RepVGGConv(RepVGGBlock):
    """A RepVGG block without ReLU that replaces a convolution and its BatchNorm.

    Shapes: those of the convolution.

    Args:
        conv: a 3x3 convolution whose padding equals its dilation.
        bn: the BatchNorm after it, or None.
        slot: the module that replaces `bn` in the network.
        branch_drop: as in `RepVGGBlock`.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        bn: _BatchNorm | None,
        slot: nn.Module | None,
        *,
        branch_drop: float = 0.0,
    ) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            stride=conv.stride[0],
            groups=conv.groups,
            dilation=conv.dilation[0],
            padding_mode=conv.padding_mode,
            bn=bn is not None,
            bias=conv.bias is not None,
            bn_eps=1e-5 if bn is None else bn.eps,
            branch_drop=branch_drop,
        )
        self.to(conv.weight)
        self.relu = nn.Identity()
        with torch.no_grad():
            self._start(conv, bn)
        self.requires_grad_(conv.weight.requires_grad)
        self.train(conv.training)
        # In tuples, so that torch does not register them: `originals` restores them.
        self._conv = (_without_weights(conv),)
        self._bn = (bn, slot)

    def originals(self) -> list[tuple[nn.Module, nn.Module]]:
        """After the switch: pairs of a module in the network and its replacement.

        The convolution gets the kernel. If there was a BatchNorm, it gets the bias, with mean 0 and
        standard deviation 1.
        """
        assert self.reparam is not None
        kernel, bias = self.reparam.weight, self.reparam.bias
        assert bias is not None
        conv = copy.deepcopy(self._conv[0])
        conv.weight = kernel
        if conv_geometry(conv) != conv_geometry(self.reparam):  # changed after the block was made
            set_geometry(conv, self.reparam)
        conv.in_channels, conv.out_channels = self.in_channels, self.out_channels
        conv.kernel_size, conv.groups = self.reparam.kernel_size, self.groups
        bn, slot = self._bn
        if bn is None or slot is None:
            if conv.bias is not None:  # otherwise no branch has a bias
                conv.bias = bias
            return [(self, conv.eval())]
        bn = copy.deepcopy(bn).to(kernel)
        with torch.no_grad():
            if conv.bias is not None:
                conv.bias = nn.Parameter(torch.zeros_like(bias))
            assert bn.running_mean is not None
            assert bn.running_var is not None
            bn.running_var.fill_(1 - bn.eps)
            bn.running_mean.zero_()
            if bn.weight is not None:
                bn.weight.fill_(1)
                bn.bias.copy_(bias)
            else:
                bn.running_mean.copy_(-bias)
            if bn.num_batches_tracked is not None:
                bn.num_batches_tracked.fill_(1)
        return [(self, conv.eval()), (slot, bn.eval())]

    def _start(self, conv: nn.Conv2d, bn: _BatchNorm | None) -> None:
        """Initialize from `conv` and `bn`; like a new block if `bn` was never updated."""
        assert self.branch_3x3 is not None
        assert self.branch_1x1 is not None
        dense, point = self.branch_3x3, self.branch_1x1
        dense.conv.weight.copy_(conv.weight)
        if conv.bias is not None:
            assert dense.conv.bias is not None
            assert point.conv.bias is not None
            dense.conv.bias.copy_(conv.bias)
            point.conv.bias.zero_()
        if bn is None:
            point.conv.weight.zero_()
            if self.branch_identity is not None:
                eye = identity_kernel(self.in_channels, self.groups, device=conv.weight.device)
                dense.conv.weight.sub_(pad_kernel(eye, KERNEL_SIZE))
            return
        assert dense.bn is not None
        assert point.bn is not None
        others = [point.bn]
        if isinstance(self.branch_identity, nn.BatchNorm2d):
            others.append(self.branch_identity)
        for norm in (dense.bn, *others):
            norm.momentum = bn.momentum
        if is_never_updated(bn):
            return
        own = dense.bn.state_dict()
        dense.bn.load_state_dict({key: bn.state_dict().get(key, own[key]) for key in own})
        for norm in others:
            norm.weight.zero_()  # the branch is zero at first, in both modes


def over_parameterize(model: nn.Module, *, branch_drop: float = 0.0) -> nn.Module:
    """Copy a network and replace every eligible 3x3 convolution by a RepVGG block.

    A convolution is eligible if its padding equals its dilation, and it has no hooks and no code
    but torch's. Stride, groups and padding mode may be any. The BatchNorm after it joins the block
    if the dataflow proves that it normalizes only this convolution. It stays outside if its mode is
    not that of the convolution.

    The copy computes the same function at first: new branches start at zero (Goyal et al., 2017,
    arXiv:1706.02677, section 5.1, for their gamma). In training mode this needs `branch_drop` 0. If
    the BatchNorm was never updated, the block starts like any new RepVGG block.

    Args:
        model: in either mode; it is not changed.
        branch_drop: of the blocks, as in `RepVGGBlock`; 0 is off.

    Returns:
        the copy. After training, `repvgg.switch_to_deploy` restores the original layers.

    Raises:
        ValueError: the network has no eligible convolution, its forward depends on the classes of
            its layers, it cannot be copied, or `branch_drop` is out of range.
    """
    model = copied(model)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    flows = _flows(model)
    inside = {
        part
        for module in modules.values()
        if isinstance(module, RepVGGBlock | RepVGG)
        or (module is not model and is_reparameterizable(module))
        for part in module.modules()
    }
    holders: dict[int, set[nn.Module]] = {}  # of weights, which may be tied
    for module in modules.values():
        for tensor in dataflow.own_tensors(module).values():
            holders.setdefault(id(tensor), set()).add(module)
    found = [
        (name, module)
        for name, module in modules.items()
        if isinstance(module, nn.Conv2d)
        and module not in inside
        and all(_is_called_plainly(name, flow) for flow in flows)
        and all(len(holders[id(parameter)]) == 1 for parameter in module.parameters())
        and is_eligible(module)
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no convolution to over-parameterize: none is 3x3, padded "
            "by its dilation, called on one argument in traceable code, and without hooks, tied "
            "weights or code of its class"
        )
    replaced: set[str] = set()
    for name, conv in found:
        behind, *others = [_bn_behind(name, conv, flow, modules) for flow in flows]
        bn = modules[behind] if behind is not None and {behind} == {behind, *others} else None
        slot: nn.Module | None = None
        if isinstance(bn, _BatchNorm) and bn.training == conv.training:
            reading = read_normalization(bn)
            assert isinstance(reading, Normalization)
            slot = foldable.replacement(bn, reading, 4).train(bn.training)
            put(model, bn, slot)
            if not reading.tail:
                replaced.add(str(behind))
        else:
            bn = None
        put(model, conv, RepVGGConv(conv, bn, slot, branch_drop=branch_drop))
    for before, after in zip(flows, _flows(model), strict=True):
        for call in [call for name in replaced for call in before.calls[name]]:
            call.replace_all_uses_with(call.all_input_nodes[0])
            call.graph.erase_node(call)
        if not dataflow.equal(before, after, apart_from=[name for name, _ in found]):
            raise ValueError(
                f"{type(model).__name__} cannot be over-parameterized: some forward depends on "
                "the classes or attributes of its layers"
            )
    return model


def _flows(model: nn.Module) -> list[dataflow.Dataflow]:
    """The dataflow in eval and in training mode."""
    modes = {module: module.training for module in model.modules()}
    with read_once():
        flows = [
            dataflow.trace(model.eval(), _is_node),
            dataflow.trace(model.train(), _is_node),
        ]
    for module, training in modes.items():
        module.training = training
    return flows


def _is_node(module: nn.Module) -> bool:
    """Whether a module is one node of the dataflow: those of fusion, and the new blocks."""
    return isinstance(module, RepVGGConv) or foldable.is_leaf(module)


def _is_called_plainly(name: str, flow: dataflow.Dataflow) -> bool:
    """Whether a module is only called, and on one argument."""
    calls = flow.calls.get(name, [])
    plain = all(not call.kwargs and len(call.args) == 1 for call in calls)
    return bool(calls) and plain and name not in flow.reached


def is_eligible(conv: nn.Conv2d) -> bool:
    """Whether a convolution may have the branches of RepVGG beside it."""
    stride, dilation, padding = conv.stride, conv.dilation, conv.padding
    return (
        foldable.is_linear(conv)
        and foldable.obstacle(conv, values=False) is None
        and conv.kernel_size == (KERNEL_SIZE, KERNEL_SIZE)
        and stride[0] == stride[1]
        and dilation[0] == dilation[1]
        and (padding == dilation or padding == "same")
    )


def _bn_behind(
    name: str, conv: nn.Conv2d, flow: dataflow.Dataflow, modules: dict[str, nn.Module]
) -> str | None:
    """The BatchNorm that normalizes all outputs of a convolution, and nothing else."""
    users = {user for call in flow.calls[name] for user in dataflow.uses(call)}
    names = {flow.called(user) for user in users}
    if len(names) != 1:
        return None
    (behind,) = names
    if behind is None or not _is_called_plainly(behind, flow):
        return None
    if set(flow.calls[behind]) != users:
        return None
    bn = modules[behind]
    if not isinstance(bn, _BatchNorm) or foldable.obstacle(bn, values=False) is not None:
        return None
    reading = read_normalization(bn)
    fits = isinstance(reading, Normalization) and reading.dims in (2, None)
    return behind if fits and bn.num_features == conv.out_channels else None


def _without_weights(conv: nn.Conv2d) -> nn.Conv2d:
    """Copy a convolution without its weights, which are then on the meta device."""
    memo: dict[int, nn.Parameter] = {
        id(parameter): nn.Parameter(_meta(parameter)) for parameter in conv.parameters()
    }
    return copy.deepcopy(conv, memo)


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")
