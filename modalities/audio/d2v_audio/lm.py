"""`d2v lm train TEXT...`: an n-gram language model of one's own text, as an ARPA file.

Interpolated modified Kneser-Ney smoothing without pruning, as KenLM's lmplz computes it, `<unk>` included.
"""

from __future__ import annotations

import gzip
from array import array
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from d2v_audio.ngram import BOS, EOS, UNK
from d2v_core.config import opt
from d2v_core.errors import UserError
from d2v_core.files import existing
from d2v_core.verbs import train_words

HELP = """d2v lm train TEXT... out=FILE.arpa [key=value ...]

Estimates an n-gram language model (interpolated modified Kneser-Ney, nothing pruned) and writes it as an ARPA file.
TEXT are UTF-8 files, packed with gzip or not, with a sentence in each line and blanks between words.

Options, with their defaults:
"""
MAX_ORDER = 6  # what KenLM's query code is built for by default
FALLBACK = (0.5, 1.0, 1.5)  # discounts where the counts give none: lmplz --discount_fallback
NO_MASS = -99.0  # log10 of a back-off weight of zero, as ARPA files have it by custom
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass
class LMConfig:
    """What `d2v lm train` is told."""

    order: int = opt(4, "Words of the longest n-gram.")
    out: str = opt("lm.arpa", "The file to write; packed where it ends in .gz. It must not exist yet.")
    case: Literal["keep", "upper", "lower"] = opt(
        "keep", "Spell words in another case; LibriSpeech's letters are upper."
    )


@dataclass
class Order:
    """All n-grams of one order, a row for each.

    prefix, suffix: the row, in the order below, of the n-gram without its last and without its first word. word: id of
    the last word. count: adjusted count (how many words precede it; how often it occurs where nothing can precede it
    or the order is the highest). prob, backoff: log10.
    """

    prefix: Ints
    suffix: Ints
    word: Ints
    count: Ints
    prob: Floats
    backoff: Floats


@dataclass
class Estimate:
    """words: word of each id. orders: from 1. fallback: orders whose discounts could not be estimated."""

    words: list[str]
    orders: list[Order]
    fallback: list[int]


def estimate(sentences: Iterable[Sequence[str]], order: int) -> Estimate:
    """Interpolated modified Kneser-Ney n-grams.

    sentences: words without sentence borders; empty sentences do not count.
    Raises UserError for an order out of range, without text, and where no sentence is long enough for the order.
    Source: Chen & Goodman, "An empirical study of smoothing techniques for language modeling" (1998), equation 26 and
    section 4.1.6; Heafield et al., "Scalable modified Kneser-Ney language model estimation" (ACL 2013), section 3. As
    there, `<s>` has probability 1, and `<unk>` what the interpolation of 1-grams with the uniform distribution gives.
    One slip of lmplz is kept, so that models can be compared with its own: the statistic behind the discounts takes one
    n-gram of each lower order by its occurrences instead of its adjusted count. On real text nobody could tell.
    """
    if not 1 <= order <= MAX_ORDER:
        raise UserError(f"order={order} must be from 1 to {MAX_ORDER}.")
    words, stream, place = _stream(sentences)
    longest = int(place.max(initial=-1)) + 1  # words, with the sentence's begin and end
    if not longest:
        raise UserError("the text is empty: there is no word in it.")
    if order > longest:
        raise UserError(
            f"order={order}: the longest sentence has {longest - 2} words, too few for {order}-grams with its begin "
            f"and end. Take order={longest} or less."
        )
    orders, raw = _count(stream, place, len(words), order)
    odd_one = dict(enumerate(_last_in_suffix_order(orders)))
    fallback: list[int] = []
    for n, table in enumerate(orders, 1):
        count = table.count.copy()
        if n < order and n - 1 in odd_one:  # lmplz (adjust_counts.cc) counts its last n-gram by occurrences here
            count[odd_one[n - 1]] = raw[n - 1][odd_one[n - 1]]
        discounts = _discounts(count)
        if discounts is None:
            discounts, _ = FALLBACK, fallback.append(n)
        _smooth(table, discounts, orders[n - 2] if n > 1 else None)
    return Estimate(words, orders, fallback)


