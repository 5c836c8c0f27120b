"""Image files: decoded to RGB or greyscale in uint8, and fitted to a size.

An image whose brightness or background is unknown is an error. Fitting is the usual preprocessing:
the shorter side is scaled, then the centre is cropped.
"""

import contextlib
import errno
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, features
from torch import Tensor

MODES = {1: "L", 3: "RGB"}  # by the number of channels
MOST_PIXELS = 178_956_970  # Pillow's limit

# Of the extensions that Pillow registers: no pictures, and pictures that need other software.
NO_PICTURES = {".bufr", ".grib", ".h5", ".hdf", ".iim", ".mpeg", ".mpg", ".palm", ".pdf"}
NEED_MORE = {".emf", ".eps", ".ps", ".wmf"}
FOREIGN = {".dcm", ".exr", ".heic", ".heif", ".hif", ".jxl", ".psb", ".svg", ".svgz", ".xcf"}
FOREIGN |= {".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".nef", ".nrw", ".orf", ".pef"}  # raw
FOREIGN |= {".raf", ".raw", ".rw2", ".sr2", ".srf", ".srw"}
OPTIONAL = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}  # not in every Pillow
SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|BM....\0\0\0\0|RIFF....WEBP|II\*\0|MM\0\*|8BPS"
    rb"|\0\0\0\x0cjP  |....ftyp(avi|hei|hev|mif|msf)",
    re.DOTALL,
)


class TooManyPixels(ValueError):  # noqa: N818 - a kind of ValueError
    """An image is larger than is allowed.

    Attributes:
        pixels: of the image.
    """

    def __init__(self, name: str, pixels: int, limit: int) -> None:
        super().__init__(f"{name}: has {pixels:,} pixels, more than {limit:,}")
        self.pixels = pixels
        self._arguments = name, pixels, limit

    def __reduce__(self) -> tuple[type, tuple[str, int, int]]:
        return type(self), self._arguments  # exceptions are pickled by their message otherwise


def extensions() -> tuple[set[str], set[str]]:
    """Extensions of images that can be read here, and of those that cannot: `.jpg`, `.heic`."""
    known = Image.registered_extensions()  # a plugin may have added to them
    missing = {
        extension
        for extension, kind in known.items()
        if kind in OPTIONAL and not features.check(OPTIONAL[kind])
    }
    readable = set(known) - NO_PICTURES - NEED_MORE - missing
    return readable, (NEED_MORE | FOREIGN | missing) - readable


def looks_like_image(path: Path) -> bool:
    """Whether a file starts with the signature of a common image format."""
    try:
        with path.open("rb") as file:
            return SIGNATURES.match(file.read(16)) is not None
    except OSError:
        return False


@contextlib.contextmanager
def pixel_limit(count: int) -> Iterator[None]:
    """Replace Pillow's limit on the pixels of an image, which holds for the whole process."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = count / 2  # type: ignore[assignment]  # it warns here, fails at twice
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def printable(path: Path | str) -> str:
    """A path with bytes that are not UTF-8 escaped."""
    return str(path).encode(errors="backslashreplace").decode()


def open_image(path: Path | BinaryIO, channels: int = 3, *, name: str | None = None) -> Image.Image:
    """Decode a file to uint8 in 1 or 3 channels, also from palettes, CMYK and uint16.

    The rotation of the EXIF data is applied.

    Args:
        path: of a file that Pillow can read, or the open file.
        channels: 1 or 3.
        name: of the image in messages; None takes the path.

    Raises:
        TooManyPixels: it is larger than Pillow's limit, or that of `pixel_limit`.
        ValueError: the file is damaged or not an image, or the scale of its pixels is unknown.
    """
    name = printable(str(path) if name is None else name)
    if channels not in MODES:
        raise ValueError(f"the network takes {channels} channels, image files have 1 or 3")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except Image.DecompressionBombError as error:
        limit = int(2 * (Image.MAX_IMAGE_PIXELS or 0))
        numbers = re.findall(r"\d+", str(error))
        raise TooManyPixels(name, int(numbers[0]) if numbers else 0, limit) from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # too many open files: not the image's fault
        raise ValueError(f"{name}: cannot be read as an image: {error}") from error
    return to_channels(image, channels, name)


def to_channels(image: Image.Image, channels: int, name: str) -> Image.Image:
    """Convert an image to uint8 in 1 or 3 channels.

    Raises:
        ValueError: the scale of its pixels or its background is unknown.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        pixels = np.asarray(image).astype(np.uint32).clip(0, 65535)
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"{name}: pixels of mode {image.mode} have no known scale; save it as uint8"
        )
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
    """Scale an image and crop its centre.

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
