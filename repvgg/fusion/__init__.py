"""Folds BatchNorms into convolutions and merges parallel branches, in any network.

`fuse` is the entry. `tracer` traces a forward, `dataflow` finds which module feeds which,
`functions` makes layers of functions, `batchnorms` folds, `sequences` and `sums` merge.
"""

from repvgg.fusion.fuse import fuse_conv_bn
from repvgg.fusion.report import FusionReport

__all__ = ["FusionReport", "fuse_conv_bn"]
