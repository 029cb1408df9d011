"""Back-off n-gram models in the ARPA format, scored as KenLM scores them. Nothing compiled is needed.

The whole file is held in Python dictionaries, about 300 bytes per n-gram: right for models of one's own text and for
LibriSpeech's pruned 3-grams; the official 4-gram wants KenLM (`pip install 'd2v[decode]'`).
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn

from d2v_core.errors import UserError
from d2v_core.files import existing

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
MISSING_UNK = -100.0  # log10, what KenLM gives `<unk>` where the file has none (lm/config.cc, unknown_missing_logprob)
KENLM_BINARY = b"mmap lm "

State = tuple[int, ...]  # ids of the words that later words can depend on, oldest first
Table = Mapping[State, tuple[float, float]]  # n-gram -> log10 probability, log10 back-off


class NGramModel:
    """log10 probabilities of words given the words before them.

    words: word of each id. tables: one for each order, from 1.
    Source: the definition of ARPA back-off, p(w | h) = p(hw) if the model has hw, else backoff(h) p(w | h without its
    oldest word), where a missing back-off is 1.
    """

    def __init__(self, words: Sequence[str], tables: Sequence[Table]) -> None:
        self.words, self.order, self._tables = words, len(tables), tables
        self._ids = {word: i for i, word in enumerate(words)}
        self._unk = self._ids[UNK]

    def __contains__(self, word: str) -> bool:
        return word in self._ids

    @property
    def begin(self) -> State:
        """The state in front of a sentence."""
        return (self._ids[BOS],) if self.order > 1 else ()

    def score(self, state: State, word: str) -> tuple[State, float]:
        """The state after `word`, and its log10 probability. An unknown word counts as `<unk>`."""
        i = self._ids.get(word, self._unk)
        backoff = 0.0
        for start in range(len(state) + 1):
            found = self._tables[len(state) - start].get((*state[start:], i))
            if found:
                return self._shorten((*state, i)), backoff + found[0]
            backoff += self._tables[len(state) - start - 1].get(state[start:], (0.0, 0.0))[1]
        raise AssertionError("every id has a unigram")

    def finish(self, state: State) -> float:
        """log10 probability that the sentence ends here."""
        return self.score(state, EOS)[1]

    def sentence(self, words: Iterable[str], begin: bool = True, end: bool = True) -> float:
        """log10 probability of a sentence; begin and end: as a whole one, with its borders."""
        state, total = self.begin if begin else (), 0.0
        for word in words:
            state, score = self.score(state, word)
            total += score
        return total + (self.finish(state) if end else 0.0)

    def perplexity(self, sentences: Iterable[Sequence[str]]) -> float:
        """Of whole sentences, for each word and sentence end; unknown words count at the price of `<unk>`."""
        total, count = 0.0, 0
        for sentence in sentences:
            total += self.sentence(sentence)
            count += len(sentence) + 1
        return 10 ** (-total / count) if count else math.nan

    def _shorten(self, history: State) -> State:
        # The longest end that is an n-gram of the model: longer ones have no back-off weight and no continuation.
        history = history[1:] if len(history) >= self.order else history
        while history and history not in self._tables[len(history) - 1]:
            history = history[1:]
        return history


def read_arpa(path: str | Path) -> NGramModel:
    """A model from an ARPA file, packed with gzip or not. Raises UserError naming the line where it is broken."""
    with open_arpa(path) as lines:
        reader = _Reader(path, lines)
        counts = reader.header()
        ids: dict[str, int] = {}
        tables: list[dict[State, tuple[float, float]]] = []
        for order, count in enumerate(counts, 1):
            table: dict[State, tuple[float, float]] = {}
            for words, prob, backoff in reader.section(order, count, last=order == len(counts)):
                if order == 1:
                    ids.setdefault(words[0], len(ids))
                try:
                    key = tuple([ids[word] for word in words])
                except KeyError as error:
                    reader.fail(f"{error.args[0]!r} is not among the 1-grams")
                if key in table:
                    reader.fail(f"the n-gram {' '.join(words)!r} stands here a second time")
                table[key] = prob, backoff
            tables.append(table)
            if order == 1:
                _specials(path, ids, table)
        return NGramModel(list(ids), tables)


def arpa_words(path: str | Path) -> list[str]:
    """The words of an ARPA file without `<s>`, `</s>` and `<unk>`, in its order; n-grams above 1 are not read."""
    with open_arpa(path) as lines:
        reader = _Reader(path, lines)
        counts = reader.header()
        words = [words[0] for words, _, _ in reader.section(1, counts[0], last=len(counts) == 1)]
    return [word for word in words if word not in (BOS, EOS, UNK, UNK.upper())]


def arpa_order(path: str | Path) -> int:
    """The longest n-grams that an ARPA file announces. Raises UserError where it announces none."""
    with open_arpa(path) as lines:
        return len(_Reader(path, lines).header())


def open_arpa(path: str | Path) -> BinaryIO:
    """The bytes of a language model's file, unpacked. Raises UserError where it is none that can be read as text."""
    file = existing(path, "an ARPA file", "LM")
    if file.is_dir():
        raise UserError(f"lm={path} is a folder; give an ARPA file.")
    with open(file, "rb") as raw:
        head = raw.read(len(KENLM_BINARY))
    if head == KENLM_BINARY:
        raise UserError(
            f"lm={path} is KenLM's binary format, which only KenLM reads: `pip install 'd2v[decode]'`, or give the "
            "ARPA file it was made from."
        )
    return gzip.open(file, "rb") if head[:2] == b"\x1f\x8b" else open(file, "rb")  # pyright: ignore[reportReturnType]


