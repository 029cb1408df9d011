"""Random numbers by name: the same everywhere, independent of each other."""

from __future__ import annotations

import json

import numpy as np

from d2v_core.keyed import generator, seed_of

CODE = """
import json, random, numpy as np
np.random.seed({0}), random.seed({0})
from d2v_core.keyed import generator, seed_of
generator(1, "other").random(100)
print(json.dumps([seed_of(7, "mask", 3, "a/b.wav"), generator(7, "mask", 3, "a/b.wav").random(4).tolist()]))
"""


def test_equal_across_processes_whatever_else_was_drawn(python):
    here = [seed_of(7, "mask", 3, "a/b.wav"), generator(7, "mask", 3, "a/b.wav").random(4).tolist()]
    for number, hash_seed in ((1, "1"), (2, "2")):
        assert json.loads(python(CODE.format(number), PYTHONHASHSEED=hash_seed).stdout) == here


def test_known_values_never_change():
    """Runs of earlier versions must resume: blake2b of the joined words, worked out with hashlib alone."""
    import hashlib

    digest = hashlib.blake2b(b"7\x1fmask\x1f3\x1fa/b.wav", digest_size=8).digest()
    assert seed_of(7, "mask", 3, "a/b.wav") == int.from_bytes(digest, "little") // 2
    assert 0 <= seed_of(0, "") < 2**63


def test_every_word_counts_and_their_borders_too():
    keys = [
        (0, "mask", 1, "a"), (1, "mask", 1, "a"), (0, "order", 1, "a"), (0, "mask", 2, "a"), (0, "mask", 1, "b"),
        (0, "mask", "1a"), (0, "mask", 11, ""), (0, "mask1", "a"), (0, "mask", 1), (0, "mask"),
    ]  # fmt: skip
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert len({seed_of(0, "mask", e, f"{i}") for e in range(50) for i in range(200)}) == 10_000


def test_streams_of_neighbouring_keys_are_uncorrelated():
    draws = np.stack([generator(0, "mask", 0, i).standard_normal(2000) for i in range(30)])
    correlation = np.corrcoef(draws) - np.eye(30)
    assert np.abs(correlation).max() < 0.1  # 435 pairs, standard deviation 0.022
    first = np.array([generator(0, "mask", 0, i).random() for i in range(4000)])
    assert abs(first.mean() - 0.5) < 0.02 and abs(first.std() - 12**-0.5) < 0.01


def test_drawing_from_one_does_not_move_another():
    a = generator(0, "a").random(3)
    generator(0, "b").random(1000)
    assert np.array_equal(generator(0, "a").random(3), a)


def test_a_name_that_is_no_utf8():
    """Files have such names, and Python gives them these letters."""
    assert seed_of(0, "mask", 1, "a\udcff.wav") != seed_of(0, "mask", 1, "a\udcfe.wav")
