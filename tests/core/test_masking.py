"""Span masks: how much they hide, what they never hide, and that they depend on their generator alone."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from d2v_core.contract import Layout, Masks, StatesShare
from d2v_core.keyed import generator
from d2v_core.masking import SpanMasking, SpanMaskingConfig, covered_share, span_mask, trim_mask


def draw(config: SpanMaskingConfig, sizes: list[int], copies: int = 1, epoch: int = 0) -> Masks:
    rngs = [generator(0, "mask", epoch, f"id-{i}") for i in range(len(sizes))]
    return SpanMasking(config)([Layout((size,)) for size in sizes], copies, rngs)


def test_coverage_of_the_official_setting():
    share = np.mean([span_mask(999, 0.65, 10, generator(0, "m", i)).mean() for i in range(1500)])
    assert share == pytest.approx(0.4895, abs=0.005)


def test_coverage_of_batches_of_four_that_hide_equally_many():
    masks = [draw(SpanMaskingConfig(), [999] * 4, epoch=epoch).hidden for epoch in range(400)]
    assert all((hidden.sum(-1) == hidden[0].sum()).all() for hidden in masks)
    assert torch.stack(masks).float().mean().item() == pytest.approx(0.468, abs=0.004)


def test_spans_are_whole_and_the_last_token_stays_visible():
    last, first = 0, 0
    for i in range(2000):
        mask = span_mask(60, 0.3, 7, generator(0, "m", i))
        runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]]))))[::2]
        assert (runs >= 7).all()  # a union of spans of 7: no shorter stretch
        last, first = last + mask[-1], first + mask[0]
    assert last == 0 and first > 0


def test_the_number_of_spans_is_rounded_at_random_in_proportion():
    # 0.5 * 100 / 20 = 2.5 spans; spans that do not meet hide 40 or 60 tokens, others less
    most = [int(span_mask(100, 0.5, 20, generator(0, "m", i)).sum()) for i in range(3000)]
    assert max(most) == 60
    one_token = [int(span_mask(10, 0.25, 1, generator(0, "n", i)).sum()) for i in range(3000)]  # 2.5 tokens exactly
    assert set(one_token) == {2, 3} and np.mean(one_token) == pytest.approx(2.5, abs=0.05)


def test_starts_are_distinct():
    for i in range(200):
        assert span_mask(20, 0.9, 1, generator(0, "m", i)).sum() == 18


def test_same_generator_same_mask_and_others_differ():
    config = SpanMaskingConfig()
    a, b, c = draw(config, [300, 200]), draw(config, [300, 200]), draw(config, [300, 200], epoch=1)
    assert torch.equal(a.hidden, b.hidden) and not torch.equal(a.hidden, c.hidden)
    assert not torch.equal(a.hidden[0, 0, :200], a.hidden[1, 0, :200])
    np.random.seed(5), torch.manual_seed(5)  # the global streams play no part
    assert torch.equal(a.hidden, draw(config, [300, 200]).hidden)


def test_a_samples_mask_does_not_depend_on_its_neighbours_before_trimming():
    config = SpanMaskingConfig(same_count=False)
    both, alone = draw(config, [50, 80]).hidden, draw(config, [50]).hidden
    assert torch.equal(both[0, 0, :50], alone[0, 0])


def test_copies_differ_and_hide_equally_many():
    hidden = draw(SpanMaskingConfig(), [200, 200], copies=3).hidden
    assert hidden.shape == (2, 3, 200) and len(set(hidden.sum(-1).flatten().tolist())) == 1
    rows = {row.numpy().tobytes() for row in hidden.flatten(0, 1)}
    assert len(rows) == 6


def test_padded_tokens_are_never_hidden():
    hidden = draw(SpanMaskingConfig(same_count=False, mask_length=3), [40, 12], copies=2).hidden
    assert hidden.shape == (2, 2, 40) and hidden[1, :, :12].any() and not hidden[1, :, 12:].any()


def test_trim_keeps_a_uniform_subset():
    mask = np.zeros(50, dtype=bool)
    mask[10:30] = True
    counts = np.zeros(50)
    for i in range(2000):
        trimmed = trim_mask(mask, 5, generator(0, "t", i))
        assert trimmed.sum() == 5 and not (trimmed & ~mask).any()
        counts += trimmed
    assert counts[10:30].min() > 400 and counts[10:30].max() < 600  # 500 each
    assert mask.sum() == 20 and trim_mask(mask, 20, generator(0, "t")) is mask


def test_mask_dropout_shows_a_share_again():
    none = draw(SpanMaskingConfig(), [500, 500])
    some = draw(SpanMaskingConfig(mask_dropout=0.25), [500, 500])
    count = int(none.hidden[0].sum())
    assert (some.hidden.sum(-1) == count - round(count * 0.25)).all()
    assert not (some.hidden & ~none.hidden).any()


@pytest.mark.parametrize("num_tokens", [2, 3, 4, 5, 9, 10, 11, 12, 20, 21])
@pytest.mark.parametrize(("mask_prob", "mask_length"), [(0.65, 10), (0.99, 10), (0.99, 1), (0.5, 3), (0.01, 50)])
def test_short_sequences_hide_something_and_never_everything(num_tokens: int, mask_prob: float, mask_length: int):
    for i in range(100):
        mask = span_mask(num_tokens, mask_prob, mask_length, generator(0, "m", i))
        assert mask.shape == (num_tokens,) and 1 <= mask.sum() < num_tokens


def test_more_spans_than_places():
    for i in range(100):
        assert 1 <= span_mask(4, 0.5, 2, generator(0, "m", i), min_spans=30).sum() < 4


def test_one_token_cannot_do_both_and_nothing_breaks():
    assert {int(span_mask(1, 0.65, 10, generator(0, "m", i)).sum()) for i in range(50)} <= {0, 1}
    masks = draw(SpanMaskingConfig(), [1, 30])
    assert masks.hidden.shape == (2, 1, 30)
    assert (masks.hidden[0].sum() == masks.hidden[1].sum()) and masks.hidden[1].sum() < 30


def test_scored_rows_are_the_flat_places_of_scored():
    hidden = np.array([[[1, 0, 1], [0, 0, 1]], [[0, 1, 0], [1, 0, 0]]], dtype=bool)
    masks = Masks.of(hidden)
    assert masks.scored_rows.tolist() == [0, 2, 5, 7, 9] and masks.num_copies == 2
    scored = ~hidden
    other = Masks.of(hidden, scored)
    assert other.scored_rows.tolist() == [1, 3, 4, 6, 8, 10, 11] and other.hidden.tolist() == hidden.tolist()
    single = Masks.of(torch.tensor([[True, False]]), fill=np.array([[7, 8]]), visible=np.array([[1]]))
    assert single.hidden.shape == (1, 1, 2) and single.fill.dtype == torch.int64 and single.visible.shape == (1, 1, 1)
    with pytest.raises(ValueError, match=r"scored has shape \(2, 2, 2\), hidden has \(2, 2, 3\)"):
        Masks.of(hidden, scored[..., :2])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask_prob": 0.0}, "mask.mask_prob=0.0 must lie between 0 and 1"),
        ({"mask_prob": 1.0}, "mask.mask_prob=1.0"),
        ({"mask_length": 0}, "mask.mask_length=0 must be at least 1"),
        ({"mask_dropout": 1.0}, "mask.mask_dropout=1.0"),
    ],
)
def test_errors(values: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SpanMasking(SpanMaskingConfig(**values))


def test_a_place_that_may_not_be_hidden_never_is():
    maskable = np.ones(40, dtype=bool)
    maskable[:7] = False
    policy = SpanMasking(SpanMaskingConfig(mask_prob=0.8, mask_length=5))
    for seed in range(20):
        rngs = [np.random.default_rng(2 * seed + i) for i in range(2)]
        masks = policy([Layout((40,), maskable), Layout((40,))], 2, rngs)
        assert not masks.hidden[0, :, :7].any()
        assert masks.hidden.any()


@pytest.mark.parametrize(
    ("num_tokens", "length", "spans", "starts"), [(9, 3, 2, 6), (7, 2, 3, 7), (5, 5, 1, 2), (6, 1, 2, 6)]
)
def test_the_mean_share_under_spans_equals_that_of_all_choices(num_tokens: int, length: int, spans: int, starts: int):
    """Every set of starts, counted one by one."""
    shares = []
    for chosen in combinations(range(starts), spans):
        covered = {place for start in chosen for place in range(start, start + length) if place < num_tokens}
        shares.append(len(covered) / num_tokens)
    assert covered_share(num_tokens, length, spans, starts) == pytest.approx(np.mean(shares))


@pytest.mark.parametrize(
    "config",
    [
        SpanMaskingConfig(), SpanMaskingConfig(mask_prob=0.3, mask_length=4), SpanMaskingConfig(mask_dropout=0.3),
        SpanMaskingConfig(mask_prob=0.1, min_spans=3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("num_tokens", [12, 61])
def test_a_policy_hides_as_much_as_it_states(config: SpanMaskingConfig, num_tokens: int):
    policy, layout = SpanMasking(config), Layout((num_tokens,))
    shares = [float(policy([layout], 1, [generator(i, "share")]).hidden.float().mean()) for i in range(2000)]
    low, high = policy.hidden_share(layout)
    assert isinstance(policy, StatesShare) and 0 < low <= high < 1
    margin = 5 * np.std(shares) / np.sqrt(len(shares)) + 1e-9
    if num_tokens > 3 * config.mask_length:  # of shorter ones, a token is shown again where all are hidden
        assert low - margin <= np.mean(shares) <= high + margin
    assert policy.hidden_share(Layout((9,), maskable=np.ones(9, bool))) == (0.0, 1.0)
