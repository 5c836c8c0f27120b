"""Predictions of a validation as pictures, for any classes, names and images."""

import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from repvgg import figures
from repvgg.contract import DataContract
from repvgg.training import predictions
from repvgg.training.predictions import Predictions

HOSTILE = ["<b>a</b>", "# b\n[c](d)", "\x1b[31mred", "$x_{$", "‮evil", "犬" * 60, "犬" * 60]


def contract(classes: list[str], channels: int = 3, size: int = 8) -> DataContract:
    return DataContract(
        classes, channels, [size, size], [0.5] * channels, [0.25] * channels, "bilinear"
    )


def collect(count: int, num_classes: int, channels: int = 3, size: int = 8) -> Predictions:
    generator = torch.Generator().manual_seed(0)
    collected = Predictions()
    for rows in torch.arange(count).split(50):
        images = torch.randn(len(rows), channels, size, size, generator=generator)
        logits = 3 * torch.randn(len(rows), num_classes, generator=generator)
        targets = torch.randint(num_classes, (len(rows),), generator=generator)
        collected.add(images, logits, targets)
    return collected


def test_the_most_confident_mistakes_of_all_batches_are_kept():
    torch.manual_seed(0)
    images, logits = torch.randn(60, 1, 2, 2), torch.randn(60, 3)
    targets = torch.randint(3, (60,))
    collected = Predictions(num_shown=5)
    for part in zip(images.split(7), logits.split(7), targets.split(7), strict=True):
        collected.add(*part)

    found = collected.mistakes()

    confidence, predicted = logits.softmax(1).max(1)
    wrong = (predicted != targets).nonzero().flatten()
    best = wrong[confidence[wrong].argsort(descending=True)][:5]
    assert len(collected) == 60
    assert torch.equal(found.images, images[best])
    assert torch.equal(found.predicted, predicted[best])
    assert torch.equal(found.targets, targets[best])
    assert torch.equal(found.confidence, confidence[best])


def test_right_predictions_are_no_mistakes():
    collected = Predictions()
    collected.add(torch.zeros(3, 1, 2, 2), torch.eye(3), torch.arange(3))

    assert len(collected.mistakes().images) == 0


def test_the_bins_are_those_of_torchmetrics():
    collected = collect(500, 4)
    classes, predicted, confidence = collected.all()
    error = MulticlassCalibrationError(4, n_bins=15)
    scores = torch.full((500, 4), 0.0)
    scores[torch.arange(500), predicted] = confidence

    bins = predictions.bin_by_confidence(confidence, classes == predicted)

    pairs = zip(bins.counts, bins.confidence, bins.accuracy, strict=True)
    found = sum(count * abs(share - hits) / 500 for count, share, hits in pairs)
    assert found == pytest.approx(float(error(scores, classes)), abs=1e-6)


@pytest.mark.parametrize(
    ("classes", "channels", "size"),
    [
        (["cat", "dog"], 1, 8),
        ([f"class {k}" for k in range(1000)], 3, 512),
        (HOSTILE, 4, 8),
    ],
)
def test_pictures_are_drawn_for_any_classes_and_images(classes, channels, size):
    collected = collect(60, len(classes), channels, size)

    drawn = {
        name: figures.rasterize(draw)
        for name, draw in predictions.draw_predictions(collected, contract(classes, channels, size))
    }

    assert [*drawn] == ["mistakes", "confusion_matrix", "reliability", "accuracy_by_class"]
    for pixels in drawn.values():
        assert max(pixels.shape) <= 1700
        assert pixels.float().std() > 5


def test_a_confusion_matrix_without_a_pixel_for_each_pair_is_left_out():
    classes = [str(k) for k in range(1001)]

    names = [name for name, _ in predictions.draw_predictions(collect(9, 1001), contract(classes))]

    assert "confusion_matrix" not in names


def test_no_mistakes_are_a_picture_too():
    collected = Predictions()
    collected.add(torch.zeros(3, 3, 8, 8), torch.eye(3), torch.arange(3))

    for _, draw in predictions.draw_predictions(collected, contract(["a", "b", "c"])):
        assert figures.rasterize(draw).float().std() > 1


def test_images_are_shown_as_they_were_before_the_network():
    stored = torch.rand(2, 3, 8, 8)
    described = contract(["a", "b"])

    shown = predictions.denormalize((stored - 0.5) / 0.25, described)

    torch.testing.assert_close(shown, stored)


@pytest.mark.parametrize(("size", "shown"), [((8, 8), (8, 8)), ((512, 256), (96, 48))])
def test_large_images_are_averaged_and_small_ones_kept(size, shown):
    assert predictions.shrink(torch.rand(2, 3, *size)).shape[2:] == shown


@pytest.mark.parametrize(
    ("target", "caption"),
    [
        (torch.tensor(1), "b"),
        (torch.tensor([0.25, 0.0, 0.75]), "c 0.75\na 0.25"),
        (torch.tensor([0.0, 1.0, 0.0]), "b"),
    ],
)
def test_labels_and_mixtures_have_captions(target, caption):
    assert predictions._caption(target, ["a", "b", "c"]) == caption


def test_a_batch_of_mixtures_is_drawn():
    draw = predictions.draw_batch(torch.randn(20, 1, 8, 8), torch.rand(20, 7), contract(HOSTILE, 1))

    assert figures.rasterize(draw).float().std() > 5


def test_equal_short_names_are_told_apart():
    assert predictions._short(["a", "犬" * 60, "犬" * 60]) == [
        "a",
        f"1: {'犬' * 11}…",
        f"2: {'犬' * 11}…",
    ]
