"""What re-parameterization does to a network while it trains: pure functions on networks.

The share of every branch in the folded kernels, the outliers that int8 suffers from, the error of
the fold, and the graphs of both forms.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from repvgg import verify
from repvgg.fusion.copying import copied
from repvgg.models.block import RepVGGBlock
from repvgg.models.forms import switch_to_deploy

if TYPE_CHECKING:
    from tensorboard.compat.proto.graph_pb2 import GraphDef

BRANCHES = ("3x3", "1x1", "identity")
MOST_NODES = 5000  # of a graph; the page takes minutes to lay out more


class BlockAnatomy(NamedTuple):
    """One block, folded.

    Attributes:
        shares: by branch, |K_branch|^2 over the sum of these of all branches, with the kernels as
            they are in the folded convolution, BatchNorm included. They add up to 1.
        outliers: the mean over the output channels of max |w| / rms(w), of the folded kernel.
        largest_outlier: the largest of these ratios.
    """

    shares: dict[str, float]
    outliers: float
    largest_outlier: float


def multi_branch_blocks(network: nn.Module) -> dict[str, RepVGGBlock]:
    """The blocks of a network that have branches, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, RepVGGBlock) and module.reparam is None
    }


@torch.no_grad()
def dissect(network: nn.Module) -> dict[str, BlockAnatomy]:
    """Measure every block that has branches, by name, in the order of the network.

    Raises:
        ValueError: a block cannot be folded.
    """
    found = {}
    for name, block in multi_branch_blocks(network).items():
        kernels = {branch: affine.kernel for branch, affine in block.branch_affines().items()}
        energies = {branch: kernel.square().sum().item() for branch, kernel in kernels.items()}
        total = sum(energies.values()) or 1.0
        ratios = outlier_ratios(sum(kernels.values(), torch.zeros(())))
        found[name] = BlockAnatomy(
            {branch: energies.get(branch, 0.0) / total for branch in BRANCHES},
            ratios.mean().item(),
            ratios.max().item(),
        )
    return found


def outlier_ratios(kernel: Tensor) -> Tensor:
    """Largest absolute weight over the root mean square, of every output channel.

    int8 divides the range of a channel into equal steps. The larger this ratio, the fewer steps are
    left for most weights. It is 1 if all are equally large, and 0 for a channel of zeros.

    Shapes: (O, ...) -> (O,).
    """
    rows = kernel.flatten(1)
    rms = rows.square().mean(1).sqrt()
    return rows.abs().amax(1) / rms.clamp_min(torch.finfo(rms.dtype).tiny)


def stage_of(block: str) -> str:
    """The module that holds a block in a list: "stages.0" for "stages.0.3"."""
    parent, _, last = block.rpartition(".")
    return parent if last.isdecimal() and parent else block


def stage_means(blocks: Mapping[str, BlockAnatomy]) -> dict[str, BlockAnatomy]:
    """Means over the blocks of every stage; of its largest outliers the largest."""
    stages: dict[str, list[BlockAnatomy]] = {}
    for name, block in blocks.items():
        stages.setdefault(stage_of(name), []).append(block)
    return {
        stage: BlockAnatomy(
            {part: statistics.fmean(block.shares[part] for block in held) for part in BRANCHES},
            statistics.fmean(block.outliers for block in held),
            max(block.largest_outlier for block in held),
        )
        for stage, held in stages.items()
    }


class Kernels(NamedTuple):
    """Kernels of single channels, as a table of maps.

    Attributes:
        maps: (R, P, H, W): a row for each channel; in columns the branches, then their sum.
        rows: R names of block and channel.
        parts: P names.
    """

    maps: Tensor
    rows: list[str]
    parts: list[str]


