"""Memory of a training step on a CPU: which freed blocks the C library keeps."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE = 8 << 20  # bytes


def return_only_large_blocks() -> None:
    """Let glibc give freed blocks of LARGE and more back to the system, and keep smaller ones for this process.

    Every step allocates and frees the same tensors. What is given back costs a page fault for every 4 KiB when it is
    next needed; what is kept leaves holes, since gradients are allocated between activations and outlive them. By
    default glibc raises its limit to 32 MiB by and by, but trims the end of its heap: many faults and large holes.
    Nothing happens where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, LARGE)
    mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
