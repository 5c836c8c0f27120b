"""Open a network from any file: a checkpoint, a deployed file, or third-party weights."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from repvgg import checkpoint, cli
from repvgg.checkpoint.tensors import METADATA, read
from repvgg.contract import METADATA_KEY, DataContract
from repvgg.deploy.evaluate_settings import check_file
from repvgg.deploy.run import find_factory
from repvgg.export.artifact import Artifact
from repvgg.export.formats import FORMATS, open_artifact
from repvgg.models.libraries import Factory
from repvgg.verify import Predictor

ENGINES = {Path(known.filename).suffix for known in FORMATS.values()} - {".safetensors"}


class Opened(NamedTuple):
    """A network from a file.

    Attributes:
        predict: images (N, C, H, W), float32 in [0, 1], on the CPU -> logits (N, K), likewise.
        data: the preprocessing and the classes.
        title: what it is, for the reader.
        assumed: the file names no classes; those of `data` are assumed.
        device: on which it runs.
    """

    predict: Predictor
    data: DataContract
    title: str
    assumed: bool
    device: str


def open_any(
    path: Path, key: str, device: str = "auto", *, network: str | None = None, trust: bool = False
) -> Opened:
    """Open a file by its ending and content.

    Args:
        key: the argument that named it, for the errors.
        device: "cpu", "cuda", or "auto": a GPU if there is one. Deployed files run on the CPU.
        network: the dotted name of what builds the network, if it is the user's own.
        trust: as in `repvgg.export.open_artifact`.

    Raises:
        ValueError: there is no such file or device, the file is damaged, or an engine is missing.
    """
    check_file(path, key)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch finds no GPU; pass device=cpu")
    factory = find_factory(network)
    described = path.suffix == ".safetensors" and METADATA_KEY in _metadata(path)
    if path.suffix in ENGINES or described:
        return _deployed(path, device, factory, trust=trust)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with cli.suggest_import(path):
        opened = checkpoint.load(path, network=factory)
    numbers = [str(number) for number in range(len(opened.data.classes))]
    return Opened(
        _on(device, opened.predictor.to(device)),
        opened.data,
        opened.origin or str(opened.config["name"]),
        bool(opened.origin) and [*opened.data.classes] == numbers,
        device,
    )


def _metadata(path: Path) -> Mapping[object, object]:
    said = read(path).get(METADATA)
    return said if isinstance(said, Mapping) else {}


def _deployed(path: Path, device: str, factory: Factory | None, *, trust: bool) -> Opened:
    if device == "cuda":
        raise ValueError(f"device=cuda: {path.name} runs on the CPU; pass device=cpu")
    try:
        artifact = open_artifact(path, network=factory, trust=trust)
    except ImportError as error:
        raise ValueError(str(error)) from error
    description = artifact.description
    predict = artifact if description.output == "logits" else _logarithm(artifact)
    title = f"{description.config['name']}, deployed"
    return Opened(predict, description.data, title, False, "cpu")


def _logarithm(artifact: Artifact) -> Predictor:
    """Logits of a file that computes probabilities, up to a constant for each image."""

    def predict(images: Tensor) -> Tensor:
        scores = artifact(images)
        return scores.clamp_min(torch.finfo(scores.dtype).tiny).log()

    return predict


def _on(device: str, network: Callable[[Tensor], Tensor]) -> Predictor:
    """Run a network on a device in float32: TF32 would round to ten bits."""

    def predict(images: Tensor) -> Tensor:
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            return network(images.to(device)).cpu()

    return predict
