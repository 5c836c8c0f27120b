"""Keeps the memory that one training step frees for the next, on CPUs."""

import ctypes
import sys

# Options of malloc.h. By default glibc maps every large block, such as a feature map, and returns
# it to the system as soon as it is free: again for every layer of every step.
_MMAP_MAX = (-4, 0)  # number of blocks that are mapped separately
_TRIM_THRESHOLD = (-1, -1)  # free bytes at the end of the heap that are returned: never
_TOP_PAD = (-2, 64 * 2**20)  # bytes by which the heap grows beyond a request


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, until it ends.

    The system then need not clear the same pages in each step. That is a fifth of a float32 step of
    RepVGG-A0 at 224 pixels, and a tenth in bf16 (12 steps, twice; see
    `scripts/studies/benchmark_training.py`).

    Results stay the same. Within a few steps the process settles at a size above its usual peak,
    because not every block fits into free memory: 5 to 17 % above for runs of RepVGG-A0, and up to
    2.6 times for a few layers with blocks of 120 MB (glibc 2.36).

    Returns:
        whether the C library has these options: glibc does, on Linux.
    """
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    return all(library.mallopt(*option) for option in (_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD))
