"""Trajectories to tokens, one for each step and group of channels, and to what student and teacher see (2.0)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from d2v_core.config import ModelConfig
from d2v_core.contract import FeatureEncoder, Masks, Tokens
from d2v_core.kernels import Linear
from d2v_core.visible import Prenet, PrenetConfig, take_visible, take_visible_padding


def sine_positions(steps: int, dim: int, device: torch.device) -> Tensor:
    """(steps, dim) float32: sines of half as many frequencies, then their cosines. Frequency i is 10000^(-2i / dim)."""
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    angles = torch.arange(steps, device=device).unsqueeze(1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :dim].float()


class TrajectoryEncoder(FeatureEncoder):
    """A fixed vector for the step and a learned one for the group are added; hidden tokens then leave."""

    def __init__(self, widths: Sequence[int], model: ModelConfig) -> None:
        """widths: numbers a step has in each group, with one for each class of a discrete channel."""
        super().__init__()
        self.widths = list(widths)
        self.embedding = nn.ModuleList(Linear(width, model.embed_dim) for width in widths)
        self.groups = nn.Parameter(nn.init.normal_(torch.empty(len(widths), model.embed_dim), std=0.1))
        self.prenet = Prenet(PrenetConfig(), model)  # without blocks: the norm alone, where blocks are post-norm

    def embed(self, inputs: Mapping[str, Tensor]) -> Tokens:
        """inputs: values (B, S, sum of widths) float32, and steps (B,) int64 where some are padded."""
        values, padding_mask = inputs["values"], None
        if values.dim() != 3 or values.shape[2] != sum(self.widths):
            raise ValueError(f"values have shape {tuple(values.shape)}; expected (B, steps, {sum(self.widths)})")
        parts = zip(self.embedding.children(), values.split(self.widths, 2), strict=True)
        x = torch.stack([embed(part) for embed, part in parts], 2).flatten(1, 2)  # step by step, groups in order
        if "steps" in inputs:
            padding_mask = torch.arange(x.shape[1], device=x.device) // len(self.widths) >= inputs["steps"][:, None]
        return Tokens(x, padding_mask, (values.shape[1], len(self.widths)))

    def view(self, tokens: Tokens, masks: Masks | None) -> Tokens:
        x, padding_mask, index = tokens.x, tokens.padding_mask, None
        steps, groups = tokens.grid
        time = sine_positions(steps, x.shape[2], x.device).repeat_interleave(groups, 0)
        x = x + (time + self.groups.repeat(steps, 1)).to(x.dtype)
        if masks is not None:
            assert masks.visible is not None
            x, padding_mask = take_visible(x, masks), take_visible_padding(padding_mask, masks)
            index = masks.visible.flatten(0, 1)
        return Tokens(self.prenet(x, padding_mask), padding_mask, tokens.grid, index=index)
