"""Batches for `reestimate_bn`, and the errors for others."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.ops import FrozenBatchNorm2d

import repvgg

IMAGES = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    )


def statistics(batches):
    model = network()
    repvgg.reestimate_bn(model, batches)
    return torch.cat([model[i].running_mean for i in (1, 3)] + [model[1].running_var])


@pytest.mark.parametrize(
    "batches",
    [
        lambda: DataLoader(TensorDataset(IMAGES, LABELS), 4),
        lambda: DataLoader(TensorDataset(IMAGES), 4),
        lambda: [(part, None, "path") for part in IMAGES.split(4)],
        lambda: ([part] for part in IMAGES.split(4)),
    ],
    ids=["images and labels", "images", "tuples", "generator of lists"],
)
def test_the_first_item_of_a_batch_is_taken(batches):
    assert torch.equal(statistics(batches()), statistics(IMAGES.split(4)))


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        (IMAGES, r"a tensor of shape \(12, 3, 16, 16\): pass a list of batches"),
        ([{"image": IMAGES}], "batch 0 is a dict: pass tensors"),
        ([IMAGES, ("a", IMAGES)], "batch 1 is a tuple of str: pass tensors"),
        ([[]], "batch 0 is a list"),
        ([IMAGES.numpy()], "batch 0 is a ndarray"),
        ([(255 * IMAGES).byte()], r"torch.uint8 and the network torch.float32: scale"),
        ([IMAGES.double()], r"torch.float64 and the network torch.float32: call .to\("),
        ([IMAGES.bfloat16()], "torch.bfloat16 and the network torch.float32"),
        ([IMAGES[:, :2]], r"cannot run on batch 0 of shape \(12, 2, 16, 16\)"),
        ([IMAGES[:1, :, :5, :5]], "larger batch"),
        ([], "batches is empty"),
    ],
)
def test_other_batches_are_rejected_and_nothing_changes(batches, said):
    model = network().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=said):
        repvgg.reestimate_bn(model, batches)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_a_network_of_frozen_statistics_is_an_error():
    with pytest.raises(ValueError, match=r"no BatchNorm whose .* FrozenBatchNorm2d"):
        repvgg.reestimate_bn(nn.Sequential(FrozenBatchNorm2d(3)), [IMAGES])


def test_a_network_without_normalization_is_left_as_it_is():
    repvgg.reestimate_bn(nn.Conv2d(3, 4, 3), [IMAGES])


def test_untrained_auxiliary_heads_warn_once(recwarn):
    sizes = {"depths": (1, 1, 2, 1), "widths": (4, 4, 4, 4), "num_classes": 3}
    model = repvgg.create_model("repvgg_a0", **sizes, auxiliary_heads=True)
    images = torch.rand(2, 3, 64, 64)
    model.forward_auxiliary(images)
    model.eval()(images)
    model.train()
    with torch.no_grad():
        model(images)
    assert not recwarn
    with pytest.warns(UserWarning, match="forward_auxiliary"):
        model(images)
    model(images)
    assert len(recwarn) == 0
