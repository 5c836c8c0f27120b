from pathlib import Path

import pytest
import torch

from repvgg.data.augment import random_affine
from repvgg.data.batches import Batches, Stored
from repvgg.data.folders import imagefolder
from repvgg.data.sets import digits
from tests.support.commands import make, run

ROOT = Path(__file__).parents[2]


def batches(**options) -> Batches:
    images = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1)
    source = Stored(images, torch.arange(10))
    return Batches(source, **{"batch_size": 3, "shuffle_seed": 1, **options})


def read(loader: Batches, epoch: int = 0) -> list[list[int]]:
    loader.set_epoch(epoch)
    return [labels.tolist() for _, labels in loader]


def flat(read_batches: list[list[int]]) -> list[int]:
    return [label for batch in read_batches for label in batch]


def test_digits_are_the_1797_images_in_three_disjoint_parts():
    data = digits()
    sizes = [len(part[1]) for part in (data.train, data.val, data.test)]

    assert sizes == [1283, 257, 257]


@pytest.mark.slow
def test_the_embedded_file_is_what_the_script_builds(tmp_path):
    made = tmp_path / "digits.safetensors"

    run("scripts/make_digits.py", str(made), cwd=tmp_path)

    assert made.read_bytes() == (ROOT / "repvgg" / "data" / "digits.safetensors").read_bytes()


def test_a_folder_of_images_needs_no_more_than_its_place(tmp_path):
    assert (
        imagefolder(root=str(make(tmp_path / "photos", count=40)), num_workers=0).batch_size == 64
    )


def test_every_part_holds_every_digit_about_equally():
    data = digits()

    for _, labels in (data.train, data.val, data.test):
        share = labels.bincount(minlength=10) / len(labels)
        assert (share - 0.1).abs().max() < 0.03


def test_prepared_training_images_have_mean_0_and_deviation_1():
    data = digits()

    images, _ = data.on_after_batch_transfer(data.train, 0)

    torch.testing.assert_close(images.mean().item(), 0.0, rtol=0, atol=1e-5)
    torch.testing.assert_close(images.std().item(), 1.0, rtol=0, atol=1e-5)


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch():
    first = read(batches(batch_size=5))

    assert sorted(flat(first)) == list(range(10))
    assert read(batches(batch_size=5)) == first
    assert read(batches(batch_size=5), epoch=1) != first
    assert read(batches(batch_size=5, shuffle_seed=2)) != first


def test_training_drops_the_small_batch_and_evaluation_keeps_it():
    assert [len(batch) for batch in read(batches())] == [3, 3, 3]
    assert read(batches(shuffle_seed=None)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert (len(batches()), len(batches(shuffle_seed=None))) == (3, 4)


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_restored_loader_continues_where_the_other_stopped(stop):
    whole = read(batches(), epoch=4)
    interrupted = batches()
    interrupted.set_epoch(4)
    reader = iter(interrupted)
    for _ in range(stop):
        next(reader)

    restored = batches()
    restored.load_state_dict(interrupted.state_dict())

    assert read(restored, epoch=4) == whole[stop:]
    assert read(restored, epoch=5) == read(batches(), epoch=5)


def test_a_loader_restored_at_the_end_of_an_epoch_gives_the_next_one_whole():
    finished = batches()
    read(finished, epoch=4)
    restored = batches()
    restored.load_state_dict(finished.state_dict())

    assert read(restored, epoch=5) == read(batches(), epoch=5)


def test_augmentation_is_a_function_of_seed_epoch_and_batch():
    images = torch.randint(0, 256, (10, 1, 8, 8), dtype=torch.uint8)

    def first(epoch, position=0):
        loader = Batches(
            Stored(images, torch.arange(10)),
            batch_size=2,
            shuffle_seed=1,
            augment=lambda batch, generator: torch.rand(2, generator=generator),
        )
        loader.set_epoch(epoch)
        return list(loader)[position][0].tolist()

    assert first(0) == first(0)
    assert first(0) != first(1)
    assert first(0) != first(0, position=1)


def test_augmentation_of_strength_zero_changes_nothing():
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)

    assert torch.equal(random_affine(images, torch.Generator(), strength=0.0), images)


