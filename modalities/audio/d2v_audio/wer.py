"""Word and letter error rates with what stands behind them: edits, confidence, significance.

Rates are percentages of edits over reference words (or letters), both summed over the whole set. Alignments come from
jiwer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from d2v_core.keyed import generator

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Edits:
    """Of one utterance or of many: what turns the reference, of `length` words or letters, into the hypothesis."""

    substitutions: int
    deletions: int
    insertions: int
    length: int

    @property
    def errors(self) -> int:
        """Substitutions, deletions and insertions together."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Per cent; above 100 where more is inserted than there was. NaN without a reference."""
        return 100.0 * self.errors / self.length if self.length else float("nan")


@dataclass(frozen=True)
class Score:
    """total: edits over the set. low, high: 95 % interval of the rate. resampled: what the interval was drawn over."""

    total: Edits
    low: float
    high: float
    resampled: str


def word_edits(references: Sequence[str], hypotheses: Sequence[str]) -> list[Edits]:
    """One for each utterance. Words end at blanks; case and punctuation count."""
    return _edits(references, hypotheses, letters=False)


def letter_edits(references: Sequence[str], hypotheses: Sequence[str]) -> list[Edits]:
    """One for each utterance. A blank between words counts as a letter, as the boundary of CTC letters does."""
    return _edits(references, hypotheses, letters=True)


def total(edits: Sequence[Edits]) -> Edits:
    """The sum over utterances; its rate is the error rate of the set."""
    return Edits(
        sum(e.substitutions for e in edits), sum(e.deletions for e in edits), sum(e.insertions for e in edits),
        sum(e.length for e in edits),
    )  # fmt: skip


def score(edits: Sequence[Edits], speakers: Sequence[str | None], resamples: int = 10_000, seed: int = 0) -> Score:
    """The rate of the set with a percentile bootstrap over speakers.

    speakers: of each utterance; where fewer than two are known, utterances are drawn instead, and `resampled` says so.
    Of one utterance there is nothing to draw: its interval is nan.
    Source: Bisani & Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation" (ICASSP 2004).
    """
    groups, resampled = _groups(speakers, len(edits))
    errors, length = _sums([e.errors for e in edits], groups), _sums([e.length for e in edits], groups)
    low, high = float("nan"), float("nan")
    if length.sum() > 0 and len(length) > 1:
        rates = _resampled(errors, length, resamples, seed)
        low, high = (float(x) for x in np.percentile(rates, [2.5, 97.5]))
    return Score(total(edits), low, high, resampled)


@dataclass(frozen=True)
class Comparison:
    """Of two systems on one set.

    difference: rate of the first less that of the second, per cent. low, high: its 95 % interval. p: two-sided, how
    likely so large a difference were if there was none; nan of one utterance. resampled: what was drawn. relative: the
    difference in per cent of the second's rate; nan where the second makes no error. Its interval is from the same
    draws; nan where the second makes no error in more than one of forty, which could lie on either side of it.
    """

    difference: float
    low: float
    high: float
    p: float
    resampled: str
    relative: float
    relative_low: float
    relative_high: float


def compare(
    first: Sequence[Edits],
    second: Sequence[Edits],
    speakers: Sequence[str | None],
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Paired bootstrap of two systems on the same utterances: both are scored on every draw of speakers.

    Raises ValueError where the two were not scored on the same references.
    Source: Bisani & Ney (2004), section 4; p is twice the share of draws on the smaller side of zero, draws of no
    difference on both sides, one added to draws and share, so that it is never 0.
    """
    if [e.length for e in first] != [e.length for e in second]:
        raise ValueError("the two systems were scored on other references, so their errors cannot be paired")
    groups, resampled = _groups(speakers, len(first))
    gaps = _sums([a.errors - b.errors for a, b in zip(first, second, strict=True)], groups)
    length = _sums([e.length for e in first], groups)
    if not length.sum():
        nan = float("nan")
        return Comparison(nan, nan, nan, nan, resampled, nan, nan, nan)
    differences = _resampled(gaps, length, resamples, seed)
    low, high = (float(x) for x in np.percentile(differences, [2.5, 97.5]))
    smaller = min((differences <= 0).sum(), (differences >= 0).sum())
    p = min(1.0, 2.0 * (float(smaller) + 1) / (len(differences) + 1))
    relative = relative_low = relative_high = float("nan")
    theirs = _sums([b.errors for b in second], groups)
    if theirs.sum():
        relative = float(100.0 * gaps.sum() / theirs.sum())
        shares = _resampled(gaps, theirs, resamples, seed)
        if len(shares) >= 0.975 * resamples:
            relative_low, relative_high = (float(x) for x in np.percentile(shares, [2.5, 97.5]))
    if len(length) == 1:
        low = high = p = relative_low = relative_high = float("nan")
    difference = float(100.0 * gaps.sum() / length.sum())
    return Comparison(difference, low, high, p, resampled, relative, relative_low, relative_high)


def _edits(references: Sequence[str], hypotheses: Sequence[str], letters: bool) -> list[Edits]:
    import jiwer

    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references and {len(hypotheses)} hypotheses")
    found: list[Edits] = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        said, heard = " ".join(reference.split()), " ".join(hypothesis.split())
        length = len(said) if letters else len(said.split())
        if not said or not heard:  # nothing to align; jiwer's versions differ on empty texts
            other = len(heard) if letters else len(heard.split())
            found.append(Edits(0, length, other, length))
            continue
        out = jiwer.process_characters(said, heard) if letters else jiwer.process_words(said, heard)
        found.append(Edits(out.substitutions, out.deletions, out.insertions, length))
    return found


def _groups(speakers: Sequence[str | None], count: int) -> tuple[NDArray[np.int64], str]:
    if len(speakers) != count:
        raise ValueError(f"{count} utterances and {len(speakers)} speakers")
    named = {speaker for speaker in speakers if speaker is not None}
    if len(named) < 2 or None in speakers:
        return np.arange(count), "utterances"
    index = {speaker: i for i, speaker in enumerate(sorted(named))}
    return np.array([index[speaker] for speaker in speakers if speaker is not None]), "speakers"


def _sums(values: Sequence[int], groups: NDArray[np.int64]) -> Floats:
    return np.bincount(groups, np.asarray(values, np.float64)).astype(np.float64)


def _resampled(errors: Floats, length: Floats, resamples: int, seed: int) -> Floats:
    """100 x errors / length on each of `resamples` samples of as many groups, drawn with replacement; samples whose
    length is 0 are left out."""
    rng, groups = generator(seed, "wer-bootstrap"), len(errors)
    both, rates = np.stack([errors, length], 1), np.empty(resamples)
    for start in range(0, resamples, 500):  # in blocks, for memory
        drawn = rng.multinomial(groups, np.full(groups, 1 / groups), min(500, resamples - start)) @ both
        with np.errstate(divide="ignore", invalid="ignore"):
            rates[start : start + 500] = np.where(drawn[:, 1] > 0, 100.0 * drawn[:, 0] / drawn[:, 1], np.nan)
    return rates[~np.isnan(rates)]
