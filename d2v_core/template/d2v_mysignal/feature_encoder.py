"""Signals to tokens, and tokens to what student and teacher see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2v_core.config import ModelConfig, opt
from d2v_core.contract import FeatureEncoder, Masks, Tokens
from d2v_core.positions import ConvPositions, ConvPositionsConfig


@dataclass
class FeaturesConfig:
    """Section `features`: how a signal becomes tokens."""

    patch: int = opt(20, "Values of the signal in a token.")


class PatchEmbedding(nn.Module):
    """(B, S) values -> (B, T, D): T = S // patch tokens, each a linear map of its values; what is left over is cut."""

    def __init__(self, patch: int, embed_dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.linear = nn.Linear(patch, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, signal: Tensor) -> Tensor:
        num_tokens = signal.shape[1] // self.patch
        return self.norm(self.linear(signal[:, : num_tokens * self.patch].reshape(-1, num_tokens, self.patch)))


class SignalEncoder(FeatureEncoder):
    """Patches; hidden ones are replaced by a learned vector; positions come from a convolution over what is left."""

    def __init__(self, features: FeaturesConfig, positions: ConvPositionsConfig, model: ModelConfig) -> None:
        super().__init__()
        self.patch, self.dropout = features.patch, model.dropout
        self.embedding = PatchEmbedding(features.patch, model.embed_dim)  # all that embed() uses lives in here
        self.mask_embedding = nn.Parameter(torch.rand(model.embed_dim))
        self.positions = ConvPositions(model.embed_dim, positions)
        self.norm = nn.LayerNorm(model.embed_dim, eps=model.norm_eps)

    def embed(self, inputs: Mapping[str, Tensor]) -> Tokens:
        """Content only. inputs: signal (B, S) float32, and num_values (B,) int64 where some are padded."""
        x = self.embedding(inputs["signal"])
        padding_mask = None
        if "num_values" in inputs:
            num_tokens = inputs["num_values"] // self.patch
            padding_mask = torch.arange(x.shape[1], device=x.device) >= num_tokens[:, None]
        return Tokens(x, padding_mask, grid=(x.shape[1],))

    def view(self, tokens: Tokens, masks: Masks | None) -> Tokens:
        """Hide (student only), then place: a position must know nothing of what is hidden."""
        x, padding_mask = tokens.x, tokens.padding_mask
        if masks is not None:
            # M masked copies of each sample, which stand together: (B, T, D) -> (B * M, T, D).
            x = x.unsqueeze(1).expand(-1, masks.num_copies, -1, -1)
            x = torch.where(masks.hidden.unsqueeze(-1), self.mask_embedding.to(x.dtype), x).flatten(0, 1)
            if padding_mask is not None:
                padding_mask = padding_mask.repeat_interleave(masks.num_copies, 0)
        if padding_mask is not None:
            x = x.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        x = self.norm(x + self.positions(x, padding_mask))
        return Tokens(F.dropout(x, self.dropout, self.training), padding_mask, tokens.grid)
