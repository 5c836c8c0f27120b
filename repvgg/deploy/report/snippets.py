"""Three lines of Python that run a deployed file."""

import re
from typing import TYPE_CHECKING

from repvgg.deploy.report.summary import engine

if TYPE_CHECKING:
    from repvgg.deploy.report.content import Report

NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)


def snippet(name: str, report: "Report") -> str:
    """Code that runs a file on one black image, in the folder of the file."""
    shape = _shape(report)
    dtype, output = report.input, report.output
    if engine(name) == "PyTorch":
        factory = str(report.model.get("_target_", ""))
        start = "import repvgg, torch"
        argument = ""
        if NAME.fullmatch(factory):  # the user's own network, whose code is in no file
            module, _, own = factory.rpartition(".")
            start, argument = f"{start}; from {module} import {own}", f", network={own}"
        opened = f'predict = repvgg.export.open_artifact("{name}"{argument})'
        channels, (height, width) = report.data.in_channels, report.data.image_size
        floats = f"torch.zeros(1, {channels}, {height}, {width})"
        return "\n".join([start, opened, f"{output} = predict({floats})"])
    tensor = f"torch.zeros({shape}, dtype=torch.{dtype})"
    array = f'np.zeros(({shape}), "{dtype}")'
    lines = {
        "torch.export": (
            "import torch",
            f'predict = torch.export.load("{name}").module()',
            f"{output} = predict({tensor})",
        ),
        "AOTInductor": (
            "import torch, torch._inductor",
            f'predict = torch._inductor.aoti_load_package("{name}")',
            f"{output} = predict({tensor})",
        ),
        "onnxruntime": (
            "import numpy as np, onnxruntime",
            f'session = onnxruntime.InferenceSession("{name}")',
            f'({output},) = session.run(None, {{"images": {array}}})',
        ),
        "OpenVINO": (
            "import numpy as np, openvino",
            f'predict = openvino.compile_model("{name}", "CPU", '
            '{"INFERENCE_PRECISION_HINT": "f32"})',
            f"{output} = predict({array})[0]",
        ),
    }
    return "\n".join(lines.get(engine(name), ()))


def _shape(report: "Report") -> str:
    channels, (height, width) = report.data.in_channels, report.data.image_size
    shape = (
        (1, height, width, channels) if report.input == "uint8" else (1, channels, height, width)
    )
    return ", ".join(map(str, shape))
