"""Spans for one-dimensional sequences (1.0), blocks on grids of any number of axes (2.0).

Source: fairseq/data/data_utils.py, `compute_mask_indices` and `compute_block_mask_1d` and `_2d`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d2v_core.config import FinetuneConfig, opt
from d2v_core.contract import Corruption, Layout, Masks


@dataclass
class SpanMaskingConfig:
    """Section `mask` of a modality that hides spans."""

    mask_prob: float = opt(
        0.65, "Expected share of tokens hidden if no two spans met; spans overlap, so 0.65 hides about 49 %."
    )
    mask_length: int = opt(10, "Length of a span in tokens.")
    min_spans: int = opt(1, "Least number of spans in a sample.")
    same_count: bool = opt(
        True, "Hide equally many tokens in every sample of a micro-batch, by showing single random ones again."
    )
    mask_dropout: float = opt(0.0, "Share of each sample's hidden tokens that are shown again in the end, at random.")


def span_mask(
    num_tokens: int, mask_prob: float, mask_length: int, rng: np.random.Generator, min_spans: int = 1
) -> np.ndarray:
    """(num_tokens,) bool, True = hidden: the union of spans that start at distinct places.

    The number of spans is mask_prob * num_tokens / mask_length, rounded up or down at random in proportion, and at
    least min_spans. As in the
    official code the last possible start is never drawn, so the last token of a sequence stays visible; at least one
    token always does, which the official code leaves to chance and then fails.
    """
    num_spans = max(int(mask_prob * num_tokens / mask_length + rng.random()), min_spans)
    num_starts = num_tokens - mask_length
    if num_starts <= num_spans:  # as many spans as places: the official code then lets spans start anywhere early
        num_starts = num_spans + 1
    starts = rng.choice(num_starts, num_spans, replace=False)
    places = np.unique((starts[:, None] + np.arange(mask_length)).ravel())
    mask = np.zeros(num_tokens, dtype=bool)
    mask[places[places < num_tokens]] = True
    if mask.all() and num_tokens > 1:
        mask[rng.integers(num_tokens)] = False
    return mask


def covered_share(num_tokens: int, mask_length: int, num_spans: int, num_starts: int) -> float:
    """Mean share of tokens under `num_spans` spans that begin at distinct places among the first `num_starts`.

    A token is missed where none of the starts that would reach it is drawn, which is a hypergeometric chance.
    """
    missed = 0.0
    for token in range(num_tokens):
        reaching = max(min(token, num_starts - 1) - max(token - mask_length + 1, 0) + 1, 0)
        missed += math.comb(num_starts - reaching, num_spans) / math.comb(num_starts, num_spans)
    return 1.0 - missed / num_tokens


def trim_mask(mask: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Keep `count` of the True places of a (T,) mask, chosen uniformly."""
    places = np.flatnonzero(mask)
    if len(places) <= count:
        return mask
    trimmed = np.zeros_like(mask)
    trimmed[rng.choice(places, count, replace=False)] = True
    return trimmed


