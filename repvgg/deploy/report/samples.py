"""Images with the predictions of the folded network, to be looked at."""

import base64
import io
from typing import NamedTuple

import torch
from torch import Tensor

from repvgg.checkpoint import Checkpoint
from repvgg.contract import to_float
from repvgg.deploy.sets import Sets, is_labelled

MOST_SHOWN = 12  # images of a kind
LARGEST = 160  # pixels of a side that is shown


class Samples(NamedTuple):
    """Labelled images and their predictions.

    Attributes:
        images: (N, C, H, W), float32 in [0, 1].
        labels: (N,).
        probabilities: (N, K), of the folded network.
        source: what the images are.
        measured: there are enough images for a confusion matrix.
    """

    images: Tensor
    labels: Tensor
    probabilities: Tensor
    source: str
    measured: bool


class Shown(NamedTuple):
    """One image of a page.

    Attributes:
        source: of the `<img>`, a data URI.
        label, predicted: names of classes.
        confidence: probability of the predicted class.
        right: the predicted class is that of the label.
    """

    source: str
    label: str
    predicted: str
    confidence: float
    right: bool


def collect(scores: Tensor, restored: Checkpoint, sets: Sets, output: str) -> Samples | None:
    """The images of the validation set, else of the probe batch; None if these are noise.

    Args:
        scores: (N, K), of the folded network on these images.
        output: as in `repvgg.contract.Description`.
    """
    if sets.validation is not None:
        (images, labels), source = sets.validation, f"{len(scores):,} validation images"
    elif is_labelled(restored.probe):
        images, labels = to_float(restored.probe.images), restored.probe.labels
        source = f"the {len(images)} validation images in the checkpoint"
    else:
        return None
    shares = scores if output == "probabilities" else scores.softmax(1)
    return Samples(images, labels, shares, source, sets.validation is not None)


def spread(samples: Samples) -> list[int]:
    """Images that are evenly spread."""
    count = min(MOST_SHOWN, len(samples.labels))
    return torch.linspace(0, len(samples.labels) - 1, count).long().tolist()


def mistakes(samples: Samples) -> list[int]:
    """The most confident mistakes, the worst first."""
    confidence, predicted = samples.probabilities.max(1)
    wrong = (predicted != samples.labels).nonzero().flatten()
    return wrong[confidence[wrong].argsort(descending=True, stable=True)][:MOST_SHOWN].tolist()


def confusion(samples: Samples) -> Tensor:
    """Counts (K, K) of images by their class and the predicted class.

    As `repvgg.metrics.confusion`, whose import of torchmetrics takes longer than a small report.
    """
    count = samples.probabilities.shape[1]
    cells = samples.labels * count + samples.probabilities.argmax(1)
    return torch.bincount(cells, minlength=count * count).view(count, count)


def show(samples: Samples, index: int, classes: list[str]) -> Shown:
    """One image with its prediction."""
    confidence, predicted = samples.probabilities[index].max(0)
    label = int(samples.labels[index])
    return Shown(
        data_uri(samples.images[index]),
        classes[label],
        classes[int(predicted)],
        float(confidence),
        label == int(predicted),
    )


def data_uri(image: Tensor) -> str:
    """An image (C, H, W) in [0, 1] as a PNG within a page; of other than 3 channels the mean."""
    from PIL import Image

    image = image if len(image) == 3 else image.mean(0, keepdim=True)
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    array = pixels.squeeze(0).numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    picture.thumbnail((LARGEST, LARGEST))  # no smaller image grows
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
