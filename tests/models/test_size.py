import pytest
import torch
from torch import nn

from repvgg.models import create_model, deployed_form
from repvgg.models.size import Size, count_macs, count_parameters, sizes_of_forms


def test_multiply_accumulates_follow_the_formula():
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)

    assert count_macs(conv, torch.zeros(1, 3, 16, 16)) == 16 * 16 * 8 * 3 * 9


def test_batchnorm_statistics_are_no_parameters():
    assert count_parameters(nn.BatchNorm2d(5)) == 10


@pytest.mark.slow
def test_both_forms_are_counted_as_if_they_ran():
    network = create_model("repvgg_tiny", num_classes=10)
    images = torch.zeros(1, 3, 32, 32)
    forms = network.eval(), deployed_form(network)[0]

    expected = tuple(Size(count_parameters(form), count_macs(form, images)) for form in forms)

    assert sizes_of_forms(network, images.shape[1:]) == expected


@pytest.mark.slow
def test_counting_changes_neither_the_network_nor_the_random_state():
    network = create_model("repvgg_tiny", num_classes=10)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state = torch.get_rng_state()

    sizes_of_forms(network, (3, 32, 32))

    assert network.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


class ReadsValues(nn.Linear):
    def forward(self, images):
        return super().forward(images) if images.sum().item() > 0 else images


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("no")


@pytest.mark.parametrize("kind", [ReadsValues, Uncopyable])
def test_a_network_that_needs_values_is_counted_without_operations(kind):
    trained, folded = sizes_of_forms(kind(4, 2), (4,))

    assert trained == Size(10, None)
    assert folded in (None, trained)