def _stream(sentences: Iterable[Sequence[str]]) -> tuple[list[str], Ints, Ints]:
    """All words, the text as ids with `<s>` and `</s>` around each sentence, and each word's place in its sentence."""
    ids = {UNK: 0, BOS: 1, EOS: 2}
    stream, place = array("q"), array("q")
    for sentence in sentences:
        if sentence:
            stream.extend([1, *(ids.setdefault(word, len(ids)) for word in sentence), 2])
            place.extend(range(len(sentence) + 2))
    return list(ids), np.frombuffer(stream, np.int64), np.frombuffer(place, np.int64)


def _count(stream: Ints, place: Ints, num_words: int, order: int) -> tuple[list[Order], list[Ints]]:
    """The n-grams with their adjusted counts, and how often each occurs."""

    def table(prefix: Ints, suffix: Ints, word: Ints, count: Ints) -> Order:
        return Order(prefix, suffix, word, count, np.zeros(len(word)), np.zeros(len(word)))

    none = np.zeros(num_words, np.int64)
    raw = np.bincount(stream, minlength=num_words)
    raw[1] = 0  # <s> is given, never predicted
    orders = [table(none, none, np.arange(num_words), raw)]
    counts = [raw]
    first_of_sentence = np.zeros(num_words, bool)
    rows = stream  # at each place, the row of the n-gram that ends there
    for n in range(2, order + 1):
        ends = np.flatnonzero(place >= n - 1)
        keys, first, inverse, raw = np.unique(
            rows[ends - 1] * num_words + stream[ends], return_index=True, return_inverse=True, return_counts=True
        )
        suffix = rows[ends[first]]
        below = orders[-1]
        counts.append(raw)
        preceded = np.bincount(suffix, minlength=len(below.word))
        below.count = np.where(first_of_sentence, below.count, preceded)
        orders.append(table(keys // num_words, suffix, keys % num_words, raw))
        first_of_sentence = place[ends[first]] == n - 1
        rows = np.full(len(stream), -1, np.int64)
        rows[ends] = inverse
    return orders, counts


def _last_in_suffix_order(orders: Sequence[Order]) -> list[int]:
    """Rows of the last n-grams by last word, then the one before it, and so on; they are each other's ends."""
    rows = [len(orders[0].word) - 1]
    for n in range(1, len(orders)):
        longer = np.flatnonzero(orders[n].suffix == rows[-1])
        if not len(longer):
            break
        first = longer
        for table in orders[n:0:-1]:
            first = table.prefix[first]
        rows.append(int(longer[np.argmax(first)]))
    return rows


def _discounts(count: Ints) -> tuple[float, float, float] | None:
    """Of n-grams with count 1, 2, and 3 or more; None where the closed form gives nothing sensible."""
    n1, n2, n3, n4 = (int((count == c).sum()) for c in (1, 2, 3, 4))
    if not (n1 and n2 and n3):
        return None
    y = n1 / (n1 + 2 * n2)
    d = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
    return d if all(0 <= value <= c for c, value in enumerate(d, 1)) else None


def _smooth(table: Order, discounts: Sequence[float], below: Order | None) -> None:
    """Fills in `prob`, and the back-off weights of the order below."""
    num_contexts = len(below.word) if below else 1
    discount = np.array([0.0, *discounts])[np.minimum(table.count, 3)]
    total = np.bincount(table.prefix, table.count, num_contexts)
    left = np.bincount(table.prefix, discount, num_contexts) / np.maximum(total, 1)  # for the interpolation
    lower = 10 ** below.prob[table.suffix] if below else np.full(len(table.word), 1 / (len(table.word) - 1))  # not <s>
    prob = (table.count - discount) / total[table.prefix] + left[table.prefix] * lower
    if below:
        with np.errstate(divide="ignore"):
            below.backoff = np.where(total > 0, np.maximum(np.log10(left), NO_MASS), 0.0)
    else:
        prob[1] = 1.0
    table.prob = np.log10(prob)


def write_arpa(path: Path, model: Estimate) -> None:
    """Whole or not at all; packed where the name ends in .gz."""
    temporary = path.with_name(f".{path.name}.tmp")
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(temporary, "wt", encoding="utf-8", newline="\n") as file:
        file.write("\\data\\\n")
        file.writelines(f"ngram {n}={len(table.word)}\n" for n, table in enumerate(model.orders, 1))
        names = [""]
        for n, table in enumerate(model.orders, 1):
            file.write(f"\n\\{n}-grams:\n")
            names = [
                f"{names[prefix]} {model.words[word]}" if n > 1 else model.words[word]
                for prefix, word in zip(table.prefix.tolist(), table.word.tolist(), strict=True)
            ]
            rows = zip(table.prob.tolist(), names, table.backoff.tolist(), strict=True)
            if n < len(model.orders):
                file.writelines(f"{prob:.7g}\t{name}\t{backoff:.7g}\n" for prob, name, backoff in rows)
            else:
                file.writelines(f"{prob:.7g}\t{name}\n" for prob, name, _ in rows)
        file.write("\n\\end\\\n")
    temporary.replace(path)


@dataclass
class Text:
    """Reads sentences from files and counts what it leaves out. Words end at ASCII's blanks, as in KenLM."""

    files: Sequence[str]
    case: Literal["keep", "upper", "lower"] = "keep"
    num_empty: int = 0
    num_special: int = 0

    def __iter__(self) -> Iterator[list[str]]:
        spell: Callable[[str], str] = {"keep": str, "upper": str.upper, "lower": str.lower}[self.case]
        for name in self.files:
            path = existing(name, "a text file", "TEXT")
            if path.is_dir():
                raise UserError(f"TEXT={name} is a folder; name the text files.")
            try:
                with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as lines:
                    for number, line in enumerate(lines, 1):
                        line = line.removeprefix(BOM_UTF8) if number == 1 else line
                        try:
                            words = [spell(word.decode()) for word in line.replace(b"\0", b" ").split()]
                        except UnicodeDecodeError as error:
                            raise UserError(f"TEXT={name}, line {number} is no UTF-8: {error}.") from None
                        kept = [word for word in words if word.lower() not in (UNK, BOS, EOS)]
                        self.num_special += len(words) - len(kept)
                        self.num_empty += not kept
                        yield kept
            except (OSError, EOFError) as error:
                raise UserError(f"TEXT={name} cannot be read: {error}.") from error

    def summary(self) -> str:
        """What was left out; empty where nothing was."""
        left_out = [
            f"{self.num_empty} lines without a word" if self.num_empty else "",
            f"{self.num_special} times {BOS}, {EOS} or {UNK}, which no text may contain" if self.num_special else "",
        ]
        return ", ".join(filter(None, left_out))


def main(argv: Sequence[str]) -> int:
    """The verb. Returns the exit status."""
    words = train_words(argv, "lm", LMConfig, HELP, "text file", "d2v lm train TEXT... out=FILE.arpa")
    if words is None:
        return 0
    files, config, out = words
    if not 1 <= config.order <= MAX_ORDER:
        raise UserError(f"lm train: order={config.order} must be from 1 to {MAX_ORDER}.")
    text = Text(files, config.case)
    try:
        model = estimate(text, config.order)
    except UserError as error:
        raise UserError(f"lm train TEXT={' '.join(files)}: {error}") from None
    try:
        write_arpa(out, model)
    except OSError as error:
        raise UserError(f"lm train: out={out} cannot be written: {error.strerror}.") from error
    if text.summary():
        print(f"Left out: {text.summary()}")
    if model.fallback:
        print(
            f"The text is too small or too even for Kneser-Ney discounts of order {', '.join(map(str, model.fallback))}"
            f"; took {', '.join(map(str, FALLBACK))} there."
        )
    counts = ", ".join(f"{len(table.word)} {n}-grams" for n, table in enumerate(model.orders, 1))
    print(f"{out}: {counts}")
    return 0
