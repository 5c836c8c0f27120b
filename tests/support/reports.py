"""Reports of deployments that never ran."""

import contextlib
from pathlib import Path

import torch

from repvgg.contract import DataContract, Description
from repvgg.deploy.report import (
    DeployedFile,
    Int8,
    Latency,
    Report,
    Size,
    Timing,
    Training,
)
from repvgg.deploy.report.samples import Samples
from repvgg.deploy.report.snippets import snippet
from repvgg.export.int8 import Trial
from repvgg.verify import Verdict

CONTRACT = DataContract(["a", "b", "c"], 3, [32, 32], [0.4, 0.5, 0.6], [0.2, 0.3, 0.2], "bilinear")
TRIAL = Trial("minmax", True, ("stem",), 0.75, 0.01)


def report(**changes) -> Report:
    """A report without int8 and latency."""
    values = {
        "checkpoint": "best.ckpt",
        "origin": "",
        "model": {"name": "repvgg_tiny", "num_classes": 3},
        "data": CONTRACT,
        "input": "float32",
        "output": "logits",
        "images": 4,
        "probe": Verdict(0.0, 1e-4, 1.0),
        "verdicts": {
            "folded, float32": Verdict(2e-7, 1e-5, 1.0),
            "model.onnx": Verdict(2e-7, 1e-5, 1.0),
        },
        "blocks": {"float64": {"stem": 1e-16}},
        "batchnorms_left": {},
        "accuracy_on_probe": {"recorded": 0.5},
        "files": {"model.onnx": DeployedFile(8_000_000, "0" * 64, {}, "float32")},
        "size": {"deployed": Size(1000, 2000)},
        "environment": {"python": "3.11"},
        "command": "python deploy.py ckpt=best.ckpt",
    }
    return Report(**{**values, **changes})


def whole_report() -> Report:
    """A report with everything that can be in one."""
    return report(
        int8=Int8(
            source="the training set",
            judged_on="the validation set",
            measured_on=16,
            chosen_on=16,
            chosen=TRIAL,
            trials=[TRIAL, Trial("mse", False, (), 0.5, 0.02)],
            sensitivity={"stem": 0.02, "linear": 0.01},
            verdicts={"model-int8.onnx, onnxruntime": Verdict(0.0, 0.25, 0.75)},
        ),
        verdicts={"model.xml": Verdict(2e-7, 1e-5, 1.0)},
        batchnorms_left={"bn": "it is read twice"},
        accuracy_on_validation={"deployed, torch": 0.75, "model.xml": 0.75},
        agreement_on_validation={"deployed, torch": 1.0, "model.xml": 1.0},
        float32_bound=4e-4,
        files={
            "model-int8.onnx": DeployedFile(90, "2" * 64, {}, "int8"),
            "model.bin": DeployedFile(8_000_000, "0" * 64, {}, None),
            "model.xml": DeployedFile(9, "1" * 64, {"convolutions": 7, "batchnorms": 0}, "float32"),
        },
        latency=Latency(
            1,
            2,
            0.5,
            False,
            {
                "trained form, torch": Timing(1.5, 1.0, 2.0, 10, 0.67),
                "deployed, torch": Timing(1.0, 0.9, 1.1, 10, 1.0),
                "model.xml": Timing(0.5, 0.4, 0.6, 10, 2.0),
            },
        ),
        validation_images=1000,
        created="2026-01-02T03:04:05Z",
        training=Training("runs/one", "digits", ["model=repvgg_tiny"], 3, {"test/accuracy": 0.98}),
    )


def run_snippet(path: Path, description: Description) -> torch.Tensor:
    """Run the three lines of a report, in the folder of a file; returns the outputs."""
    given = report(
        model=description.config,
        data=description.data,
        input=description.input,
        output=description.output,
    )
    code, names = snippet(path.name, given), {}
    assert len(code.splitlines()) == 3
    with contextlib.chdir(path.parent):
        exec(code, names)
    return torch.as_tensor(names[description.output])


def samples(classes: int = 3, channels: int = 3, size: int = 8) -> Samples:
    """Two images of each class, of which the first class's are wrong."""
    labels = torch.arange(classes).repeat(2)
    predicted = labels.where(labels > 0, classes - 1)
    probabilities = 0.9 * torch.nn.functional.one_hot(predicted, classes) + 0.1 / classes
    images = torch.rand(len(labels), channels, size, size)
    return Samples(images, labels, probabilities, f"{len(labels)} images", True)
