"""Two masks on the grid of (steps, groups): stretches of time in all groups, or stretches of each group by itself.

The first asks what happened meanwhile. The second asks for one channel given the others: which action leads from this
observation to the next, what it was worth.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from d2v_core.config import opt
from d2v_core.contract import Layout, Masks
from d2v_core.masking import BlockMasking, BlockMaskingConfig, block_mask, visible_places


@dataclass
class TrajectoryMaskingConfig(BlockMaskingConfig):
    """Section `mask`: d2v's block masks over the steps. Every group has the same number of hidden tokens."""

    channel_prob: float = opt(0.5, "Probability that a mask is drawn for each group by itself.")
    channel_length: int = opt(16, "Steps of a stretch in such a mask, in place of mask_length.")


class TrajectoryMasking(BlockMasking):
    """Masks of (steps, groups) grids, which may differ in their steps."""

    def __init__(self, config: TrajectoryMaskingConfig) -> None:
        super().__init__(config)
        if not 0 <= config.channel_prob <= 1 or config.channel_length < 1:
            given = f"mask.channel_prob={config.channel_prob} and mask.channel_length={config.channel_length}"
            raise ValueError(f"{given} must be a share and at least 1")
        self.channels, self.channel_prob = replace(config, mask_length=config.channel_length), config.channel_prob

    def hidden_share(self, layout: Layout) -> tuple[float, float]:
        """The exact share, which every group in every mask has."""
        return super().hidden_share(Layout(layout.shape[:1]))

    def __call__(self, layouts: Sequence[Layout], num_copies: int, rngs: Sequence[np.random.Generator]) -> Masks:
        sizes = np.array([layout.num_tokens for layout in layouts])
        hidden = np.zeros((len(layouts), num_copies, sizes.max()), dtype=bool)
        for copies, layout, rng in zip(hidden, layouts, rngs, strict=True):
            for copy in copies:
                copy[: layout.num_tokens] = self._one(layout, rng)
        return Masks.of(hidden, visible=visible_places(hidden, np.arange(sizes.max()) >= sizes[:, None]))

    def _one(self, layout: Layout, rng: np.random.Generator) -> np.ndarray:
        (steps, groups), apart = layout.shape, rng.random() < self.channel_prob
        if not apart:
            return np.repeat(block_mask((steps,), self.config, rng), groups)
        return np.stack([block_mask((steps,), self.channels, rng) for _ in range(groups)], 1).ravel()
