"""Byte-level BPE in fairseq's order of special symbols, and `d2v tokenizer train`.

`<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, then symbols, `<mask>` last: what the official dictionary and RoBERTa's
tokenizer.json have, and what masking and positions count on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from d2v_core.config import opt
from d2v_core.errors import UserError
from d2v_core.verbs import train_words

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"
BOS, PAD, EOS, UNK = range(4)
NUM_SPECIAL = len(SPECIAL)
SMALLEST = NUM_SPECIAL + 256 + 1  # every byte is a symbol
HELP = """d2v tokenizer train FILES out=FILE.json [key=value ...]

Trains a byte-level BPE tokenizer on text files, .jsonl files or folders of them, for data.tokenizer=FILE.json.

Options, with their defaults:
"""


@dataclass(frozen=True)
class Vocabulary:
    """size: symbols, special ones included. fingerprint: 63 bits that stand for all of them in order; 0 = unknown."""

    size: int
    fingerprint: int = 0

    @property
    def mask(self) -> int:
        """The id of `<mask>`, the last one."""
        return self.size - 1

    @classmethod
    def of(cls, symbols: Sequence[str]) -> Vocabulary:
        """From all symbols by id."""
        digest = hashlib.blake2b("\0".join(symbols).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return cls(len(symbols), int.from_bytes(digest, "little") >> 1)


class BPE:
    """A tokenizer from a file. Special symbols that stand in a text are text, not symbols."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
        self._tokenizer, self.vocabulary = tokenizer, vocabulary
        self._json = tokenizer.to_str(pretty=True)
        self.identity = hashlib.blake2b(self._json.encode(), digest_size=8).hexdigest()
        # Said outright, or the library warns of it when a loader forks its workers.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids without `<s>` and `</s>`."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(self._json, encoding="utf-8")
        temporary.replace(path)

    def spellings(self) -> list[bytes]:
        """The bytes of every symbol by id; of special ones, their names."""
        symbols = sorted(self._tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda pair: pair[1])
        byte_of = _bytes_by_letter()
        return [
            bytes(byte_of[letter] for letter in symbol) if set(symbol) <= byte_of.keys() else symbol.encode()
            for symbol, _ in symbols
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special symbols written out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def _bytes_by_letter() -> dict[str, int]:
    """How byte-level BPE writes bytes: visible ones of Latin-1 as themselves, the others as letters from U+0100 on."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(itself))
    return {chr(b): b for b in itself} | {chr(0x100 + i): b for i, b in enumerate(others)}


def load_tokenizer(path: str | Path) -> BPE:
    """Raises UserError where there is no file, it is no tokenizer, or its special symbols stand elsewhere."""
    from tokenizers import Tokenizer

    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(
            f"data.tokenizer={path} is no file. Train one with `d2v tokenizer train FILES out={path}`, or give a "
            "tokenizer.json."
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no exception of its own
        raise UserError(f"data.tokenizer={path} is not a tokenizer.json: {error}.") from error
    by_id = {i: symbol for symbol, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    size = len(by_id)
    wanted = dict(enumerate(SPECIAL)) | {max(size - 1, NUM_SPECIAL): MASK}
    wrong = [f"{i} is {by_id.get(i)!r}, not {symbol!r}" for i, symbol in wanted.items() if by_id.get(i) != symbol]
    if wrong:
        raise UserError(
            f"data.tokenizer={path} has other special symbols than data2vec's: id {'; id '.join(wrong)}. Expected "
            f"{', '.join(SPECIAL)} as ids 0 to 3 and {MASK} last, as `d2v tokenizer train` and RoBERTa have them."
        )
    gaps = sorted(set(range(size)) - by_id.keys())
    if gaps:
        raise UserError(f"data.tokenizer={path} has no symbol for id {gaps[0]}, though for higher ones.")
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return BPE(tokenizer, Vocabulary.of([by_id[i] for i in range(size)]))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (GPT-2's) of at most vocab_size symbols; fewer where the texts give no more."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST:
        raise UserError(f"vocab_size={vocab_size} must be at least {SMALLEST}: 256 bytes and 5 special symbols.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([MASK])
    return tokenizer


@dataclass
class TokenizerConfig:
    """What `d2v tokenizer train` is told."""

    vocab_size: int = opt(50265, "Symbols, special ones included; 50265 is the official number.")
    out: str = opt("tokenizer.json", "The file to write; it must not exist yet.")
    key: str = opt("text", "Key of the text in the records of .jsonl files.")
    max_bad_ratio: float = opt(0.01, "Larger share of unreadable lines or records is an error.")


def main(argv: Sequence[str]) -> int:
    """The verb. Returns the exit status."""
    words = train_words(
        argv, "tokenizer", TokenizerConfig, HELP, "text file, .jsonl file or folder",
        "d2v tokenizer train FILES out=FILE.json",
    )  # fmt: skip
    if words is None:
        return 0
    files, config, out = words
    tokenizer = train_tokenizer(_texts(files, config), config.vocab_size)
    try:
        tokenizer.save(str(out))
    except Exception as error:
        raise UserError(f"tokenizer train: out={out} cannot be written: {error}.") from error
    size = load_tokenizer(out).vocabulary.size
    print(f"{out}: {size} symbols" + (f" (the text gives no {config.vocab_size})" if size < config.vocab_size else ""))
    print(f"Next: d2v run modality=text data.path={files[0]} data.tokenizer={out}")
    return 0


def _texts(files: Sequence[str], config: TokenizerConfig) -> Iterator[str]:
    from d2v_text.files import Reader, find_files

    reader = Reader(config.key, section="")
    for name in files:
        for path in find_files(name, "FILES"):
            yield from (line for line in reader.lines(path) if line)
    reader.check(config.max_bad_ratio, "FILES")
    if reader.summary():
        print(reader.summary())
