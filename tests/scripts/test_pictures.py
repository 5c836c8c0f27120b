from functools import partial

import pytest
import torch

from repvgg import figures
from scripts import pictures


@pytest.mark.slow
def test_the_picture_of_a_fold_shows_kernels_that_add_up(folder):
    fold = pictures.measure_fold(folder / "checkpoints" / "best.ckpt")

    assert [*fold.kernels] == ["3x3", "1x1", "identity"]
    assert fold.kernels["3x3"].ne(0).all()
    for name in ("1x1", "identity"):
        assert fold.kernels[name].ne(0).nonzero().tolist() == [[1, 1]]
    cents = [kernel.mul(100).round() for kernel in fold.kernels.values()]
    assert torch.equal(sum(cents), sum(fold.kernels.values()).mul(100).round())
    assert 0 < fold.error64 < 1e-12 < fold.error32 < 1e-5
    pixels = figures.rasterize(partial(pictures.draw_fold, fold=fold))
    assert 0.02 < (pixels != 255).any(2).float().mean() < 0.5


def test_the_bars_of_the_readme_are_the_recorded_times(monkeypatch):
    drawn = {}
    monkeypatch.setattr(pictures.figures, "bars", lambda _, values, **__: drawn.update(values))

    pictures.draw_latency(figures.LIGHT)

    assert [*drawn] == [*pictures.SHOWN.values()]
    assert drawn["torch, folded"] < drawn["torch, multi-branch"]
