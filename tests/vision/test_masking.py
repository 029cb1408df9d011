"""Block masks: bounds, chance, and grids that are too small."""

from __future__ import annotations

import numpy as np
import pytest

from d2v_core.contract import Layout
from d2v_core.keyed import generator
from d2v_vision.masking import BlockMasking, BlockMaskingConfig, block_mask

OFFICIAL = BlockMaskingConfig(num_patches=120, min_block=16)


def drawn(config: BlockMaskingConfig, side: int, count: int) -> np.ndarray:
    return np.array([block_mask(side, side, config, generator(0, "mask", i)) for i in range(count)])


def test_counts_of_the_official_setting() -> None:
    """Of 14 x 14 patches 119.5 on average, never more than 120, exactly 120 in about 69 % of the images."""
    counts = drawn(OFFICIAL, 14, 500).sum((1, 2))
    assert counts.max() == 120 and counts.min() >= 100
    assert counts.mean() == pytest.approx(119.5, abs=0.3)
    assert (counts == 120).mean() == pytest.approx(0.69, abs=0.08)


def test_the_same_generator_gives_the_same_mask_and_another_gives_another() -> None:
    first, again, other = (block_mask(14, 14, OFFICIAL, generator(0, "mask", i)) for i in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_first_block_is_a_rectangle_that_does_not_span_the_grid() -> None:
    for i in range(200):
        mask = block_mask(8, 10, BlockMaskingConfig(num_patches=20, min_block=20, min_aspect=0.3), generator(1, "m", i))
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert len(rows) <= 8 and len(columns) <= 10
        assert mask.sum() <= 20


def test_no_block_adds_more_than_its_bound() -> None:
    config = BlockMaskingConfig(num_patches=40, min_block=4, max_block=6)
    assert drawn(config, 14, 50).sum((1, 2)).max() <= 40


@pytest.mark.parametrize("side", [2, 3])
def test_a_tiny_grid_hides_something_and_shows_something(side: int) -> None:
    config = BlockMaskingConfig(num_patches=side * side - 1, min_block=16)
    counts = drawn(config, side, 100).sum((1, 2))
    assert counts.min() >= 1 and counts.max() < side * side


def test_a_policy_gives_each_copy_a_mask_of_its_own() -> None:
    masks = BlockMasking(OFFICIAL)([Layout((14, 14))] * 3, 2, [generator(0, "mask", i) for i in range(3)])
    assert masks.hidden.shape == (3, 2, 196) and masks.scored is masks.hidden
    assert not np.array_equal(masks.hidden[0, 0], masks.hidden[0, 1])
    assert len(masks.scored_rows) == masks.hidden.sum()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BlockMaskingConfig(num_patches=196), "mask.num_patches=196 must lie between 1 and 195"),
        (BlockMaskingConfig(num_patches=0), "mask.num_patches=0"),
        (BlockMaskingConfig(min_block=0), "mask.min_block=0"),
        (BlockMaskingConfig(max_block=8), "mask.max_block=8 must be at least mask.min_block=16"),
        (BlockMaskingConfig(min_aspect=0.0), "mask.min_aspect=0"),
    ],
)
def test_what_cannot_work_is_refused(config: BlockMaskingConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config.check(196)
