"""Clips to tokens and to what student and teacher see, and from encoded tokens to predictions: data2vec 2.0.

A token is a tubelet: a patch of a few frames (ViViT, arXiv:2103.15691).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from d2v_core.config import ModelConfig, opt
from d2v_core.contract import FeatureEncoder, Masks, Tokens
from d2v_core.decoder import ConvDecoder, DecoderBlock, DecoderConfig
from d2v_core.visible import Prenet, PrenetConfig, take_visible

CHANNELS = 3  # red, green, blue


@dataclass
class FeaturesConfig:
    """Section `features`: what a token is."""

    tubelet: int = opt(2, "Frames in a token.")
    patch_size: int = opt(8, "Side of a token, pixels.")
    positions: Literal["fixed", "learned"] = opt("fixed", "Sines of frame, row and column; learned begins as these.")


def sine_positions(grid: tuple[int, ...], dim: int) -> Tensor:
    """(T, dim) float32 of a grid of three axes: a third of the channels for each axis, sines of dim / 6 frequencies,
    then their cosines. Frequency i is 10000^(-i / (dim / 6))."""
    if dim % 6:
        raise ValueError(f"model.embed_dim={dim} must be a multiple of 6: sines and cosines of frame, row and column")
    frequencies = 10000.0 ** (-torch.arange(dim // 6, dtype=torch.float64) / (dim // 6))
    places = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    angles = [place.flatten().unsqueeze(1) * frequencies for place in places]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1).float()


class TubeletEncoder(FeatureEncoder):
    """Positions are added to all tubelets, hidden ones then leave; the norm before the first block follows."""

    def __init__(self, features: FeaturesConfig, model: ModelConfig, clip: tuple[int, int, int]) -> None:
        """clip: frames, rows and columns of pixels, of which `grid` tubelets are made."""
        super().__init__()
        self.clip = clip
        self.grid = (clip[0] // features.tubelet, clip[1] // features.patch_size, clip[2] // features.patch_size)
        size = (features.tubelet, features.patch_size, features.patch_size)
        self.embedding = nn.Conv3d(CHANNELS, model.embed_dim, size, stride=size)
        nn.init.xavier_uniform_(self.embedding.weight.data.flatten(1))  # as of a linear map
        self.positions = nn.Parameter(sine_positions(self.grid, model.embed_dim), features.positions == "learned")
        self.prenet = Prenet(PrenetConfig(), model)  # without blocks: the norm alone, where blocks are post-norm

    def embed(self, inputs: Mapping[str, Tensor]) -> Tokens:
        """inputs: clip (B, 3, F, S, S) float32, normalised. Raises ValueError where that is another shape."""
        clip = inputs["clip"]
        if clip.dim() != 5 or clip.shape[1:] != (CHANNELS, *self.clip):
            raise ValueError(f"clip has shape {tuple(clip.shape)}; expected (B, {CHANNELS}, {str(self.clip)[1:-1]})")
        return Tokens(self.embedding(clip).flatten(2).mT, None, self.grid)

    def view(self, tokens: Tokens, masks: Masks | None) -> Tokens:
        x, index = tokens.x + self.positions.to(tokens.x.dtype), None
        if masks is not None:
            assert masks.visible is not None, "data2vec 2.0 needs masks that say what is visible"
            x, index = take_visible(x, masks), masks.visible.flatten(0, 1)
        return Tokens(self.prenet(x, None), None, tokens.grid, index=index)


class SpaceTimeDecoder(ConvDecoder):
    """data2vec 2.0's decoder over three axes: each layer is a convolution within every frame, then one through time at
    every place, as d2v's own has one and two axes only. Clips are never padded."""

    def __init__(self, config: DecoderConfig, embed_dim: int) -> None:
        super().__init__(config, embed_dim, num_axes=2)
        self.through_time = nn.ModuleList(DecoderBlock(config.dim, config, num_axes=1) for _ in range(config.layers))

    def convolve(self, x: Tensor, keep: Tensor | None, grid: tuple[int, ...]) -> Tensor:
        """(R, T, D) -> (R, T, dim)."""
        assert keep is None
        rows, frames = len(x), grid[0]
        for within, through in zip(self.blocks, self.through_time, strict=True):
            x = rearrange(x, "r (f p) c -> (r f) p c", f=frames)
            x = rearrange(self._add(x, within(x, grid[1:])), "(r f) p c -> (r p) f c", r=rows)
            x = rearrange(self._add(x, through(x, grid[:1])), "(r p) f c -> r (f p) c", r=rows)
        return x

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y if self.config.residual and x.shape == y.shape else y
