"""Error rates by hand, and the bootstrap where its answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from d2v_audio.wer import Edits, compare, letter_edits, score, total, word_edits


def test_edits_by_hand():
    references = ["the cat sat", "a b c d", "yes", "", "no words"]
    hypotheses = ["the hat sat down", "a c d", "yes", "uh oh", ""]
    edits = word_edits(references, hypotheses)
    assert edits == [Edits(1, 0, 1, 3), Edits(0, 1, 0, 4), Edits(0, 0, 0, 1), Edits(0, 0, 2, 0), Edits(0, 2, 0, 2)]
    whole = total(edits)
    assert whole == Edits(1, 3, 3, 10) and whole.errors == 7
    assert whole.rate == 70.0  # over the set; the mean of the utterances' rates would be another number
    assert math.isnan(edits[3].rate)


def test_letters_count_blanks_between_words():
    # "no w" has 4 letters with its blank; "now" lacks the blank.
    assert letter_edits(["no w", "kitten"], ["now", "sitting"]) == [Edits(0, 1, 0, 4), Edits(2, 0, 1, 6)]
    assert letter_edits(["  a  b "], ["a b"]) == [Edits(0, 0, 0, 3)]


def test_no_spread_between_speakers_no_interval():
    got = score([Edits(1, 0, 0, 4)] * 6, ["a", "a", "b", "b", "c", "c"])
    assert (got.low, got.high, got.total.rate, got.resampled) == (25.0, 25.0, 25.0, "speakers")


def test_interval_of_two_speakers_by_hand():
    # Two draws of two speakers, 0 % and 100 %: 0, 50 or 100 % with 1/4, 1/2, 1/4, so both ends lie in the interval.
    edits = [Edits(0, 0, 0, 10), Edits(10, 0, 0, 10)]
    got = score(edits, ["a", "b"])
    assert (got.low, got.high, got.total.rate) == (0.0, 100.0, 50.0)


def test_interval_is_over_speakers_where_they_are_known():
    # Ten utterances of one speaker are one draw, not ten: the interval is wider than over utterances.
    rng = np.random.default_rng(0)
    edits, speakers = [], []
    for speaker in range(20):
        wrong = int(rng.integers(0, 9))
        for _ in range(10):
            edits.append(Edits(wrong, 0, 0, 10))
            speakers.append(f"s{speaker}")
    over_speakers, over_utterances = score(edits, speakers), score(edits, [None] * 200)
    assert over_utterances.resampled == "utterances"
    width = [s.high - s.low for s in (over_speakers, over_utterances)]
    rates = np.array([10.0 * e.errors for e in edits[::10]])
    assert width[0] == pytest.approx(2 * 1.96 * rates.std() / np.sqrt(20), rel=0.1)
    assert width[0] / width[1] == pytest.approx(np.sqrt(10), rel=0.1)
    assert score(edits, speakers) == over_speakers  # drawn by name, not from a stream
    assert score(edits, speakers, seed=1) != over_speakers


def test_paired_comparison():
    lengths, speakers = [10] * 40, [f"s{i}" for i in range(40)]
    worse = [Edits(4, 0, 0, n) for n in lengths]
    better = [Edits(3, 0, 0, n) for n in lengths]
    got = compare(worse, better, speakers)
    assert got.difference == got.low == got.high == 10.0
    assert got.p == 2 / 10_001  # no draw on the other side
    assert got.relative == got.relative_low == got.relative_high == pytest.approx(100 / 3)
    faultless = compare(worse, [Edits(0, 0, 0, n) for n in lengths], speakers)
    assert faultless.difference == 40.0 and np.isnan(faultless.relative)
    assert compare(better, worse, speakers).difference == -10.0
    same = compare(worse, worse, speakers)
    assert same.difference == 0.0 and same.p == 1.0
    # Half the speakers one way, half the other: no difference, whatever the size of the single ones.
    mixed = [Edits(4 + 3 * (-1) ** i, 0, 0, 10) for i in range(40)]
    assert compare(mixed, worse, speakers).p > 0.5
    uneven = compare(
        [Edits(2 * i, 0, 0, 100) for i in range(1, 41)], [Edits(3 * i, 0, 0, 100) for i in range(1, 41)], speakers
    )
    assert uneven.low < uneven.high and uneven.relative_low == pytest.approx(-100 / 3)  # a third less of each speaker
    with pytest.raises(ValueError, match="other references"):
        compare(worse, [Edits(0, 0, 0, 9)] * 40, speakers)


def test_counts_that_do_not_match():
    with pytest.raises(ValueError, match="2 references and 1 hypotheses"):
        word_edits(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="1 utterances and 2 speakers"):
        score([Edits(0, 0, 0, 1)], ["a", "b"])
    empty = score([Edits(0, 0, 2, 0)], [None])
    assert math.isnan(empty.total.rate) and math.isnan(empty.low)


def test_one_utterance_says_nothing_of_others():
    got = score([Edits(1, 0, 0, 4)], ["a"])
    assert got.total.rate == 25.0 and math.isnan(got.low) and math.isnan(got.high)
    found = compare([Edits(1, 0, 0, 4)], [Edits(2, 0, 0, 4)], ["a"])
    assert (found.difference, found.relative) == (-25.0, -50.0)
    assert all(map(math.isnan, (found.low, found.high, found.p, found.relative_low, found.relative_high)))
    # Of two utterances of one speaker, utterances are drawn.
    assert score([Edits(1, 0, 0, 4), Edits(0, 0, 0, 4)], ["a", "a"]).resampled == "utterances"


def test_draws_without_anything_to_divide_by():
    # One speaker of two makes all the errors of the second system: in a quarter of the draws it makes none.
    first, second = [Edits(3, 0, 0, 10), Edits(1, 0, 0, 10)], [Edits(4, 0, 0, 10), Edits(0, 0, 0, 10)]
    found = compare(first, second, ["a", "b"])
    assert found.relative == 0.0 and math.isnan(found.relative_low) and math.isnan(found.relative_high)
    # One of ten makes none: there is an interval, as if draws of that one alone were never made.
    found = compare([*[Edits(2, 0, 0, 10)] * 9, first[1]], [*[Edits(4, 0, 0, 10)] * 9, second[1]], list("abcdefghij"))
    assert -50.0 <= found.relative_low < found.relative < found.relative_high < 0.0
    # Where nothing is said, insertions have nothing to be compared with: only draws with the other speaker count.
    got = score([Edits(0, 0, 5, 0), Edits(1, 0, 0, 10)], ["silent", "b"])
    assert (got.low, got.high) == (10.0, 60.0)
