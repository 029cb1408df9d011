"""The built-in language: always the same, and its roles are not to be had from the words alone."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np

from d2v_text import grammar
from d2v_text.data import role_probe, words_around
from d2v_text.grammar import ROLES, UNSCORED, document, labelled, lexicon, sentences, vocabulary, written
from d2v_text.tokenizer import BOS, EOS, MASK, NUM_SPECIAL, SPECIAL


def test_it_is_the_same_everywhere():
    """Written down from the first run: another one would change every number in the documentation."""
    assert written(document("pretrain", 0)[0]) == FIRST
    assert document("pretrain", 5) == document("pretrain", 5) != document("train", 5)


FIRST = "a bunoma gifure a sozeze fuguki"


def test_vocabulary():
    symbols = lexicon().symbols
    assert symbols[:NUM_SPECIAL] == SPECIAL and symbols[-1] == MASK
    assert len(set(symbols)) == len(symbols) == vocabulary().size


def test_every_word_has_a_role_or_is_a_function_word():
    function = set(range(NUM_SPECIAL, NUM_SPECIAL + len(grammar.FUNCTION_WORDS)))
    seen: Counter[int] = Counter()
    for sentence in sentences("train", 500):
        ids, roles = labelled(sentence)
        assert ids[0] == BOS and ids[-1] == EOS and roles[0] == roles[-1] == UNSCORED
        assert 5 <= len(ids) <= 40
        assert ids.min() >= 0 and ids.max() < vocabulary().mask
        for word, role in zip(sentence.ids, sentence.roles, strict=True):
            assert (role == UNSCORED) == (word in function)
            seen[role] += 1
    assert all(seen[role] > 50 for role in range(len(ROLES)))


def test_the_word_alone_does_not_tell_its_role():
    """Best possible guess by word type, told the truth for every word: well below certainty."""
    counts: dict[int, Counter[int]] = defaultdict(Counter)
    for sentence in sentences("train", 4000):
        for word, role in zip(sentence.ids, sentence.roles, strict=True):
            if role != UNSCORED:
                counts[word][role] += 1
    total = sum(sum(of.values()) for of in counts.values())
    assert 0.5 < sum(max(of.values()) for of in counts.values()) / total < 0.75
    assert max(sum(of[r] for of in counts.values()) for r in range(len(ROLES))) / total < 0.4


def test_parts_share_no_sentence():
    parts = {split: {s.ids for s in sentences(split, 300)} for split in ("train", "dev", "test")}
    pretrain = {s.ids for i in range(500) for s in document("pretrain", i)}
    assert not parts["train"] & parts["test"] and not parts["dev"] & parts["test"]
    assert len(pretrain & parts["test"]) <= 3


def test_corpus():
    ids, sizes = grammar.corpus(20)
    assert sizes.sum() == len(ids) and (sizes == 0).sum() == 20
    assert np.array_equal(ids[: sizes[0] - 1], document("pretrain", 0)[0].ids) and ids[sizes[0] - 1] == EOS


def test_probe():
    task = role_probe()
    inputs, labels = task.train[3]
    assert inputs["ids"].shape == (1, len(labels))
    around = words_around(inputs)
    assert around.shape == (len(labels), 5 * vocabulary().size)
    assert (around.sum(1) == 5).all()
    assert task.num_classes == len(ROLES)
