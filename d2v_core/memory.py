"""Memory of a training step on a CPU: which freed blocks the C library keeps, and what that comes to."""

from __future__ import annotations

import ctypes
import sys
from bisect import bisect_left, insort

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


# What the heap takes beyond the tensors in it and the holes between them, and what kernels keep for themselves.
# Measured, as docs/performance.md says.
HEAP_SHARE, FIXED = 0.2, 18 * 2**20
ALIGNED, HEADER, LEAST = 64, 16, 32  # bytes: of torch's blocks; of glibc's chunks; its smallest chunk


class Heap:
    """glibc's heap as `return_only_large_blocks` leaves it, asked for blocks by size and given them back.

    A block takes the smallest hole that can hold it, or lengthens the heap; neighbouring holes become one. An aligned
    block asks for more than it keeps, and gives the rest back, so that a hole of its very size is too small for it
    (`_int_memalign` of glibc 2.36). No page of the heap is ever given back: what counts is its greatest length. Blocks
    of LARGE and more are not in it, and go when they are freed.
    """

    def __init__(self) -> None:
        self.large = self.longest = self.resident = 0
        self._end = 0
        self._holes: list[tuple[int, int]] = []  # (length, start), sorted
        self._by_start: dict[int, int] = {}  # lengths of holes
        self._by_end: dict[int, int] = {}
        self._blocks: dict[int, tuple[int, int]] = {}  # (start, length), or (-1, length) outside the heap

    def take(self, key: int, size: int) -> None:
        """A block of `size` bytes, to be known by `key`."""
        if size >= LARGE:
            self.large += size
            self._blocks[key] = -1, size
        elif size:
            self._blocks[key] = self._placed(max(LEAST, -(-(size + HEADER // 2) // HEADER) * HEADER))
        self.longest = max(self.longest, self._end)
        self.resident = max(self.resident, self.large + round((1.0 + HEAP_SHARE) * self.longest) + FIXED)

    def free(self, key: int) -> None:
        """Give a block back; one that is unknown is none."""
        start, length = self._blocks.pop(key, (0, 0))
        if start < 0:
            self.large -= length
        elif length:
            self._release(start, length)

    def reset(self) -> None:
        """`resident` counts from now on: with the heap as long as it has been at most."""
        self.resident = self.large + round((1.0 + HEAP_SHARE) * self.longest) + FIXED

    def _placed(self, length: int) -> tuple[int, int]:
        asked = length + ALIGNED + LEAST
        at = bisect_left(self._holes, (asked, -1))
        if at < len(self._holes):
            size, start = self._holes[at]
            self._forget(start, size)
        else:
            size, start = asked, self._end
            self._end += asked
            self.longest = max(self.longest, self._end)
        end = start + size
        first = -(-(start + HEADER) // ALIGNED) * ALIGNED - HEADER
        if 0 < first - start < LEAST:
            first += ALIGNED
        if first > start:
            self._release(start, first - start)
        if end - first - length < LEAST:
            return first, end - first
        self._release(first + length, end - first - length)
        return first, length

    def _release(self, start: int, length: int) -> None:
        before, after = self._by_end.get(start), self._by_start.get(start + length)
        if before is not None:
            self._forget(start - before, before)
            start, length = start - before, length + before
        if after is not None:
            self._forget(start + length, after)
            length += after
        if start + length == self._end:
            self._end = start
            return
        insort(self._holes, (length, start))
        self._by_start[start] = self._by_end[start + length] = length

    def _forget(self, start: int, length: int) -> None:
        del self._holes[bisect_left(self._holes, (length, start))]
        del self._by_start[start], self._by_end[start + length]
