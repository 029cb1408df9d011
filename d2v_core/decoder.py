"""The head of data2vec 2.0: visible tokens and noise back on the grid, then a few convolutions.

Source: fairseq, examples/data2vec/models/modalities/modules.py (`Decoder1d`, `Decoder2d`) and base.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2v_core.config import opt
from d2v_core.contract import Masks, Predictor, Tokens
from d2v_core.kernels import Linear, grouped_conv1d_same


@dataclass
class DecoderConfig:
    """Section `decoder`: from the encoded visible tokens to predictions at the hidden places."""

    dim: int = opt(384, "Channels of every convolution.")
    layers: int = opt(4, "Convolutions.")
    kernel: int = opt(7, "Taps along every axis of the grid.")
    groups: int = opt(16, "Channel groups of each convolution.")
    residual: bool = opt(True, "Add each convolution's input to its output, where both have the same channels.")
    projection_layers: int = opt(1, "Linear maps to D at the end, GELU between them.")
    projection_ratio: float = opt(2.0, "Width between the linear maps over `dim`.")
    input_dropout: float = opt(0.0, "Of the encoded tokens.")
    noise_std: float = opt(0.01, "Standard deviation of the normal noise that stands at places not encoded.")


class DecoderBlock(nn.Module):
    """Convolution to the same grid, layer norm over channels without affine, GELU; (R, T, C) -> (R, T, dim)."""

    def __init__(self, channels: int, config: DecoderConfig, num_axes: int) -> None:
        super().__init__()
        kind = nn.Conv1d if num_axes == 1 else nn.Conv2d
        self.kernel, self.groups = config.kernel, config.groups
        self.conv = kind(channels, config.dim, config.kernel, padding=config.kernel // 2, groups=config.groups)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """x (R, T, C), the places of a grid flattened row-major -> (R, T, dim)."""
        if len(grid) == 1:
            y = grouped_conv1d_same(x, self.conv.weight, self.conv.bias, self.groups)
        else:
            y = self.conv(x.transpose(1, 2).reshape(len(x), x.shape[2], *grid))
            # An even kernel gives one row and one column too many: the last ones go, as in the official code.
            y = y[..., : grid[0], : grid[1]].flatten(2).transpose(1, 2)
        return F.gelu(F.layer_norm(y, y.shape[-1:]))


class ConvDecoder(Predictor):
    """One- or two-dimensional convolutions over all places, then linear maps at the scored ones.

    There is no mask token: a place that was not encoded holds noise, drawn anew in every forward pass. Padding is set
    to zero before every convolution, so that it cannot change a valid token; leaky_padding leaves it as it is, as the
    official code does.
    """

    def __init__(self, config: DecoderConfig, embed_dim: int, num_axes: int, leaky_padding: bool = False) -> None:
        """embed_dim: D, of what comes in and goes out. num_axes: of the grid, 1 or 2. Everything keeps
        PyTorch's initial weights."""
        super().__init__()
        if num_axes not in (1, 2):
            raise ValueError(f"a decoder of {num_axes} axes: there are convolutions of one and of two")
        for key in ("dim", "layers", "kernel", "groups", "projection_layers"):
            if getattr(config, key) < 1:
                raise ValueError(f"decoder.{key}={getattr(config, key)} must be at least 1")
        for key, value in (("model.embed_dim", embed_dim), ("decoder.dim", config.dim)):
            if value % config.groups:
                raise ValueError(f"{key}={value} must be a multiple of decoder.groups={config.groups}")
        if not 0 <= config.input_dropout < 1 or config.noise_std < 0:
            raise ValueError(
                f"decoder.input_dropout={config.input_dropout} must be at least 0 and below 1, "
                f"decoder.noise_std={config.noise_std} at least 0"
            )
        self.config, self.leaky_padding = config, leaky_padding
        self.blocks = nn.ModuleList(
            DecoderBlock(config.dim if i else embed_dim, config, num_axes) for i in range(config.layers)
        )
        hidden = int(config.dim * config.projection_ratio)
        widths = [config.dim, *[hidden] * (config.projection_layers - 1), embed_dim]
        self.projections = nn.ModuleList(Linear(a, b) for a, b in pairwise(widths))

    def forward(self, tokens: Tokens, masks: Masks) -> Tensor:
        """As `Predictor.forward`; tokens.x holds the visible tokens only."""
        x, keep = self.on_the_grid(tokens, masks)
        return self.project(self.convolve(x, keep, tokens.grid).flatten(0, 1)[masks.scored_rows])

    def on_the_grid(self, tokens: Tokens, masks: Masks) -> tuple[Tensor, Tensor | None]:
        """Encoded tokens at their places, noise elsewhere, (R, T, D); and what is no padding, (R, T, 1)."""
        encoded = F.dropout(tokens.x[:, tokens.num_extra :], self.config.input_dropout, self.training)
        assert tokens.index is not None
        full = self.noise(encoded, math.prod(tokens.grid))
        full = full.scatter(1, tokens.index.unsqueeze(-1).expand_as(encoded), encoded)
        if tokens.padding_mask is None or self.leaky_padding:
            return full, None
        # Whatever is neither hidden nor a valid encoded token is padding.
        valid = ~tokens.padding_mask[:, tokens.num_extra :]
        keep = masks.hidden.flatten(0, 1).scatter(1, tokens.index, valid)
        return full, keep.unsqueeze(-1)

    def noise(self, like: Tensor, num_tokens: int) -> Tensor:
        """(R, T, D) for T = num_tokens; rows, width, type and device are those of `like`."""
        return torch.randn(
            like.shape[0], num_tokens, like.shape[2], dtype=like.dtype, device=like.device
        ) * self.config.noise_std  # fmt: skip

    def convolve(self, x: Tensor, keep: Tensor | None, grid: tuple[int, ...]) -> Tensor:
        """x (R, T, D) -> (R, T, dim). keep (R, T, 1) bool, False = padding, set to zero; None = nothing is."""
        for block in self.blocks:
            if keep is not None:
                x = x * keep
            y = block(x, grid)
            x = x + y if self.config.residual and x.shape == y.shape else y
        return x

    def project(self, x: Tensor) -> Tensor:
        """x (..., dim) -> (..., D)."""
        for i, linear in enumerate(self.projections):
            x = linear(F.gelu(x) if i else x)
        return x
