"""Image files: opened as a network was trained to see them, refused where nothing says how.

Fitted to a size as everywhere in the field: the shorter side is scaled, then the centre is cut out.
"""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MODES = {1: "L", 3: "RGB"}  # by the number of channels


def open_image(path: Path | BinaryIO, channels: int = 3, *, name: str | None = None) -> Image.Image:
    """Decode a file: greyscale, palette, CMYK and 16 bits become 8 bits of the wanted channels.

    The rotation that a camera noted is applied.

    Args:
        path: of a file that Pillow can read, or the open file.
        channels: 1 or 3.
        name: of the image in messages; None takes the path.

    Raises:
        ValueError: the file is damaged or no image, or nothing says how bright its pixels are.
    """
    name = str(path) if name is None else name
    if channels not in MODES:
        raise ValueError(f"the network takes {channels} channels, image files have 1 or 3")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: cannot be read as an image: {error}") from error
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        pixels = np.asarray(image).astype(np.uint32).clip(0, 65535)
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"{name}: pixels of mode {image.mode} have no known scale; save 8 bits")
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        if alpha.min() < 255:
            raise ValueError(
                f"{name}: it is transparent, on an unknown background; save it without"
            )
    return image.convert(MODES[channels])


def fit(
    image: Image.Image,
    size: tuple[int, int],
    *,
    interpolation: str = "bilinear",
    resize: int | None = None,
) -> Image.Image:
    """Scale an image and cut out its centre.

    Args:
        size: height and width of the result, in pixels.
        interpolation: "bilinear" or another filter of Pillow's.
        resize: length of the scaled image's shorter side; None scales it as little as covers
            `size`.
    """
    height, width = size
    if resize is None:
        scale = max(width / image.width, height / image.height)
    else:
        scale = max(resize, min(height, width)) / min(image.width, image.height)
        scale = max(scale, width / image.width, height / image.height)
    scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling[interpolation.upper()])
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> Tensor:
    """(C, H, W), uint8."""
    pixels = torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1)
    return pixels.permute(2, 0, 1).contiguous()
