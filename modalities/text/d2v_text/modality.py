"""The text modality: its configuration, and how its parts meet the contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from d2v_core.config import RunConfig, read_yaml
from d2v_core.contract import (
    Batch,
    Batching,
    Dataset,
    Inventory,
    Layout,
    MaskingPolicy,
    Modality,
    Part,
    Predictor,
    ProbeTask,
    Raw,
    Task,
)
from d2v_core.decoder import ConvDecoder, DecoderConfig
from d2v_core.errors import UserError
from d2v_core.masking import BlockMasking, BlockMaskingConfig
from d2v_core.transformer import init_bert
from d2v_text import grammar, labelled
from d2v_text.data import Lines, Sample, TextConfig, collate, from_files, from_grammar, role_probe
from d2v_text.feature_encoder import (
    NO_BYTE,
    BytesConfig,
    EmbeddingConfig,
    HeadConfig,
    ReadBytes,
    RegressionHead,
    SequenceConfig,
    TextEncoder,
    VisibleEmbeddingConfig,
    VisibleTextEncoder,
)
from d2v_text.files import inventory, tokenise
from d2v_text.labelled import GlueConfig
from d2v_text.masking import NOT_SELECTED, TokenMasking, TokenMaskingConfig
from d2v_text.tokenizer import BPE, NUM_SPECIAL, PAD, Vocabulary, load_tokenizer

TOKENIZER = "tokenizer.json"  # in the run folder


class TextModality(Modality[Sample]):
    """Text as token ids. Sizes are counted in tokens, `<s>` included."""

    name = "text"
    unit = "tokens"
    encoders = ("embedding",)
    methods = ("data2vec", "data2vec2")

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.data = config.section("data", TextConfig)
        self.visible_only = config.method == "data2vec2"
        kind = BytesConfig if self.reads_raw else VisibleEmbeddingConfig if self.visible_only else EmbeddingConfig
        self.embedding: SequenceConfig = config.section("embedding", kind)
        try:
            self.data.check()
            self.glue = None if config.stage == "pretrain" else config.section("glue", GlueConfig)
            if self.glue is not None:
                self.glue.check()
            if not self.visible_only and self.head.layers < 1:
                raise ValueError(f"head.layers={self.head.layers} must be at least 1")
            if isinstance(self.embedding, EmbeddingConfig) and not self.embedding.position_std >= 0:
                raise ValueError(f"embedding.position_std={self.embedding.position_std} must be 0 or more")
            if isinstance(self.embedding, BytesConfig) and self.embedding.token_bytes < 1:
                raise ValueError(f"embedding.token_bytes={self.embedding.token_bytes} must be at least 1")
            if self.data.block_tokens > self.embedding.max_positions:
                raise ValueError(
                    f"data.block_tokens={self.data.block_tokens} is more than "
                    f"embedding.max_positions={self.embedding.max_positions}"
                )
            if config.model.norm != "post":
                raise ValueError(f"model.norm={config.model.norm}: text has a norm before the first block, so post")
            self.tokenizer_file = self._tokenizer_file()
            self.vocabulary = self._vocabulary()
            self._check_source()
            self.masking()
        except ValueError as error:
            raise UserError(f"This configuration cannot work: {error}") from error

    def _tokenizer_file(self) -> Path | None:
        """`data.tokenizer`; of a stored run the copy in its folder; of labelled data the one that `from` was trained
        with. None = no tokenizer. Raises UserError where another one than that of `from` is given."""
        config, given = self.config, self.data.tokenizer
        if config.home is not None and (config.home / TOKENIZER).is_file():
            return config.home / TOKENIZER
        if config.stage == "pretrain" or config.home is not None or config.from_run is None:
            return None if given is None else Path(given)
        kept, before = Path(config.from_run) / TOKENIZER, read_yaml(Path(config.from_run) / "config.yaml")
        stored = (before.get("data") or {}).get("tokenizer")
        if kept.is_file():
            if given not in (None, stored) and load_tokenizer(given).identity != load_tokenizer(kept).identity:
                raise UserError(
                    f"data.tokenizer={given} is not the tokenizer that from={config.from_run} was trained with: the "
                    f"same ids would mean other words. Leave data.tokenizer out, {kept} is then used."
                )
            return kept
        if given is None and self.data.path is not None:
            raise UserError(
                f"data.path={self.data.path}: from={config.from_run} was trained on the built-in grammar, whose words "
                "are not those of a text. Give a run that was trained on text, or leave data.path out for a labelled "
                "task on the grammar."
            )
        return None if given is None else Path(given)

    @property
    def head(self) -> HeadConfig:
        """Of data2vec 1.0."""
        return self.config.section("head", HeadConfig)

    @property
    def mask(self) -> TokenMaskingConfig:
        """Of data2vec 1.0."""
        return self.config.section("mask", TokenMaskingConfig)

    def _vocabulary(self) -> Vocabulary:
        """The tokenizer's, the built-in grammar's, or, where only a size is given, one of which no more is known."""
        size = self.embedding.vocab_size
        if self.tokenizer_file is not None:
            found = self.tokenizer.vocabulary
        elif self.data.path is not None:
            if self.config.home is not None:
                raise UserError(
                    f"The run {self.config.home} was trained on the built-in grammar, whose words are not those of "
                    f"data.path={self.data.path}. Take a run that was trained on text."
                )
            kept = Path(self.config.from_run or "") / TOKENIZER
            if self.config.from_run and kept.is_file():
                raise UserError(f"data.path={self.data.path} needs a tokenizer, that of `from`: data.tokenizer={kept}.")
            raise UserError(
                f"data.path={self.data.path} needs a tokenizer. Train one with `d2v tokenizer train {self.data.path} "
                "out=tokenizer.json`, then give data.tokenizer=tokenizer.json."
            )
        elif size is None or size == grammar.vocabulary().size:
            return grammar.vocabulary()
        elif size <= 5:
            raise ValueError(f"embedding.vocab_size={size} must be above 5, the number of special symbols")
        else:
            return Vocabulary(size)
        if size is not None and size != found.size:
            raise ValueError(
                f"data.tokenizer={self.tokenizer_file} has {found.size} symbols, embedding.vocab_size={size}; give the "
                "tokenizer that this configuration was made for, or leave embedding.vocab_size out"
            )
        return found

    def _check_source(self) -> None:
        """That `from` is no run on the built-in grammar where this one reads text. The rest is seen by the weights."""
        stored = Path(self.config.from_run or "") / "config.yaml"
        if self.config.from_run is None or self.tokenizer_file is None or not stored.is_file():
            return
        if self.config.home is not None:  # it was asked when that run began
            return
        before = read_yaml(stored)
        if (before.get("data") or {}).get("tokenizer") is None and not (before.get("embedding") or {}).get(
            "vocab_size"
        ):
            raise UserError(
                f"from={self.config.from_run} was trained on the built-in grammar, whose words are not those of "
                f"data.tokenizer={self.data.tokenizer}: its weights cannot be used on text. Leave `from` out."
            )

    @cached_property
    def tokenizer(self) -> BPE:
        """That of `tokenizer_file`. Raises UserError where it does not fit."""
        assert self.tokenizer_file is not None
        return load_tokenizer(self.tokenizer_file)

    def keep(self, run: Path) -> None:
        """A copy of the tokenizer, without which the ids that the network takes mean nothing."""
        if self.tokenizer_file is not None and not (run / TOKENIZER).exists():
            self.tokenizer.save(run / TOKENIZER)

    def __getstate__(self) -> dict[str, object]:
        """Loader workers need no tokenizer."""
        return {key: value for key, value in self.__dict__.items() if key != "tokenizer"}

    def inputs(self, text: str) -> Mapping[str, Tensor]:
        """What `LoadedRun.encode` takes, for one text: `<s>`, its tokens, `</s>`; what is too long is cut off.

        Raises UserError where there is no tokenizer: the built-in grammar has ids alone (`grammar.labelled`).
        """
        return collate([self.sample(text)])

    def sample(self, given: Any, *more: str) -> Sample:
        """A text, or a pair of them, as labelled data are read; a file's `Path`, if it has one line; or ids, (T,)."""
        if isinstance(given, Path):
            return super().sample(given)
        if not isinstance(given, str):
            return np.asarray(given, dtype=np.int64)
        if self.tokenizer_file is None:
            raise UserError("This run has no tokenizer: it was trained on the built-in grammar. Give it ids.")
        (ids,), _ = labelled.encode(self.tokenizer, [(given, *more)], self.max_tokens)
        return ids

    @property
    def max_tokens(self) -> int:
        """Of a labelled sample."""
        positions = self.embedding.max_positions
        return positions if self.glue is None else min(self.glue.max_tokens, positions)

    @classmethod
    def sections(cls, encoder: str) -> Mapping[str, type]:
        del encoder
        return {"data": TextConfig, "embedding": EmbeddingConfig, "head": HeadConfig, "mask": TokenMaskingConfig}

    @classmethod
    def task_sections(cls) -> Mapping[str, type]:
        return {"glue": GlueConfig}

    @classmethod
    def method_sections(cls, encoder: str, method: str) -> Mapping[str, type]:
        del encoder, method
        return {
            "data": TextConfig,
            "embedding": VisibleEmbeddingConfig,
            "mask": BlockMaskingConfig,
            "decoder": DecoderConfig,
        }

    @classmethod
    def raw_sections(cls, method: str) -> Mapping[str, type]:
        sections = cls.method_sections("", method) if method == "data2vec2" else cls.sections("")
        return {**sections, "embedding": BytesConfig}

    def raw(self) -> Raw:
        """The bytes of each token."""
        read = ReadBytes(self._spellings(), self.config.section("embedding", BytesConfig).token_bytes)
        patch = (read.table.shape[1],)
        return Raw(patch, channels=1, read=read, symbols=read.num_symbols, absent=NO_BYTE, fill=read.fill)

    def _spellings(self) -> list[bytes | None]:
        """Of every symbol by id; None for special ones. Raises UserError where they are not known."""
        size = self.vocabulary.size
        if self.tokenizer_file is not None:
            spelt = self.tokenizer.spellings()
        elif self.vocabulary == grammar.vocabulary():
            spelt = [symbol.encode() for symbol in grammar.lexicon().symbols]
        else:
            raise UserError(
                f"embedding.vocab_size={size} without data.tokenizer: how the symbols are spelt is not known, so "
                f"encoder={self.config.encoder} has no bytes to read. Give data.tokenizer=FILE."
            )
        return [None if i < NUM_SPECIAL or i == size - 1 else one for i, one in enumerate(spelt)]

    @classmethod
    def recipes(cls) -> Path:
        return Path(__file__).parent / "recipes"

    @classmethod
    def inventory(cls, config: RunConfig, measure: bool) -> Inventory:
        """Documents where they are to be measured, in tokens if there is data.tokenizer, else in words."""
        data = config.section("data", TextConfig)
        tokenizer = None if data.tokenizer is None or not measure else load_tokenizer(data.tokenizer)
        assert data.path is not None
        return inventory(data.path, data.key, measure, tokenizer)

    def dataset(self, split: str) -> Dataset[Sample]:
        del split
        data = self.data
        if data.path is not None:
            return from_files(tokenise(data.path, data.key, self.tokenizer, data.cache, data.max_bad_ratio), data)
        if self.vocabulary != grammar.vocabulary():
            raise UserError(
                f"No data.path: the built-in grammar has a vocabulary of its own, {grammar.vocabulary().size} words. "
                "Give data.path=YOUR_TEXT, or leave data.tokenizer and embedding.vocab_size out."
            )
        return from_grammar(data)

    def all_samples(self) -> Dataset[Sample]:
        """Each line of the files at data.path, and each record's text, by itself; else blocks of the grammar."""
        return self.dataset("train") if self.data.path is None else Lines(self.data, self.tokenizer, self.max_tokens)

    def batching(self) -> Batching:
        data = self.data
        return Batching(data.batch_tokens, data.micro_batch_tokens or data.batch_tokens, data.block_tokens)

    def micro_batch_option(self, size: int) -> str:
        return f"data.micro_batch_tokens={size}"

    def layout(self, sample: Sample) -> Layout:
        return Layout((len(sample),))

    def collate(self, samples: Sequence[Sample]) -> Mapping[str, Tensor]:
        return collate(list(samples))

    def amount(self, inputs: Mapping[str, Tensor]) -> float:
        padding = inputs["padding_mask"].sum().item() if "padding_mask" in inputs else 0
        return inputs["ids"].numel() - padding

    def masking(self) -> MaskingPolicy:
        if self.visible_only:
            return BlockMasking(self.config.section("mask", BlockMaskingConfig), self.config.official_quirks)
        return TokenMasking(self.mask, self.vocabulary)

    def feature_encoder(self) -> TextEncoder | VisibleTextEncoder:
        if isinstance(self.embedding, EmbeddingConfig):
            return TextEncoder(self.vocabulary, self.config.model, self.embedding)
        embedding = self.config.section("embedding", VisibleEmbeddingConfig)
        return VisibleTextEncoder(self.vocabulary, self.config.model, embedding, self.config.official_quirks)

    def predictor(self) -> Predictor:
        if not self.visible_only:
            return RegressionHead(self.config.model.embed_dim, self.head)
        config = self.config
        decoder = ConvDecoder(
            config.section("decoder", DecoderConfig), config.model.embed_dim, 1, leaky_padding=config.official_quirks
        )
        init_bert(decoder.projections)
        return decoder

    def teacher_parts(self) -> Mapping[str, Part]:
        """1.0: tables and their norm are the student's own of the last update, or averaged too. 2.0: the student's.
        A plugin's encoder is averaged but for what reads bytes."""
        if self.reads_raw:
            return {"": "average", "encoder.embedding": "share"}
        if isinstance(self.embedding, EmbeddingConfig):
            return {"encoder": self.embedding.teacher, "transformer": "average"}
        return {"encoder": "share", "transformer": "average"}

    def teacher_inputs(self, batch: Batch) -> Mapping[str, Tensor] | None:
        """mask.teacher_input=labels: the selected tokens, `<pad>` everywhere else. The official data pipeline hands its
        teacher this by mistake: it then attends to selected tokens only, whose positions are counted without gaps."""
        if self.visible_only or self.mask.teacher_input == "full":
            return None
        assert batch.masks is not None and batch.masks.fill is not None
        unselected = batch.masks.fill[:, 0] == NOT_SELECTED
        return {"ids": batch.inputs["ids"].masked_fill(unselected, PAD), "padding_mask": unselected}

    def probe(self) -> ProbeTask | None:
        """The roles of the built-in grammar, for networks that know its words."""
        return role_probe() if self.vocabulary == grammar.vocabulary() else None

    def task(self) -> Task[Sample]:
        """Labelled sentences or pairs at `data.path`; without one, a task on the built-in grammar."""
        data = self.data
        assert self.glue is not None
        if data.path is not None:
            return labelled.from_files(data.path, self.glue, self.tokenizer, self.max_tokens, data.max_bad_ratio)
        if self.vocabulary != grammar.vocabulary():
            raise UserError(
                f"from={self.config.from_run} was trained on text, and there is no data.path. Give labelled text: a "
                "folder of a task of GLUE with train.tsv, or a .tsv, .csv or .jsonl file with named columns."
            )
        return labelled.from_grammar(self.max_tokens)
