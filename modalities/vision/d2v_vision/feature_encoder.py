"""Images to tokens, for data2vec 1.0 and 2.0.

1.0 (`PatchEncoder`): patches, a mask token, CLS in front, and one relative position bias for all blocks. There are no
absolute positions: a block knows places only by the bias on its attention logits. Source of every detail:
facebookresearch/data2vec_vision, beit/modeling_cyclical.py and beit/modeling_finetune.py.

2.0 (`VisiblePatchEncoder`): visible patches with fixed positions, CLS in front. Source: fairseq,
examples/data2vec/models/modalities/images.py and base.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from d2v_core.config import ModelConfig, opt
from d2v_core.contract import AttentionBias, FeatureEncoder, Masks, Predictor, RawValues, Tokens
from d2v_core.kernels import linear
from d2v_core.transformer import Transformer
from d2v_core.visible import Prenet, PrenetConfig, take_visible

CHANNELS = 3  # red, green, blue: whatever a file holds is converted to them


@dataclass
class RawPatchConfig:
    """Section `features`: patches, and what of the network is not the encoder's."""

    patch_size: int = opt(16, "Side of a patch, pixels.")
    init_std: float = opt(
        0.02, "Initial weights are normal with this standard deviation, cut at one of it; narrow networks want more."
    )
    head: Literal["linear", "identity"] = opt(
        "linear", "Prediction from the final norm's output: one linear map (official), or as it is (fairseq's port)."
    )


@dataclass
class PatchConfig(RawPatchConfig):
    """Section `features`: patches, and what fairseq's port does otherwise than the official code."""

    teacher: Literal["average", "share"] = opt(
        "average",
        "Patch embedding and CLS of the teacher: averaged like the rest (official), or the student's own (fairseq's "
        "port).",
    )
    bias: Literal["shared", "per_block"] = opt(
        "shared",
        "Relative position bias: one table for all blocks (official pre-training), or one for each (official "
        "fine-tuning, where each begins as a copy of the shared one).",
    )


@dataclass
class VisiblePatchConfig:
    """Section `features` of data2vec 2.0: patches."""

    patch_size: int = opt(16, "Side of a patch, pixels.")


def init_official(module: nn.Module, std: float) -> None:
    """Linear and convolution weights from N(0, std^2) cut at one standard deviation, biases zero."""
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(child.weight, std=std, a=-std, b=std)
            bias = child._parameters.get("bias")
            if bias is not None:
                nn.init.zeros_(bias)


@torch.no_grad()
def init_transformer(transformer: Transformer, std: float) -> None:
    """`init_official`, then what block i (from 1) adds to the residual stream is divided by sqrt(2 i)."""
    init_official(transformer, std)
    for i, block in enumerate(transformer.blocks, 1):
        for name in ("attention.out.weight", "fc2.weight"):
            block.get_parameter(name).div_(math.sqrt(2.0 * i))


