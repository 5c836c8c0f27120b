"""Fold BatchNorms into convolutions, and merge parallel branches, in any network.

`tracer` follows a network's forward, `dataflow` finds its layers, `batchnorms` and `sums` change
them, `fuse` does all of it.
"""

from repvgg.fusion.batchnorms import FusionReport
from repvgg.fusion.fuse import fuse_conv_bn

__all__ = ["FusionReport", "fuse_conv_bn"]
