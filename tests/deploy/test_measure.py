import pytest
import torch

from repvgg.deploy.measure import is_noisy, measure_latency
from repvgg.deploy.report import Quartiles


def test_every_predictor_is_timed_the_same_number_of_rounds():
    calls = {"a": 0, "b": 0}

    def predictor(name):
        def predict(images):
            calls[name] += 1
            return images

        return predict

    measured = measure_latency(
        {name: predictor(name) for name in calls}, torch.zeros(1, 1, 2, 2), seconds=0.01
    )

    assert calls["a"] == calls["b"] == 2 * (measured["a"].rounds + 3)
    assert measured["b"].rounds == measured["a"].rounds >= 10
    assert 0 < measured["a"].lower <= measured["a"].median <= measured["a"].upper


def test_predictors_get_contiguous_images():
    seen = []
    images = torch.zeros(1, 4, 4, 3).permute(0, 3, 1, 2)

    measure_latency({"a": lambda x: seen.append(x.is_contiguous())}, images, seconds=0.0)

    assert all(seen)


@pytest.mark.parametrize(
    ("second", "noisy"),
    [
        ((10.5, 9.0, 12.0), False),
        ((11.5, 11.0, 12.0), True),  # the median
        ((10.0, 9.0, 14.5), True),  # the quartiles
    ],
)
def test_a_control_shows_whether_the_machine_was_busy(second, noisy):
    first = Quartiles(10.0, 9.5, 10.5, rounds=10)

    assert is_noisy(first, Quartiles(*second, rounds=10)) == noisy
    assert is_noisy(Quartiles(*second, rounds=10), first) == noisy
