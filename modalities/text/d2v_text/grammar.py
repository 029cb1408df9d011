"""A language made in code: the corpus used when no data path is given, with the role of every word known.

Who does what to whom is told by word order, voice and prepositions, never by the word alone: a noun can be agent,
patient or recipient, and many forms are noun and verb, or noun and adjective, at once. Words are many and most are
rare, so that a few labelled sentences do not show what kind of word each of them is, while unlabelled text does.

Every document is a function of (split, index), so nothing is stored or downloaded. Called by the text dataset and the
role probe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from d2v_text.tokenizer import BOS, EOS, MASK, NUM_SPECIAL, SPECIAL, Vocabulary

Split = Literal["pretrain", "train", "dev", "test"]
_SPLITS: tuple[Split, ...] = ("pretrain", "train", "dev", "test")

ROLES = ("agent", "patient", "recipient", "place", "action", "quality", "manner")
AGENT, PATIENT, RECIPIENT, PLACE, ACTION, QUALITY, MANNER = range(len(ROLES))
UNSCORED = -100

FUNCTION_WORDS = ("the", "a", "was", "by", "to", "in", "near", "that", "and", "it")
_COUNTS = {"person": 110, "thing": 130, "place": 60, "verb": 110, "giving": 30, "adjective": 90, "adverb": 40}
_SHARED = {"verb": ("thing", 50), "adjective": ("person", 35), "adverb": ("place", 10)}  # forms with two readings
_TOPICS = 8
_ON_TOPIC = 0.6  # share of words that are drawn from the topic's own


@dataclass(frozen=True)
class Sentence:
    """ids: words as token ids, without `<s>` and `</s>`. roles: one per word, UNSCORED for function words."""

    ids: tuple[int, ...]
    roles: tuple[int, ...]


@dataclass(frozen=True)
class _Lexicon:
    symbols: tuple[str, ...]
    """All symbols by id, special ones included."""
    classes: dict[str, tuple[int, ...]]
    """Token ids of each word class; a form may stand in two."""


@lru_cache
def lexicon() -> _Lexicon:
    """Word forms are made of syllables and are the same in every run."""
    rng = np.random.default_rng(20_22)
    forms: list[str] = []
    seen: set[str] = set(FUNCTION_WORDS)

    def new() -> str:
        while True:
            syllables = rng.integers(2, 4)
            word = "".join("bdfgklmnprstvz"[rng.integers(14)] + "aeiou"[rng.integers(5)] for _ in range(syllables))
            if word not in seen:
                seen.add(word)
                forms.append(word)
                return word

    words: dict[str, list[str]] = {}
    for kind, count in _COUNTS.items():
        other, shared = _SHARED.get(kind, ("", 0))
        own = [new() for _ in range(count - shared)]
        # Shared forms are spread over both classes, lest they be the frequent ones in either.
        both = [words[other][i] for i in rng.permutation(len(words[other]))[:shared]] if shared else []
        words[kind] = [(own + both)[i] for i in rng.permutation(count)]
    symbols = (*SPECIAL, *FUNCTION_WORDS, *forms, MASK)
    number = {symbol: i for i, symbol in enumerate(symbols)}
    return _Lexicon(symbols, {kind: tuple(number[w] for w in some) for kind, some in words.items()})


@lru_cache
def vocabulary() -> Vocabulary:
    """Of all words of the grammar."""
    return Vocabulary.of(lexicon().symbols)


@lru_cache
def _ids_of_function_words() -> dict[str, int]:
    return {word: NUM_SPECIAL + i for i, word in enumerate(FUNCTION_WORDS)}


class _Writer:
    """Draws one document's sentences."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.topic = int(rng.integers(_TOPICS))
        self.out: list[tuple[int, int]] = []

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def say(self, *words: str) -> None:
        ids = _ids_of_function_words()
        self.out += [(ids[word], UNSCORED) for word in words]

    def word(self, kind: str, role: int) -> None:
        """Frequencies fall off as 1 / (rank + 8); a topic prefers every eighth word."""
        own = lexicon().classes[kind]
        while True:
            rank = int(8 * ((len(own) + 8) / 8) ** self.rng.random() - 8)
            if rank % _TOPICS == self.topic or not self.chance(_ON_TOPIC):
                self.out.append((own[min(rank, len(own) - 1)], role))
                return

    def phrase(self, kind: str, role: int, clause: float = 0.0) -> None:
        self.say("the" if self.chance(0.6) else "a")
        if self.chance(0.3):
            self.word("adjective", QUALITY)
        self.word(kind, role)
        if self.chance(clause):
            self.say("that")
            self.word("verb", ACTION)
            self.phrase(self.patient(), PATIENT)

    def patient(self) -> str:
        draw = self.rng.random()
        return "thing" if draw < 0.5 else "person" if draw < 0.9 else "place"

    def agent(self) -> str:
        return "person" if self.chance(0.75) else "thing"

    def place(self) -> None:
        self.say("in" if self.chance(0.5) else "near")
        self.phrase("place" if self.chance(0.8) else "thing", PLACE)

    def sentence(self) -> Sentence:
        self.out = []
        if fronted := self.chance(0.12):
            self.place()
        form = self.rng.random()
        if form < 0.36:
            self.phrase(self.agent(), AGENT, 0.15)
            self.word("verb", ACTION)
            self.phrase(self.patient(), PATIENT)
        elif form < 0.58:
            self.phrase(self.patient(), PATIENT, 0.1)
            self.say("was")
            self.word("verb", ACTION)
            self.say("by")
            self.phrase(self.agent(), AGENT)
        elif form < 0.70:  # the patient in front: "it the seed that the king ate"
            self.say("it")
            self.phrase(self.patient(), PATIENT)
            self.say("that")
            self.phrase(self.agent(), AGENT)
            self.word("verb", ACTION)
        elif form < 0.80:
            self.phrase(self.agent(), AGENT)
            self.word("giving", ACTION)
            self.phrase(self.patient(), PATIENT)
            self.say("to")
            self.phrase("person", RECIPIENT)
        elif form < 0.90:
            self.phrase(self.agent(), AGENT)
            self.word("giving", ACTION)
            self.phrase("person", RECIPIENT)
            self.phrase(self.patient(), PATIENT)
        else:
            self.phrase(self.agent(), AGENT)
            self.word("verb", ACTION)
            self.say("and")
            self.word("verb", ACTION)
        if self.chance(0.2):
            self.word("adverb", MANNER)
        if not fronted and self.chance(0.2):
            self.place()
        ids, roles = zip(*self.out, strict=True)
        return Sentence(ids, roles)


