"""Data in the format of MNIST, which torchvision reads without a download."""

import struct
from pathlib import Path

import numpy as np

NOISE = np.random.default_rng(0)
PIXELS = {
    part: NOISE.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    for part, count in (("train", 40), ("t10k", 20))
}


def write_mnist(folder: Path, name: str) -> Path:
    """Write 40 training and 20 test images; image i has class i mod 10."""
    for part, images in PIXELS.items():
        raw = folder / name / "raw"
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(len(images)) % 10)
    return folder


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write a magic number with the axes, their lengths, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())
