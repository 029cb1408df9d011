"""Connectionist temporal classification: a sequence of symbols read off a sequence of tokens (Graves et al., 2006).

Each token is given to one symbol or to the blank, symbol 0; a sequence is what is left when repeats are merged and
blanks dropped. Nothing here knows what the symbols stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2v_core.config import FinetuneConfig, ModelConfig
from d2v_core.contract import Tokens
from d2v_core.objectives import Head, Objective

BLANK = 0
NOTHING = -1
"""What stands behind the end of shorter targets."""


class Emissions(NamedTuple):
    """logits: (B, T, symbols) float32. lengths: (B,) int64, how many of the tokens are no padding."""

    logits: Tensor
    lengths: Tensor


class PerToken(NamedTuple):
    """x: (B, T, D). lengths as in Emissions."""

    x: Tensor
    lengths: Tensor


class TokenHead(Head):
    """One linear map at every token (fairseq: wav2vec2_asr.py, Wav2VecEncoder)."""

    def __init__(self, model: ModelConfig, config: FinetuneConfig, num_symbols: int) -> None:
        super().__init__()
        self.dropout = config.head_dropout
        self.out = nn.Linear(model.embed_dim, num_symbols)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def features(self, tokens: Tokens) -> PerToken:
        x = tokens.x[:, tokens.num_extra :]
        if tokens.padding_mask is None:
            return PerToken(x, torch.full((len(x),), x.shape[1], device=x.device))
        return PerToken(x, (~tokens.padding_mask[:, tokens.num_extra :]).sum(1))

    def read(self, features: PerToken) -> Emissions:
        logits = self.out(F.dropout(features.x, self.dropout, self.training))
        return Emissions(logits.float(), features.lengths)


def log_probabilities(emissions: Emissions) -> Tensor:
    """(B, T, symbols) float32. Padding is blank for certain (fairseq: wav2vec2_asr.py, get_normalized_probs)."""
    logits, lengths = emissions
    padding = torch.arange(logits.shape[1], device=logits.device) >= lengths[:, None]
    certain = torch.full_like(logits[0, 0], float("-inf"))
    certain[BLANK] = 0.0
    return torch.where(padding.unsqueeze(-1), certain, logits.log_softmax(-1))


def ctc_loss(emissions: Emissions, targets: Tensor) -> Tensor:
    """(B,) float32, of each sample; 0 where there are too few tokens for the symbols.

    targets: (B, S) int64, NOTHING behind the end of shorter ones.
    """
    lengths = (targets != NOTHING).sum(1)
    with torch.autocast(emissions.logits.device.type, enabled=False):
        log_probs = emissions.logits.float().log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(
            log_probs, targets.clamp(min=BLANK), emissions.lengths, lengths, BLANK, "none", zero_infinity=True
        )


def greedy(logits: Tensor, length: int | None = None) -> list[int]:
    """(T, symbols) -> the best symbol of each token, repeats merged, blanks dropped."""
    best = logits[:length].argmax(-1).cpu().numpy()
    new = np.diff(best, prepend=BLANK) != 0  # before the first token there is a blank as well
    return [int(symbol) for symbol in best[new] if symbol != BLANK]


def tokens_needed(symbols: Sequence[int]) -> int:
    """The least number of tokens that can spell a sequence: a blank must stand between two equal symbols."""
    return len(symbols) + sum(a == b for a, b in pairwise(symbols))


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Least number of symbols to substitute, delete or insert to make `b` of `a` (Levenshtein)."""
    other, places = np.asarray(b, np.int64), np.arange(len(b) + 1)
    row = places
    for i, symbol in enumerate(a):
        changed = np.minimum(row[1:] + 1, row[:-1] + (other != symbol))
        # What inserting from the left would cost, for all places at once: the least of row[k] + (j - k).
        row = np.minimum.accumulate(np.concatenate([[i + 1], changed]) - places) + places
    return int(row[-1])


def symbol_errors(predicted: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> dict[str, float]:
    """{"symbol_errors": edits over symbols of the labels, both summed over all samples, in per cent}."""
    edits = sum(edit_distance(p, label) for p, label in zip(predicted, labels, strict=True))
    return {"symbol_errors": round(100.0 * edits / max(sum(map(len, labels)), 1), 2)}


def sequences(labels: Sequence[Sequence[int]]) -> np.ndarray:
    """Labels of a `LabelledPart`: an array of (S,) int64 arrays."""
    out = np.empty(len(labels), dtype=object)
    for i, label in enumerate(labels):
        out[i] = np.asarray(label, dtype=np.int64)
    return out


def padded(labels: np.ndarray) -> Tensor:
    """From `sequences` of B samples to (B, S) int64, NOTHING behind the end of shorter ones."""
    return nn.utils.rnn.pad_sequence(
        [torch.as_tensor(label) for label in labels], batch_first=True, padding_value=float(NOTHING)
    )


Score = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], Mapping[str, float]]


class Symbols(Objective):
    """A sequence of symbols, by CTC. symbols: their names, the blank first.

    score: from predicted and true sequences to metrics of which less is better, `symbol_errors` where it is None.
    show: how a sequence is written in files, symbols with blanks between where it is None.
    """

    asks_for = "symbols"

    def __init__(
        self,
        symbols: Sequence[str],
        metrics: Sequence[str],
        score: Score | None = None,
        show: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        self.symbols, self.metrics, self.targets = tuple(symbols), tuple(metrics), padded
        self._score, self._show = score or symbol_errors, show

    def head(self, model: ModelConfig, config: FinetuneConfig) -> Head:
        """One map for every token."""
        return TokenHead(model, config, len(self.symbols))

    def loss(self, output: Emissions, targets: Tensor) -> Tensor:
        return ctc_loss(output, targets).sum()

    def split(self, features: PerToken) -> list[Tensor]:
        return [x[: int(length)] for x, length in zip(features.x, features.lengths, strict=True)]

    def join(self, features: Sequence[Tensor]) -> PerToken:
        x = nn.utils.rnn.pad_sequence(list(features), batch_first=True)
        return PerToken(x, torch.tensor([len(one) for one in features], device=x.device))

    def keep(self, output: Emissions) -> list[np.ndarray]:
        best = zip(output.logits.cpu(), output.lengths.cpu(), strict=True)
        return [np.array(greedy(logits, int(length)), dtype=np.int64) for logits, length in best]

    def score(self, kept: Sequence[np.ndarray], labels: np.ndarray) -> dict[str, float]:
        return dict(self._score([one.tolist() for one in kept], [label.tolist() for label in labels]))

    def rank(self, scores: Mapping[str, float]) -> float:
        """The fewest errors. Before anything is spelled right the first rate stays at 100: then the others decide."""
        return -sum(scores[name] / 1e6**i for i, name in enumerate(self.metrics))

    def line(self, kept: np.ndarray, label: Any) -> tuple[str, ...]:
        return self.show(label.tolist()), self.show(kept.tolist())

    def show(self, symbols: Sequence[int]) -> str:
        """A sequence of symbols as it is written in files."""
        return " ".join(self.symbols[i] for i in symbols) if self._show is None else self._show(symbols)
