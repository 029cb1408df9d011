"""Random numbers by name.

Every random choice of a run (order, crop, mask, noise, dropout) comes from a generator made for that one choice from
the run's seed, a purpose and the ids it concerns. There is no stream to advance, so neither the number of workers nor
an interruption can change what is drawn.
"""

from __future__ import annotations

import hashlib

import numpy as np

Key = int | str


def seed_of(seed: int, purpose: str, *ids: Key) -> int:
    """A 63-bit seed for one purpose, equal on every machine (Python's own `hash` of a string is not)."""
    name = "\x1f".join([str(seed), purpose, *map(str, ids)])
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *ids: Key) -> np.random.Generator:
    """The NumPy generator of one choice, such as `generator(seed, "mask", epoch, sample_id)`."""
    return np.random.Generator(np.random.Philox(key=seed_of(seed, purpose, *ids)))
