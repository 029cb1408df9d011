"""Damaged files end in a refusal that says why: no crash, no code run, no hang, no memory that the file only claims."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from d2v_text.files import TokenisedText

from .fuzzing import PICKLE, READERS, _Evil, fuzz

SHORT, LONG = 200, 10_000
FEWER = {"config": 40, "index": 100, "checkpoint": 100}  # of those that take longest, where the suite has no time


def test_a_few_damaged_files(tmp_path: Path) -> None:
    _all_fine({reader: FEWER.get(reader, SHORT) for reader in READERS}, tmp_path, 0)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_many_damaged_files(reader: str, tmp_path: Path) -> None:
    _all_fine({reader: LONG}, tmp_path, 1)


def test_the_planted_pickle_would_run(own_folder: Path) -> None:
    pickle.loads(PICKLE)
    assert (own_folder / "ran").exists()


def test_tokenised_text_is_no_place_for_a_pickle(own_folder: Path) -> None:
    """numpy's own format may hold one."""
    np.save("sizes.npy", np.array([_Evil()]), allow_pickle=True)
    text = TokenisedText(own_folder, "uint16", 1, "", 1)
    for sizes in (Path("sizes.npy").read_bytes(), PICKLE):
        Path("sizes.npy").write_bytes(sizes)
        with pytest.raises(ValueError, match=r"pickle|Python objects"):
            text.sizes()
    assert not (own_folder / "ran").exists()


def _all_fine(counts: dict[str, int], folder: Path, seed: int) -> None:
    results = fuzz(counts, folder / "fuzz", seed)
    assert {reader: result.findings for reader, result in results.items() if result.findings} == {}
    for reader, result in results.items():
        assert sum(result.outcomes.values()) == counts[reader]
        # A damaged line of a text is counted and left out; the rest of it is read.
        assert result.outcomes["refused"] > counts[reader] // 10 or reader == "text"
    assert not list(folder.rglob("ran")), "a file has run code"
