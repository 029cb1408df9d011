"""The transformer that student and teacher share in form: it can hand back what every block computed.

Post-norm and pre-norm blocks, as in data2vec (arXiv:2202.03555; fairseq: fairseq/models/wav2vec/wav2vec2.py and
fairseq/modules/transformer_layer.py; BEiT: modeling_finetune.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from d2v_core.config import ModelConfig
from d2v_core.contract import AttentionBias
from d2v_core.kernels import Linear, attention, gelu_linear, linear


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: leave a residual branch out for whole rows of (R, T, D), scaled to keep the expectation."""
    if rate == 0.0 or not training:
        return x
    keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= rate
    return x * (keep / (1.0 - rate)).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values (rows in this order, then by head).

    bias="qv" leaves the keys without a bias, as BEiT does.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float, bias: Literal["qkv", "qv"] = "qkv") -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} is not a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = Linear(embed_dim, 3 * embed_dim, bias=bias == "qkv")
        if bias == "qv":
            self.q_bias = nn.Parameter(torch.zeros(embed_dim))
            self.v_bias = nn.Parameter(torch.zeros(embed_dim))
        self.out = Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        """x (R, T, D); attn_mask broadcastable to (R, H, T, T), bool (True = attend) or added to the logits."""
        bias = self.qkv.bias
        if bias is None:  # pyright: ignore[reportUnnecessaryComparison]
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = linear(x, self.qkv.weight, bias)
        q, k, v = rearrange(qkv, "r t (three h d) -> three r h t d", three=3, h=self.num_heads).unbind(0)
        dropout = self.dropout if self.training else 0.0
        y = attention(q, k, v, attn_mask, dropout)
        return self.out(rearrange(y, "r h t d -> r t (h d)"))


class Block(nn.Module):
    """Attention and feed-forward network, each with a residual sum.

    post-norm: x = norm1(x + attention(x)); x = norm2(x + ffn(x)).
    pre-norm:  x = x + attention(norm1(x)); x = x + ffn(norm2(x)).
    """

    def __init__(self, config: ModelConfig, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        dim, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        self.pre_norm = config.norm == "pre"
        self.dropout, self.activation_dropout = config.dropout, config.activation_dropout
        self.drop_path_rate = drop_path_rate
        self.attention = Attention(dim, config.num_heads, config.attention_dropout, config.attention_bias)
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)
        if config.layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((dim,), config.layer_scale))
            self.gamma2 = nn.Parameter(torch.full((dim,), config.layer_scale))
        else:
            self.gamma1 = self.gamma2 = None

    def forward(self, x: Tensor, attn_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the block's output and its FFN output, the latter as it is before dropout, residual and norm."""
        y = self.attention(self.norm1(x) if self.pre_norm else x, attn_mask)
        y = F.dropout(y, self.dropout, self.training)
        x = x + drop_path(y if self.gamma1 is None else self.gamma1 * y, self.drop_path_rate, self.training)
        if not self.pre_norm:
            x = self.norm1(x)
        ffn = self.feed_forward(self.norm2(x) if self.pre_norm else x)
        if self.gamma2 is not None:
            ffn = self.gamma2 * ffn
        x = x + drop_path(F.dropout(ffn, self.dropout, self.training), self.drop_path_rate, self.training)
        return (x if self.pre_norm else self.norm2(x)), ffn

    def feed_forward(self, x: Tensor) -> Tensor:
        """fc2(dropout(gelu(fc1(x))))."""
        hidden = self.fc1(x)
        if self.training and self.activation_dropout > 0:
            return self.fc2(F.dropout(F.gelu(hidden), self.activation_dropout))
        return gelu_linear(hidden, self.fc2.weight, self.fc2.bias)


class TransformerOutput(NamedTuple):
    """x: (R, T, D). ffn, blocks: one (R, T, D) per block that ran, input side first; empty unless asked for."""

    x: Tensor
    ffn: list[Tensor]
    blocks: list[Tensor]


@dataclass(frozen=True)
class _Masking:
    """The attention mask of each block, made once per forward pass."""

    masks: list[Tensor | None] = field(default_factory=list[Tensor | None])

    @classmethod
    def of(cls, num_layers: int, padding_mask: Tensor | None, bias: AttentionBias) -> _Masking:
        keep = None if padding_mask is None else rearrange(~padding_mask, "r t -> r 1 1 t")

        def combine(one: Tensor | None) -> Tensor | None:
            if one is None or keep is None:
                return one if keep is None else keep
            return one.masked_fill(~keep, float("-inf"))

        if bias is None or isinstance(bias, Tensor):
            return cls([combine(bias)] * num_layers)
        if len(bias) != num_layers:
            raise ValueError(f"{len(bias)} attention biases for {num_layers} blocks: one for all or one per block")
        return cls([combine(one) for one in bias])


class Transformer(nn.Module):
    """`num_layers` blocks, and for pre-norm a final norm. What comes before the first block is the encoder's matter."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        steps = max(config.num_layers - 1, 1)
        self.blocks = nn.ModuleList(Block(config, config.drop_path * i / steps) for i in range(config.num_layers))
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps) if config.norm == "pre" else None
        self.layer_drop = config.layer_drop
        self.coins: torch.Generator | None = None  # where to draw from which blocks run, if not from torch's own stream

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, bias: AttentionBias = None, taps: bool = False
    ) -> TransformerOutput:
        """x (R, T, D), padding_mask (R, T) bool with True = padding; bias as `FeatureEncoder.attention_bias` gives it;
        taps=True keeps every block's outputs."""
        masking = _Masking.of(len(self.blocks), padding_mask, bias)
        ffn_outputs: list[Tensor] = []
        block_outputs: list[Tensor] = []
        for block, attn_mask in zip(self.blocks, masking.masks, strict=True):
            # Drawn on the host: whether a block runs is control flow, and a device would have to be waited for.
            if self.training and self.layer_drop > 0 and torch.rand((), generator=self.coins).item() < self.layer_drop:
                continue
            x, ffn = block(x, attn_mask)
            if taps:
                ffn_outputs.append(ffn)
                block_outputs.append(x)
        return TransformerOutput(x if self.norm is None else self.norm(x), ffn_outputs, block_outputs)


def init_bert(module: nn.Module) -> None:
    """N(0, 0.02^2) for every linear and embedding weight, zero bias (fairseq: init_bert_params)."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=0.02)
            bias = cast("Tensor | None", child.bias)
            if bias is not None:
                nn.init.zeros_(bias)
        elif isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=0.02)
            if child.padding_idx is not None:
                nn.init.zeros_(child.weight[child.padding_idx].data)
