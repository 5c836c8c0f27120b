import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from repvgg.data.augment import POLICIES, by_batch, by_image, crop_and_flip

IMAGES = torch.randint(
    256, (6, 3, 8, 10), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
)


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_each_image_is_a_part_of_its_mirrored_padding():
    varied = crop_and_flip(IMAGES.repeat(8, 1, 1, 1), generator(), padding=2)

    padded = F.pad(IMAGES.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    places = set()
    for i, image in enumerate(varied):
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


def test_padding_zero_only_mirrors():
    varied = crop_and_flip(IMAGES, generator(), padding=0)

    for image, given in zip(varied, IMAGES, strict=True):
        assert torch.equal(image, given) or torch.equal(image, given.flip(-1))


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_a_policy_is_a_function_of_the_generator_and_leaves_the_global_noise_alone(policy):
    vary = by_batch(policy, padding=1, erase=0.5, size=32)
    torch.manual_seed(1)
    state = torch.get_rng_state()

    first, again, other = (vary(IMAGES, generator(seed)) for seed in (5, 5, 6))

    assert (first.shape, first.dtype) == (IMAGES.shape, torch.uint8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_erasing_paints_a_rectangle_in_the_mean_of_imagenet():
    black = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)

    varied = by_batch("basic", padding=0, erase=0.5, size=32)(black, generator())

    erased = [image for image in varied if image.any()]
    assert 8 < len(erased) < 32
    for image in erased:
        assert set(image.flatten(1).T.unique(dim=0).flatten().tolist()) == {0, 124, 116, 104}


def test_a_file_is_varied_to_the_wanted_size():
    image = Image.new("RGB", (50, 40), "red")

    for policy in POLICIES[1:]:
        varied = by_image(policy, size=(24, 24), interpolation="bilinear", erase=0.25)(image)
        assert (varied.shape, varied.dtype) == ((3, 24, 24), torch.uint8)


def test_no_policy_evaluates():
    assert by_batch("none", padding=4, erase=0.0, size=32) is None
    assert by_image("none", size=(8, 8), interpolation="bilinear", erase=0.0) is None


@pytest.mark.parametrize(
    ("policy", "erase", "message"),
    [
        ("auto", 0.0, "data.augment='auto': must be one of none, basic"),
        ("basic", 1.5, "data.erase=1.5"),
        ("none", 0.5, "data.erase=0.5: has no effect with data.augment=none"),
    ],
)
def test_a_bad_value_is_refused_with_its_key(policy, erase, message):
    with pytest.raises(ValueError, match=message):
        by_batch(policy, padding=4, erase=erase, size=32)