@torch.no_grad()
def pick_kernels(network: nn.Module, *, blocks: int = 3, channels: int = 4) -> Kernels | None:
    """The kernels of a few channels of a few blocks, each branch and their sum.

    Output channel k is shown at the input channel that the identity branch adds to it. Blocks are
    spread evenly over those that have an identity branch; without any, over all.

    Returns:
        None if no block has branches.

    Raises:
        ValueError: a block cannot be folded.
    """
    held = multi_branch_blocks(network)
    full = {name: block for name, block in held.items() if block.branch_identity is not None}
    chosen = [*(full or held).items()]
    if not chosen:
        return None
    count = min(blocks, len(chosen))
    last = len(chosen) - 1
    places = sorted({round(last * k / max(1, count - 1)) for k in range(count)})
    rows, maps = [], []
    for name, block in (chosen[place] for place in places):
        affines = block.branch_affines()
        size = affines["3x3"].kernel.shape
        none = torch.zeros(size, dtype=torch.float64, device=affines["3x3"].kernel.device)
        parts = [affines[b].kernel if b in affines else none for b in BRANCHES]
        table = torch.stack([*parts, torch.stack(parts).sum(0)], 1)  # (O, 4, I / groups, 3, 3)
        for channel in range(min(channels, len(table))):
            rows.append(f"{name}, channel {channel}")
            maps.append(table[channel, :, channel % size[1]])
    if len({one.shape for one in maps}) > 1:  # kernels of the user's own sizes
        kept = [k for k, one in enumerate(maps) if one.shape == maps[0].shape]
        rows, maps = [rows[k] for k in kept], [maps[k] for k in kept]
    return Kernels(torch.stack(maps).cpu(), rows, [*BRANCHES, "sum"])


@torch.no_grad()
def fold_error(network: nn.Module, images: Tensor) -> float:
    """The largest difference that the fold makes to a logit, relative to the largest logit.

    Both forms compute in float64, the folded one with its weights as they are stored. So it is what
    rounding the folded weights costs: about 1e-7 in float32.

    Args:
        network: in any mode; it is not changed.
        images: (N, C, H, W), preprocessed.

    Raises:
        ValueError: the network cannot be folded.
    """
    folded = switch_to_deploy(network).double()
    reference = copied(network).eval().double()
    return verify.relative_error(reference(images.double()), folded(images.double()))


@torch.no_grad()
def draw_graph(forms: Mapping[str, nn.Module], images: Tensor) -> GraphDef | None:
    """The dataflow of networks beside each other, as TensorBoard's page "Graphs" reads it.

    torch.fx traces it. TensorBoard's own `add_graph` uses torch.jit, which is deprecated.

    Args:
        forms: by name; none is changed.
        images: (1, C, H, W), preprocessed; they give the sizes.

    Returns:
        None if a network cannot be traced, or has too many layers.
    """
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    from tensorboard.compat.proto.versions_pb2 import VersionDef

    nodes: list[Any] = []
    for name, network in forms.items():
        found = _nodes(name, copied(network).eval(), images)
        if found is None or len(nodes) + len(found) > MOST_NODES:
            return None
        nodes += found
    return GraphDef(node=nodes, versions=VersionDef(producer=22))


class _Sizes(fx.Interpreter):
    """Runs a graph and keeps the shape of every result."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, list[int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = [*result.shape]
        return result


def _nodes(prefix: str, network: nn.Module, images: Tensor) -> list[Any] | None:
    from torch.utils.tensorboard._proto_graph import node_proto

    try:
        traced = fx.symbolic_trace(network)
        sizes = _Sizes(traced)
        sizes.run(images)
    except Exception:  # the network is the user's own code, which may do anything
        return None
    names: dict[fx.Node, str] = {}
    taken: set[str] = set()
    nodes: list[Any] = []
    modules = dict(traced.named_modules())
    for node in traced.graph.nodes:
        inputs = [names[one] for one in node.all_input_nodes if one in names]
        if node.op == "get_attr":  # weights: the layer that holds them is shown
            continue
        if node.op == "call_module":
            target = str(node.target)
            path, kind = target.replace(".", "/"), type(modules[target]).__name__
            detail = modules[target].extra_repr()
        else:
            scopes = [*(node.meta.get("nn_module_stack") or {}).values()]
            scope = str(scopes[-1][0]).replace(".", "/") if scopes else ""
            path = f"{scope}/{node.name}" if scope else node.name
            kind, detail = _operation(node), ""
        names[node] = f"{prefix}/{path}"
        if names[node] in taken:  # a module that is called twice
            names[node] = f"{names[node]}_{node.name}"
        taken.add(names[node])
        nodes.append(
            node_proto(
                names[node],
                op=kind,
                input=inputs,
                outputsize=sizes.shapes.get(node),
                attributes=detail,
            )
        )
    return nodes


def _operation(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return {"placeholder": "images", "output": "logits"}[node.op]
    return str(getattr(node.target, "__name__", node.target))
