"""From a folded network to a file, and from the file back to predictions.

`formats` saves and opens each format. `artifact` is an opened file with its description. `int8`
quantizes an ONNX graph with the ranges of `calibration`; `equalize` prepares a network for it.
"""

from repvgg.contract import Description
from repvgg.export.artifact import Artifact
from repvgg.export.formats import FORMATS, open_artifact

__all__ = ["FORMATS", "Artifact", "Description", "open_artifact"]