def document(split: Split, index: int) -> list[Sentence]:
    """4 to 9 sentences on one topic."""
    writer = _Writer(np.random.default_rng([_SPLITS.index(split), index]))
    return [writer.sentence() for _ in range(int(writer.rng.integers(4, 10)))]


def judged(split: Split, index: int) -> tuple[tuple[int, ...], bool]:
    """(ids of the first sentence of a document, whether it follows the grammar).

    In every other document two neighbouring words of different roles have changed places, as in "king the slept": which
    words there are does not tell, their order does.
    """
    sentence = document(split, index)[0]
    ids, roles = list(sentence.ids), sentence.roles
    if index % 2:
        return sentence.ids, True
    places = [i for i in range(len(ids) - 1) if roles[i] != roles[i + 1]]
    i = places[int(np.random.default_rng([_SPLITS.index(split), index, 1]).integers(len(places)))]
    ids[i], ids[i + 1] = ids[i + 1], ids[i]
    return tuple(ids), False


def sentences(split: Split, count: int) -> Iterator[Sentence]:
    """The first sentence of each of `count` documents."""
    return (document(split, i)[0] for i in range(count))


def corpus(num_documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Flat ids and sentence sizes of the pre-training part, as `files.TokenisedText` has them."""
    ids: list[int] = []
    sizes: list[int] = []
    for i in range(num_documents):
        for sentence in document("pretrain", i):
            ids += [*sentence.ids, EOS]
            sizes.append(len(sentence.ids) + 1)
        sizes.append(0)
    return np.array(ids, dtype=np.uint16), np.array(sizes, dtype=np.int32)


def labelled(sentence: Sentence) -> tuple[np.ndarray, np.ndarray]:
    """ids with `<s>` and `</s>`, and their roles; (T,) int64 each."""
    return np.array([BOS, *sentence.ids, EOS]), np.array([UNSCORED, *sentence.roles, UNSCORED])


def written(sentence: Sentence) -> str:
    """For people."""
    return " ".join(lexicon().symbols[i] for i in sentence.ids)
