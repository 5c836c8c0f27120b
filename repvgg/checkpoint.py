"""The self-describing checkpoint: one file that rebuilds, explains and proves a network.

Beside the weights it carries the arguments that rebuild the network, the data contract (classes,
image size, mean and std, interpolation) and a probe: a few validation images with the logits the
trained network gave them. It holds plain types and tensors alone, so it loads with
`torch.load(weights_only=True)`, in a process without Lightning, and runs no code of the file.
"""

import pickle
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repvgg.model import DataContract, Normalize, to_float
from repvgg.zoo import build_model

KEY = "repvgg"  # of our entry beside what Lightning stores
FORMAT = 1
NETWORK_PREFIX = "net."  # of the network's weights inside the Lightning module


class Probe(NamedTuple):
    """Images and what the trained network said of them.

    Attributes:
        images: (N, C, H, W), uint8.
        labels: (N,), int64.
        logits: (N, K), float32, in eval mode.
    """

    images: Tensor
    labels: Tensor
    logits: Tensor


class Checkpoint(NamedTuple):
    """A checkpoint that was opened.

    Attributes:
        model: the network, in its training form and eval mode, on the CPU.
        config: the arguments of `repvgg.zoo.build_model` that rebuilt it.
        data: the data contract.
        probe: the recorded images, labels and logits.
        predictor: images (N, C, H, W), float32 in [0, 1] -> logits; normalizes, then runs `model`.
    """

    model: nn.Module
    config: dict[str, Any]
    data: DataContract
    probe: Probe

    @property
    def predictor(self) -> nn.Module:
        return nn.Sequential(Normalize(self.data.mean, self.data.std), self.model).eval()


def describe(
    model: nn.Module,
    *,
    config: Mapping[str, Any],
    data: DataContract,
    images: Tensor,
    labels: Tensor,
) -> dict[str, Any]:
    """Write down what makes a checkpoint of `model` self-describing.

    Runs `model` once on the probe images, in eval mode, float32 and without TF32, and leaves its
    mode and the random state as they were.

    Args:
        config: arguments of `repvgg.zoo.build_model`, of plain types.
        images: (N, C, H, W), uint8, for the probe.
        labels: (N,).

    Returns:
        the entry to store under `KEY` beside the `state_dict`.
    """
    device = next(model.parameters()).device
    normalize = Normalize(data.mean, data.std).to(device)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            logits = model(normalize(to_float(images.to(device)))).float().cpu()
    finally:
        for module, training in modes.items():
            module.training = training
    return {
        "format": FORMAT,
        "model": dict(config),
        "data": asdict(data),
        # Copies: of a slice, torch would save all that it was cut from.
        "probe": {"images": images.cpu().clone(), "labels": labels.cpu().clone(), "logits": logits},
    }


def load(path: str | Path) -> Checkpoint:
    """Open a checkpoint of ours and rebuild its network.

    Raises:
        ValueError: the file is missing, truncated, not a checkpoint, one of another project, needs
            arbitrary code to load, or its weights do not fit its description. Each says which.
    """
    content = _read(Path(path))
    if KEY not in content:
        keys = ", ".join(map(str, list(content)[:5]))
        raise ValueError(
            f"'{path}' is not a checkpoint of this project: it has no entry '{KEY}' "
            f"(its first keys: {keys}); give a best.ckpt or last.ckpt that train.py wrote"
        )
    entry = content[KEY]
    try:
        if entry["format"] != FORMAT:
            raise ValueError(
                f"'{path}' has checkpoint format {entry['format']}, this version reads {FORMAT}: "
                "update the package"
            )
        config, data, probe = entry["model"], DataContract(**entry["data"]), entry["probe"]
        model = build_model(**config)
        weights = {
            key.removeprefix(NETWORK_PREFIX): value
            for key, value in content["state_dict"].items()
            if key.startswith(NETWORK_PREFIX)
        }
        model.load_state_dict(weights)
        probe = Probe(**probe)
        if probe.images.ndim != 4 or len(probe.logits) != len(probe.images):
            raise ValueError(f"'{path}' has a damaged probe")
        return Checkpoint(model.eval(), config, data, probe)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' has a damaged description: {error!r}") from error
    except RuntimeError as error:  # what load_state_dict raises; its second line names a key
        detail = " ".join(str(error).split()[:60])
        raise ValueError(f"'{path}' does not fit its own description: {detail}") from error


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"'{path}' does not exist; give the path of a best.ckpt or last.ckpt")
    if not path.is_file():
        raise ValueError(f"'{path}' is a folder; give the file in it, e.g. checkpoints/best.ckpt")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's reader, on files that are not its own
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"'{path}' is no checkpoint of plain tensors: it is not a torch file, or it holds "
            "objects whose loading would run code, which is refused; give a file train.py wrote"
        ) from error
    except Exception as error:  # torch's reader fails in many ways on what is not a torch file
        detail = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"'{path}' cannot be read: it is truncated, or not a torch file "
            f"({type(error).__name__}: {detail})"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}, not a checkpoint")
    return content
