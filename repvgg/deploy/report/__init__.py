"""The report of a deployment: its data, and the same as JSON, Markdown, HTML and text."""

from repvgg.deploy.report.content import (
    DeployedFile,
    Int8,
    Latency,
    Quartiles,
    Report,
    Size,
    Timing,
    Training,
)

__all__ = [
    "DeployedFile",
    "Int8",
    "Latency",
    "Quartiles",
    "Report",
    "Size",
    "Timing",
    "Training",
]
