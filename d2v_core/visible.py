"""Parts of data2vec 2.0's student, which encodes visible tokens only (arXiv:2212.07525).

Gathering, ALiBi on original places, and blocks that belong to the feature encoder. Which of them it uses is a
modality's choice. Source: fairseq, examples/data2vec/models/modalities/base.py and modules.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2v_core.config import ModelConfig, opt
from d2v_core.contract import AttentionBias, Masks, Tokens
from d2v_core.transformer import Transformer, init_bert


def take_visible(x: Tensor, masks: Masks) -> Tensor:
    """The visible tokens of each copy: x (B, T, D), once per sample, or (R, T, D), once per copy -> (R, V, D)."""
    assert masks.visible is not None
    samples, copies, kept = masks.visible.shape
    index = masks.visible.reshape(len(x), samples * copies * kept // len(x), 1)
    return torch.gather(x, 1, index.expand(-1, -1, x.shape[2])).view(samples * copies, kept, -1)


def take_visible_padding(padding_mask: Tensor | None, masks: Masks) -> Tensor | None:
    """(B, T) -> (R, V), for rows that are filled up with padding."""
    if padding_mask is None:
        return None
    assert masks.visible is not None
    return torch.gather(padding_mask.unsqueeze(1).expand(-1, masks.num_copies, -1), 2, masks.visible).flatten(0, 1)


# ---------------------------------------------------------------------------------------------------------- ALiBi


@dataclass
class AlibiConfig:
    """Section `alibi`: attention falls off with the distance between two tokens, at another rate in each head."""

    use: bool = opt(True, "Whether there is such a bias.")
    scale: float = opt(1.0, "Factor of the bias at first.")
    learned: bool = opt(True, "Train the factor; it stays at or above 0.")
    per_head: bool = opt(True, "A factor for each head.")
    per_layer: bool = opt(False, "A factor for each block, prenet blocks included.")


def alibi_slopes(num_heads: int) -> list[float]:
    """2^(-8h/H) for h = 1 .. H where H is a power of two; else those of the power of two below, then every other one
    of the power above."""
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * h / below) for h in range(1, below + 1)]
    return slopes + [2.0 ** (-8.0 * h / (2 * below)) for h in range(1, 2 * below, 2)][: num_heads - below]


class Alibi(nn.Module):
    """-slope_h |i - j| max(scale, 0) between the original places i and j of two tokens; 0 for extra tokens.

    num_heads, num_layers: of the network that it is for. scale: (layers * heads,), each 1 or all of them, layers
    outside. A vector, as biases and norms are.
    """

    slopes: Tensor

    def __init__(self, config: AlibiConfig, num_heads: int, num_layers: int) -> None:
        super().__init__()
        if config.scale < 0:
            raise ValueError(f"alibi.scale={config.scale} must be at least 0")
        self.layers, self.heads = num_layers if config.per_layer else 1, num_heads if config.per_head else 1
        self.scale = nn.Parameter(torch.full((self.layers * self.heads,), config.scale), config.learned)
        self.register_buffer("slopes", torch.tensor(alibi_slopes(num_heads)), persistent=False)

    def unscaled(self, tokens: Tokens) -> Tensor:
        """(R, H, E + V, E + V) float32, or with one row where the tokens stand in order."""
        index = tokens.index
        if index is None:
            index = torch.arange(tokens.x.shape[1] - tokens.num_extra, device=tokens.x.device).unsqueeze(0)
        distance = (index.unsqueeze(2) - index.unsqueeze(1)).abs()
        bias = -self.slopes[:, None, None] * distance.unsqueeze(1)
        return F.pad(bias, (tokens.num_extra, 0, tokens.num_extra, 0)) if tokens.num_extra else bias

    def forward(self, tokens: Tokens) -> Tensor | list[Tensor]:
        """One bias for all blocks, or one for each."""
        unscaled = self.unscaled(tokens)
        scale = self.scale.clamp(min=0.0).view(self.layers, self.heads, 1, 1)
        return unscaled * scale[0] if self.layers == 1 else [unscaled * one for one in scale]


# --------------------------------------------------------------------------------------------------------- prenet


@dataclass
class PrenetConfig:
    """Section `prenet`: blocks of the feature encoder. They come before the shared ones and never become targets."""

    layers: int = opt(0, "Blocks, each like those of `model`.")
    layer_drop: float = opt(0.0, "Probability that one of them is left out of a forward pass of the student.")
    dropout: float = opt(0.0, "Before the first of them (post-norm: after the norm that stands there).")


class Prenet(nn.Module):
    """Norm, dropout, blocks; of pre-norm blocks the norm comes last. Without blocks the norm is all there is."""

    def __init__(self, config: PrenetConfig, model: ModelConfig) -> None:
        super().__init__()
        if config.layers < 0:
            raise ValueError(f"prenet.layers={config.layers} must be at least 0")
        for key in ("layer_drop", "dropout"):
            if not 0 <= getattr(config, key) < 1:
                raise ValueError(f"prenet.{key}={getattr(config, key)} must be at least 0 and below 1")
        self.norm = nn.LayerNorm(model.embed_dim, eps=model.norm_eps) if model.norm == "post" else None
        self.dropout, self.num_layers = config.dropout, config.layers
        self.transformer = Transformer(
            replace(model, num_layers=config.layers, layer_drop=config.layer_drop, drop_path=0.0)
        )
        init_bert(self.transformer)

    def forward(self, x: Tensor, padding_mask: Tensor | None, bias: AttentionBias = None) -> Tensor:
        """x (R, T, D); bias as `FeatureEncoder.attention_bias` gives it, for prenet and shared blocks together."""
        x = F.dropout(x if self.norm is None else self.norm(x), self.dropout, self.training)
        return self.transformer(x, padding_mask, self.own(bias)).x

    def own(self, bias: AttentionBias) -> AttentionBias:
        """What of a `bias` is for the prenet blocks: a single one, or the first of those for each block."""
        return bias if bias is None or isinstance(bias, Tensor) else bias[: self.num_layers]

    def rest(self, bias: AttentionBias) -> AttentionBias:
        """What of a `bias` is left for the shared blocks."""
        return bias if bias is None or isinstance(bias, Tensor) else bias[self.num_layers :]
