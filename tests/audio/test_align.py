"""Forced alignment: against all paths of a small case, and by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from d2v_audio.align import Clock, Span, align, by_word, joined, timed_words
from d2v_audio.letters import Letters

LETTERS = Letters.of(["ab"])
A, B, END = LETTERS.symbols.index("a"), LETTERS.symbols.index("b"), LETTERS.boundary


def collapsed(path: tuple[int, ...]) -> list[int]:
    return [symbol for symbol, _ in itertools.groupby(path) if symbol]


@pytest.mark.parametrize("symbols", [[1], [1, 1], [1, 2, 1], [2, 2, 1]])
def test_it_is_the_best_of_all_paths(symbols: list[int]) -> None:
    log_probs = torch.randn(6, 3, generator=torch.Generator().manual_seed(len(symbols))).log_softmax(-1)
    paths = [path for path in itertools.product(range(3), repeat=6) if collapsed(path) == symbols]
    best = max(paths, key=lambda path: sum(log_probs[t, s].item() for t, s in enumerate(path)))
    spans = align(log_probs, symbols)
    assert spans is not None
    assert [span.symbol for span in spans] == symbols
    ours = [0] * 6
    for span in spans:
        ours[span.first : span.last + 1] = [span.symbol] * (span.last - span.first + 1)
        mean = log_probs[span.first : span.last + 1, span.symbol].mean()
        assert span.log_prob == pytest.approx(mean.item(), abs=1e-5)
    assert tuple(ours) == best


def test_too_few_frames() -> None:
    log_probs = torch.zeros(3, 3).log_softmax(-1)
    assert align(log_probs, [1, 1, 2]) is None  # a blank must stand between the two
    assert align(log_probs, [1, 2, 1]) is not None
    assert align(log_probs, []) == []


def test_words_have_the_times_of_their_letters() -> None:
    path = [0, A, A, B, 0, END, 0, A]
    log_probs = torch.full((len(path), len(LETTERS)), -9.0)
    log_probs[torch.arange(len(path)), torch.tensor(path)] = -0.1
    spans = align(log_probs, [A, B, END, A])
    assert spans is not None
    assert spans[0] == Span(A, 1, 2, pytest.approx(-0.1))
    clock = Clock(offset_s=0.02, frame_s=0.04, end_s=0.31)
    first, second = timed_words(spans, ["ab", "a"], LETTERS, clock)
    assert (first.text, first.start_s, first.end_s) == ("ab", pytest.approx(0.04), pytest.approx(0.16))
    assert (second.start_s, second.end_s) == (pytest.approx(0.28), 0.31)  # not behind the end of the sound
    assert first.confidence == pytest.approx(0.9048, abs=1e-4)
    assert timed_words([], [], LETTERS, clock) == []


def test_words_between_boundaries() -> None:
    assert by_word([END, A, END, END, B, A], END) == [[A], [B, A]]
    assert joined([[A], [B, A]], END) == [A, END, B, A]
