"""What a CTC head spells with: the letters, and the spellings of the words a decoder may find."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from d2v_core.errors import UserError
from d2v_core.files import existing, first

BLANK, PAD, EOS, UNK = range(4)
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # <s> is the blank of CTC
BOUNDARY = "|"
OFFICIAL = "|ETAONIHSRDLUMWCFGYPBVK'XJQZ"  # fairseq, dict.ltr.txt


@dataclass(frozen=True)
class Letters:
    """The output symbols by id: blank, three that are never used, the word boundary, letters.

    The official 32 come from fairseq's examples/wav2vec (dict.ltr.txt); 28 letters and 4 special symbols.
    """

    symbols: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.symbols[:4] != SPECIAL or BOUNDARY not in self.symbols or len(set(self.symbols)) < len(self.symbols):
            raise ValueError(f"symbols must be {SPECIAL}, then letters with {BOUNDARY!r} among them, each once")

    @classmethod
    def official(cls) -> Letters:
        """English, as in LibriSpeech: upper case and the apostrophe."""
        return cls((*SPECIAL, *OFFICIAL))

    @classmethod
    def of(cls, transcripts: Iterable[str]) -> Letters:
        """The letters of transcripts in any script (code points in Unicode's NFC), the most frequent first."""
        counts: dict[str, int] = {}
        for text in transcripts:
            for letter in "".join(normal(text).split()):
                counts[letter] = counts.get(letter, 0) + 1
        counts.pop(BOUNDARY, None)
        if not counts:
            raise UserError("the transcripts have no letters: no vocabulary can be made from them.")
        return cls((*SPECIAL, BOUNDARY, *sorted(counts, key=lambda letter: (-counts[letter], letter))))

    def __len__(self) -> int:
        return len(self.symbols)

    @property
    def boundary(self) -> int:
        """The id of what stands between words."""
        return self.symbols.index(BOUNDARY)

    def unknown(self, text: str) -> list[str]:
        """Letters of a text that are not in the vocabulary, each once, in order."""
        known = set(self.symbols[4:]) - {BOUNDARY}
        return list(dict.fromkeys(letter for word in normal(text).split() for letter in word if letter not in known))

    def encode(self, text: str, unknown: int | None = None) -> list[int]:
        """Ids of a text, a boundary after each word (as fairseq's libri_labels.py).

        unknown: the id of letters outside the vocabulary; where it is None, they raise ValueError.
        """
        if unknown is None and (letters := self.unknown(text)):
            raise ValueError(f"{text!r} has letters outside the vocabulary: {' '.join(letters)}")
        ids: dict[str, int | None] = {symbol: i for i, symbol in enumerate(self.symbols) if i > UNK}
        spelled = [
            i for word in normal(text).split()
            for i in (*(unknown if letter == BOUNDARY else ids.get(letter, unknown) for letter in word), self.boundary)
        ]  # fmt: skip
        return [i for i in spelled if i is not None]

    def decode(self, ids: Sequence[int], unknown: str = "") -> str:
        """The text of ids that are already collapsed, composed as transcripts are; boundaries become blanks, special
        symbols vanish.

        unknown: what is written for letters outside the vocabulary.
        """
        text = "".join(unknown if i == UNK else self.symbols[i] for i in ids if i >= UNK)
        return normal(" ".join(text.replace(BOUNDARY, " ").split()))


def normal(text: str) -> str:
    """Composed characters, so that an accent has one spelling."""
    return unicodedata.normalize("NFC", text)


@dataclass
class Lexicon:
    """The words a decoder may find, each with its spellings (ids, a boundary last).

    skipped: words left out, each with the letters that the vocabulary lacks.
    """

    words: dict[str, list[tuple[int, ...]]]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """One line of what was left out; empty where nothing was."""
        if not self.skipped:
            return ""
        named = [f"{word} ({letters})" for word, letters in self.skipped.items()]
        return (
            f"{len(self.skipped)} of {len(self.skipped) + len(self.words)} words have letters outside the vocabulary "
            f"and cannot be found: {first(named, ', ')}"
        )


def lexicon_of(words: Iterable[str], letters: Letters) -> Lexicon:
    """Each word spelled with its own letters. Raises UserError where no word can be spelled."""
    return _lexicon(((word, list(normal(word))) for word in words), letters, "the language model's words")


def read_lexicon(path: str | Path, letters: Letters) -> Lexicon:
    """From lines `word TAB letters`, letters with blanks between; a word on several lines has several spellings.

    The boundary after the last letter may be left out. Raises UserError for other lines, and where no word can be
    spelled.
    """
    entries: list[tuple[str, list[str]]] = []
    file = existing(path, "a lexicon", "lexicon")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"lexicon={path} cannot be read: {error}.") from error
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if len(fields) == 1:
            raise UserError(f"lexicon={path}, line {number}: expected 'word TAB letters', found {line[:80]!r}.")
        if fields:
            spelling = fields[1:-1] if fields[-1] == BOUNDARY else fields[1:]
            entries.append((fields[0], [normal(letter) for letter in spelling]))
    return _lexicon(entries, letters, f"lexicon={path}")


def _lexicon(entries: Iterable[tuple[str, list[str]]], letters: Letters, source: str) -> Lexicon:
    ids = {symbol: i for i, symbol in enumerate(letters.symbols) if i > UNK and symbol != BOUNDARY}
    words: dict[str, list[tuple[int, ...]]] = {}
    skipped: dict[str, str] = {}
    for word, spelling in entries:
        unknown = [letter for letter in dict.fromkeys(spelling) if letter not in ids]
        if unknown or not spelling:
            skipped[word] = " ".join(unknown) or "none"
            continue
        spellings = words.setdefault(word, [])
        ended = (*(ids[letter] for letter in spelling), letters.boundary)
        if ended not in spellings:
            spellings.append(ended)
    if not words:
        shown = first([f"{word} ({missing})" for word, missing in skipped.items()], ", ")
        raise UserError(
            f"{source}: no word can be spelled with the vocabulary {''.join(letters.symbols[4:])}"
            + (f", for example {shown}. Are both in the same case and script?" if shown else ": there are no words.")
        )
    return Lexicon(words, skipped)
