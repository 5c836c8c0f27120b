import functools

import pytest
import torch

from repvgg.data.augment import crop_and_flip
from repvgg.data.batches import Batches, Stored

SOURCE = Stored(torch.arange(24, dtype=torch.uint8).reshape(24, 1, 1, 1), torch.arange(24))


def randomized(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(256, images.shape, generator=generator, dtype=torch.uint8)


def epoch(**options) -> list[tuple[list[int], list[int]]]:
    """Labels and pixels of every batch of epoch 3."""
    loader = Batches(
        SOURCE, **{"batch_size": 4, "shuffle_seed": 1, "augment": randomized, **options}
    )
    loader.set_epoch(3)
    read = [(labels.tolist(), images.flatten().tolist()) for images, labels in loader]
    assert len(read) == len(loader)
    return read


@pytest.mark.parametrize("devices", [2, 3])
def test_devices_in_turn_take_the_batches_and_augmentation_of_one_device(devices):
    parts = [epoch(rank=rank, world_size=devices) for rank in range(devices)]

    assert [batch for turn in zip(*parts, strict=True) for batch in turn] == epoch()


def test_devices_have_as_many_batches_each_and_drop_what_is_left():
    parts = [epoch(rank=rank, world_size=4, batch_size=5) for rank in range(4)]

    assert [len(part) for part in parts] == [1, 1, 1, 1]


def test_devices_together_evaluate_every_image_once():
    parts = [epoch(rank=rank, world_size=5, shuffle_seed=None) for rank in range(5)]

    assert sorted(label for part in parts for labels, _ in part for label in labels) == list(
        range(24)
    )
    assert {len(part) for part in parts} <= {1, 2}


def test_the_same_epoch_is_given_again_and_can_be_resumed():
    def loader(epoch: int, **options) -> Batches:
        made = Batches(SOURCE, batch_size=4, shuffle_seed=1, augment=randomized, **options)
        made.set_epoch(epoch)
        return made

    first = [images for images, _ in loader(0)]
    stopped = loader(3, same_epoch=True)
    reader = iter(stopped)
    begun = [next(reader)[0], next(reader)[0]]
    resumed = loader(3, same_epoch=True)
    resumed.load_state_dict(stopped.state_dict())

    assert all(map(torch.equal, [*begun, *(images for images, _ in resumed)], first))
    resumed.sampler.set_epoch(4)
    assert all(map(torch.equal, [images for images, _ in resumed], first))


def test_images_are_augmented_on_their_device():
    there = Stored(*(tensor.to("meta") for tensor in SOURCE))
    augment = functools.partial(crop_and_flip, padding=0)

    (images, labels), *_ = Batches(there, batch_size=4, shuffle_seed=1, augment=augment)

    assert (images.device.type, labels.device.type) == ("meta", "meta")
    assert (images.shape, images.dtype) == ((4, 1, 1, 1), torch.uint8)


def test_a_batch_is_returned_on_the_given_device():
    (images, labels), *_ = Batches(SOURCE, batch_size=4, device=torch.device("meta"))

    assert (images.device.type, labels.device.type) == ("meta", "meta")
