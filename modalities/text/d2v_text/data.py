"""Where text comes from: the user's files, or the built-in grammar; and the role probe on the latter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from d2v_core.config import opt
from d2v_core.contract import Dataset, ProbeTask
from d2v_core.errors import UserError
from d2v_text import grammar
from d2v_text.files import Reader, TokenisedText, block_ids, blocks, find_texts
from d2v_text.tokenizer import BOS, BPE, EOS, PAD


@dataclass
class TextConfig:
    """What to train on, and how much at a time."""

    path: str | None = opt(
        None,
        "Text file (a sentence or paragraph a line, an empty line between documents), .jsonl file, or a folder of "
        "them; null = the built-in grammar.",
    )
    key: str = opt("text", "Key of the text in the records of .jsonl files; each record is a document.")
    tokenizer: str | None = opt(None, "A tokenizer.json, as `d2v tokenizer train` writes it.")
    block_tokens: int = opt(512, "Longest sequence in tokens, <s> in front included.")
    break_mode: Literal["document", "none"] = opt(
        "document",
        "document = whole sentences of one document, as many as fit (fairseq: complete_doc); none = equal pieces "
        "across sentences and documents.",
    )
    batch_tokens: int = opt(8192, "Tokens per optimizer step, padding included, over all processes and accumulation.")
    micro_batch_tokens: int | None = opt(None, "Tokens that run at once; null = the whole batch.")
    cache: str | None = opt(None, "Folder for tokenised text; null = d2v/text in the user's cache folder.")
    max_bad_ratio: float = opt(0.01, "Larger share of unreadable lines or records stops the run before training.")
    grammar_documents: int = opt(8000, "Documents of the built-in grammar; 8000 are about half a million tokens.")

    def check(self) -> None:
        """Raises ValueError."""
        for key in ("batch_tokens", "grammar_documents"):
            if getattr(self, key) < 1:
                raise ValueError(f"data.{key}={getattr(self, key)} must be at least 1")
        if self.block_tokens < 3:
            raise ValueError(f"data.block_tokens={self.block_tokens} must be at least 3: <s>, a token and </s>")
        if self.micro_batch_tokens is not None and not 0 < self.micro_batch_tokens <= self.batch_tokens:
            raise ValueError(
                f"data.micro_batch_tokens={self.micro_batch_tokens} must lie between 0 and "
                f"data.batch_tokens={self.batch_tokens}"
            )
        if not 0 <= self.max_bad_ratio <= 1:
            raise ValueError(f"data.max_bad_ratio={self.max_bad_ratio} must lie between 0 and 1")


Sample = np.ndarray
"""(T,) int64 ids, `<s>` in front."""


class Blocks(Dataset[Sample]):
    """Blocks of a flat array of ids. `text` opens that array where it lies on disk, in each worker for itself."""

    def __init__(
        self, text: TokenisedText | np.ndarray, sizes: np.ndarray, config: TextConfig, description: str
    ) -> None:
        self.text, self.description = text, description
        self.starts, self.lengths = blocks(sizes, config.block_tokens, config.break_mode == "document")
        self.sizes = self.lengths + 1
        self._flat: np.ndarray | None = None

    def id(self, index: int) -> str:
        return str(index)

    def __getitem__(self, index: int) -> Sample:
        if self._flat is None:
            self._flat = self.text.ids() if isinstance(self.text, TokenisedText) else self.text
        return block_ids(self._flat, int(self.starts[index]), int(self.lengths[index]))

    def __getstate__(self) -> dict[str, Any]:
        """A mapped file pickles as all that is in it."""
        return {**self.__dict__, "_flat": None}

    def describe(self) -> str:
        return self.description.format(tokens=int(self.lengths.sum()), blocks=len(self))


class Lines(Dataset[Sample]):
    """Each line of text, and each record's text, by itself: `<s>`, its tokens, `</s>`, cut to `max_tokens`.

    Ids are the file's path below `data.path` and the number of the line: `notes/a.txt:12`.
    """

    def __init__(self, config: TextConfig, tokenizer: BPE, max_tokens: int) -> None:
        assert config.path is not None
        texts, root = find_texts(config.path, 1.0), Path(config.path).expanduser().resolve()
        reader = Reader(config.key, every={})
        self.names: list[str] = []
        self.ids: list[np.ndarray] = []
        self.num_cut, self.num_files = 0, len(texts.sources)

        def name(file: Path, number: int) -> str:
            if file == root:
                return f"{file.name}:{number}"
            return f"{(file.relative_to(root) if file.is_relative_to(root) else file).as_posix()}:{number}"

        for source in texts.sources:
            file = Path(source.name or source.path)
            for number, pieces in reader.numbered(source):
                text = " ".join(filter(None, pieces))
                if not text or (self.names and self.names[-1] == name(file, number)):  # the rest of an endless line
                    continue
                (ids,) = tokenizer.encode([text])
                self.num_cut += len(ids) > max_tokens - 2
                self.names.append(name(file, number))
                self.ids.append(np.array([BOS, *ids[: max_tokens - 2], EOS], dtype=np.int32))
        if not self.ids:
            raise UserError(
                f"data.path={config.path}: no text in {self.num_files} files. {reader.summary()}".rstrip(". ")
            )
        self.max_tokens = max_tokens
        self.sizes = np.array([len(ids) for ids in self.ids], dtype=np.int64)
        self.left_out = {name(*place): reason for place, reason in (reader.every or {}).items()}

    def id(self, index: int) -> str:
        return self.names[index]

    def __getitem__(self, index: int) -> Sample:
        return self.ids[index].astype(np.int64)

    def describe(self) -> str:
        text = f"{len(self)} lines or records with text in {self.num_files} files"
        return text + (f"; {self.num_cut} are cut to {self.max_tokens} tokens" if self.num_cut else "")


def from_files(text: TokenisedText, config: TextConfig) -> Blocks:
    """Blocks of a tokenised text."""
    more = f"\n{text.notes}" if text.notes else ""
    return Blocks(
        text,
        text.sizes(),
        config,
        f"{text.num_files} files, {{tokens}} tokens in {{blocks}} blocks of up to {config.block_tokens}; tokenised in "
        + f"{text.folder}{more}".replace("{", "{{").replace("}", "}}"),
    )


def from_grammar(config: TextConfig) -> Blocks:
    """The corpus is the same for every seed of a run, as a data set on disk would be."""
    flat, sizes = grammar.corpus(config.grammar_documents)
    return Blocks(
        flat,
        sizes,
        config,
        f"No data.path: training on the built-in grammar, {config.grammar_documents} documents, {{tokens}} tokens in "
        "{blocks} blocks. Give data.path=YOUR_TEXT and data.tokenizer=FILE for your own.",
    )


def collate(samples: list[Sample]) -> Mapping[str, Tensor]:
    """ids (B, T) int64, `<pad>` behind shorter ones; padding_mask (B, T) bool only where some are shorter."""
    lengths = torch.tensor([len(sample) for sample in samples])
    ids = torch.full((len(samples), int(lengths.max())), PAD)
    for row, sample in zip(ids, samples, strict=True):
        row[: len(sample)] = torch.from_numpy(sample)
    if int(lengths.min()) == ids.shape[1]:
        return {"ids": ids}
    return {"ids": ids, "padding_mask": torch.arange(ids.shape[1]) >= lengths[:, None]}


Labelled = tuple[Mapping[str, Tensor], Tensor]


def role_probe() -> ProbeTask:
    """Word-level role accuracy on sentences of the built-in grammar that no run has seen."""

    def part(split: grammar.Split, count: int) -> list[Labelled]:
        pairs = map(grammar.labelled, grammar.sentences(split, count))
        return [({"ids": torch.from_numpy(ids)[None]}, torch.from_numpy(roles)) for ids, roles in pairs]

    return ProbeTask(
        name="role accuracy",
        description=(
            f"Share of content words whose role ({', '.join(grammar.ROLES)}) a linear classifier names, on unseen "
            "sentences of the built-in grammar. Each row uses the layer that is best on other unseen sentences."
        ),
        num_classes=len(grammar.ROLES),
        budgets=(10, 100),
        train=part("train", 100),
        dev=part("dev", 100),
        test=part("test", 300),
        input_name="words around",
        input_features=words_around,
    )


def words_around(inputs: Mapping[str, Tensor]) -> Tensor:
    """(T, 5 V): which words stand here and up to two places away, one-hot. What a probe sees without a network."""
    size = grammar.vocabulary().size
    ids = F.pad(inputs["ids"][0], (2, 2), value=PAD)
    return F.one_hot(ids, size).float().unfold(0, 5, 1).flatten(1)
