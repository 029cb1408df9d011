"""Block masks: exact shares on sequences and grids, padding, and what the student encodes."""

from __future__ import annotations

import numpy as np
import pytest

from d2v_core.contract import Layout
from d2v_core.keyed import generator
from d2v_core.masking import BlockMasking, BlockMaskingConfig, block_mask, draw_blocks


def rngs(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [generator(seed, "mask", i) for i in range(count)]


def policy(official_quirks: bool = False, **options) -> BlockMasking:
    return BlockMasking(BlockMaskingConfig(**options), official_quirks)


@pytest.mark.parametrize(
    ("shape", "options", "hidden"),
    [
        ((999,), {"mask_prob": 0.5, "mask_length": 5, "adjust": 0.05}, 499),
        ((999,), {"mask_prob": 0.55, "mask_length": 5, "adjust": 0.1}, 549),
        ((14, 14), {"mask_prob": 0.8, "mask_length": 3, "adjust": 0.07, "inverse": True}, 157),
        ((14, 14), {"mask_prob": 0.75, "mask_length": 3, "adjust": 0.1, "inverse": True}, 147),
        ((16, 16), {"mask_prob": 0.75, "mask_length": 3, "adjust": 0.1, "inverse": True}, 192),
        ((512,), {"mask_prob": 0.48, "mask_length": 1, "adjust": 0.0, "inverse": True}, 246),
        ((512,), {"mask_prob": 0.5, "mask_length": 1, "adjust": 0.0, "inverse": True}, 256),
        ((4, 6, 5), {"mask_prob": 0.6, "mask_length": 2, "adjust": 0.1}, 72),
    ],
)
def test_shares_of_the_official_recipes(shape, options, hidden):
    masks = policy(**options)([Layout(shape)] * 3, 4, rngs(3))
    assert (masks.hidden.sum(-1) == hidden).all() and masks.hidden.equal(masks.scored)
    num_tokens = int(np.prod(shape))
    assert masks.visible is not None and masks.visible.shape == (3, 4, num_tokens - hidden)
    assert (masks.visible.diff(dim=-1) > 0).all()
    assert not masks.hidden.gather(2, masks.visible).any()
    copies = masks.hidden.flatten(0, 1)
    assert len(np.unique(copies.numpy(), axis=0)) == 12  # every copy its own


def test_blocks_are_blocks():
    config = BlockMaskingConfig(mask_prob=0.2, mask_length=4, adjust=0.0)
    seen = set()
    for i in range(200):
        blocks = draw_blocks((8, 12), config, generator(i, "one"))
        rows, columns = np.nonzero(blocks.any(1))[0], np.nonzero(blocks.any(0))[0]
        assert int(8 * 12 * 0.2 / 16) == 1 and blocks[np.ix_(rows, columns)].all()
        assert blocks.sum() == len(rows) * len(columns) and len(rows) <= 4 and len(columns) <= 4
        seen.add((rows[0], rows[-1], columns[0], columns[-1]))
    assert any(r0 == 0 and r1 < 3 for r0, r1, _, _ in seen)  # cut at the border
    assert len(seen) > 60


def test_inverse_blocks_are_what_stays_visible():
    options = {"mask_prob": 0.8, "mask_length": 3, "adjust": 0.0}
    config = BlockMaskingConfig(inverse=True, **options)
    blocks = draw_blocks((14, 14), config, generator(1, "x"))
    hidden = block_mask((14, 14), config, generator(1, "x")).reshape(14, 14)
    assert (~hidden & blocks).sum() == blocks.sum() == min(blocks.sum(), 39)  # blocks and single tokens more


@pytest.mark.parametrize("inverse", [False, True])
def test_padded_samples_have_their_own_share_and_rows_are_filled_with_padding(inverse: bool):
    lengths = (40, 31, 9, 2)
    masks = policy(mask_prob=0.5, mask_length=3, inverse=inverse)([Layout((n,)) for n in lengths], 3, rngs(4))
    assert masks.visible is not None and masks.visible.shape == (4, 3, 20)
    for row, length in enumerate(lengths):
        for copy in range(3):
            hidden, visible = masks.hidden[row, copy], masks.visible[row, copy]
            want = length - int(length * 0.5) if inverse else int(length * 0.5)
            assert hidden.sum() == want and not hidden[length:].any()
            assert visible.diff().min() > 0
            shown = set(visible.tolist())
            assert {t for t in range(length) if not hidden[t]} <= shown
            assert not shown & set(hidden.nonzero().squeeze(1).tolist())


def test_a_sample_of_one_token_is_shown_what_it_is_asked_for():
    masks = policy(mask_prob=0.5, mask_length=2)([Layout((6,)), Layout((1,))], 2, rngs(2))
    assert masks.visible is not None
    assert masks.hidden[1].tolist() == [[True] + [False] * 5] * 2 and (masks.visible[1, :, 0] == 0).all()


def test_only_part_of_a_sample_may_be_hidden():
    maskable = np.array([False] * 4 + [True] * 8)
    masks = policy(mask_prob=0.5, mask_length=2)([Layout((12,), maskable), Layout((12,))], 2, rngs(2))
    assert masks.hidden[0].sum(-1).tolist() == [4, 4] and not masks.hidden[0, :, :4].any()
    assert masks.visible is not None and masks.visible.shape == (2, 2, 8)
    assert not masks.hidden.gather(2, masks.visible).any()
    assert (masks.hidden[1].sum(-1) == 4).all()  # of six, two had to be shown to make the rows equally long


def test_grids_of_a_micro_batch_must_agree():
    with pytest.raises(ValueError, match=r"different grids: \[\(4, 4\), \(4, 5\)\]"):
        policy(mask_prob=0.5, mask_length=2)([Layout((4, 4)), Layout((4, 5))], 1, rngs(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_prob": 1.0}, r"mask\.mask_prob=1\.0"),
        ({"mask_length": 0}, r"mask\.mask_length=0"),
        ({"adjust": -0.1}, r"mask\.adjust=-0\.1"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        policy(**options)


def test_official_quirk_the_first_row_says_how_many_are_kept():
    """Masks are made before cropping, so that what a crop sees of them differs from row to row."""
    layouts = [Layout((30,), num_uncropped=n) for n in (90, 80, 30)]
    masks = policy(True, mask_prob=0.5, mask_length=5)(layouts, 4, rngs(3))
    count = (~masks.hidden).sum(-1)
    assert len(set(count.flatten().tolist())) > 2 and (count[2] == 15).all()
    assert masks.visible is not None and masks.visible.shape[2] == count[0, 0]
    kept_though_hidden = masks.hidden.gather(2, masks.visible).sum(-1)
    assert kept_though_hidden.equal((count[0, 0] - count).clamp(min=0)) and (kept_though_hidden > 0).any()
    assert all(len(set(row)) == len(row) for row in masks.visible.flatten(0, 1).tolist())
    calm = policy(mask_prob=0.5, mask_length=5)(layouts, 4, rngs(3))
    assert (calm.hidden.sum(-1) == 15).all()


def test_official_quirk_padding_is_masked_too():
    options = {"mask_prob": 0.48, "mask_length": 1, "adjust": 0.0, "inverse": True}
    layouts = [Layout((30,)), Layout((21,))]
    masks = policy(True, **options)(layouts, 20, rngs(2))
    assert (masks.hidden.sum(-1) == 15).all() and masks.hidden[1, :, 21:].any()
    assert not policy(**options)(layouts, 20, rngs(2)).hidden[1, :, 21:].any()


@pytest.mark.parametrize("inverse", [False, True])
def test_every_mask_hides_exactly_the_stated_share(inverse: bool):
    policy = BlockMasking(BlockMaskingConfig(mask_prob=0.37, mask_length=3, inverse=inverse))
    some = np.arange(24) % 3 > 0
    for layout in (Layout((24,)), Layout((4, 6)), Layout((2,)), Layout((1,)), Layout((24,), maskable=some)):
        (low, high) = policy.hidden_share(layout)
        for seed in range(10):
            share = float(policy([layout], 1, [generator(seed, "share")]).hidden.float().mean())
            assert low == high == pytest.approx(share), layout
    quirky = BlockMasking(BlockMaskingConfig(), official_quirks=True)
    assert quirky.hidden_share(Layout((24,))) == (0.0, 1.0)
