"""Memory that one step of training frees is kept for the next, on processors."""

import ctypes
import sys

# Of malloc.h. Large blocks, as features are, glibc otherwise asks the system for and gives back as
# soon as they are free: for every layer of every step anew.
_MMAP_MAX = (-4, 0)  # blocks that are mapped by themselves: none
_TRIM_THRESHOLD = (-1, -1)  # bytes free at the end of the heap that are given back: never
_TOP_PAD = (-2, 64 * 2**20)  # bytes by which it grows beyond what is asked for


def keep_memory() -> bool:
    """Let this process keep what it frees, until it ends.

    The system need not clear the same pages in each step: a fifth of the time of a float32 step of
    RepVGG-A0 at 224 pixels (`scripts/studies/benchmark_training.py`), a tenth in bf16 (12 steps,
    twice).
    What is computed stays the same. Within a few steps the process settles at a larger size than
    its peak would be, as blocks do not all fit into the room that others left: 5 to 17 % for runs
    of RepVGG-A0, up to 2.6 times where a network is a few layers of blocks of 120 MB (glibc 2.36).

    Returns:
        whether the C library can be asked for it: glibc, on Linux.
    """
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    return all(library.mallopt(*option) for option in (_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD))
