"""What the server of `processes` imports once, before it forks the first program."""

import gc
import importlib

for name in (
    "lightning.pytorch.loggers.tensorboard",
    "tensorboard.backend.event_processing.event_accumulator",
    "torchvision.transforms.v2",
    "repvgg.commands.deploy",
    "repvgg.commands.train",
    "repvgg.deploy.run",
    "repvgg.training.run",
):
    importlib.import_module(name)
gc.freeze()  # or each program would copy what it collects
