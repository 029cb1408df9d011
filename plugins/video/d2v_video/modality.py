"""The video modality: its configuration, and how its parts meet the contract (d2v's docs/contract.md)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from d2v_core.config import RunConfig
from d2v_core.contract import Batching, Dataset, Layout, MaskingPolicy, Modality, Part, Predictor, ProbeTask
from d2v_core.decoder import DecoderConfig
from d2v_core.errors import UserError
from d2v_video.data import Clips, DataConfig, action_probe, cut, to_tensor
from d2v_video.feature_encoder import FeaturesConfig, SpaceTimeDecoder, TubeletEncoder, sine_positions
from d2v_video.masking import TubeMasking, TubeMaskingConfig


class VideoModality(Modality[np.ndarray]):
    """Clips of `data.num_frames` square frames in tubelets, by data2vec 2.0. Sizes and amounts are counted in clips."""

    name = "video"
    unit = "clips"
    encoders = ("tubelets",)
    methods = ("data2vec2",)

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.data = config.section("data", DataConfig)
        self.features = config.section("features", FeaturesConfig)
        try:  # what cannot work is said before a run has a folder
            self.data.check()
            for size, part in (("num_frames", "tubelet"), ("image_size", "patch_size")):
                whole, one = getattr(self.data, size), getattr(self.features, part)
                if one < 1 or whole % one:
                    raise ValueError(f"data.{size}={whole} must be a multiple of features.{part}={one}, at least 1")
            rows = self.data.image_size // self.features.patch_size
            self.grid = (self.data.num_frames // self.features.tubelet, rows, rows)
            sine_positions((1, 1, 1), config.model.embed_dim)
            self.masking()
        except ValueError as error:
            raise UserError(f"This configuration cannot work: {error}") from error

    @classmethod
    def sections(cls, encoder: str) -> Mapping[str, type]:
        return {"data": DataConfig, "features": FeaturesConfig, "mask": TubeMaskingConfig, "decoder": DecoderConfig}

    @classmethod
    def recipes(cls) -> Path:
        return Path(__file__).parent / "recipes"

    def dataset(self, split: str) -> Dataset[np.ndarray]:
        return Clips(self.data)

    def batching(self) -> Batching:
        return Batching(self.data.batch, self.data.batch, max_size=1)

    def prepare(self, sample: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        return cut(sample, self.data, rng)

    def layout(self, sample: np.ndarray) -> Layout:
        return Layout(self.grid)

    def collate(self, samples: Sequence[np.ndarray]) -> Mapping[str, Tensor]:
        """clip (B, 3, F, S, S) float32, normalised, of clips that were prepared."""
        return {"clip": to_tensor(samples)}

    def amount(self, inputs: Mapping[str, Tensor]) -> float:
        return float(len(inputs["clip"]))

    def masking(self) -> MaskingPolicy:
        return TubeMasking(self.config.section("mask", TubeMaskingConfig))

    def feature_encoder(self) -> TubeletEncoder:
        size = self.data.image_size
        return TubeletEncoder(self.features, self.config.model, (self.data.num_frames, size, size))

    def predictor(self) -> Predictor:
        return SpaceTimeDecoder(self.config.section("decoder", DecoderConfig), self.config.model.embed_dim)

    def teacher_parts(self) -> Mapping[str, Part]:
        return {"": "average"}

    def probe(self) -> ProbeTask | None:
        """Where the built-in clips can be drawn well enough to tell what moves."""
        return action_probe(self.data) if self.data.image_size >= 16 and self.data.num_frames >= 4 else None