class SpanMasking:
    """Span masking as a policy, for any sequence. Hides spans of the unpadded tokens of each sample."""

    def __init__(self, config: SpanMaskingConfig) -> None:
        if not 0 < config.mask_prob < 1:
            raise ValueError(f"mask.mask_prob={config.mask_prob} must lie between 0 and 1")
        for key, least in (("mask_length", 1), ("min_spans", 0)):
            if getattr(config, key) < least:
                raise ValueError(f"mask.{key}={getattr(config, key)} must be at least {least}")
        if not 0 <= config.mask_dropout < 1:
            raise ValueError(f"mask.mask_dropout={config.mask_dropout} must lie between 0 and 1")
        self.config = config

    def hidden_share(self, layout: Layout) -> tuple[float, float]:
        """The exact mean, where the whole sample may be hidden and no mask is cut to leave one token visible."""
        config, size = self.config, layout.num_tokens
        if layout.maskable is not None:
            return 0.0, 1.0
        spans = config.mask_prob * size / config.mask_length
        means: dict[int, float] = {}
        for count in (math.floor(spans), math.floor(spans) + 1):
            num_spans = max(count, config.min_spans)
            means[count] = covered_share(
                size, config.mask_length, num_spans, max(size - config.mask_length, num_spans + 1)
            )
        more = spans - math.floor(spans)
        mean = (1 - more) * means[math.floor(spans)] + more * means[math.floor(spans) + 1]
        spread = 0.5 / size if config.mask_dropout > 0 else 0.0  # of rounding to whole tokens
        mean *= 1 - config.mask_dropout
        return mean - spread, mean + spread

    def __call__(self, layouts: Sequence[Layout], num_copies: int, rngs: Sequence[np.random.Generator]) -> Masks:
        config = self.config
        masks = [
            span_mask(layout.num_tokens, config.mask_prob, config.mask_length, rng, config.min_spans)
            for layout, rng in zip(layouts, rngs, strict=True)
            for _ in range(num_copies)
        ]
        for i, layout in enumerate(layouts):
            if layout.maskable is not None:
                for mask in masks[i * num_copies : (i + 1) * num_copies]:
                    mask &= layout.maskable
        if config.same_count:
            least = min(int(mask.sum()) for mask in masks)
            masks = [trim_mask(mask, least, rngs[i // num_copies]) for i, mask in enumerate(masks)]
        if config.mask_dropout > 0:
            keep = [int(mask.sum()) - round(mask.sum() * config.mask_dropout) for mask in masks]
            masks = [trim_mask(mask, keep[i], rngs[i // num_copies]) for i, mask in enumerate(masks)]
        hidden = np.zeros((len(layouts), num_copies, max(layout.num_tokens for layout in layouts)), dtype=bool)
        for i, mask in enumerate(masks):
            hidden[i // num_copies, i % num_copies, : len(mask)] = mask
        return Masks.of(hidden)


class FinetuneMasking:
    """Spans of tokens and of channels that fine-tuning withholds; equally many in every sample of a micro-batch.

    Source: fairseq, wav2vec2.py, apply_mask: tokens first, then channels, both by the same rule.
    """

    def __init__(self, config: FinetuneConfig, num_channels: int) -> None:
        self.num_channels = num_channels
        self._tokens = self._channels = None
        if config.mask_prob > 0:
            self._tokens = SpanMasking(SpanMaskingConfig(config.mask_prob, config.mask_length))
        if config.channel_mask_prob > 0:
            channels = SpanMaskingConfig(config.channel_mask_prob, config.channel_mask_length, min_spans=0)
            self._channels = SpanMasking(channels)

    def __call__(self, layouts: Sequence[Layout], rngs: Sequence[np.random.Generator]) -> Corruption | None:
        """rngs: one generator per sample, made for this sample and epoch."""
        if self._tokens is None and self._channels is None:
            return None
        tokens = None if self._tokens is None else self._tokens(layouts, 1, rngs).hidden[:, 0]
        whole = [Layout((self.num_channels,))] * len(layouts)
        channels = None if self._channels is None else self._channels(whole, 1, rngs).hidden[:, 0]
        return Corruption(tokens, channels)


@dataclass
class BlockMaskingConfig:
    """Section `mask` of data2vec 2.0: blocks of tokens on a grid of any number of axes, then an exact share."""

    mask_prob: float = opt(0.5, "Share of each sample's tokens that is hidden, rounded down to whole tokens.")
    mask_length: int = opt(5, "Side of a block in tokens, along every axis of the grid.")
    adjust: float = opt(
        0.05,
        "Blocks overlap and hide less than they have tokens: this much more of the grid is drawn, and single random "
        "tokens are then hidden or shown until the share is exact.",
    )
    inverse: bool = opt(False, "Blocks are what stays visible, rather than what is hidden.")


def draw_blocks(shape: tuple[int, ...], config: BlockMaskingConfig, rng: np.random.Generator) -> np.ndarray:
    """Bool grid of this shape, True in a block. Centres fall anywhere, with replacement; what reaches over the border
    is cut off."""
    size, side = math.prod(shape), config.mask_length
    share = 1.0 - config.mask_prob if config.inverse else config.mask_prob
    num_blocks = int(size * (share + config.adjust) / side ** len(shape))
    blocks = np.zeros(shape, dtype=bool)
    for centre in zip(*np.unravel_index(rng.integers(size, size=num_blocks), shape), strict=True):
        first = [int(c) - side // 2 for c in centre]
        blocks[tuple(slice(max(i, 0), i + side) for i in first)] = True
    return blocks


def num_in_blocks(num_allowed: int, config: BlockMaskingConfig) -> int:
    """How many tokens stand in blocks in the end, of those that the mask is about."""
    count = int(num_allowed * (1.0 - config.mask_prob if config.inverse else config.mask_prob))
    return max(min(count, num_allowed - 1), 1) if num_allowed > 1 else int(not config.inverse)


def block_mask(
    shape: tuple[int, ...], config: BlockMaskingConfig, rng: np.random.Generator, allowed: np.ndarray | None = None
) -> np.ndarray:
    """(T,) bool of a grid of this shape, True = hidden (fairseq: data_utils.py, compute_block_mask_1d and _2d).

    Blocks, then single tokens at random more or less until the share is exact. allowed: (T,) bool, the tokens that the
    mask is about; the share is one of them. At least one is hidden, and one visible where there are two or more.
    """
    if allowed is None:
        allowed = np.ones(math.prod(shape), dtype=bool)
    count = num_in_blocks(int(allowed.sum()), config)
    blocks = trim_mask(draw_blocks(shape, config, rng).ravel() & allowed, count, rng)
    missing = count - int(blocks.sum())
    if missing > 0:
        blocks[rng.choice(np.flatnonzero(allowed & ~blocks), missing, replace=False)] = True
    return allowed & ~blocks if config.inverse else blocks


class BlockMasking:
    """Block masks as a policy, with what the student encodes: every visible token, and no more.

    Where samples are padded, a shorter one has fewer visible tokens; its row is filled up with padding, so that every
    row keeps as many as the longest. A sample of one token is shown what it is asked for.

    official_quirks: as fairseq, masks are drawn before cropping (`Layout.num_uncropped`) and over padding too, and as
    many tokens are kept in every row as are visible in the first: rows with fewer also encode tokens that are hidden
    and scored, rows with more lose some that are visible.
    """

    def __init__(self, config: BlockMaskingConfig, official_quirks: bool = False) -> None:
        if not 0 < config.mask_prob < 1:
            raise ValueError(f"mask.mask_prob={config.mask_prob} must lie between 0 and 1")
        if config.mask_length < 1:
            raise ValueError(f"mask.mask_length={config.mask_length} must be at least 1")
        if not 0 <= config.adjust < 1:
            raise ValueError(f"mask.adjust={config.adjust} must be at least 0 and below 1")
        self.config, self.official_quirks = config, official_quirks

    def hidden_share(self, layout: Layout) -> tuple[float, float]:
        """The exact share, which every mask has."""
        if self.official_quirks:
            return 0.0, 1.0
        allowed = layout.num_tokens if layout.maskable is None else int(layout.maskable.sum())
        count = num_in_blocks(allowed, self.config)
        share = (allowed - count if self.config.inverse else count) / layout.num_tokens
        return share, share

    def __call__(self, layouts: Sequence[Layout], num_copies: int, rngs: Sequence[np.random.Generator]) -> Masks:
        shapes = {layout.shape for layout in layouts}
        if len(shapes) > 1 and any(len(shape) > 1 for shape in shapes):
            raise ValueError(f"samples of a micro-batch have different grids: {sorted(shapes)}; only sequences may")
        num_tokens = max(layout.num_tokens for layout in layouts)
        hidden = np.zeros((len(layouts), num_copies, num_tokens), dtype=bool)
        padded = np.zeros((len(layouts), num_tokens), dtype=bool)
        for row, (layout, rng) in enumerate(zip(layouts, rngs, strict=True)):
            for copy in range(num_copies):
                mask = self._official(layout, num_tokens, rng) if self.official_quirks else self._one(layout, rng)
                hidden[row, copy, : len(mask)] = mask
            padded[row, layout.num_tokens :] = True
        if self.official_quirks:
            return Masks.of(hidden, visible=_kept_as_in_the_first_row(hidden, rngs))
        visible = visible_places(hidden, padded)
        # Samples of which only part may be hidden can have fewer visible tokens than there are places: what then had
        # to be taken from the hidden ones is not hidden.
        shown = np.zeros_like(hidden)
        np.put_along_axis(shown, visible, True, axis=-1)
        alone = (~padded).sum(-1) == 1
        return Masks.of(hidden & (~shown | alone[:, None, None]), visible=visible)

    def _one(self, layout: Layout, rng: np.random.Generator) -> np.ndarray:
        return block_mask(layout.shape, self.config, rng, layout.maskable)

    def _official(self, layout: Layout, num_tokens: int, rng: np.random.Generator) -> np.ndarray:
        if len(layout.shape) > 1:
            return block_mask(layout.shape, self.config, rng)
        whole = max(layout.num_uncropped or 0, num_tokens)
        first = int(rng.integers(whole - num_tokens + 1))
        return block_mask((whole,), self.config, rng)[first : first + num_tokens]


def visible_places(hidden: np.ndarray, padded: np.ndarray) -> np.ndarray:
    """hidden (B, M, T), padded (B, T) bool -> (B, M, V) int64, ascending: every place that is neither, then as many
    padded ones as make all rows equally long. A token that is alone in its sample is always among them."""
    rank = np.where(hidden, 2, padded[:, None, :].astype(int))
    alone = (~padded).sum(-1) == 1
    rank[alone] = np.where(padded[alone, None, :], 1, 0)
    order = np.argsort(rank, axis=-1, kind="stable")
    num_visible = int((rank == 0).sum(-1).max())
    return np.sort(order[..., :num_visible], axis=-1)


def _kept_as_in_the_first_row(hidden: np.ndarray, rngs: Sequence[np.random.Generator]) -> np.ndarray:
    """(B, M, V): V visible places of each row, ties in random order (officially an unstable sort decides)."""
    ties = np.zeros(hidden.shape)
    for row, rng in zip(ties, rngs, strict=True):
        row[:] = rng.random(row.shape)
    return np.argsort(hidden + 0.5 * ties, axis=-1)[..., : int((~hidden[0, 0]).sum())]
