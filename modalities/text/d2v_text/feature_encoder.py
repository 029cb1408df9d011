"""Token ids to vectors, and vectors to what student and teacher see; the regression head.

fairseq: examples/data2vec/models/data2vec_text.py and fairseq/models/transformer/transformer_encoder.py; for
data2vec 2.0 examples/data2vec/models/modalities/text.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from d2v_core.config import ModelConfig, opt
from d2v_core.contract import FeatureEncoder, Masks, Predictor, RawValues, Tokens
from d2v_core.errors import UserError
from d2v_core.kernels import Linear
from d2v_core.transformer import init_bert
from d2v_core.visible import take_visible, take_visible_padding
from d2v_text.tokenizer import NUM_SPECIAL, PAD, Vocabulary


@dataclass
class SequenceConfig:
    """Section `embedding`: how many symbols there are, and places for them."""

    vocab_size: int | None = opt(
        None,
        "Symbols, the five special ones included; null = as many as the tokenizer (or the built-in grammar) has. Where "
        "both are given they must agree.",
    )
    max_positions: int = opt(512, "Longest sequence in tokens; a table of positions has two rows more.")


@dataclass
class BytesConfig(SequenceConfig):
    """Section `embedding`: the bytes of tokens, which a plugin's encoder reads."""

    token_bytes: int = opt(16, "Bytes of a token that are read; what is longer is cut off.")


@dataclass
class EmbeddingConfig(SequenceConfig):
    """The tables of tokens and positions."""

    position_std: float = opt(
        0.02,
        "Initial standard deviation of the positions; officially that of the tokens, which makes place half of every "
        "first target and trivial to predict. Less is for runs too short to grow out of that.",
    )
    teacher: Literal["copy", "average"] = opt(
        "copy",
        "How the teacher's tables and their norm follow the student's. The official recipe copies them "
        "(`ema_transformer_layers_only`).",
    )


@dataclass
class VisibleEmbeddingConfig(SequenceConfig):
    """The tables of tokens and positions, of data2vec 2.0. The teacher uses the student's."""

    dropout: float = opt(0.0, "After the norm.")


@dataclass
class HeadConfig:
    """The regression head."""

    layers: int = opt(2, "Linear layers, GELU between them: 2 is D -> 2D -> D; more keep 2D in between; 1 is D -> D.")


class TokenEmbedding(nn.Module):
    """(B, T) int64 ids -> (B, T, D). The row of `<pad>` starts at zero and gets no gradient.

    The fingerprint of the vocabulary travels with the weights, so that a run is never continued with another tokenizer
    of the same size, in which every id means something else.
    """

    fingerprint: Tensor

    def __init__(self, vocabulary: Vocabulary, embed_dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary.size, embed_dim, padding_idx=PAD)
        self.expected = vocabulary.fingerprint
        self.register_buffer("fingerprint", torch.tensor(vocabulary.fingerprint))
        self.checked = False

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) int64 -> (B, T, D). Raises UserError where the weights are those of another vocabulary."""
        if not self.checked:
            self._check(int(self.fingerprint))
            self.checked = True
        return self.table(ids)

    def _check(self, stored: int) -> None:
        """Weights are loaded after the network is built and before it is used: the first use is the time to look."""
        if stored and self.expected and stored != self.expected:
            raise UserError(
                f"The tokenizer does not fit the weights: its vocabulary has fingerprint {self.expected:016x}, theirs "
                f"had {stored:016x}; the same ids would mean other words. Give data.tokenizer=FILE of the run that "
                "made the weights."
            )


NUM_BYTES = 256
NO_BYTE = 256  # behind the last byte of a token; special symbols follow, one each


class ReadBytes(nn.Module):
    """For `Raw.read` and `Raw.fill`: the bytes of each token's spelling, each special symbol as a symbol of its own.

    spellings: by id; None for special symbols. table: (symbols, width) int16, width that of the longest one or
    token_bytes.
    """

    table: Tensor
    num_symbols = NO_BYTE + 1 + NUM_SPECIAL + 1

    def __init__(self, spellings: Sequence[bytes | None], token_bytes: int) -> None:
        super().__init__()
        self.mask_id = len(spellings) - 1
        special = iter(range(NO_BYTE + 1, self.num_symbols))
        rows = [[next(special)] if one is None else list(one[:token_bytes]) for one in spellings]
        width = max(map(len, rows))
        padded = [row + [NO_BYTE] * (width - len(row)) for row in rows]
        self.register_buffer("table", torch.tensor(padded, dtype=torch.int16), persistent=False)

    def forward(self, inputs: Mapping[str, Tensor]) -> RawValues:
        """The bytes of each token of ids (B, T)."""
        ids = inputs["ids"]
        return RawValues(self.of(ids), inputs.get("padding_mask"), (ids.shape[1],))

    def of(self, ids: Tensor) -> Tensor:
        """(...) ids -> (..., width) int64."""
        return self.table[ids].long()

    def fill(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Behind `<mask>`, and where nothing is replaced, there is nothing."""
        there = (codes >= 0) & (codes != self.mask_id)
        return self.of(codes.clamp(min=0)), there


