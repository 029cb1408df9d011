"""Token masks against the numbers of the paper and of the official algorithm; mistakes in them are noticed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from d2v_core.contract import Layout, Masks
from d2v_core.keyed import generator
from d2v_text import masking
from d2v_text.masking import LEFT_ALONE, NOT_SELECTED, TokenMasking, TokenMaskingConfig
from d2v_text.tokenizer import NUM_SPECIAL, Vocabulary

SIZE, T, CALLS = 105, 512, 400
SPANS = {"mask_prob": 0.35, "mask_length": 4, "random_prob": 0.0, "unmasked_prob": 0.0}


def draw(calls: int = CALLS, num_tokens: int = T, **options) -> Masks:
    """(calls, 1, T) masks, one call a sample."""
    policy = TokenMasking(TokenMaskingConfig(**options), Vocabulary(SIZE))
    return policy([Layout((num_tokens,))] * calls, 1, [generator(0, "mask", 0, i) for i in range(calls)])


def check_bert(masks: Masks) -> None:
    """80/10/10 of 15 %, each share within five standard errors of independent draws."""
    fill = masks.fill[:, 0].numpy()
    selected, n = fill != NOT_SELECTED, fill.size
    assert abs(selected.mean() - 0.15) < 5 * (0.3 / T**2 / CALLS) ** 0.5  # the count is fixed but for its rounding
    of = fill[selected]

    def near(share: float, expected: float, count: int = len(of)) -> None:
        assert abs(share - expected) < 5 * (expected * (1 - expected) / count) ** 0.5

    ids = SIZE - NUM_SPECIAL
    near((of == LEFT_ALONE).mean(), 0.1)
    near((of == SIZE - 1).mean(), 0.8 + 0.1 / ids)
    near(((of >= 0) & (of != SIZE - 1)).mean(), 0.1 - 0.1 / ids)
    random = of[(of >= 0) & (of != SIZE - 1)]
    assert random.min() == NUM_SPECIAL and random.max() == SIZE - 2
    counts = np.bincount(random, minlength=SIZE)[NUM_SPECIAL : SIZE - 1]
    expected = counts.mean()
    assert ((counts - expected) ** 2 / expected).sum() < ids + 5 * (2 * ids) ** 0.5  # uniform
    assert np.array_equal(masks.scored[:, 0].numpy(), selected)
    assert np.array_equal(masks.hidden[:, 0].numpy(), selected & (fill != LEFT_ALONE))
    near(selected[:, 0].mean(), 0.15, CALLS)  # <s> as any other
    near(selected[:, -1].mean(), 0.15, CALLS)
    assert n == CALLS * T


def test_the_recipe_of_the_paper():
    check_bert(draw())


def as_without(monkeypatch: pytest.MonkeyPatch, **changes) -> None:
    """Build policies with other options than asked for."""
    init = TokenMasking.__init__

    def other(self, config, vocabulary):
        init(self, config, vocabulary)
        self.config = TokenMaskingConfig(**changes)

    monkeypatch.setattr(TokenMasking, "__init__", other)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "80/10/10 ignored": lambda patch: as_without(patch, random_prob=0.0, unmasked_prob=0.0),
    "80/20/0": lambda patch: as_without(patch, random_prob=0.2, unmasked_prob=0.0),
    "only <mask> scored": lambda patch: as_without(patch, score="masked"),
    "spans": lambda patch: as_without(patch, mask_length=4),
    "special symbols as random ones": lambda patch: patch.setattr(masking, "NUM_SPECIAL", 0),
    "every token by itself": lambda patch: patch.setattr(
        masking, "select", lambda n, p, length, rng: rng.random(n) < p * 1.02
    ),
    "not <s>": lambda patch: patch.setattr(
        masking,
        "select",
        lambda n, p, length, rng: np.insert(masking_select(n - 1, p * n / (n - 1), length, rng), 0, 0),
    ),
}
masking_select = masking.select


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch):
    FAULTS[fault](monkeypatch)
    with pytest.raises(AssertionError):
        check_bert(draw())


def test_the_shipped_recipe():
    """fairseq's yaml: spans of four, all <mask>; about 30.6 % of 512 tokens (simulated with the official algorithm)."""
    masks = draw(**SPANS)
    hidden = masks.hidden[:, 0].numpy()
    assert hidden.mean() == pytest.approx(0.306, abs=0.003)
    fill = masks.fill[:, 0].numpy()
    assert set(np.unique(fill)) == {NOT_SELECTED, SIZE - 1}
    assert np.array_equal(masks.scored[:, 0].numpy(), hidden)
    # A start may be anywhere: the last token is hidden as often as one in the middle, the first one a quarter as often.
    assert hidden[:, 0].mean() == pytest.approx(0.35 / 4, abs=0.06)
    assert hidden[:, -1].mean() == pytest.approx(0.306, abs=0.1)


