"""Which tokens the student may not see, and what it sees instead (fairseq: fairseq/data/mask_tokens_dataset.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from d2v_core.config import opt
from d2v_core.contract import Layout, Masks
from d2v_core.masking import covered_share
from d2v_text.tokenizer import NUM_SPECIAL, Vocabulary

# Codes in Masks.fill where no id is put; an id is 0 or more.
NOT_SELECTED = -1
LEFT_ALONE = -2


@dataclass
class TokenMaskingConfig:
    """Which tokens are selected, what is put in their place, and what the teacher reads."""

    mask_prob: float = opt(0.15, "Share of tokens selected, if no two spans met.")
    mask_length: int = opt(1, "Length of a span in tokens; 1 = single tokens.")
    random_prob: float = opt(0.1, "Share of selected tokens that become a random symbol instead of <mask>.")
    unmasked_prob: float = opt(0.1, "Share of selected tokens that are left as they are.")
    score: Literal["selected", "masked"] = opt(
        "selected",
        "Tokens in the loss: all selected ones, or, as the official code does, only those that read <mask>, so that "
        "random and unchanged ones count for nothing (fairseq issue 4229).",
    )
    teacher_input: Literal["full", "labels"] = opt(
        "full",
        "full = the teacher reads the whole sequence, as the paper has it. labels = it reads the selected tokens only, "
        "moved together, which is a defect of the official code (fairseq issue 4881) and of use for comparison alone.",
    )

    def check(self) -> None:
        """Raises ValueError."""
        if not 0 < self.mask_prob < 1:
            raise ValueError(f"mask.mask_prob={self.mask_prob} must lie between 0 and 1")
        if self.mask_length < 1:
            raise ValueError(f"mask.mask_length={self.mask_length} must be at least 1")
        for key in ("random_prob", "unmasked_prob"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"mask.{key}={getattr(self, key)} must lie between 0 and 1")
        if self.random_prob + self.unmasked_prob > 1:
            raise ValueError(
                f"mask.random_prob={self.random_prob} and mask.unmasked_prob={self.unmasked_prob} add up to more than 1"
            )
        if self.score == "masked" and self.random_prob + self.unmasked_prob == 1:
            raise ValueError("mask.score=masked scores nothing where no selected token becomes <mask>")


def select(num_tokens: int, mask_prob: float, mask_length: int, rng: np.random.Generator) -> np.ndarray:
    """(num_tokens,) bool: spans from distinct starts, anywhere in the sequence and cut off at its end.

    Their number is mask_prob * num_tokens / mask_length, rounded up or down at random in proportion. The official code
    may select nothing or everything in a short sequence; here one token at least is selected, and one is not.
    """
    num_spans = max(int(mask_prob * num_tokens / mask_length + rng.random()), 1)
    starts = rng.choice(num_tokens, num_spans, replace=False)
    places = (starts[:, None] + np.arange(mask_length)).ravel()
    selected = np.zeros(num_tokens, dtype=bool)
    selected[places[places < num_tokens]] = True
    if selected.all() and num_tokens > 1:
        selected[rng.integers(num_tokens)] = False
    return selected


class TokenMasking:
    """BERT's 80/10/10 or spans of <mask>, as a policy. Any token may be selected, <s> and </s> too.

    Random symbols are uniform over all but the first four special ones: <mask> is among them, as officially.
    """

    def __init__(self, config: TokenMaskingConfig, vocabulary: Vocabulary) -> None:
        config.check()
        self.config, self.vocabulary = config, vocabulary

    def __call__(self, layouts: Sequence[Layout], num_copies: int, rngs: Sequence[np.random.Generator]) -> Masks:
        longest = max(layout.num_tokens for layout in layouts)
        fill = np.full((len(layouts), num_copies, longest), NOT_SELECTED, dtype=np.int64)
        for rows, layout, rng in zip(fill, layouts, rngs, strict=True):
            for row in rows:
                row[: layout.num_tokens] = self.draw(layout, rng)
        return Masks.of(fill >= 0, self._scored(fill), fill)

    def hidden_share(self, layout: Layout) -> tuple[float, float]:
        """The mean of what `select` selects, without the share that is left alone.

        Of very short sequences less is hidden, since one token is never selected: the bounds leave room for that one.
        """
        config, size = self.config, layout.num_tokens
        if layout.maskable is not None or config.score == "masked":
            return 0.0, 1.0
        spans = config.mask_prob * size / config.mask_length
        few, more = math.floor(spans), spans - math.floor(spans)
        shares = [covered_share(size, config.mask_length, max(n, 1), size) for n in (few, few + 1)]
        selected = (1 - more) * shares[0] + more * shares[1]
        most = selected * (1 - config.unmasked_prob)
        return (most if selected < 0.9 else most - 1 / size), most

    def draw(self, layout: Layout, rng: np.random.Generator) -> np.ndarray:
        """(T,) int64: the id that replaces each token, or one of the codes below 0."""
        config, mask, num_tokens = self.config, self.vocabulary.mask, layout.num_tokens
        selected = select(num_tokens, config.mask_prob, config.mask_length, rng)
        if layout.maskable is not None:
            selected &= layout.maskable
        fill = np.where(selected, mask, NOT_SELECTED)
        either = config.random_prob + config.unmasked_prob
        if either > 0:
            kept_from_mask = selected & (rng.random(num_tokens) < either)
            left = kept_from_mask & (rng.random(num_tokens) < config.unmasked_prob / either)
            fill[left] = LEFT_ALONE
            randomised = kept_from_mask & ~left
            fill[randomised] = rng.integers(NUM_SPECIAL, mask + 1, randomised.sum())
            if (
                config.score == "masked" and selected.any() and not (fill == mask).any()
            ):  # a short sample would count for nothing
                fill[np.flatnonzero(selected)[0]] = mask
        return fill

    def _scored(self, fill: np.ndarray) -> np.ndarray:
        return fill == self.vocabulary.mask if self.config.score == "masked" else fill != NOT_SELECTED
