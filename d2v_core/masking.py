"""Span masks for one-dimensional sequences (fairseq: fairseq/data/data_utils.py, `compute_mask_indices`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d2v_core.config import opt
from d2v_core.contract import Layout, Masks


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

    The number of spans is mask_prob * num_tokens / mask_length, rounded up or down at random in proportion. As in the
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
