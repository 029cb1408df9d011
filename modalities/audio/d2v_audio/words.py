"""From emissions to words, with or without a language model, and the weights of that model tuned."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from d2v_audio.align import Clock, Word, align, by_word, joined, timed_words
from d2v_audio.decode import DecodeConfig, Decoder, make_decoder
from d2v_audio.letters import SPECIAL, Letters, normal, read_lexicon
from d2v_audio.lm import MAX_ORDER, estimate, write_arpa
from d2v_audio.ngram import BOS, EOS, UNK
from d2v_audio.wer import letter_edits, total, word_edits
from d2v_core.config import opt
from d2v_core.ctc import greedy
from d2v_core.errors import UserError
from d2v_core.files import existing
from d2v_core.keyed import generator

NONE = "none"
WEIGHTS = ("lm_weight", "word_score", "sil_score")
# Of wav2vec 2.0 (Baevski et al., 2020, appendix B) and of fairseq's sweeps, which have the silence score too
# (examples/speech_recognition/new/conf/hydra/sweeper).
RANGES = {"lm_weight": (0.0, 5.0), "word_score": (-5.0, 5.0), "sil_score": (-8.0, 0.0)}


@dataclass
class SearchConfig(DecodeConfig):
    """The beam search, and whether its weights are tuned."""

    tune: bool = opt(
        False, "Choose lm_weight, word_score and sil_score by the word error rate of the dev part, then keep them."
    )
    trials: int = opt(48, "Settings that tuning tries; the one given is the first.")

    def check(self) -> None:
        super().check()
        if self.trials < 1:
            raise UserError(f"trials={self.trials} must be at least 1.")


class Heard(NamedTuple):
    """What was understood. spelled: the letters of each word, by id."""

    words: list[str]
    spelled: list[list[int]]

    @property
    def text(self) -> str:
        """The words with blanks between."""
        return " ".join(self.words)


def understand(emissions: Sequence[Tensor], letters: Letters, decoder: Decoder | None = None) -> list[Heard]:
    """emissions: (T, letters) log-probabilities of each utterance. decoder: None = the best letter of each frame."""
    found: list[Heard] = []
    for one in emissions:
        if decoder is None:
            # As they were emitted: composed with its neighbour, a letter may be none of the vocabulary.
            symbols = [symbol for symbol in greedy(one) if symbol >= len(SPECIAL)]
            found.append(Heard(letters.decode(symbols).split(), by_word(symbols, letters.boundary)))
            continue
        hypotheses = decoder(one[None])[0]
        if not hypotheses:  # nothing of the lexicon fits into so few frames
            found.append(Heard([], []))
            continue
        path = hypotheses[0].path
        symbols = [symbol for i, symbol in enumerate(path) if symbol and (i == 0 or symbol != path[i - 1])]
        words = [normal(word) for word in hypotheses[0].words]  # as references are; a model may have accents apart
        found.append(Heard(words, by_word(symbols, letters.boundary)[: len(words)]))  # a word cut off is none of them
    return found


def times(heard: Heard, emissions: Tensor, letters: Letters, clock: Clock) -> list[Word]:
    """When each word was said, by forced alignment to emissions (T, letters)."""
    spans = align(emissions, joined(heard.spelled, letters.boundary))
    assert spans is not None, "the frames were enough to find the words"
    return timed_words(spans, heard.words, letters, clock)


def open_decoder(
    letters: Letters, config: DecodeConfig, lm: Path | None, lexicon: str | None, say: Callable[[str], None]
) -> Decoder | None:
    """The beam search; None for greedy decoding, where there is neither a language model nor a lexicon.

    Raises UserError as `make_decoder` does.
    """
    config.check()
    if lm is None and lexicon is None:
        return None
    words = None if lexicon is None else read_lexicon(lexicon, letters)
    return make_decoder(letters, config, lm, words, say=say)


def language_model(name: str, texts: Callable[[], Sequence[str]], folder: Path) -> Path | None:
    """The ARPA file that `lm=name` stands for; None for none.

    name: none, a file, or an order such as 4gram: a model of `texts`, written into `folder`, of lower order where no
    text is long enough for it.
    """
    if name == NONE:
        return None
    order = re.fullmatch(r"(\d+)gram", name)
    if order is None:
        if not name.strip() or not Path(name).expanduser().exists():
            existing(name, f"{NONE}, 4gram or the like, or an ARPA file", "lm")  # raises
        return Path(name).expanduser()
    if not 1 <= int(order[1]) <= MAX_ORDER:
        raise UserError(f"lm={name}: from 1gram to {MAX_ORDER}gram, or an ARPA file.")
    special = {UNK, BOS, EOS}
    sentences = [[word for word in text.split() if word.lower() not in special] for text in texts()]
    longest = max((len(sentence) for sentence in sentences), default=0) + 2
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.arpa"
    write_arpa(path, estimate(sentences, min(int(order[1]), longest)))
    return path


class Tuned(NamedTuple):
    """decoder: with the best weights. record: what to keep of the search for them."""

    decoder: Decoder
    record: dict[str, Any]


def tune(
    decoder: Decoder,
    config: SearchConfig,
    letters: Letters,
    emissions: Sequence[Tensor],
    references: Sequence[str],
    seed: int = 0,
) -> Tuned:
    """The weights with the fewest word errors, then letter errors, on these utterances.

    Half of the trials lie anywhere within RANGES, the other half around the best so far.
    """
    rng = generator(seed, "decode-tune")
    low, high = (np.array([RANGES[name][i] for name in WEIGHTS]) for i in (0, 1))
    trials: list[dict[str, float]] = []

    def rank(trial: dict[str, float]) -> tuple[float, float]:
        return trial["wer"], trial["cer"]

    best: tuple[dict[str, float], Decoder] | None = None
    for number in range(config.trials):
        if number == 0:
            weights = np.array([getattr(config, name) for name in WEIGHTS])
        elif best is None or number < config.trials / 2:
            weights = rng.uniform(low, high)
        else:
            centre = np.array([best[0][name] for name in WEIGHTS])
            weights = np.clip(rng.normal(centre, (high - low) / 10), low, high)
        weights = np.round(weights, 2)
        own = decoder.weighted(*(float(weight) for weight in weights))
        heard = [one.text for one in understand(emissions, letters, own)]
        trial = {name: float(weight) for name, weight in zip(WEIGHTS, weights, strict=True)}
        trial["wer"] = round(total(word_edits(references, heard)).rate, 3)
        trial["cer"] = round(total(letter_edits(references, heard)).rate, 3)
        trials.append(trial)
        if best is None or rank(trial) < rank(best[0]):
            best = trial, own
    assert best is not None
    chosen = {name: best[0][name] for name in WEIGHTS}
    record = {"utterances": len(references), **chosen, "dev_wer": best[0]["wer"], "trials": trials}
    return Tuned(best[1], record)
