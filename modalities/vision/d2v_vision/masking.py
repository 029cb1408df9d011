"""Block masks of BEiT, as data2vec uses them (data2vec_vision: beit/masking_generator.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d2v_core.config import opt
from d2v_core.contract import Layout, Masks

ATTEMPTS = 10  # to place one block, before the mask is left as it is


@dataclass
class BlockMaskingConfig:
    """Section `mask`: rectangles until enough patches are hidden."""

    num_patches: int = opt(120, "Patches to hide in an image; never more, sometimes a few less.")
    min_block: int = opt(16, "Least area of a block, patches.")
    max_block: int | None = opt(None, "Most patches that one block may add; null = no bound but num_patches.")
    min_aspect: float = opt(0.3, "Least height over width of a block; the largest is its inverse.")

    def check(self, num_tokens: int) -> None:
        """Raises ValueError."""
        if not 1 <= self.num_patches < num_tokens:
            raise ValueError(
                f"mask.num_patches={self.num_patches} must lie between 1 and {num_tokens - 1}: an image has "
                f"{num_tokens} patches, of which at least one stays visible"
            )
        if self.min_block < 1:
            raise ValueError(f"mask.min_block={self.min_block} must be at least 1")
        if self.max_block is not None and self.max_block < self.min_block:
            raise ValueError(f"mask.max_block={self.max_block} must be at least mask.min_block={self.min_block}")
        if not 0 < self.min_aspect <= 1:
            raise ValueError(f"mask.min_aspect={self.min_aspect} must lie between 0 and 1")


def block_mask(rows: int, columns: int, config: BlockMaskingConfig, rng: np.random.Generator) -> np.ndarray:
    """(rows, columns) bool, True = hidden: a union of rectangles of at most `num_patches` patches.

    Area uniform from `min_block` to what may still be hidden (the bounds cross when little is left, as in the official
    code), height over width log-uniform, place uniform. A block is taken where it hides something new, and no more
    than may be hidden. Where ten attempts in a row fail, the mask is left as it is: with 120 of 14 x 14 about a third
    of the masks end up to ten patches short.
    """
    hidden = np.zeros((rows, columns), dtype=bool)
    count, log_aspect = 0, math.log(config.min_aspect)
    while count < config.num_patches:
        room = config.num_patches - count
        if config.max_block is not None:
            room = min(room, config.max_block)
        for _ in range(ATTEMPTS):
            area = config.min_block + (room - config.min_block) * rng.random()
            aspect = math.exp(log_aspect * (1.0 - 2.0 * rng.random()))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, left = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
            block = hidden[top : top + height, left : left + width]
            new = block.size - int(block.sum())
            if 0 < new <= room:
                block[:] = True
                count += new
                break
        else:
            break
    if count == 0:  # a grid too small for any block; the official code would fail at an empty loss
        hidden.flat[int(rng.integers(hidden.size))] = True
    return hidden


class BlockMasking:
    """Block masks as a policy. All images of a batch have the same grid; how many patches are hidden differs."""

    def __init__(self, config: BlockMaskingConfig) -> None:
        self.config = config

    def hidden_share(self, layout: Layout) -> tuple[float, float]:
        """At least one patch, at most `num_patches`. How many a mask ends up short has no closed form."""
        return 1 / layout.num_tokens, self.config.num_patches / layout.num_tokens

    def __call__(self, layouts: Sequence[Layout], num_copies: int, rngs: Sequence[np.random.Generator]) -> Masks:
        hidden = [
            [block_mask(layout.shape[0], layout.shape[1], self.config, rng).ravel() for _ in range(num_copies)]
            for layout, rng in zip(layouts, rngs, strict=True)
        ]
        return Masks.of(np.array(hidden))
