"""What lightning-hydra-template, timm and ultralytics call a key, a choice or a command.

A mistake with one of their names ends with what to pass here.
"""

import os
from collections.abc import Container
from pathlib import Path

# Several stand for the same key of several commands: the first that the command has.
# A text with "=" is passed as it is; the others get the value that was passed.
KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("epochs", "epoch", "max_epochs", "num_epochs"), ("trainer.max_epochs",)),
    **dict.fromkeys(("lr", "lr0", "learning_rate", "optimizer.lr"), ("optim.lr",)),
    **dict.fromkeys(("batch", "batch_size", "bs"), ("batch_size", "data.batch_size")),
    **dict.fromkeys(("imgsz", "img_size", "image_size", "input_size"), ("data.image_size",)),
    **dict.fromkeys(("workers", "num_workers"), ("data.num_workers",)),
    **dict.fromkeys(("ckpt_path", "checkpoint"), ("ckpt", "resume", "model")),
    **dict.fromkeys(("ckpt", "weights"), ("ckpt", "init", "model")),
    **dict.fromkeys(("initial_checkpoint", "finetune"), ("init",)),
    **dict.fromkeys(("data_dir", "data_path", "dataset", "data.data_dir"), ("data.root",)),
    **dict.fromkeys(("source", "input"), ("images",)),
    **dict.fromkeys(("opt", "optim.opt"), ("optim.name",)),
    **dict.fromkeys(("wd", "weight_decay"), ("optim.weight_decay",)),
    **dict.fromkeys(("gpus", "num_gpus", "trainer.gpus"), ("trainer.devices",)),
    **dict.fromkeys(("name", "task_name", "run_name", "project", "output"), ("hydra.run.dir",)),
    **dict.fromkeys(("output_dir", "save_dir", "outdir"), ("out", "hydra.run.dir")),
    **dict.fromkeys(("amp", "half", "fp16"), ("trainer.precision=16-mixed",)),
    **dict.fromkeys(("smoothing", "model.label_smoothing"), ("label_smoothing",)),
    **dict.fromkeys(("num_classes", "nc"), ("data=imagefolder data.root=FOLDER",)),
    **dict.fromkeys(
        ("pretrained", "model.pretrained"), ("model=timm model.name=NAME model.pretrained=true",)
    ),
    "model": ("ckpt",),
    "drop": ("model.dropout",),
    "dropout": ("model.dropout",),
    "drop_path": ("model.drop_path",),
    "momentum": ("optim.momentum",),
    "sched": ("scheduler._target_=torch.optim.lr_scheduler.OneCycleLR",),
    "warmup_epochs": ("optim.warmup_epochs",),
    "layer_decay": ("optim.layer_decay",),
    "clip_grad": ("trainer.gradient_clip_val",),
    "grad_accum_steps": ("trainer.accumulate_grad_batches",),
    "model_ema": ("ema=0.999",),
    "patience": ("callbacks=early_stopping callbacks.early_stopping.patience",),
    "device": ("trainer.accelerator=gpu",),
    "topk": ("top",),
    "model._target_": ("model=custom model._target_",),
    "model.weights": ("model=torchvision model.name=NAME model.weights",),
    "model.optimizer._target_": ("optimizer._target_",),
    "model.optimizer.lr": ("optim.lr",),
    "model.optimizer.weight_decay": ("optim.weight_decay",),
    "model.scheduler._target_": ("scheduler._target_",),
    "model.net._target_": ("model=custom model._target_",),
}

# What others pass as optimizer=NAME and scheduler=NAME.
PARTS = {
    "optimizer": {
        "sgd": "pass optim.name=sgd",
        "adamw": "pass optim.name=adamw",
        "adam": "pass optimizer._target_=torch.optim.Adam, or optim.name=adamw",
        "rmsprop": "pass optimizer._target_=torch.optim.RMSprop",
    },
    "scheduler": {
        "cosine": "leave it out: the default is warm-up and cosine decay",
        "step": "pass scheduler._target_=torch.optim.lr_scheduler.StepLR",
        "onecycle": "pass scheduler._target_=torch.optim.lr_scheduler.OneCycleLR",
        "plateau": "pass scheduler._target_=torch.optim.lr_scheduler.ReduceLROnPlateau",
    },
}

COMMANDS = {
    **dict.fromkeys(("val", "validate", "eval", "test"), "evaluate"),
    **dict.fromkeys(("infer", "inference", "label"), "predict"),
    **dict.fromkeys(("export", "fuse", "fold"), "deploy"),
    **dict.fromkeys(("fit", "finetune"), "train"),
    **dict.fromkeys(("info", "show"), "inspect"),
    "convert": "import",
}


def key(given: str, value: str, known: Container[str]) -> str | None:
    """What to pass for a key of another framework; None if it is no such key.

    Args:
        given: the key, dotted.
        value: what was passed for it.
        known: the keys at the root of the command's configuration.
    """
    for meant in KEYS.get(given, ()):
        root = meant.partition("=")[0].partition(".")[0]
        if root in known or (root == "hydra" and "trainer" in known):
            last = meant.rpartition(" ")[2]
            return f"pass {meant}" if "=" in last else f"pass {meant}={value or 'VALUE'}"
    return None


def choice(group: str, given: str) -> str | None:
    """What to pass for a path, a dotted name or a network of others as a group's choice."""
    path = Path(given)
    if group == "data" and path.suffix == ".csv":
        return f"pass data=csv data.root={path.parent} data.train={path.name}"
    if group == "data" and (os.path.isdir(given) or "/" in given):
        return f"pass data=imagefolder data.root={given}"
    if group in ("model", "data") and _is_dotted(given):
        return f"pass {group}=custom {group}._target_={given}"
    if group == "model":
        return f"pass model=torchvision model.name={given}, or model=timm model.name={given}"
    if group == "experiment":
        return "--config-dir=FOLDER adds the recipes in FOLDER/experiment"
    if group == "data":
        return f"pass data=torchvision data.name={given} data.root=FOLDER"
    return None


def part(key: str, given: object) -> str | None:
    """What to pass for a short name of an optimizer or a schedule; None if it is no such name."""
    return PARTS.get(key, {}).get(str(given).lower())


def command(given: str) -> str | None:
    """The command that another framework calls `given`; None if it is no such name."""
    return COMMANDS.get(given)


def _is_dotted(given: str) -> bool:
    parts = given.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)
