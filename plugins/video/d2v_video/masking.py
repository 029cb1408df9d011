"""Tubes: the same places are hidden in a row of frames, so that no hidden patch can be copied from the frame before."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from d2v_core.config import opt
from d2v_core.contract import Layout, Masks
from d2v_core.masking import BlockMasking, BlockMaskingConfig, visible_places


@dataclass
class TubeMaskingConfig(BlockMaskingConfig):
    """Section `mask`: d2v's block masks over the places of a frame, each hidden for the length of a tube."""

    tube_length: int | None = opt(None, "Tokens in time after which other places are hidden; null = the whole clip.")


class TubeMasking(BlockMasking):
    """Masks of (frames, rows, columns) grids. Every frame has the same number of hidden places."""

    def __init__(self, config: TubeMaskingConfig) -> None:
        super().__init__(config)
        if config.tube_length is not None and config.tube_length < 1:
            raise ValueError(f"mask.tube_length={config.tube_length} must be at least 1")
        self.tube_length = config.tube_length

    def hidden_share(self, layout: Layout) -> tuple[float, float]:
        """The exact share, which every frame of every mask has."""
        return super().hidden_share(Layout(layout.shape[1:]))

    def __call__(self, layouts: Sequence[Layout], num_copies: int, rngs: Sequence[np.random.Generator]) -> Masks:
        shapes = {layout.shape for layout in layouts}
        if len(shapes) > 1 or len(layouts[0].shape) != 3:
            raise ValueError(f"tubes need one grid of (frames, rows, columns) for all clips, not {sorted(shapes)}")
        frames, *plane = layouts[0].shape
        length, places = self.tube_length or frames, [Layout(tuple(plane))] * len(layouts)
        tubes = [super(TubeMasking, self).__call__(places, num_copies, rngs) for _ in range(0, frames, length)]
        every = torch.stack([tube.hidden for tube in tubes], 2).repeat_interleave(length, 2)[:, :, :frames]
        hidden = every.flatten(2).numpy()
        return Masks.of(hidden, visible=visible_places(hidden, np.zeros((len(layouts), hidden.shape[2]), dtype=bool)))