class TextEncoder(FeatureEncoder):
    """Token embedding + learned position, layer norm, dropout; padded rows are zero.

    What is content (`embed`) is the token's vector alone. Everything else belongs to `view`: hidden places take the
    vector of the id in `Masks.fill`, from this encoder's own table, and positions follow from the padding mask. They
    count unpadded tokens from 2 on (1 stands for padding), so that padding inside a sequence, as in the label tensor
    that the official code feeds its teacher, closes the gaps.
    """

    def __init__(self, vocabulary: Vocabulary, model: ModelConfig, config: EmbeddingConfig) -> None:
        super().__init__()
        self.max_positions = config.max_positions
        self.mask_id = vocabulary.mask
        self.embedding = TokenEmbedding(vocabulary, model.embed_dim)
        self.positions = nn.Embedding(config.max_positions + PAD + 1, model.embed_dim, padding_idx=PAD)
        self.norm = nn.LayerNorm(model.embed_dim, eps=model.norm_eps)
        self.dropout = model.dropout
        init_bert(self)
        with torch.no_grad():
            self.positions.weight *= config.position_std / 0.02  # of init_bert

    def embed(self, inputs: Mapping[str, Tensor]) -> Tokens:
        """inputs: ids (B, T) int64, and padding_mask (B, T) bool where some are padded."""
        ids = _checked(inputs["ids"], self.max_positions)
        return Tokens(self.embedding(ids), inputs.get("padding_mask"), (ids.shape[1],))

    def view(self, tokens: Tokens, masks: Masks | None) -> Tokens:
        x, padding_mask = tokens.x, tokens.padding_mask
        if masks is not None:
            x = repeat(x, "b t d -> b m t d", m=masks.num_copies)
            fill = torch.full_like(masks.hidden, self.mask_id, dtype=torch.int64) if masks.fill is None else masks.fill
            # Codes below 0 stand at places that are not hidden.
            replaced = self.embedding(fill.clamp(min=0))
            x = rearrange(torch.where(masks.hidden.unsqueeze(-1), replaced, x), "b m t d -> (b m) t d")
            if padding_mask is not None:
                padding_mask = repeat(padding_mask, "b t -> (b m) t", m=masks.num_copies)
        x = x + self.positions(position_ids(x.shape[1], padding_mask, x.device))
        x = F.dropout(self.norm(x), self.dropout, self.training)
        if padding_mask is not None:
            x = x.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        return Tokens(x, padding_mask, tokens.grid)


class VisibleTextEncoder(FeatureEncoder):
    """data2vec 2.0: token embedding + learned position, layer norm; hidden tokens leave, and dropout follows.

    official_quirks: as fairseq, dropout belongs to what is computed once for student and teacher, so that the teacher,
    which is given the student's tokens, sees the student's noise.
    """

    def __init__(
        self, vocabulary: Vocabulary, model: ModelConfig, config: VisibleEmbeddingConfig, official_quirks: bool
    ) -> None:
        super().__init__()
        if not 0 <= config.dropout < 1:
            raise ValueError(f"embedding.dropout={config.dropout} must be at least 0 and below 1")
        self.max_positions, self.dropout, self.official_quirks = config.max_positions, config.dropout, official_quirks
        self.embedding = TokenEmbedding(vocabulary, model.embed_dim)
        self.positions = nn.Embedding(config.max_positions + PAD + 1, model.embed_dim, padding_idx=PAD)
        self.norm = nn.LayerNorm(model.embed_dim, eps=model.norm_eps)
        init_bert(self)

    def embed(self, inputs: Mapping[str, Tensor]) -> Tokens:
        """inputs: ids (B, T) int64, and padding_mask (B, T) bool where some are padded."""
        ids = _checked(inputs["ids"], self.max_positions)
        tokens = Tokens(self.embedding(ids), inputs.get("padding_mask"), (ids.shape[1],))
        return replace(tokens, x=self._drop(self._place(tokens))) if self.official_quirks else tokens

    def view(self, tokens: Tokens, masks: Masks | None) -> Tokens:
        x, padding_mask, index = tokens.x if self.official_quirks else self._place(tokens), tokens.padding_mask, None
        if masks is not None:
            assert masks.visible is not None, "data2vec 2.0 needs masks that say what is visible"
            x, padding_mask = take_visible(x, masks), take_visible_padding(padding_mask, masks)
            index = masks.visible.flatten(0, 1)
        return Tokens(x if self.official_quirks else self._drop(x), padding_mask, tokens.grid, index=index)

    def _place(self, tokens: Tokens) -> Tensor:
        x = tokens.x
        return self.norm(x + self.positions(position_ids(x.shape[1], tokens.padding_mask, x.device)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def _checked(ids: Tensor, max_positions: int) -> Tensor:
    if ids.shape[1] > max_positions:
        raise UserError(f"A sequence has {ids.shape[1]} tokens, but embedding.max_positions={max_positions}. Cut it.")
    return ids


def position_ids(num_tokens: int, padding_mask: Tensor | None, device: torch.device) -> Tensor:
    """(1, T) or (R, T) int64: 2, 3, ... over unpadded tokens, 1 at padded ones (fairseq: utils.make_positions)."""
    if padding_mask is None:
        return torch.arange(PAD + 1, PAD + 1 + num_tokens, device=device).unsqueeze(0)
    keep = ~padding_mask
    return (keep.cumsum(1) * keep) + PAD


class RegressionHead(Predictor):
    """Linear layers with GELU between them at the scored tokens (fairseq's `regression_head`)."""

    def __init__(self, embed_dim: int, config: HeadConfig) -> None:
        super().__init__()
        hidden = 2 * embed_dim
        widths = [embed_dim, *[hidden] * (config.layers - 1), embed_dim]
        layers: list[nn.Module] = []
        for i in range(config.layers):
            layers += [Linear(widths[i], widths[i + 1]), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])
        init_bert(self)

    def forward(self, tokens: Tokens, masks: Masks) -> Tensor:
        return self.layers(tokens.x[:, tokens.num_extra :].flatten(0, 1)[masks.scored_rows])