class PatchEmbedding(nn.Module):
    """(B, 3, height, width) pixels -> (B, T, D): a convolution whose stride is its kernel, rows of patches first."""

    def __init__(self, patch_size: int, embed_dim: int, init_std: float = 0.02) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.conv = nn.Conv2d(CHANNELS, embed_dim, patch_size, stride=patch_size)
        init_official(self, init_std)

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, height, width) -> (B, T, D)."""
        # A convolution without overlap is a matrix product on the patches, which is faster on a CPU.
        p = self.patch_size
        patches = rearrange(image, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        return linear(patches, self.conv.weight.flatten(1), self.conv.bias)


@dataclass(frozen=True)
class ReadPatches:
    """For `Raw.read`: the pixels of each patch, row by row, three channels each."""

    patch_size: int

    def __call__(self, inputs: Mapping[str, Tensor]) -> RawValues:
        image, p = inputs["image"], self.patch_size
        values = rearrange(image, "b c (h p) (w q) -> b (h w) (p q) c", p=p, q=p)
        return RawValues(values, None, (image.shape[2] // p, image.shape[3] // p))


class RelativeBias(nn.Module):
    """A learned number per head for each offset between two patches, and three for pairs with CLS.

    table: ((2h - 1)(2w - 1) + 3, H), zero at first. Row (dy + h - 1)(2w - 1) + (dx + w - 1) is for an offset query -
    key of (dy, dx) patches; the last three rows are CLS -> patch, patch -> CLS and CLS -> CLS (query -> key).
    """

    index: Tensor

    def __init__(self, grid: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        rows, columns = grid
        self.table = nn.Parameter(torch.zeros((2 * rows - 1) * (2 * columns - 1) + 3, num_heads))
        self.register_buffer("index", relative_index(rows, columns))

    def forward(self) -> Tensor:
        """(1, H, 1 + T, 1 + T), to be added to the logits."""
        return rearrange(F.embedding(self.index, self.table), "q k h -> 1 h q k").contiguous()


def relative_index(rows: int, columns: int) -> Tensor:
    """(1 + T, 1 + T) int64: the row of the table for query i and key j, CLS at 0."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    y, x = y.flatten(), x.flatten()
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    num_offsets = (2 * rows - 1) * (2 * columns - 1)
    index = torch.empty(1 + rows * columns, 1 + rows * columns, dtype=torch.int64)
    index[1:, 1:] = (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1
    index[0, :] = num_offsets
    index[:, 0] = num_offsets + 1
    index[0, 0] = num_offsets + 2
    return index


class PatchEncoder(FeatureEncoder):
    """A hidden patch is replaced by one learned vector before CLS joins; the teacher's view has nothing hidden."""

    def __init__(self, features: PatchConfig, model: ModelConfig, image_size: int) -> None:
        super().__init__()
        side = image_size // features.patch_size
        self.image_size, self.grid, self.dropout = image_size, (side, side), model.dropout
        std = features.init_std
        self.embedding = PatchEmbedding(features.patch_size, model.embed_dim, std)
        # Weight decay is for tensors of two or more axes: as officially, on the mask token and not on CLS.
        self.mask_token = nn.Parameter(torch.zeros(1, model.embed_dim))
        self.cls_token = nn.Parameter(torch.zeros(model.embed_dim))
        for token in (self.mask_token, self.cls_token):
            nn.init.trunc_normal_(token, std=std, a=-std, b=std)
        if features.bias == "shared":
            self.positions = RelativeBias(self.grid, model.num_heads)
        else:
            self.positions = nn.ModuleList(RelativeBias(self.grid, model.num_heads) for _ in range(model.num_layers))

    def embed(self, inputs: Mapping[str, Tensor]) -> Tokens:
        """inputs: image (B, 3, S, S) float32, normalised."""
        return Tokens(self.embedding(_checked(inputs["image"], self.image_size)), None, self.grid)

    def view(self, tokens: Tokens, masks: Masks | None) -> Tokens:
        x = tokens.x
        if masks is not None:
            x = repeat(x, "b t d -> b m t d", m=masks.num_copies)
            x = torch.where(masks.hidden.unsqueeze(-1), self.mask_token.to(x.dtype), x)
            x = rearrange(x, "b m t d -> (b m) t d")
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), 1, -1), x], 1)
        return Tokens(F.dropout(x, self.dropout, self.training), None, tokens.grid, num_extra=1)

    def attention_bias(self, tokens: Tokens) -> AttentionBias:
        del tokens
        if isinstance(self.positions, RelativeBias):
            return self.positions()
        return [positions() for positions in self.positions]


def _checked(image: Tensor, size: int) -> Tensor:
    if image.dim() != 4 or image.shape[1:] != (CHANNELS, size, size):
        raise ValueError(f"image has shape {tuple(image.shape)}; expected (B, {CHANNELS}, {size}, {size})")
    return image


def sine_positions(rows: int, columns: int, dim: int) -> Tensor:
    """(rows * columns, dim) float32: the first half of the channels encodes the column, the second the row; each half
    is sines of dim / 4 frequencies, then their cosines. Frequency i is 10000^(-i / (dim / 4))."""
    if dim % 4:
        raise ValueError(
            f"model.embed_dim={dim} must be a multiple of 4: places enter as sines and cosines of two axes"
        )
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [place.flatten().unsqueeze(1) * frequencies for place in (x, y)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1).float()


class VisiblePatchEncoder(FeatureEncoder):
    """data2vec 2.0: positions are added to all patches, hidden ones then leave, CLS joins in front without a position.

    The norm before the first block and blocks of the encoder's own follow.
    """

    positions: Tensor

    def __init__(self, features: VisiblePatchConfig, model: ModelConfig, prenet: PrenetConfig, image_size: int) -> None:
        super().__init__()
        side = image_size // features.patch_size
        self.image_size, self.grid = image_size, (side, side)
        self.embedding = PatchEmbedding(features.patch_size, model.embed_dim)
        self.embedding.conv.reset_parameters()  # of which the bias stays
        nn.init.xavier_uniform_(self.embedding.conv.weight.data.flatten(1))
        self.cls_token = nn.Parameter(torch.randn(model.embed_dim))
        self.register_buffer("positions", sine_positions(side, side, model.embed_dim), persistent=False)
        self.prenet = Prenet(prenet, model)

    def embed(self, inputs: Mapping[str, Tensor]) -> Tokens:
        """inputs: image (B, 3, S, S) float32, normalised."""
        return Tokens(self.embedding(_checked(inputs["image"], self.image_size)), None, self.grid)

    def view(self, tokens: Tokens, masks: Masks | None) -> Tokens:
        x, index = tokens.x + self.positions.to(tokens.x.dtype), None
        if masks is not None:
            assert masks.visible is not None, "data2vec 2.0 needs masks that say what is visible"
            x, index = take_visible(x, masks), masks.visible.flatten(0, 1)
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), 1, -1), x], 1)
        return Tokens(self.prenet(x, None), None, tokens.grid, num_extra=1, index=index)


class IdentityPredictor(Predictor):
    """The student's output at the scored patches as it is."""

    def forward(self, tokens: Tokens, masks: Masks) -> Tensor:
        return tokens.x[:, tokens.num_extra :].flatten(0, 1)[masks.scored_rows]
