"""The study of a detector on a RepVGG backbone, on a small job."""

import re

import pytest
import torch

from scripts.studies import detection
from scripts.studies.detection import count_same, draw, evaluate


@pytest.mark.slow
def test_a_detector_learns_and_every_form_gives_its_outputs(run):
    printed = run(
        detection, "model=repvgg_tiny", "seeds=1", "steps=40", "size=64", "batch=4", "images=4"
    )

    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line[:2] == "| "]
    first, last = (float(value) for value in rows[1][1:3])
    assert last < 0.85 * first
    for name, own, exact, folded, onnx in rows[3:-1]:
        assert re.match("map of stages|pyramid|class logits|box regression", name)
        assert float(exact) < 1e-10
        assert max(float(own), float(folded), float(onnx)) < 1e-5
    assert len(rows) == 3 + 8 + 1
    counts = [re.fullmatch(r"(\d+) of (\d+)", cell).groups() for cell in rows[-1][1:]]
    assert all(same == total != "0" for same, total in counts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seeds=0"], "seeds=0: must be an integer of at least 1"),
        (["size=32"], "size=32: must be an integer of at least 64"),
        (["batch=1"], "batch=1: must be an integer of at least 2"),
        (["lr=fast"], "lr='fast': must be a number"),
        (["model=repvgg_a9"], "=repvgg_a9: there is no such model"),
    ],
)
def test_settings_that_cannot_work_are_one_line(run, capfd, arguments, message):
    with pytest.raises(SystemExit):
        run(detection, *arguments)

    assert message in capfd.readouterr().err


def test_scenes_show_what_their_boxes_state():
    images, targets = draw(20, 96, seed=0)

    for image, target in zip(images, targets, strict=True):
        bright = image.amax(0) > 0.31
        for (left, top, right, bottom), label in zip(
            target["boxes"].int().tolist(), target["labels"].tolist(), strict=True
        ):
            inside = bright[top:bottom, left:right]
            assert inside.any(0).all()
            assert inside.any(1).all()
            assert inside.float().mean() == pytest.approx(1.0 if label == 1 else 0.785, abs=0.04)
            bright[top:bottom, left:right] = False
        assert not bright.any()


def test_detections_are_the_same_if_box_score_and_label_are():
    box = torch.tensor([[0.0, 0.0, 9.0, 9.0]])
    one = [{"boxes": box, "scores": torch.tensor([0.9]), "labels": torch.tensor([1])}]

    for change in (
        {"boxes": box + 0.1},
        {"scores": one[0]["scores"] - 0.1},
        {"labels": one[0]["labels"] + 1},
    ):
        assert count_same(one, [{**one[0], **change}]) == (0, 1, 1)
    assert count_same(one, [{**one[0], "boxes": box + 1e-4}]) == (1, 1, 1)
    assert evaluate(one, one) == (1, 1)
    assert evaluate([{**one[0], "scores": torch.tensor([0.1])}], one) == (0, 0)
