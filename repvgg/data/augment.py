"""How training images are varied: torchvision's transforms, and the cheap ones by the batch.

Images in memory are varied a batch at a time, with noise of its own for each image (a random
transform of torchvision draws once for a whole batch). Images in files are varied one by one, by
the processes that decode them.
"""

import functools
import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from repvgg.checks import check_number, refusal
from repvgg.data.batches import Augmentation
from repvgg.data.files import Transform
from repvgg.data.images import to_tensor

POLICIES = ("none", "basic", "autoaugment", "randaugment", "trivialaugment")
GREY = [124, 116, 104]  # ImageNet's mean; what is erased is close to 0 in the network


def random_affine(images: Tensor, generator: torch.Generator, *, strength: float) -> Tensor:
    """Rotate, scale and shift each image by its own small amount; what comes in is black.

    Uniform in +-15 degrees, +-10 % and +-half a pixel of 8, all times `strength`. Bilinear.

    Args:
        images: (N, C, H, W), uint8. The result has the same shape and type.
    """
    noise = (torch.rand(4, len(images), generator=generator) * 2 - 1) * strength
    angle, scale, x, y = noise.to(images.device)
    angle, scale = angle * math.radians(15), 1 + scale * 0.1
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cos, -sin, x / 8], dim=1), torch.stack([sin, cos, y / 8], dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False).round().to(torch.uint8)


def crop_and_flip(images: Tensor, generator: torch.Generator, *, padding: int) -> Tensor:
    """Shift each image by up to `padding` pixels, each way, and mirror every second one.

    What comes in is the mirrored border, as in K. Jordan's 94 % on CIFAR-10 (arXiv:2404.00498).

    Args:
        images: (N, C, H, W), uint8. The result has the same shape and type.
    """
    count, channels, height, width = images.shape
    shifts = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    flips = torch.rand(count, 1, generator=generator) < 0.5
    rows = torch.arange(height) + shifts[0]  # (N, H), of the padded image
    columns = torch.arange(width)
    columns = torch.where(flips, columns.flip(0), columns) + shifts[1]  # (N, W)
    source = _mirror(rows, height, padding)[:, :, None] * width
    source = source + _mirror(columns, width, padding)[:, None, :]  # (N, H, W)
    index = source.reshape(count, 1, -1).expand(-1, channels, -1).to(images.device)
    return images.flatten(2).gather(2, index).reshape(images.shape)


def by_batch(policy: str, *, padding: int, erase: float, size: int) -> Augmentation | None:
    """How images in memory are varied: shifted and mirrored, then by the policy, then erased.

    Args:
        policy: one of `POLICIES`. Those behind "basic" run image by image, and take their time.
        padding: largest shift in pixels.
        erase: probability with which a rectangle of an image is erased (Zhong et al., 2020,
            arXiv:1708.04896).
        size: of the images in pixels, for AutoAugment's choice of a policy.

    Raises:
        ValueError: a value is outside its range; the message names the key.
    """
    check_policy(policy, erase)
    if policy == "none":
        return None
    rest = [*_policy(policy, size), *_erasing(erase)]

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        images = crop_and_flip(images, generator, padding=padding)
        if not rest:
            return images
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(generator.initial_seed())
            return torch.stack([_run(rest, image) for image in images])

    return augment


def by_image(
    policy: str, *, size: tuple[int, int], interpolation: str, erase: float
) -> Transform | None:
    """How images in files are varied: a random part scaled to `size`, mirrored, policy, erased.

    The part has 8 to 100 % of the area and sides of 3:4 to 4:3 (Szegedy et al., 2015).

    Args:
        policy: one of `POLICIES`; "none" evaluates them.
        size: height and width in pixels.
        interpolation: "bilinear" or "bicubic".
        erase: as in `by_batch`.

    Raises:
        ValueError: a value is outside its range; the message names the key.
    """
    check_policy(policy, erase)
    if policy == "none":
        return None
    mode = v2.InterpolationMode(interpolation)
    chain = [
        v2.RandomResizedCrop(size, interpolation=mode, antialias=True),
        v2.RandomHorizontalFlip(),
        *_policy(policy, max(size)),
    ]
    return functools.partial(_vary, chain, _erasing(erase))


def check_policy(policy: str, erase: float) -> None:
    if policy not in POLICIES:
        raise refusal("data.augment", policy, f"must be one of {', '.join(POLICIES)}", "basic")
    check_number("data.erase", erase, below=1 + 1e-9, example=0.25)
    if erase > 0 and policy == "none":
        raise refusal("data.erase", erase, "has no effect with data.augment=none", 0)


def _vary(chain: list[v2.Transform], erasing: list[v2.Transform], image: Image.Image) -> Tensor:
    return _run(erasing, to_tensor(_run(chain, image)))


def _run(chain: list[v2.Transform], image: Any) -> Any:
    for transform in chain:
        image = transform(image)
    return image


def _policy(policy: str, size: int) -> list[v2.Transform]:
    kind = v2.AutoAugmentPolicy.CIFAR10 if size <= 64 else v2.AutoAugmentPolicy.IMAGENET
    return {
        "basic": [],
        "autoaugment": [v2.AutoAugment(kind)],
        "randaugment": [v2.RandAugment()],
        "trivialaugment": [v2.TrivialAugmentWide()],
    }[policy]


def _erasing(probability: float) -> list[v2.Transform]:
    return [v2.RandomErasing(p=probability, value=GREY)] if probability > 0 else []


def _mirror(positions: Tensor, length: int, padding: int) -> Tensor:
    """Positions in an image padded by reflection -> positions in the image."""
    inside = (positions - padding).abs()
    return torch.where(inside >= length, 2 * (length - 1) - inside, inside)
