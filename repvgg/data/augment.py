"""Random changes of training images: crops and flips, then any transforms of torchvision.

Images in memory are cropped and flipped as a batch, each image differently. The transforms of
torchvision draw once for a whole batch, so they run image by image. Images in files are augmented
one by one, by the processes that decode them.
"""

import functools
import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from repvgg.checks import ArgumentError, wrong_value
from repvgg.data.batches import Augmentation
from repvgg.data.files import Transform
from repvgg.data.images import MODES, to_tensor


def random_affine(images: Tensor, generator: torch.Generator, *, strength: float) -> Tensor:
    """Rotate, scale and shift each image by a small random amount; the border is black.

    Uniform in +-15 degrees, +-10 % and +-half a pixel of 8, all times `strength`. Bilinear.

    Args:
        images: (N, C, H, W), uint8. The result has the same shape and type.
    """
    amounts = (torch.rand(4, len(images), generator=generator) * 2 - 1) * strength
    angle, scale, x, y = amounts.to(images.device)
    angle, scale = angle * math.radians(15), 1 + scale * 0.1
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cos, -sin, x / 8], dim=1), torch.stack([sin, cos, y / 8], dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False).round().to(torch.uint8)


def crop_and_flip(
    images: Tensor, generator: torch.Generator, *, padding: int, flip: bool = True
) -> Tensor:
    """Pad by reflection, crop at random, and flip about half of the images.

    As in K. Jordan's 94 % on CIFAR-10 (arXiv:2404.00498).

    Args:
        images: (N, C, H, W), uint8. The result has the same shape and type.
        padding: largest shift of the crop, in pixels.
        flip: False only crops, as for digits and letters.
    """
    count, channels, height, width = images.shape
    shifts = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    flips = torch.rand(count, 1, generator=generator) < 0.5
    rows = torch.arange(height) + shifts[0]  # (N, H), of the padded image
    columns = torch.arange(width)
    columns = torch.where(flips & flip, columns.flip(0), columns) + shifts[1]  # (N, W)
    source = _reflect(rows, height, padding)[:, :, None] * width
    source = source + _reflect(columns, width, padding)[:, None, :]  # (N, H, W)
    index = source.reshape(count, 1, -1).expand(-1, channels, -1).to(images.device)
    return images.flatten(2).gather(2, index).reshape(images.shape)


def by_batch(
    transforms: Sequence[v2.Transform] | None,
    *,
    padding: int,
    size: int | tuple[int, int],
    channels: int = 3,
    flip: bool = True,
) -> Augmentation | None:
    """Augment images in memory: `crop_and_flip`, then the transforms, image by image.

    Args:
        transforms: take a uint8 tensor (C, H, W) and return one of the same shape; an empty
            sequence only crops and flips, None does not augment.
        padding: largest shift of the crop, in pixels.
        size: height and width of the images, in pixels.
        channels: of the images.
        flip: False does not flip.

    Raises:
        ValueError: `transforms` holds something else, or a transform fails on an image.
    """
    chain = _check_transforms(transforms)
    if chain is None:
        return None
    if not chain:
        return functools.partial(crop_and_flip, padding=padding, flip=flip)
    height, width = (size, size) if isinstance(size, int) else size
    _try(chain, torch.zeros(channels, height, width, dtype=torch.uint8))

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        images = crop_and_flip(images, generator, padding=padding, flip=flip)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(generator.initial_seed())
            return torch.stack([_apply(chain, image) for image in images])

    return augment


def by_image(
    transforms: Sequence[v2.Transform] | None,
    *,
    size: tuple[int, int],
    interpolation: str,
    channels: int = 3,
    flip: bool = True,
) -> Transform | None:
    """Augment images in files: a random resized crop, a flip, then the transforms.

    The crop has 8 to 100 % of the area and an aspect ratio of 3:4 to 4:3 (Szegedy et al., 2015).

    Args:
        transforms: take an image of Pillow; an empty sequence only crops and flips, None does not
            augment.
        size: height and width in pixels.
        interpolation: "bilinear" or "bicubic".
        channels: 3, or 1 for greyscale.
        flip: False does not flip.

    Raises:
        ValueError: `transforms` holds something else, or a transform fails on an image.
    """
    chain = _check_transforms(transforms)
    if chain is None:
        return None
    height, width = size
    if chain:
        _try(chain, Image.new(MODES[channels], (width, height)))
    mode = v2.InterpolationMode(interpolation)
    crop = v2.RandomResizedCrop(size, interpolation=mode, antialias=True)
    flips = [v2.RandomHorizontalFlip()] if flip else []
    return functools.partial(_apply, [crop, *flips, *chain])


def _check_transforms(transforms: Sequence[v2.Transform] | None) -> list[v2.Transform] | None:
    if transforms is None:
        return None
    allowed = "must be a list of transforms of torchvision.transforms.v2, or None"
    if isinstance(transforms, str) or not isinstance(transforms, Sequence):
        raise wrong_value("augment", transforms, allowed)
    for transform in transforms:
        if not isinstance(transform, v2.Transform):
            raise wrong_value("augment", transform, allowed)
    return list(transforms)


def _try(chain: list[v2.Transform], image: Image.Image | Tensor) -> None:
    """Run the transforms once, so that a wrong one is an error before training.

    Raises:
        ValueError: one fails, or the result is not an image of the same shape.
    """
    names = ", ".join(type(transform).__name__ for transform in chain)
    given = image if isinstance(image, Tensor) else to_tensor(image)
    try:
        with torch.random.fork_rng(devices=[]):
            result = _apply(chain, image)
    except Exception as error:  # any, of any transform
        kind = "a greyscale image" if len(given) == 1 else "an image"
        message = f"augment: {names} cannot transform {kind}: {error}"
        raise ArgumentError(message, "augment") from error
    if result.dtype != torch.uint8 or result.shape != given.shape:
        raise ArgumentError(
            f"augment: {names} must return uint8 of shape {tuple(given.shape)}, returned "
            f"{str(result.dtype).removeprefix('torch.')} of shape {tuple(result.shape)}",
            "augment",
        )


def _apply(chain: list[v2.Transform], image: Image.Image | Tensor) -> Tensor:
    for transform in chain:
        image = transform(image)
    return image if isinstance(image, Tensor) else to_tensor(image)


def _reflect(positions: Tensor, length: int, padding: int) -> Tensor:
    """Positions in an image padded by reflection -> positions in the image."""
    inside = (positions - padding).abs()
    return torch.where(inside >= length, 2 * (length - 1) - inside, inside)