def test_augmentation_moves_each_image_of_a_batch_differently():
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    image[..., 2:6, 3:5] = 255
    moved = random_affine(image.repeat(6, 1, 1, 1), torch.Generator(), strength=1.0)

    assert len({tuple(one.flatten().tolist()) for one in moved}) == 6
    assert moved.dtype == torch.uint8


def mixed(**options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two epochs of training batches, of random pixels in place of the digits' black borders."""
    data = digits(**{"batch_size": 400, "seed": 3, **options})
    generator = torch.Generator().manual_seed(8)
    pixels = torch.randint(0, 256, data.train[0].shape, generator=generator, dtype=torch.uint8)
    data.train = Stored(pixels, data.train.labels)
    loader = data.train_dataloader()
    batches = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        batches += list(loader)
    return batches


def shares(targets: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The share of each image's own label, where the other differs: the same in all rows."""
    differs = labels != labels.roll(1)
    return targets[torch.arange(len(labels)), labels][differs]


def test_mixup_blends_images_and_labels_in_the_same_share():
    for (images, targets), (pure, labels) in zip(
        mixed(mixup=0.4, augment=0), mixed(augment=0), strict=True
    ):
        share = shares(targets, labels)[0]
        hot = torch.nn.functional.one_hot(labels, 10).float()
        torch.testing.assert_close(targets, share * hot + (1 - share) * hot.roll(1, 0))
        pixels = share * pure.float() + (1 - share) * pure.float().roll(1, 0)
        torch.testing.assert_close(images, pixels, rtol=1e-4, atol=1e-2)


def test_cutmix_pastes_the_area_that_the_labels_say():
    areas = []
    for (images, targets), (pure, labels) in zip(
        mixed(cutmix=1.0, augment=0), mixed(augment=0), strict=True
    ):
        other = pure.float().roll(1, 0)
        pasted = (images != pure.float()).any(0).squeeze(0)  # (H, W): the rectangle
        assert torch.equal(torch.where(pasted, other, pure.float()), images)
        torch.testing.assert_close(shares(targets, labels)[0], 1 - pasted.float().mean())
        areas.append(pasted.float().mean().item())

    assert max(areas) > 0.1


def test_with_both_on_each_batch_takes_one_of_the_two():
    kinds = set()
    for (images, _), (pure, _) in zip(mixed(mixup=0.4, cutmix=1), mixed(), strict=True):
        kinds.add(bool(torch.equal(images, images.round())))  # pasted pixels stay whole numbers
        assert not torch.equal(images, pure.float())

    assert kinds == {True, False}


def test_mixing_depends_on_seed_epoch_and_batch_and_not_on_the_global_generator():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = mixed(mixup=0.4, cutmix=1.0)

    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = mixed(mixup=0.4, cutmix=1.0), mixed(mixup=0.4, cutmix=1.0, seed=4)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a[1], b[1]) for a, b in zip(first, other, strict=True))
    assert len({tuple(targets[0].tolist()) for _, targets in first}) > 1


def test_evaluation_is_not_mixed():
    data = digits(mixup=1.0)

    images, labels = next(iter(data.val_dataloader()))

    assert (images.shape, images.dtype, labels.shape) == ((64, 1, 8, 8), torch.uint8, (64,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: must be an integer of at least 1"),
        ({"batch_size": "many"}, "batch_size='many'"),
        ({"batch_size": 5000}, "batch_size=5000: exceeds the 1283 training images"),
        ({"augment": -1}, "augment=-1: must be a number of at least 0"),
        ({"seed": -1}, "seed=-1"),
        ({"mixup": -0.1}, "mixup=-0.1: must be a number of at least 0"),
        ({"cutmix": "yes"}, "cutmix='yes'"),
    ],
)
def test_a_bad_value_is_an_error_that_names_its_argument(options, message):
    with pytest.raises(ValueError, match=message):
        digits(**options)
