"""Random numbers by name.

Every random choice of a run (order, crop, mask, noise, dropout) comes from a generator made for that one choice from
the run's seed, a purpose and the ids it concerns. There is no stream to advance, so neither the number of workers nor
an interruption can change what is drawn.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np

Key = int | str


def seed_of(seed: int, purpose: str, *ids: Key) -> int:
    """A 63-bit seed for one purpose, equal on every machine (Python's own `hash` of a string is not)."""
    name = "\x1f".join([str(seed), purpose, *map(str, ids)])
    encoded = name.encode("utf-8", "surrogateescape")  # ids are names of files, some of which are no UTF-8
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *ids: Key) -> np.random.Generator:
    """The NumPy generator of one choice, such as `generator(seed, "mask", epoch, sample_id)`."""
    return np.random.Generator(np.random.Philox(key=seed_of(seed, purpose, *ids)))


@contextmanager
def seeded(rng: np.random.Generator) -> Generator[None]:
    """Inside, the global generators of Python, NumPy and torch follow `rng`; afterwards they are as before.

    For libraries that draw from those, such as timm's augmentation.
    """
    import torch

    seed = int(rng.integers(2**63))
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
