"""The modality: its configuration, and how its parts meet the contract (d2v's docs/contract.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2v_core.config import RunConfig
from d2v_core.contract import Batching, Dataset, Layout, MaskingPolicy, Modality, Part
from d2v_core.errors import UserError
from d2v_core.masking import SpanMasking, SpanMaskingConfig
from d2v_core.positions import ConvPositionsConfig
from d2v_mysignal.data import DataConfig, open_dataset
from d2v_mysignal.feature_encoder import FeaturesConfig, SignalEncoder


class MySignalModality(Modality[np.ndarray]):
    """Signals of one channel, (S,) float32 each. Sizes are counted in values."""

    name = "mysignal"  # as in `d2v run modality=mysignal`, and as the entry point is called
    unit = "values"
    encoders = ("patches",)

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.data = config.section("data", DataConfig)
        self.features = config.section("features", FeaturesConfig)
        try:  # what cannot work is said before a run has a folder
            self.data.check()
            if self.features.patch < 1:
                raise ValueError(f"features.patch={self.features.patch} must be at least 1")
            if self.data.max_size < 2 * self.features.patch:
                raise ValueError(f"data.max_size={self.data.max_size} must be at least two patches")
            self.masking()
        except ValueError as error:
            raise UserError(f"This configuration cannot work: {error}") from error

    # ------------------------------------------------------------------------------------------------ configuration

    @classmethod
    def sections(cls, encoder: str) -> Mapping[str, type]:
        del encoder  # there is only one
        return {
            "data": DataConfig,
            "features": FeaturesConfig,
            "positions": ConvPositionsConfig,
            "mask": SpanMaskingConfig,
        }

    @classmethod
    def recipes(cls) -> Path:
        return Path(__file__).parent / "recipes"

    # --------------------------------------------------------------------------------------------------------- data

    def dataset(self, split: str) -> Dataset[np.ndarray]:
        del split
        return open_dataset(self.data, 2 * self.features.patch)

    def batching(self) -> Batching:
        return Batching(self.data.batch, self.data.batch, self.data.max_size)

    def prepare(self, sample: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        """A random stretch of at most `size` values."""
        start = int(rng.integers(max(len(sample) - size, 0) + 1))
        return sample[start : start + size]

    def layout(self, sample: np.ndarray) -> Layout:
        """As many tokens as `embed` will make of it."""
        return Layout((len(sample) // self.features.patch,))

    def collate(self, samples: Sequence[np.ndarray]) -> Mapping[str, Tensor]:
        """signal (B, S) float32, zeros behind shorter ones; num_values (B,) int64 only where some are shorter."""
        lengths = [len(sample) for sample in samples]
        signal = torch.zeros(len(samples), max(lengths))
        for row, sample in zip(signal, samples, strict=True):
            row[: len(sample)] = torch.as_tensor(sample)
        if min(lengths) == max(lengths):
            return {"signal": signal}
        return {"signal": signal, "num_values": torch.tensor(lengths)}

    def amount(self, inputs: Mapping[str, Tensor]) -> float:
        return float(inputs["num_values"].sum()) if "num_values" in inputs else float(inputs["signal"].numel())

    # ------------------------------------------------------------------------------------------------- the network

    def masking(self) -> MaskingPolicy:
        return SpanMasking(self.config.section("mask", SpanMaskingConfig))

    def feature_encoder(self) -> SignalEncoder:
        return SignalEncoder(self.features, self.config.section("positions", ConvPositionsConfig), self.config.model)

    def teacher_parts(self) -> Mapping[str, Part]:
        """The teacher averages everything, but uses the student's own patch embedding."""
        return {"": "average", "encoder.embedding": "share"}
