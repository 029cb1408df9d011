"""Relative positions by convolution, for any one-dimensional sequence.

Five stacked grouped convolutions see the masked features around a token and what they compute is added to it
(fairseq: fairseq/models/wav2vec/wav2vec2.py, `pos_conv_depth` > 1).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from d2v_core.config import opt
from d2v_core.kernels import grouped_conv1d_same


@dataclass
class ConvPositionsConfig:
    """Section `positions` of a modality that uses convolutional positions."""

    depth: int = opt(5, "Stacked convolutions.")
    width: int = opt(95, "Receptive field in tokens over all of them; each kernel has max(3, width // depth) taps.")
    groups: int = opt(16, "Channel groups of each convolution.")
    rezero_padding: bool = opt(
        True,
        "Zero the padded tokens before every convolution, so that padding cannot change a valid token. fairseq does "
        "so before the first one only, and a token's value then depends on how much padding stands behind it: "
        "false reproduces that.",
    )


class ConvPositions(nn.Module):
    """depth x [Conv1d (same length, grouped, bias) -> LayerNorm over D without affine -> GELU] on (R, T, D).

    D is embed_dim.
    """

    def __init__(self, embed_dim: int, config: ConvPositionsConfig) -> None:
        super().__init__()
        for key in ("depth", "width", "groups"):
            if getattr(config, key) < 1:
                raise ValueError(f"positions.{key}={getattr(config, key)} must be at least 1")
        if embed_dim % config.groups:
            raise ValueError(f"model.embed_dim={embed_dim} must be a multiple of positions.groups={config.groups}")
        kernel = max(3, config.width // config.depth)
        self.rezero_padding, self.groups = config.rezero_padding, config.groups
        self.convs = nn.ModuleList(
            nn.Conv1d(embed_dim, embed_dim, kernel, padding=kernel // 2, groups=config.groups)
            for _ in range(config.depth)
        )

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Returns the positions alone, (R, T, D); the caller adds them. padding_mask (R, T) bool, True = padding."""
        for i, conv in enumerate(self.convs):
            if padding_mask is not None and (i == 0 or self.rezero_padding):
                x = x.masked_fill(padding_mask.unsqueeze(-1), 0.0)
            # An even kernel gives one token too many: the last one goes, as in the official code.
            y = grouped_conv1d_same(x, conv.get_parameter("weight"), conv.get_parameter("bias"), self.groups)
            x = F.gelu(F.layer_norm(y, y.shape[-1:]))
        return x
