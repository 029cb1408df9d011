"""The model of the C library's heap, by hand and beside the real one."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from itertools import pairwise

import pytest

from d2v_core import memory
from d2v_core.memory import FIXED, LARGE, Heap

MIB = 1 << 20


def test_large_blocks_go_and_the_heap_stays():
    heap = Heap()
    heap.take(1, LARGE)
    heap.take(2, 2 * MIB)
    assert heap.large == LARGE and 2 * MIB <= heap.longest < 2 * MIB + 256
    assert heap.resident == LARGE + FIXED + round((1 + memory.HEAP_SHARE) * heap.longest)
    heap.free(1)
    heap.free(2)
    heap.reset()
    assert heap.large == 0 and heap.resident == FIXED + round((1 + memory.HEAP_SHARE) * heap.longest)


def test_a_hole_of_the_very_size_is_too_small_for_an_aligned_block():
    heap, size = Heap(), MIB - memory.HEADER // 2  # a chunk of it ends where the next aligned block may begin
    for key in range(4):
        heap.take(key, size)
    full = heap.longest
    heap.free(1)
    heap.take(10, size)
    assert heap.longest > full + MIB // 2
    longer = heap.longest
    heap.free(2)  # two holes become one, in which there is room
    heap.take(11, size)
    assert heap.longest == longer


def test_the_smallest_hole_that_is_large_enough_is_taken():
    heap = Heap()
    for key, size in enumerate((4, 1, 3, 1, 2, 1)):
        heap.take(key, size * MIB)
    full = heap.longest
    for key in (0, 2, 4):
        heap.free(key)
    for key, size in ((10, 2.5), (11, 1.5), (12, 3.5)):  # into those of 3, 2 and 4, and in another order nowhere else
        heap.take(key, int(size * MIB))
    assert heap.longest == full


def test_what_is_given_back_is_there_again():
    rng, heap, alive = random.Random(0), Heap(), {}
    for key in range(2000):
        if alive and rng.random() < 0.5:
            heap.free(alive.pop(rng.choice(list(alive))))
        size = rng.randrange(1, 2 * MIB)
        heap.take(key, size)
        alive[key] = key
        places = sorted(heap._blocks.values())
        assert all(start + length <= other for (start, length), (other, _) in pairwise(places))
    for key in alive:
        heap.free(key)
    assert heap._end == 0 and not heap._holes and not heap._by_start and not heap._by_end


REAL = """
import ctypes, json, random, sys
from d2v_core.memory import Heap, return_only_large_blocks
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
return_only_large_blocks()
libc.malloc_trim(0)
def taken(size):
    place = ctypes.c_void_p()
    assert libc.posix_memalign(ctypes.byref(place), 64, ctypes.c_size_t(size)) == 0
    return place
before, heap, alive, rng = libc.mallinfo2(), Heap(), {}, random.Random(int(sys.argv[1]))
sizes, most = {}, 0
for step in range(40):  # activations that are kept, temporaries, and gradients in between, as a training step has them
    for key in range(60):
        alive[step, key] = taken(size := rng.choice([300_000, 600_000, 1_200_000, 2_400_000]))
        heap.take(100 * step + key, size)
        sizes[step, key] = size
        most = max(most, sum(sizes[one] for one in alive))
        if key % 3:
            libc.free(alive.pop((step, key - 1), None))
            heap.free(100 * step + key - 1)
    for old, key in list(alive):
        if old < step - 2 or rng.random() < 0.5:
            libc.free(alive.pop((old, key)))
            heap.free(100 * old + key)
after = libc.mallinfo2()
print(json.dumps([after.arena - before.arena, heap.longest, most]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is what is modelled")
def test_it_grows_as_the_real_one():
    """The median of five: how a heap breaks up depends on what the process had in it before."""
    ratios: list[float] = []
    for seed in range(5):
        done = subprocess.run([sys.executable, "-c", REAL, str(seed)], capture_output=True, text=True, check=False)
        if "mallinfo2" in done.stderr:
            pytest.skip("this C library does not tell how long its heap is")
        assert done.returncode == 0, done.stderr
        real, modelled, alive = json.loads(done.stdout)
        assert alive < modelled < real * 1.2
        ratios.append(modelled / real)
    assert statistics.median(ratios) == pytest.approx(1.0, abs=0.2), ratios