def _specials(path: str | Path, ids: dict[str, int], unigrams: dict[State, tuple[float, float]]) -> None:
    for word in (BOS, EOS):
        if word not in ids:
            raise UserError(f"lm={path} has no {word} among its 1-grams: it cannot say where sentences begin and end.")
    if UNK not in ids:  # some tools write <UNK>
        same = ids.pop(UNK.upper(), None)
        if same is None:
            ids[UNK] = len(ids)
            unigrams[(ids[UNK],)] = MISSING_UNK, 0.0
        else:
            by_id = dict(sorted({**{i: w for w, i in ids.items()}, same: UNK}.items()))
            ids.clear()
            ids.update({word: i for i, word in by_id.items()})


class _Reader:
    """Goes through an ARPA file once, counting lines for the errors. Blanks are ASCII's, as in KenLM."""

    def __init__(self, path: str | Path, lines: Iterable[bytes]) -> None:
        self._path, self._lines, self._number = path, self._guarded(lines), 0
        self._line: bytes | None = b""

    def fail(self, what: str) -> NoReturn:
        raise UserError(
            f"lm={self._path}, line {self._number}: {what}. The file is no whole ARPA file: fetch it again, or "
            "make one of a text by `d2v lm train TEXT out=FILE.arpa`."
        )

    def header(self) -> list[int]:
        """Reads up to the first section. Returns the announced number of n-grams of each order."""
        self._skip_blank()
        if self._line != b"\\data\\":
            self.fail(f"expected \\data\\, found {self._shown()}")
        counts: list[int] = []
        while self._next() and self._line:
            words = self._line.replace(b"=", b" = ").split()
            expected = b"%d" % (len(counts) + 1)
            if len(words) != 4 or words[:1] != [b"ngram"] or words[1] != expected or not words[3].isdigit():
                self.fail(f"expected 'ngram {len(counts) + 1}=COUNT', found {self._shown()}")
            counts.append(int(words[3]))
        if not counts:
            self.fail("no line 'ngram 1=COUNT' after \\data\\")
        return counts

    def section(self, order: int, count: int, last: bool) -> Iterator[tuple[list[str], float, float]]:
        """The n-grams of one order: words, log10 probability, log10 back-off. last: no order comes after."""
        self._skip_blank()
        if self._line != b"\\%d-grams:" % order:
            self.fail(f"expected \\{order}-grams:, found {self._shown()}")
        found = 0
        while self._next() and self._line and not self._line.startswith(b"\\"):
            fields = self._line.split()
            if len(fields) not in (order + 1, order + 2):
                self.fail(f"expected a number, {order} words and perhaps a second number, found {self._shown()}")
            try:
                prob = float(fields[0])
                backoff = float(fields[order + 1]) if len(fields) > order + 1 else 0.0
                words = [field.decode() for field in fields[1 : order + 1]]
            except UnicodeDecodeError:
                self.fail("a word is not UTF-8")
            except ValueError:
                self.fail(f"not a number in {self._shown()}")
            if math.isnan(prob) or math.isnan(backoff) or prob > 0:
                self.fail(f"{fields[0].decode()} is no log10 of a probability or the back-off no number")
            found += 1
            yield words, prob, backoff
        if self._line is None:
            self.fail(f"the file ends after {found} of {count} {order}-grams")
        if found != count:
            self.fail(f"{found} {order}-grams, though \\data\\ announces {count}")
        if last:
            self._skip_blank()
            if self._line != b"\\end\\":
                self.fail(f"expected \\end\\, found {self._shown()}")

    def _guarded(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        try:
            yield from lines
        except (EOFError, zlib.error, OSError) as error:
            self.fail(f"cannot be read on ({error})")

    def _next(self) -> bool:
        line = next(self._lines, None)
        self._number += line is not None
        self._line = None if line is None else line.strip()
        return line is not None

    def _skip_blank(self) -> None:
        while self._line == b"" and self._next():
            pass

    def _shown(self) -> str:
        return "the end of the file" if self._line is None else repr(self._line[:80].decode("utf-8", "replace"))
