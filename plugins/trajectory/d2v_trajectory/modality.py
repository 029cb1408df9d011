"""The trajectory modality: its configuration, and how its parts meet the contract (d2v's docs/contract.md)."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2v_core.config import RunConfig
from d2v_core.contract import Batching, Dataset, Layout, MaskingPolicy, Modality, Part, Predictor, ProbeTask
from d2v_core.decoder import ConvDecoder, DecoderConfig
from d2v_core.errors import UserError
from d2v_trajectory.data import DataConfig, Group, Trajectories, return_probe
from d2v_trajectory.feature_encoder import TrajectoryEncoder
from d2v_trajectory.masking import TrajectoryMasking, TrajectoryMaskingConfig


class TrajectoryModality(Modality[np.ndarray]):
    """What an agent saw, did and got, step by step, by data2vec 2.0. Sizes and amounts are counted in steps."""

    name = "trajectory"
    unit = "steps"
    encoders = ("groups",)
    methods = ("data2vec2",)

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.data = config.section("data", DataConfig)
        try:  # what cannot work is said before a run has a folder
            self.data.check()
            self.masking()
        except ValueError as error:
            raise UserError(f"This configuration cannot work: {error}") from error

    @classmethod
    def sections(cls, encoder: str) -> Mapping[str, type]:
        return {"data": DataConfig, "mask": TrajectoryMaskingConfig, "decoder": DecoderConfig}

    @classmethod
    def recipes(cls) -> Path:
        return Path(__file__).parent / "recipes"

    @cached_property
    def kept(self) -> list[Group] | None:
        """The groups of the stored run which this modality belongs to or starts from."""
        stored = Path(self.config.home or self.config.from_run or "") / "groups.json"
        return (
            [Group(**group) for group in json.loads(stored.read_text(encoding="utf-8"))] if stored.is_file() else None
        )

    @cached_property
    def opened(self) -> Trajectories:
        return Trajectories(self.data, self.kept)

    @property
    def groups(self) -> Sequence[Group]:
        return self.kept or self.opened.groups

    def keep(self, run: Path) -> None:
        (run / "groups.json").write_text(json.dumps([vars(one) for one in self.groups], indent=1), encoding="utf-8")

    def dataset(self, split: str) -> Dataset[np.ndarray]:
        return self.opened

    def batching(self) -> Batching:
        return Batching(self.data.batch, self.data.batch, self.data.window)

    def prepare(self, sample: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        """A random stretch of at most `size` steps."""
        start = int(rng.integers(max(len(sample) - size, 0) + 1))
        return sample[start : start + size]

    def layout(self, sample: np.ndarray) -> Layout:
        return Layout((len(sample), len(self.groups)))

    def collate(self, samples: Sequence[np.ndarray]) -> Mapping[str, Tensor]:
        """values (B, S, W) float32, zeros behind shorter ones; steps (B,) int64 only where some are shorter."""
        values = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(sample) for sample in samples], batch_first=True)
        steps = torch.tensor([len(sample) for sample in samples])
        return {"values": values} if bool((steps == steps[0]).all()) else {"values": values, "steps": steps}

    def amount(self, inputs: Mapping[str, Tensor]) -> float:
        return float(inputs["steps"].sum() if "steps" in inputs else inputs["values"][..., 0].numel())

    def masking(self) -> MaskingPolicy:
        return TrajectoryMasking(self.config.section("mask", TrajectoryMaskingConfig))

    def feature_encoder(self) -> TrajectoryEncoder:
        return TrajectoryEncoder([group.channels * (group.classes or 1) for group in self.groups], self.config.model)

    def predictor(self) -> Predictor:
        return ConvDecoder(self.config.section("decoder", DecoderConfig), self.config.model.embed_dim, num_axes=2)

    def teacher_parts(self) -> Mapping[str, Part]:
        return {"": "average"}

    def probe(self) -> ProbeTask | None:
        """On built-in trajectories, so only where the run was trained on such."""
        return return_probe(self.groups, self.data.window) if self.data.path is None else None
