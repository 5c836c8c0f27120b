import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import v2

from repvgg.data.augment import by_batch, by_image, crop_and_flip

IMAGES = torch.randint(
    256, (6, 3, 8, 10), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
)
CHAINS = [
    [],
    [v2.TrivialAugmentWide()],
    [v2.RandAugment(), v2.RandomErasing(p=0.5, value=[124, 116, 104])],
]


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_each_image_is_a_crop_of_its_reflected_padding():
    augmented = crop_and_flip(IMAGES.repeat(8, 1, 1, 1), generator(), padding=2)

    padded = F.pad(IMAGES.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    places = set()
    for i, image in enumerate(augmented):
        found = [
            (y, x, flipped)
            for y in range(5)
            for x in range(5)
            for flipped in (False, True)
            if torch.equal(
                image.flip(-1) if flipped else image, padded[i % 6, :, y:, x:][:, :8, :10]
            )
        ]
        assert len(found) == 1
        places |= set(found)
    assert len(places) > 20
    assert {flipped for *_, flipped in places} == {False, True}


def test_padding_zero_only_flips():
    augmented = crop_and_flip(IMAGES, generator(), padding=0)

    for image, given in zip(augmented, IMAGES, strict=True):
        assert torch.equal(image, given) or torch.equal(image, given.flip(-1))


@pytest.mark.parametrize("chain", CHAINS, ids=len)
def test_augmentation_depends_on_the_generator_and_not_on_the_global_one(chain):
    augment = by_batch(chain, padding=1, size=32)
    torch.manual_seed(1)
    state = torch.get_rng_state()

    first, again, other = (augment(IMAGES, generator(seed)) for seed in (5, 5, 6))

    assert (first.shape, first.dtype) == (IMAGES.shape, torch.uint8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_building_an_augmentation_draws_no_random_number():
    torch.manual_seed(1)
    state = torch.get_rng_state()

    by_batch([v2.RandAugment()], padding=1, size=32)
    by_image([v2.RandAugment()], size=(24, 24), interpolation="bilinear")

    assert torch.equal(torch.get_rng_state(), state)


def test_transforms_run_image_by_image():
    black = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    erasing = v2.RandomErasing(p=0.5, value=[124, 116, 104])

    augmented = by_batch([erasing], padding=0, size=32)(black, generator())

    erased = [image for image in augmented if image.any()]
    assert 8 < len(erased) < 32
    for image in erased:
        assert set(image.flatten(1).T.unique(dim=0).flatten().tolist()) == {0, 124, 116, 104}


@pytest.mark.parametrize("chain", CHAINS, ids=len)
def test_a_file_is_augmented_to_the_given_size(chain):
    image = Image.new("RGB", (50, 40), "red")

    augmented = by_image(chain, size=(24, 20), interpolation="bilinear")(image)

    assert (augmented.shape, augmented.dtype) == ((3, 24, 20), torch.uint8)


@pytest.mark.parametrize("chain", [CHAINS[0], CHAINS[1], [v2.AutoAugment(), v2.RandomErasing()]])
def test_greyscale_images_are_augmented(chain):
    batch = by_batch(chain, padding=1, size=(8, 10), channels=1)(IMAGES[:, :1], generator())
    image = by_image(chain, size=(24, 20), interpolation="bilinear", channels=1)(
        Image.new("L", (50, 40), 9)
    )

    assert (batch.shape, batch.dtype) == ((6, 1, 8, 10), torch.uint8)
    assert (image.shape, image.dtype) == ((1, 24, 20), torch.uint8)


def test_a_transform_of_colours_alone_is_an_error_for_greyscale():
    with pytest.raises(ValueError, match="RandomErasing cannot transform a greyscale image"):
        by_batch([v2.RandomErasing(p=1, value=[1, 2, 3])], padding=1, size=32, channels=1)


def test_without_flips_images_are_only_cropped():
    kept = by_batch([], padding=0, size=(8, 10), flip=False)(IMAGES, generator())

    assert torch.equal(kept, IMAGES)


def test_none_does_not_augment():
    assert by_batch(None, padding=4, size=32) is None
    assert by_image(None, size=(8, 8), interpolation="bilinear") is None


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ("trivialaugment", "augment='trivialaugment': must be a list of transforms of torchvision"),
        (v2.RandAugment(), "augment=RandAugment.*: must be a list of transforms"),
        ([torch.nn.Identity()], "augment=Identity.*: must be a list of transforms"),
        ([v2.MixUp(num_classes=3)], "augment: MixUp cannot transform an image"),
        ([v2.CenterCrop(4)], r"augment: CenterCrop must return uint8 of shape \(3, 32, 32\)"),
    ],
)
@pytest.mark.parametrize(
    "build",
    [
        lambda transforms: by_batch(transforms, padding=4, size=32),
        lambda transforms: by_image(transforms, size=(32, 32), interpolation="bilinear"),
    ],
    ids=["batch", "image"],
)
def test_a_wrong_transform_is_an_error_before_training(build, transforms, message):
    with pytest.raises(ValueError, match=message):
        build(transforms)


def test_a_transform_of_another_type_is_an_error_before_training():
    with pytest.raises(ValueError, match=r"ToDtype must return uint8 .* returned float32"):
        by_batch([v2.ToDtype(torch.float32)], padding=4, size=32)
