"""The regression target: normalise each of the teacher's top K layers, then average them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from d2v_core.config import Norm, TargetConfig
from d2v_core.transformer import TransformerOutput

EPS = 1e-5


class TopKTargets:
    """Builds (B, T, D) float32 targets from the teacher's blocks (arXiv:2202.03555, section 3.3).

    Norms, none with learned parameters, all with biased variance:
      instance  each channel of a sample over its tokens
      layer     each token over its channels
      batch     each channel over all tokens of the micro-batch
      group     a whole sample, over tokens and channels together
    Padded tokens stay out of the statistics unless `padding_in_stats` is set; what stands at them is of no use.

    `official_axes` reproduces fairseq where its axes are not the ones meant: without an instance or batch norm before,
    its tensor is still (T, B, D), so that its group norm runs over samples and channels of one time step, and an
    instance norm of the mean runs over the samples of the batch.
    """

    def __init__(self, config: TargetConfig) -> None:
        if config.top_k_layers < 1:
            raise ValueError(f"target.top_k_layers={config.top_k_layers} must be at least 1")
        self.config = config

    def __call__(self, teacher: TransformerOutput, padding_mask: Tensor | None, num_extra: int = 0) -> Tensor:
        """teacher: output with taps, (B, E + T, D) per block; padding_mask (B, E + T). Returns (B, T, D) float32."""
        taps = teacher.ffn if self.config.tap == "ffn" else teacher.blocks
        k = self.config.top_k_layers
        if len(taps) < k:
            raise ValueError(f"target.top_k_layers={k}, but the teacher gave {len(taps)} layers")
        if padding_mask is not None:
            padding_mask = padding_mask[:, num_extra:]
        return self.build([tap[:, num_extra:] for tap in taps[-k:]], padding_mask)

    @torch.no_grad()
    def build(self, layers: Sequence[Tensor], padding_mask: Tensor | None) -> Tensor:
        """layers: K tensors (B, T, D); padding_mask (B, T) bool, True = padding."""
        config = self.config
        valid = None if padding_mask is None or config.padding_in_stats else ~padding_mask.unsqueeze(-1)
        over_samples = config.official_axes and not {"instance", "batch"} & set(config.layer_norms)
        with torch.autocast(layers[0].device.type, enabled=False):
            target: Tensor | None = None
            for layer in layers:
                x = layer.float()
                for norm in config.layer_norms:
                    x = _normalise(x, norm, valid, over_samples)
                target = x if target is None else target + x
            assert target is not None
            target = target / len(layers)
            for norm in config.mean_norms:
                target = _normalise(target, norm, valid, over_samples)
        return target


def _normalise(x: Tensor, norm: Norm, valid: Tensor | None, over_samples: bool) -> Tensor:
    """x (B, T, D) float32; valid (B, T, 1) bool or None."""
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], eps=EPS)
    axes = {"instance": (1,), "batch": (0, 1), "group": (1, 2)}[norm]
    if over_samples:
        axes = {"instance": (0,), "batch": (0, 1), "group": (0, 2)}[norm]
    if valid is None:
        var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(var + EPS)
    count = valid.expand_as(x).sum(axes, keepdim=True).clamp(min=1)
    mean = x.masked_fill(~valid, 0.0).sum(axes, keepdim=True) / count
    centred = (x - mean).masked_fill(~valid, 0.0)
    var = centred.square().sum(axes, keepdim=True) / count
    return centred * torch.rsqrt(var + EPS)
