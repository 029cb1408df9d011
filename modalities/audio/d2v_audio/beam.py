"""A beam search over the words of a lexicon with an n-gram model, in plain Python.

The same search as flashlight's LexiconDecoder for CTC without log-add: same scores, same pruning, same merging.
`d2v_audio.decode` chooses between the two. Source: flashlight/text, decoder/{LexiconDecoder,Trie}.cpp, Utils.h.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from d2v_audio.ngram import NGramModel, State

MAX_HOMOGRAPHS = 6  # words with one spelling that the trie keeps (Trie.h, kTrieMaxLabel)


class Node:
    """A place in the lexicon's trie. words: those that end here. look_ahead: best score of a word at or below."""

    __slots__ = ("children", "look_ahead", "scores", "words")

    def __init__(self) -> None:
        self.children: dict[int, Node] = {}
        self.words: list[str] = []
        self.scores: list[float] = []
        self.look_ahead = 0.0


class History:
    """The words found so far. One object for each sequence of words: hypotheses merge where it is the same object."""

    __slots__ = ("next", "state")

    def __init__(self, state: State) -> None:
        self.state = state
        self.next: dict[str, tuple[History, float]] = {}


class Entry(NamedTuple):
    """A hypothesis at one frame. token: what the frame emitted. word: the one it ended, if any."""

    score: float
    history: History
    node: Node
    token: int
    word: str | None
    parent: Entry | None


class Options(NamedTuple):
    """Of the search; `d2v_audio.decode.DecodeConfig` says what they mean."""

    beam_size: int
    beam_size_token: int
    beam_threshold: float
    lm_weight: float
    word_score: float
    sil_score: float


def build_trie(lexicon: Mapping[str, Sequence[tuple[int, ...]]], lm: NGramModel | None) -> Node:
    """The trie of all spellings, the best score of a word at a sentence's begin smeared towards the root."""
    root = Node()
    for word, spellings in lexicon.items():
        score = lm.score(lm.begin, word)[1] if lm else 0.0
        for spelling in spellings:
            node = root
            for token in spelling:
                node = node.children.setdefault(token, Node())
            if len(node.words) < MAX_HOMOGRAPHS:
                node.words.append(word)
                node.scores.append(score)
    _smear(root)
    return root


def _smear(root: Node) -> None:
    # Words with one spelling are added up, as in flashlight, whatever the mode; children are compared.
    nodes = [root]  # parents before children; a word may be longer than calls can be nested
    for node in nodes:
        nodes.extend(node.children.values())
    for node in reversed(nodes):
        best = max(node.scores, default=-math.inf)
        if node.scores:
            best += math.log(sum(math.exp(score - best) for score in node.scores))
        node.look_ahead = max([best, *(child.look_ahead for child in node.children.values())])


def search(
    emissions: Sequence[Sequence[float]], root: Node, lm: NGramModel | None, options: Options, blank: int, boundary: int
) -> list[Entry]:
    """The best hypotheses, best first.

    emissions: (T, tokens) scores of each frame. Merged where words, place in the trie and last token are the same; of
    these the best path counts. In each frame those below the best by more than the threshold are dropped, and all but
    beam_size. At the end, hypotheses inside a word count only if there are no others.
    """

    def follow(history: History, word: str) -> tuple[History, float]:
        found = history.next.get(word)
        if found is None:
            state, score = lm.score(history.state, word) if lm else ((), 0.0)
            found = history.next[word] = History(state), score
        return found

    lm_weight, word_score, sil_score, threshold = options[3], options[4], options[5], options[2]
    beam = [Entry(0.0, History(lm.begin if lm else ()), root, boundary, None, None)]
    for frame in emissions:
        allowed: set[int] | None = None
        if options.beam_size_token < len(frame):
            allowed = set(heapq.nlargest(options.beam_size_token, range(len(frame)), key=frame.__getitem__))
        merged: dict[tuple[History, Node, int], Entry] = {}
        best = max(entry.score for entry in beam) + frame[blank]
        for entry in beam:
            before, history, node, last = entry.score, entry.history, entry.node, entry.token
            at_root = node is root
            known = 0.0 if at_root else node.look_ahead
            found: list[Entry] = []
            for token, child in node.children.items():
                if allowed is not None and token not in allowed:
                    continue
                score = before + frame[token] + (sil_score if token == boundary else 0.0)
                if child.children and token != last:
                    ahead = score + lm_weight * (child.look_ahead - known)
                    if ahead >= best - threshold:
                        found.append(Entry(ahead, history, child, token, None, entry))
                if at_root and token == last:  # a word of one letter would repeat itself
                    continue
                for word in child.words:
                    after, lm_score = follow(history, word)
                    ended = score + lm_weight * (lm_score - known) + word_score
                    if ended >= best - threshold:
                        found.append(Entry(ended, after, root, token, word, entry))
            if at_root or last != blank:  # stay: silence between words, the same letter inside one
                token = boundary if at_root else last
                stay = before + frame[token] + (sil_score if token == boundary else 0.0)
                found.append(Entry(stay, history, node, token, None, entry))
            found.append(Entry(before + frame[blank], history, node, blank, None, entry))
            for new in found:
                score = new.score
                if score >= best - threshold:
                    best = max(best, score)
                    key = new.history, new.node, new.token
                    old = merged.get(key)
                    if old is None or score > old.score:
                        merged[key] = new
        beam = [entry for entry in merged.values() if entry.score >= best - threshold]
        if len(beam) > options.beam_size:
            beam = heapq.nlargest(options.beam_size, beam, key=lambda entry: entry.score)
    whole = [entry for entry in beam if entry.node is root] or beam
    final: dict[tuple[History, Node], Entry] = {}
    for entry in whole:
        score = entry.score + (lm_weight * lm.finish(entry.history.state) if lm else 0.0)
        key = entry.history, entry.node
        if key not in final or score > final[key].score:
            final[key] = entry._replace(score=score)
    ranked = sorted(final.values(), key=lambda entry: -entry.score)
    return [entry for entry in ranked if entry.score >= ranked[0].score - threshold][: options.beam_size]


def trace(entry: Entry) -> tuple[list[str], list[int]]:
    """The words of a hypothesis, and the token of each frame."""
    words: list[str] = []
    path: list[int] = []
    step: Entry | None = entry
    while step is not None and step.parent is not None:
        path.append(step.token)
        if step.word is not None:
            words.append(step.word)
        step = step.parent
    return words[::-1], path[::-1]
