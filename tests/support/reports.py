"""Reports of deployments that never ran."""

from repvgg.contract import DataContract
from repvgg.deploy.report import DeployedFile, Int8, Latency, Report, Size, Timing
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
        "verdicts": {"folded, float32": Verdict(2e-7, 1e-5, 1.0)},
        "blocks": {"float64": {"stem": 1e-16}},
        "batchnorms_left": {},
        "accuracy_on_probe": {"recorded": 0.5},
        "files": {},
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
        batchnorms_left={"bn": "it is read twice"},
        accuracy_on_validation={"deployed, torch": 0.75},
        agreement_on_validation={"deployed, torch": 1.0},
        float32_bound=4e-4,
        files={
            "model.bin": DeployedFile(8, "0" * 64, {}, None),
            "model.xml": DeployedFile(9, "1" * 64, {"convolutions": 7, "batchnorms": 0}, "float32"),
        },
        latency=Latency(1, 2, 0.5, False, {"deployed, torch": Timing(1.5, 1.0, 2.0, 10, 1.0)}),
    )