def official(num_tokens: int, config: TokenMaskingConfig, rng: np.random.Generator) -> np.ndarray:
    """The order of draws of fairseq's mask_tokens_dataset.py, in the words of our codes."""
    n = int(config.mask_prob * num_tokens / config.mask_length + rng.random())
    starts = rng.choice(num_tokens, n, replace=False)
    selected = np.zeros(num_tokens + config.mask_length, bool)
    for i in range(config.mask_length):
        selected[starts + i] = True
    selected = selected[:num_tokens]
    both = config.random_prob + config.unmasked_prob
    out = np.where(selected, SIZE - 1, NOT_SELECTED)
    if both:
        other = selected & (rng.random(num_tokens) < both)
        left = other & (rng.random(num_tokens) < config.unmasked_prob / both)
        out[left] = LEFT_ALONE
        out[other & ~left] = rng.integers(4, SIZE, (other & ~left).sum())
    return out


@pytest.mark.parametrize("options", [{}, SPANS, {"mask_prob": 0.3, "random_prob": 0.2}])
def test_draws_in_the_official_order(options):
    fill = draw(50, 100, **options).fill[:, 0].numpy()
    config = TokenMaskingConfig(**options)
    for i, row in enumerate(fill):
        assert np.array_equal(row, official(100, config, generator(0, "mask", 0, i)))


def test_official_scoring_counts_what_reads_mask():
    masks = draw(50, score="masked")
    assert np.array_equal(masks.scored.numpy(), masks.fill.numpy() == SIZE - 1)
    assert (masks.hidden & ~masks.scored).any()  # random symbols: hidden, but not scored


@pytest.mark.parametrize("num_tokens", [2, 3, 5, 17])
@pytest.mark.parametrize("options", [{}, SPANS, {"mask_prob": 0.95}, {"mask_prob": 0.01}, {"score": "masked"}])
def test_short_samples_and_padding(num_tokens: int, options):
    policy = TokenMasking(TokenMaskingConfig(**options), Vocabulary(SIZE))
    for i in range(30):
        masks = policy([Layout((num_tokens,)), Layout((20,))], 2, [generator(i, "mask", row) for row in range(2)])
        assert masks.hidden.shape == (2, 2, 20)
        assert not masks.hidden[0, :, num_tokens:].any() and not masks.scored[0, :, num_tokens:].any()
        assert masks.scored.any(-1).all()
        assert not masks.scored[0, :, :num_tokens].all(-1).any()


def test_places_that_may_not_be_hidden():
    maskable = np.arange(40) % 2 == 0
    policy = TokenMasking(TokenMaskingConfig(mask_prob=0.5, mask_length=3), Vocabulary(SIZE))
    masks = policy([Layout((40,), maskable)] * 20, 1, [generator(0, "mask", i) for i in range(20)])
    assert masks.scored.any(-1).all() and not masks.scored[..., ~maskable].any()


def test_the_same_generators_give_the_same_masks():
    assert (draw(5).fill == draw(5).fill).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask_prob": 0.0}, "mask.mask_prob=0.0 must lie between 0 and 1"),
        ({"mask_length": 0}, "mask.mask_length=0 must be at least 1"),
        ({"random_prob": 1.5}, "mask.random_prob=1.5 must lie"),
        ({"random_prob": 0.6, "unmasked_prob": 0.6}, "add up to more than 1"),
        ({"random_prob": 0.5, "unmasked_prob": 0.5, "score": "masked"}, "scores nothing"),
    ],
)
def test_what_cannot_work_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TokenMasking(TokenMaskingConfig(**options), Vocabulary(SIZE))


@pytest.mark.parametrize(
    "options", [{}, {"mask_prob": 0.4, "mask_length": 4}, {"random_prob": 0.0, "unmasked_prob": 0.5}]
)
@pytest.mark.parametrize("num_tokens", [16, 61])
def test_as_much_is_hidden_as_the_policy_states(num_tokens: int, options: dict[str, float]):
    policy, layout = TokenMasking(TokenMaskingConfig(**options), Vocabulary(50)), Layout((num_tokens,))  # type: ignore
    shares = [float(policy([layout], 1, [generator(i, "share")]).hidden.float().mean()) for i in range(2000)]
    low, high = policy.hidden_share(layout)
    margin = 5 * np.std(shares) / np.sqrt(len(shares))
    assert low == high and low - margin <= np.mean(shares) <= high + margin
    some = Layout((num_tokens,), maskable=np.arange(num_tokens) > 3)
    assert policy.hidden_share(some) == (0.0, 1.0)
