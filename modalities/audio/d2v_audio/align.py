"""When each word is said: the most probable way to read a given text off a network's emissions.

Times are those of CTC's frames, in which a network names a letter for a moment and is silent (blank) between: a word
lasts from its first letter's first frame to its last letter's last one, so that its edges lie a little inside the
sound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchaudio.functional import forced_align

from d2v_audio.letters import BLANK, Letters
from d2v_core.ctc import tokens_needed


class Span(NamedTuple):
    """Where one symbol lies: frames first to last, both included. log_prob: the mean over them."""

    symbol: int
    first: int
    last: int
    log_prob: float


class Word(NamedTuple):
    """start_s, end_s: seconds from the beginning. confidence: geometric mean of the probabilities of its letters'
    frames, from 0 to 1."""

    text: str
    start_s: float
    end_s: float
    confidence: float


class Clock(NamedTuple):
    """From frames to seconds: the middle of frame 0, the time from one to the next, and where the sound ends."""

    offset_s: float
    frame_s: float
    end_s: float

    def edges(self, first: int, last: int) -> tuple[float, float]:
        """Beginning of the frame `first` and end of the frame `last`."""
        start, end = (self.offset_s + self.frame_s * edge for edge in (first - 0.5, last + 0.5))
        return max(0.0, start), min(self.end_s, end)


def align(log_probs: Tensor, symbols: Sequence[int]) -> list[Span] | None:
    """The frames of each symbol on the most probable path that spells them; None where there are too few frames.

    log_probs: (T, symbols) float32. symbols: none of them CTC's blank; repeats are kept apart by a blank.
    Source: Graves et al. (2006), the forward recursion with the maximum in place of the sum.
    """
    if not symbols:
        return []
    if tokens_needed(symbols) > len(log_probs):
        return None
    targets = torch.tensor([list(symbols)], dtype=torch.int32)
    path, scores = forced_align(log_probs.detach().float().cpu().contiguous()[None], targets, blank=BLANK)
    spans: list[Span] = []
    before = BLANK
    for frame, (symbol, score) in enumerate(zip(path[0].tolist(), scores[0].tolist(), strict=True)):
        if symbol != BLANK and symbol == before:
            one = spans[-1]
            mean = one.log_prob + (score - one.log_prob) / (frame - one.first + 1)
            spans[-1] = one._replace(last=frame, log_prob=mean)
        elif symbol != BLANK:
            spans.append(Span(symbol, frame, frame, score))
        before = symbol
    return spans


def by_word(spelled: Sequence[int], boundary: int) -> list[list[int]]:
    """Symbols between boundaries; empty words are left out."""
    words: list[list[int]] = [[]]
    for symbol in spelled:
        if symbol == boundary:
            words.append([])
        else:
            words[-1].append(symbol)
    return [word for word in words if word]


def joined(spellings: Sequence[Sequence[int]], boundary: int) -> list[int]:
    """One boundary between each two words, none at the ends."""
    return [symbol for i, word in enumerate(spellings) for symbol in ([boundary, *word] if i else word)]


def timed_words(spans: Sequence[Span], words: Sequence[str], letters: Letters, clock: Clock) -> list[Word]:
    """The words of an alignment. words: how each is written; there are as many as boundaries divide."""
    groups: list[list[Span]] = [[]]
    for span in spans:
        if span.symbol == letters.boundary:
            groups.append([])
        else:
            groups[-1].append(span)
    timed: list[Word] = []
    for group, text in zip(groups if spans else [], words, strict=True):
        frames = sum(span.last - span.first + 1 for span in group)
        log_prob = sum(span.log_prob * (span.last - span.first + 1) for span in group) / frames
        start, end = clock.edges(group[0].first, group[-1].last)
        timed.append(Word(text, round(start, 3), round(end, 3), round(math.exp(log_prob), 4)))
    return timed
