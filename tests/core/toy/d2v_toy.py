"""A modality of random vectors, as small as the contract allows: what the core is tested with."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from d2v_core import (
    BadSample,
    Batching,
    Dataset,
    FeatureEncoder,
    LabelledPart,
    Layout,
    Masks,
    Modality,
    SpanMasking,
    Task,
    Tokens,
)
from d2v_core.config import ModelConfig, opt
from d2v_core.ctc import sequences
from d2v_core.keyed import generator
from d2v_core.masking import SpanMaskingConfig

CHANNELS = 4
MAX_TOKENS = 24


@dataclass
class ToyConfig:
    """Random sequences."""

    num_samples: int = opt(14, "Sequences.")
    min_size: int = opt(12, "Shortest, tokens.")
    max_size: int = opt(24, "Longest, tokens.")
    batch: int = opt(96, "Tokens per optimizer step.")
    micro_batch: int = opt(48, "Tokens that run at once.")
    crop: bool = opt(True, "Crop to the shortest; false = pad.")
    bad: list[int] = opt([], "Samples that cannot be read.")
    extra_tokens: int = opt(0, "Learned tokens in front of each sequence.")


@dataclass
class ToyTaskConfig:
    """Which of its classes a sequence has: each has an offset of its own in channel 0."""

    num_classes: int = opt(3, "Classes; 1 = the offset itself is asked for, a number.")
    signal: float = opt(2.0, "Distance between the offsets.")
    bad_test: bool = opt(False, "Make the first sample of the test part unreadable.")
    spelled: bool = opt(False, "Sequences of the symbols a and b instead of classes.")
    mixed: bool = opt(False, "Blend each sample of a batch with its neighbour while training.")


class ToyDataset(Dataset[np.ndarray]):
    """(size, CHANNELS) arrays. In the environment, TOY_DELAY makes reading slow, and TOY_FALL names samples at which a
    process other than the first dies or hangs: "die-3 hang-5"."""

    def __init__(self, config: ToyConfig) -> None:
        self.config = config
        span = config.max_size - config.min_size + 1
        self.sizes = config.min_size + np.arange(config.num_samples, dtype=np.int64) * 7 % span

    def id(self, index: int) -> str:
        return f"sample-{index}"

    def __getitem__(self, index: int) -> np.ndarray:
        time.sleep(float(os.environ.get("TOY_DELAY", "0")))
        if multiprocessing.parent_process() is not None:
            falls = os.environ.get("TOY_FALL", "").split()
            if f"die-{index}" in falls:
                os.kill(os.getpid(), signal.SIGKILL)
            if f"hang-{index}" in falls:
                time.sleep(1000)
        if index in self.config.bad:
            raise BadSample(f"sample {index} is broken on purpose")
        return generator(0, "toy", index).normal(size=(int(self.sizes[index]), CHANNELS)).astype(np.float32)


class ToyLabelled(Dataset[np.ndarray]):
    """Sequences of noise of 12 to 23 tokens with an offset."""

    def __init__(self, part: str, offsets: np.ndarray, bad: bool = False) -> None:
        self.part, self.offsets, self.bad = part, offsets, bad
        self.sizes = 12 + np.arange(len(offsets), dtype=np.int64) * 7 % 12

    def id(self, index: int) -> str:
        return f"{self.part}-{index}"

    def __getitem__(self, index: int) -> np.ndarray:
        if self.bad and index == 0:
            raise BadSample("broken on purpose")
        x = generator(0, self.part, index).normal(size=(int(self.sizes[index]), CHANNELS)).astype(np.float32)
        x[:, 0] += self.offsets[index]
        return x


class ToySpelled(ToyLabelled):
    """Noise with two tokens of +3 for each a and of -3 for each b of `spellings`, and two of neither behind them."""

    def __init__(self, part: str, count: int) -> None:
        super().__init__(part, np.zeros(count))
        self.spellings = [
            list(map(int, generator(0, part, "spelling", i).integers(1, 3, 1 + i % 3))) for i in range(count)
        ]

    def __getitem__(self, index: int) -> np.ndarray:
        x = 0.3 * super().__getitem__(index)
        for place, symbol in enumerate(self.spellings[index]):
            x[4 * place : 4 * place + 2, 0] += 3.0 if symbol == 1 else -3.0
        return x


class ToyEncoder(FeatureEncoder):
    def __init__(self, model: ModelConfig, extra_tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(CHANNELS, model.embed_dim)
        self.mask_embedding = nn.Parameter(torch.randn(model.embed_dim))
        self.places = nn.Parameter(0.1 * torch.randn(MAX_TOKENS, model.embed_dim))
        self.extra = nn.Parameter(torch.randn(extra_tokens, model.embed_dim))
        self.dropout = model.dropout

    def embed(self, inputs: Mapping[str, Tensor]) -> Tokens:
        x = self.embedding(inputs["x"])
        padding_mask = None
        if "sizes" in inputs:
            padding_mask = torch.arange(x.shape[1]) >= inputs["sizes"][:, None]
        return Tokens(x, padding_mask, (x.shape[1],))

    def view(self, tokens: Tokens, masks: Masks | None) -> Tokens:
        x, padding_mask = tokens.x, tokens.padding_mask
        if masks is not None:
            x = repeat(x, "b t d -> b m t d", m=masks.num_copies)
            x = torch.where(masks.hidden.unsqueeze(-1), self.mask_embedding.to(x.dtype), x)
            x = rearrange(x, "b m t d -> (b m) t d")
            if padding_mask is not None:
                padding_mask = repeat(padding_mask, "b t -> (b m) t", m=masks.num_copies)
        x = torch.cat([self.extra.to(x.dtype).expand(len(x), -1, -1), x + self.places[: x.shape[1]].to(x.dtype)], 1)
        if padding_mask is not None:
            padding_mask = F.pad(padding_mask, (len(self.extra), 0))
        return Tokens(F.dropout(x, self.dropout, self.training), padding_mask, tokens.grid, len(self.extra))


class ToyModality(Modality[np.ndarray]):
    """encoders: the teacher shares the embedding, or averages one of its own."""

    name = "toy"
    unit = "tokens"
    encoders = ("shared", "own")

    def __init__(self, config) -> None:
        super().__init__(config)
        self.data = config.section("data", ToyConfig)

    @classmethod
    def sections(cls, encoder: str) -> Mapping[str, type]:
        return {"data": ToyConfig, "mask": SpanMaskingConfig}

    @classmethod
    def task_sections(cls) -> Mapping[str, type]:
        return {"offsets": ToyTaskConfig}

    def task(self) -> Task[np.ndarray]:
        task = self.config.section("offsets", ToyTaskConfig)
        if task.spelled:
            parts = (ToySpelled("train", 60), ToySpelled("test", 31))
            train, test = (LabelledPart(data, sequences(data.spellings)) for data in parts)
            return Task("spelling", (), ("symbol_errors",), train, test=test, symbols=("blank", "a", "b"))

        def part(name: str, count: int) -> LabelledPart[np.ndarray]:
            labels = np.arange(count) % max(task.num_classes, 2)
            offsets = task.signal * labels
            data = ToyLabelled(name, offsets, task.bad_test and name == "test")
            return LabelledPart(data, labels if task.num_classes > 1 else offsets.astype(np.float32))

        regression = task.num_classes == 1
        return Task(
            name="offsets",
            classes=() if regression else tuple(f"class-{i}" for i in range(task.num_classes)),
            metrics=("pearson_spearman", "pearson") if regression else ("accuracy",),
            train=part("train", 60),
            test=part("test", 31),
            input_name="channel means",
            input_features=lambda inputs: inputs["x"].mean(1),
        )

    def prepare_labelled(self, sample: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        return sample if rng is None else sample + 0.1 * rng.normal(size=sample.shape).astype(np.float32)

    def mix(self, inputs, targets, rng):
        if not self.config.section("offsets", ToyTaskConfig).mixed:
            return inputs, targets
        share = float(rng.random())
        x = share * inputs["x"] + (1 - share) * inputs["x"].roll(1, 0)
        return {**inputs, "x": x}, share * targets + (1 - share) * targets.roll(1, 0)

    @classmethod
    def recipes(cls) -> Path:
        return Path(__file__).parent / "recipes"

    def dataset(self, split: str) -> ToyDataset:
        return ToyDataset(self.data)

    def batching(self) -> Batching:
        return Batching(self.data.batch, self.data.micro_batch, self.data.max_size, self.data.crop)

    def micro_batch_option(self, size: int) -> str:
        return f"data.micro_batch={size}"

    def prepare(self, sample: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        start = int(rng.integers(max(len(sample) - size, 0) + 1))
        return sample[start : start + size]

    def layout(self, sample: np.ndarray) -> Layout:
        return Layout((len(sample),))

    def collate(self, samples: Sequence[np.ndarray]) -> Mapping[str, Tensor]:
        sizes = torch.tensor([len(sample) for sample in samples])
        x = nn.utils.rnn.pad_sequence([torch.from_numpy(sample) for sample in samples], batch_first=True)
        return {"x": x} if (sizes == sizes[0]).all() else {"x": x, "sizes": sizes}

    def amount(self, inputs: Mapping[str, Tensor]) -> float:
        return float(inputs["sizes"].sum() if "sizes" in inputs else inputs["x"].shape[0] * inputs["x"].shape[1])

    def masking(self) -> SpanMasking:
        return SpanMasking(self.config.section("mask", SpanMaskingConfig))

    def feature_encoder(self) -> ToyEncoder:
        return ToyEncoder(self.config.model, self.data.extra_tokens)

    def teacher_parts(self):
        parts = {"": "average", "encoder.mask_embedding": "share"}
        return parts | ({"encoder.embedding": "share"} if self.config.encoder == "shared" else {})
