"""What fusion did to a network, and what it left and why."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class FusionReport:
    """What `fuse_conv_bn` did. Modules are identified by their names in the network.

    Attributes:
        fused: pairs of a convolution or linear layer and a normalization, in execution order.
            Each pair is one module now, under the name of the layer.
        merged: layers, and the branches added to them or the layers before them. Each group is one
            module now, under the first name.
        kept: every normalization that was not folded, and why.
        unmerged: modules whose forward adds branches that were not merged, and why.
        untraced: modules whose forward could not be traced, and why. Less is folded inside them.
        layers: new layers in the place of functions of a forward (OREPA's convolution, say).
        costlier: layers that stay although they could be merged with the one before or beside
            them, since that would take more multiplications.
    """

    fused: list[tuple[str, str]] = field(default_factory=list)
    merged: list[tuple[str, ...]] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    unmerged: dict[str, str] = field(default_factory=dict)
    untraced: dict[str, str] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    costlier: dict[str, str] = field(default_factory=dict)

    @property
    def moved(self) -> set[str]:
        """Modules whose outputs changed, because another module does part of their work."""
        moved = {name for names in self.merged for name in names}
        for place, (first, second) in enumerate(self.fused):
            moved.add(first)
            if any(first == later for later, _ in self.fused[place + 1 :]):
                moved.add(second)  # one BatchNorm after another
        return moved
