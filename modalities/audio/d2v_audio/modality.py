"""The audio modality: its configuration, and how its parts meet the contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from d2v_audio.augment import AugmentConfig
from d2v_audio.classification import LabelledConfig, open_classification
from d2v_audio.data import AudioConfig, AudioSample, inventory, normalise, open_dataset, phone_probe
from d2v_audio.feature_encoder import (
    AudioEncoder,
    LogMelConfig,
    ReadStretches,
    StretchConfig,
    StretchGeometry,
    VisibleAudioEncoder,
    WaveformConfig,
    make_embedding,
    make_encoder,
    make_geometry,
)
from d2v_audio.transcripts import TranscriptsConfig, open_transcription
from d2v_core.config import RunConfig, opt
from d2v_core.contract import (
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
    Sequel,
    Task,
)
from d2v_core.decoder import ConvDecoder, DecoderConfig
from d2v_core.errors import UserError
from d2v_core.masking import BlockMasking, BlockMaskingConfig, SpanMasking, SpanMaskingConfig
from d2v_core.positions import ConvPositionsConfig
from d2v_core.visible import AlibiConfig, PrenetConfig


@dataclass
class AudioPositionsConfig(ConvPositionsConfig):
    """Relative positions by convolution."""

    teacher: Literal["average", "copy"] = opt(
        "copy",
        "How the teacher's positions follow the student's. The official Base recipe copies them (`ema_layers_only`); "
        "the released Base checkpoint's stored configuration says they were averaged.",
    )


class AudioModality(Modality[AudioSample]):
    """Sound, sampled at `data.sample_rate`. Sizes are counted in samples, amounts in seconds."""

    name = "audio"
    unit = "s of audio"
    encoders = ("logmel", "waveform")
    methods = ("data2vec", "data2vec2")

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.data = config.section("data", AudioConfig)
        self.visible_only = config.method == "data2vec2"
        try:
            self.data.check()
            self.geometry = make_geometry(self._tokens_config(), self.data.sample_rate)
            if round(self.data.max_s * self.data.sample_rate) < self.two_tokens():
                least = self.two_tokens() / self.data.sample_rate
                raise ValueError(f"data.max_s={self.data.max_s} must be at least {least:g} s, which is two tokens")
            self.masking()
        except ValueError as error:
            raise UserError(f"This configuration cannot work: {error}") from error

    def _tokens_config(self) -> WaveformConfig | LogMelConfig | StretchConfig:
        """What says how long a token is."""
        return self.config.section("stretches", StretchConfig) if self.reads_raw else self.features

    @property
    def features(self) -> WaveformConfig | LogMelConfig:
        """Of the modality's own encoders."""
        kind = WaveformConfig if self.config.encoder == "waveform" else LogMelConfig
        return self.config.section("features", kind)

    @classmethod
    def sections(cls, encoder: str) -> Mapping[str, type]:
        return {
            "data": AudioConfig,
            "features": WaveformConfig if encoder == "waveform" else LogMelConfig,
            "positions": AudioPositionsConfig,
            "mask": SpanMaskingConfig,
        }

    @classmethod
    def task_sections(cls) -> Mapping[str, type]:
        return {"labelled": LabelledConfig, "transcripts": TranscriptsConfig, "augment": AugmentConfig}

    @classmethod
    def method_sections(cls, encoder: str, method: str) -> Mapping[str, type]:
        return {
            **cls.sections(encoder),
            "positions": ConvPositionsConfig,
            "mask": BlockMaskingConfig,
            "prenet": PrenetConfig,
            "alibi": AlibiConfig,
            "decoder": DecoderConfig,
        }

    @classmethod
    def raw_sections(cls, method: str) -> Mapping[str, type]:
        sections = {"data": AudioConfig, "stretches": StretchConfig}
        if method == "data2vec2":
            return {**sections, "mask": BlockMaskingConfig, "decoder": DecoderConfig}
        return {**sections, "mask": SpanMaskingConfig}

    def raw(self) -> Raw:
        """Samples of the waveform."""
        assert isinstance(self.geometry, StretchGeometry)
        return Raw((self.geometry.hop,), channels=1, read=ReadStretches(self.geometry))

    @classmethod
    def recipes(cls) -> Path:
        return Path(__file__).parent / "recipes"

    @classmethod
    def sequel(cls, given: Mapping[str, str]) -> Sequel | None:
        """Fine-tuning on transcripts, pre-trained and untrained, and the word error rates of both."""
        from d2v_audio.ladder import sequel

        return sequel(given)

    @classmethod
    def inventory(cls, config: RunConfig, measure: bool) -> Inventory:
        """Headers say how long a sample is."""
        return inventory(config.section("data", AudioConfig))

    def dataset(self, split: str) -> Dataset[AudioSample]:
        return open_dataset(self.data, split, self.config.seed, self.min_samples)

    def all_samples(self) -> Dataset[AudioSample]:
        """Every clip that makes a token: what is damaged or too short for one is left out by name. What is training's
        own, data.min_s, data.max_s, data.max_bad_ratio and data.repeat, does not count."""
        data = replace(self.data, max_bad_ratio=1.0, verify="headers", repeat=[])
        return open_dataset(data, "train", self.config.seed, self.geometry.min_samples)

    def sample(self, given: Any) -> AudioSample:
        """An audio file's path, or (S,) numbers at `data.sample_rate`, of any loudness."""
        if isinstance(given, (str, Path, AudioSample)):
            return super().sample(given)
        waveform = np.asarray(given, dtype=np.float32)
        least = self.geometry.min_samples
        if waveform.ndim != 1 or len(waveform) < least or not np.isfinite(waveform).all():
            raise UserError(
                f"A waveform of shape {waveform.shape} was given; expected (S,) finite numbers at "
                f"{self.data.sample_rate} Hz, S at least {least}, or the path of an audio file."
            )
        return AudioSample(normalise(waveform))

    @property
    def min_samples(self) -> int:
        """Shortest clip of use: data.min_s, and two tokens in any case, one to hide and one to see."""
        return max(self.two_tokens(), round(self.data.min_s * self.data.sample_rate))

    def two_tokens(self) -> int:
        """Samples in the shortest clip that has two tokens."""
        samples = self.geometry.min_samples
        while self.geometry.num_tokens(samples) < 2:
            samples += 1
        return samples

    def batching(self) -> Batching:
        data = self.data
        rate = data.sample_rate
        micro = data.micro_batch_s or data.batch_s
        batch, micro_batch, longest = (round(seconds * rate) for seconds in (data.batch_s, micro, data.max_s))
        return Batching(batch, micro_batch, longest, data.crop, data.shards_at_once)

    def micro_batch_option(self, size: int) -> str:
        return f"data.micro_batch_s={size / self.data.sample_rate:.6g}"

    def prepare(self, sample: AudioSample, size: int, rng: np.random.Generator) -> AudioSample:
        """A random stretch of `size` samples of a longer clip, ends included."""
        return _cropped(sample, size, rng)

    def layout(self, sample: AudioSample) -> Layout:
        uncropped = self.geometry.num_tokens(sample.num_uncropped) if sample.num_uncropped else None
        return Layout((self.geometry.num_tokens(len(sample.waveform)),), num_uncropped=uncropped)

    def collate(self, samples: Sequence[AudioSample]) -> Mapping[str, Tensor]:
        """waveform (B, S) float32, zeros behind shorter clips; num_samples (B,) int64 only where some are shorter;
        withheld (B, N, 4) int64 only where something is."""
        lengths = [len(sample.waveform) for sample in samples]
        waveform = torch.zeros(len(samples), max(lengths))
        for row, sample in zip(waveform, samples, strict=True):
            row[: len(sample.waveform)] = torch.from_numpy(sample.waveform)
        inputs = {"waveform": waveform}
        if min(lengths) < max(lengths):
            inputs["num_samples"] = torch.tensor(lengths)
        withheld = [torch.from_numpy(sample.withheld) for sample in samples if sample.withheld is not None]
        if withheld:
            inputs["withheld"] = torch.nn.utils.rnn.pad_sequence(withheld, batch_first=True)
        return inputs

    def amount(self, inputs: Mapping[str, Tensor]) -> float:
        samples = inputs["num_samples"].sum().item() if "num_samples" in inputs else inputs["waveform"].numel()
        return samples / self.data.sample_rate

    def masking(self) -> MaskingPolicy:
        if self.visible_only:
            return BlockMasking(self.config.section("mask", BlockMaskingConfig), self.config.official_quirks)
        return SpanMasking(self.config.section("mask", SpanMaskingConfig))

    def feature_encoder(self) -> AudioEncoder | VisibleAudioEncoder:
        config, rate = self.config, self.data.sample_rate
        if not self.visible_only:
            return make_encoder(self.features, config.model, config.section("positions", AudioPositionsConfig), rate)
        return VisibleAudioEncoder(
            make_embedding(self.features, config.model.embed_dim, rate),
            config.model,
            config.section("positions", ConvPositionsConfig),
            config.section("prenet", PrenetConfig),
            config.section("alibi", AlibiConfig),
            leaky_padding=config.official_quirks,
        )

    def predictor(self) -> Predictor:
        if not self.visible_only:
            return super().predictor()
        decoder = self.config.section("decoder", DecoderConfig)
        return ConvDecoder(decoder, self.config.model.embed_dim, 1, leaky_padding=self.config.official_quirks)

    def teacher_parts(self) -> Mapping[str, Part]:
        """The front end and its projection are the student's own; the mask vector is of no use to a teacher."""
        if self.visible_only or self.reads_raw:  # positions, norm, prenet blocks and the scale of ALiBi are averaged
            return {"": "average", "encoder.embedding": "share"}
        return {
            "encoder": "average",
            "encoder.embedding": "share",
            "encoder.mask_embedding": "share",
            "encoder.positions": self.config.section("positions", AudioPositionsConfig).teacher,
            "transformer": "average",
        }

    def probe(self) -> ProbeTask:
        return phone_probe(self)

    def task(self) -> Task[AudioSample]:
        transcripts = self.config.section("labelled", LabelledConfig).task == "transcripts"
        self.config.section("augment", AugmentConfig).check(self._tokens_config())
        return open_transcription(self) if transcripts else open_classification(self)

    def prepare_labelled(self, sample: AudioSample, rng: np.random.Generator | None) -> AudioSample:
        """Whole, but of a clip whose class is asked for at most data.max_s, at random while training, else the middle.
        While training, with what section augment withholds."""
        labelled = self.config.sections.get("labelled")  # pre-training has no such section
        if isinstance(labelled, LabelledConfig) and labelled.task == "classes":
            sample = _cropped(sample, round(self.data.max_s * self.data.sample_rate), rng)
        features = self._tokens_config()
        if rng is None or not isinstance(features, LogMelConfig):
            return sample
        augment = self.config.section("augment", AugmentConfig)
        return replace(sample, withheld=augment.rectangles(features, len(sample.waveform) / self.data.sample_rate, rng))


def _cropped(sample: AudioSample, size: int, rng: np.random.Generator | None) -> AudioSample:
    """A stretch of `size` samples of a longer clip: random, ends included, or, without rng, from the middle."""
    excess = len(sample.waveform) - size
    if excess <= 0:
        return sample
    start = excess // 2 if rng is None else int(rng.integers(excess + 1))
    return AudioSample(sample.waveform[start : start + size], len(sample.waveform))
