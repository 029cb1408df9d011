"""Raw values of any modality to tokens, by cross-attention (Perceiver, arXiv:2103.03206; Perceiver IO, 2107.14795).

The bytes of a sample are keys and values: each is one symbol, or a few neighbouring numbers. There is a query for each
patch, made of its place alone: what comes out is a sequence of tokens with places, as a transformer reads it.

Hidden patches are left out of the keys. A mask after the cross-attention would come too late: every query may look at
every byte, so visible tokens would hold what is hidden, and the student could copy it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from d2v_core.config import RunConfig, opt
from d2v_core.contract import Masks, Raw, RawEncoder, Tokens
from d2v_core.kernels import Linear, attention
from d2v_core.visible import take_visible, take_visible_padding

LONGEST = 1000.0  # patches in half the slowest wave's period: places further apart than this look alike


@dataclass
class PerceiverConfig:
    """Section `perceiver`: cross-attention from a query for each patch to the bytes of all patches."""

    width: int = opt(64, "Channels of a byte, before keys and values are made of it.")
    keys: int = opt(4, "Most keys a patch of numbers has: neighbours are read together until there are no more.")
    sharpness: float = opt(3.0, "How closely a query looks at its own place at first; 0 = everywhere alike.")

    def check(self) -> None:
        """Raises ValueError."""
        for key in ("width", "keys"):
            if getattr(self, key) < 1:
                raise ValueError(f"perceiver.{key}={getattr(self, key)} must be at least 1")
        if not 0 <= self.sharpness < math.inf:
            raise ValueError(f"perceiver.sharpness={self.sharpness} must be 0 or more")


class Bytes(nn.Module):
    """(B, T, P, C) numbers or (B, T, P) symbols -> (B, T, K * width): the bytes of a patch side by side, zero where
    there is none.

    A byte is multiplied by what its place in the patch stands for: queries take means over bytes, and a mean of sums
    would not tell which of them stood where.
    """

    def __init__(self, raw: Raw, config: PerceiverConfig) -> None:
        super().__init__()
        places, self.symbols, self.absent = math.prod(raw.patch), raw.symbols > 0, raw.absent
        self.together = 1 if self.symbols else together(raw.patch, config.keys)
        self.num_keys, self.width = places // self.together, config.width
        wide = 2 * config.width
        if self.symbols:
            self.value = nn.Embedding(raw.symbols, wide)
        else:
            self.value = Linear(self.together * raw.channels, wide)
        self.place = nn.Parameter(torch.randn(self.num_keys, wide))
        self.out = Linear(wide, config.width, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        if not self.symbols:
            values = rearrange(values, "... (k n) c -> ... k (n c)", n=self.together)
        x = self.value(values)
        x = self.out((x if self.symbols else F.gelu(x)) * self.place)
        return (x if self.absent is None else x * (values != self.absent).unsqueeze(-1)).flatten(-2)


def together(patch: tuple[int, ...], keys: int) -> int:
    """How many neighbours along the last axis make one key, so that a patch has at most so many; the whole of that axis
    where even this leaves more."""
    rows, length = math.prod(patch[:-1]), patch[-1]
    return next((n for n in range(1, length + 1) if length % n == 0 and rows * length // n <= keys), length)


def waves(at: Tensor, num_heads: int, width: int) -> Tensor:
    """Sines and cosines of places: at (N, A) in patches -> (N, num_heads * width) float32.

    Periods run geometrically from 2 to 2 * LONGEST patches, in each head; those of one lie between another's.
    """
    count = width // (2 * at.shape[1])
    if count < 1:
        raise ValueError(
            f"a head of {width} channels is too narrow for places on {at.shape[1]} axes: model.embed_dim over "
            f"model.num_heads must be at least {2 * at.shape[1]}"
        )
    head, step = torch.meshgrid(*(torch.arange(n, device=at.device) for n in (num_heads, count)), indexing="ij")
    steps = (step + head / num_heads) / count
    angles = math.pi * LONGEST**-steps * at[:, :, None, None]
    x = rearrange(torch.stack([angles.sin(), angles.cos()]), "two n a h c -> n h (two a c)")
    return F.pad(x, (0, width - x.shape[2])).flatten(1)


def grid_of(shape: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """(N, A) float32: the places of a grid, row-major."""
    return torch.cartesian_prod(*(torch.arange(float(n), device=device) for n in shape)).reshape(-1, len(shape))


class PerceiverEncoder(RawEncoder):
    """One query a patch, bytes of visible patches as keys, and for post-norm a norm.

    The query of a hidden patch finds the vector that stands for nothing. What it could see of the bytes around it the
    blocks see too; and where it saw them, the student learnt by way of the map of bytes to answer with the mean of its
    targets, so that all tokens became alike (text, preset tiny, seed 0, step 40: 0.2 % of the mean square of the last
    block's output was variance between tokens).
    """

    name = "perceiver"
    section = PerceiverConfig

    def __init__(self, raw: Raw, config: RunConfig) -> None:
        super().__init__(raw, config)
        own, model = config.section("perceiver", PerceiverConfig), config.model
        own.check()
        dim, width = model.embed_dim, own.width
        self.num_heads, self.dropout = model.num_heads, model.dropout
        self.embedding = Bytes(raw, own)
        self.content_dim = self.embedding.num_keys * width
        inner = (*raw.patch[:-1], raw.patch[-1] // self.embedding.together)
        # Places of a patch's bytes from its middle, in patches.
        self.register_buffer("inner", (grid_of(inner) + 0.5) / torch.tensor(inner) - 0.5, persistent=False)
        waves(self.inner, model.num_heads, dim // model.num_heads)  # refuses heads that are too narrow

        self.norm_bytes = nn.LayerNorm(width)
        self.key = Linear(width, dim, bias=False)  # a bias would move all logits of a query alike
        self.value = Linear(width, dim, bias=False)
        self.key_place, self.query_place = Linear(dim, dim, bias=False), Linear(dim, dim, bias=False)
        self.nothing = nn.Parameter(torch.randn(2, dim))  # a key that is always there, and what is found at it
        self.out = Linear(dim, dim, bias=False)
        self.place = Linear(dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim, eps=model.norm_eps) if model.norm == "post" else None
        self.init(own.sharpness)

    @torch.no_grad()
    def init(self, sharpness: float) -> None:
        """Initial weights with which a query looks at its own place, and half of a token is its bytes, half its place:
        what all tokens have in common a teacher would hand on as the target."""
        self.nothing[0] *= 0.02
        for place in (self.key_place, self.query_place):
            nn.init.eye_(place.weight).mul_(sharpness)
        # A mean over the keys of a patch is smaller than each by the root of their number.
        nn.init.normal_(self.value.weight, std=math.sqrt(self.embedding.num_keys / self.embedding.width))
        nn.init.normal_(self.out.weight, std=self.out.in_features**-0.5)
        nn.init.normal_(self.place.weight, std=0.1)

    def embed(self, inputs: Mapping[str, Tensor]) -> Tokens:
        """inputs: what the modality's `Raw.read` takes."""
        raw = self.read(inputs)
        return Tokens(self.embedding(raw.values), raw.padding_mask, raw.grid)

    def view(self, tokens: Tokens, masks: Masks | None) -> Tokens:
        content, padding_mask, index = tokens.x, tokens.padding_mask, None
        at = grid_of(tokens.grid, content.device)
        places = self.waves(at)  # (T, D)
        if masks is None:
            shown = None if padding_mask is None else ~padding_mask  # (R, T), patches whose bytes are keys
            x, query = (repeat(map_(places), "t d -> r t d", r=len(content)) for map_ in (self.place, self.query_place))
            x = x + self.look(query, content, at, shown)
        else:
            content, shown = self.shown(content, masks)
            left_out = ~shown
            if padding_mask is not None:
                padding_mask = repeat(padding_mask, "b t -> (b m) t", m=masks.num_copies)
                shown = shown & ~padding_mask
            x, query = (repeat(map_(places), "t d -> r t d", r=len(shown)) for map_ in (self.place, self.query_place))
            if masks.visible is None:
                seen = self.look(query, content, at, shown)
                x = x + torch.where(left_out.unsqueeze(-1), self.nothing[1].to(seen.dtype), seen)
            else:
                x = take_visible(x, masks) + self.look(take_visible(query, masks), content, at, shown)
                padding_mask = take_visible_padding(tokens.padding_mask, masks)
                index = masks.visible.flatten(0, 1)
        x = F.dropout(x if self.norm is None else self.norm(x), self.dropout, self.training)
        return Tokens(x, padding_mask, tokens.grid, index=index)

    def shown(self, content: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        """(B, T, W) -> content (B or R, T, W) with what stands at hidden places, and (R, T) bool, False where nothing
        does."""
        shown = ~masks.hidden
        if masks.fill is not None and self.fill is not None:
            values, there = self.fill(masks.fill)
            there = there & masks.hidden
            content = torch.where(there.unsqueeze(-1), self.embedding(values), content.unsqueeze(1)).flatten(0, 1)
            shown = shown | there
        return content, shown.flatten(0, 1)

    def waves(self, at: Tensor) -> Tensor:
        dim = self.place.in_features
        return waves(at, self.num_heads, dim // self.num_heads)

    def look(self, query: Tensor, content: Tensor, at: Tensor, shown: Tensor | None) -> Tensor:
        """Cross-attention: query (R, Q, D), content (B or R, T, W), at (T, A), shown (R, T) -> (R, Q, D)."""
        bytes_ = content.unflatten(-1, (self.embedding.num_keys, -1)).flatten(1, 2)
        there = None if self.embedding.absent is None else bytes_.any(-1)
        bytes_ = self.norm_bytes(bytes_)
        at = (at.unsqueeze(1) + self.inner).flatten(0, 1)
        key = self.key(bytes_) + self.key_place(self.waves(at))
        value = self.value(bytes_)
        key, value = (
            torch.cat([nothing.to(x.dtype).expand(len(x), 1, -1), x], 1)
            for nothing, x in zip(self.nothing, (key, value), strict=True)
        )
        copies = len(query) // len(key)
        key, value = (repeat(x, "b k d -> (b m) k d", m=copies) for x in (key, value))
        mask = None if there is None else repeat(there, "b k -> (b m) k", m=copies)
        if shown is not None:
            shown = shown.repeat_interleave(self.embedding.num_keys, 1)
            mask = shown if mask is None else shown & mask
        if mask is not None:
            mask = rearrange(F.pad(mask, (1, 0), value=True), "r k -> r 1 1 k")
        heads = (rearrange(x, "r t (h d) -> r h t d", h=self.num_heads) for x in (query, key, value))
        return self.out(rearrange(attention(*heads, mask, 0.0), "r h t d -> r t (h d)"))
