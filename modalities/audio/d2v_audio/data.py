"""Where sound comes from: the user's files, or the built-in synthetic speech; and the phone probe on the latter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from d2v_audio.feature_encoder import LogMelConfig, LogMelEmbedding, stacked_bands
from d2v_audio.files import MAX_RATE, BadClip, Clip, ScanReport, duration, read, scan
from d2v_audio.synthetic import MIN_SAMPLE_RATE, PHONES, SILENCE, SyntheticSpeech, frame_labels
from d2v_core.config import opt
from d2v_core.contract import BadSample, Dataset, Inventory, ProbeTask
from d2v_core.errors import UserError
from d2v_core.shards import shard_numbers
from d2v_core.sources import Item

if TYPE_CHECKING:
    from d2v_audio.modality import AudioModality

VERIFY_HOURS = 20.0  # data.verify=auto decodes up to this much before training: half a minute on two cores


@dataclass
class AudioConfig:
    """What to train on, and how much at a time."""

    path: str | None = opt(
        None, "Folder searched for audio, .tsv manifest, or one file; null = the built-in synthetic speech."
    )
    split: str | None = opt(None, "Rows of a .tsv table with this value in its column `split`; null = all.")
    also: list[str] = opt([], "More folders, manifests or files to pre-train on together with data.path.")
    repeat: list[int] = opt(
        [], "How many times an epoch hears data.path and each of data.also, in this order; empty = once each."
    )
    sample_rate: int = opt(16000, "Hz, of what the network sees.")
    rate_policy: Literal["resample", "refuse"] = opt("resample", "What to do with files of another rate.")
    min_s: float = opt(0.5, "Shorter clips are dropped and counted, seconds.")
    max_s: float = opt(20.0, "Longer clips are cropped to this, at random, seconds.")
    batch_s: float = opt(16.0, "Audio per optimizer step, over all processes and accumulation, seconds.")
    micro_batch_s: float | None = opt(None, "Audio that runs at once, seconds; null = the whole batch.")
    crop: bool = opt(True, "Cut every clip of a micro-batch to its shortest; false = pad to the longest.")
    verify: Literal["auto", "headers", "decode"] = opt(
        "auto", "Before training read headers only, or decode every file; auto decodes up to 20 hours."
    )
    order: Literal["samples", "shards"] = opt(
        "samples",
        "samples = any order; shards = tars one after the other, for storage that is slow to go to and fro in.",
    )
    open_shards: int = opt(4, "Tars that are mixed at a time by order=shards, for each micro-batch of a step.")
    max_bad_ratio: float = opt(0.01, "Larger share of unreadable files stops the run before training.")
    synthetic_clips: int = opt(1500, "Utterances of the built-in corpus; 1500 are about 48 minutes.")

    @property
    def shards_at_once(self) -> int | None:
        """As `Batching` takes it."""
        return self.open_shards if self.order == "shards" else None

    def check(self) -> None:
        """Raises ValueError."""
        if self.open_shards < 1:
            raise ValueError(f"data.open_shards={self.open_shards} must be at least 1")
        for key in ("sample_rate", "max_s", "batch_s", "synthetic_clips"):
            if not 0 < getattr(self, key) < float("inf"):
                raise ValueError(f"data.{key}={getattr(self, key)} must be above 0")
        if not MIN_SAMPLE_RATE <= self.sample_rate <= MAX_RATE:  # the probe's synthetic speech needs the lower bound
            raise ValueError(
                f"data.sample_rate={self.sample_rate} must lie between {MIN_SAMPLE_RATE} and {MAX_RATE} Hz"
            )
        if not 0 <= self.min_s < self.max_s:
            raise ValueError(f"data.min_s={self.min_s} must lie between 0 and data.max_s={self.max_s}")
        if self.micro_batch_s is not None and not 0 < self.micro_batch_s <= self.batch_s:
            raise ValueError(
                f"data.micro_batch_s={self.micro_batch_s} must lie between 0 and data.batch_s={self.batch_s}"
            )
        if not 0 <= self.max_bad_ratio <= 1:
            raise ValueError(f"data.max_bad_ratio={self.max_bad_ratio} must lie between 0 and 1")
        if self.also and self.path is None:
            raise ValueError(f"data.also={self.also} goes together with data.path, which is not given")
        if self.repeat and (self.path is None or len(self.repeat) != 1 + len(self.also) or min(self.repeat) < 1):
            raise ValueError(
                f"data.repeat={self.repeat} must have a number from 1 on for data.path and for each of data.also="
                f"{self.also}, {1 + len(self.also)} in all"
            )


@dataclass(frozen=True)
class AudioSample:
    """waveform: (S,) float32, mean 0 and variance 1 over the whole clip, before any cropping. num_uncropped: samples in
    the clip that it was cut from, 0 where it was not. withheld: (N, 4) int64, rectangles for `LogMelEmbedding`."""

    waveform: np.ndarray
    num_uncropped: int = 0
    withheld: np.ndarray | None = None


def normalise(waveform: np.ndarray) -> np.ndarray:
    """Zero mean, unit biased variance, 1e-5 inside the root (fairseq: raw_audio_dataset.py, `normalize`)."""
    centred = waveform - waveform.mean(dtype=np.float64)
    return (centred / np.sqrt(np.square(centred).mean(dtype=np.float64) + 1e-5)).astype(np.float32)


class AudioFiles(Dataset[AudioSample]):
    """Clips on disk, read when asked for."""

    def __init__(self, report: ScanReport, sample_rate: int) -> None:
        self.report, self.sample_rate = report, sample_rate
        self.clips: Sequence[Clip] = report.clips
        self.left_out = report.left_out
        self.sizes = np.array([clip.num_samples for clip in self.clips], dtype=np.int64)
        self.shards = shard_numbers([clip.source for clip in self.clips])

    def id(self, index: int) -> str:
        return self.clips[index].id

    def __getitem__(self, index: int) -> AudioSample:
        try:
            return AudioSample(normalise(read(self.clips[index], self.sample_rate)))
        except BadClip as error:
            raise BadSample(str(error)) from error

    def describe(self) -> str:
        return self.report.summary()


class Together(Dataset[AudioSample]):
    """Several data sets as one, each as many times as `repeat` says. Ids begin with the number of the data set; a
    repetition has an id of its own, so that it is cropped and masked in its own way."""

    def __init__(self, parts: Sequence[AudioFiles], names: Sequence[str], repeat: Sequence[int]) -> None:
        self.parts, self.names, self.repeat = parts, names, repeat
        self._places = [(p, i, r) for p, part in enumerate(parts) for r in range(repeat[p]) for i in range(len(part))]
        self.sizes = np.concatenate([np.tile(part.sizes, times) for part, times in zip(parts, repeat, strict=True)])
        self.left_out = {f"{p}:{name}": why for p, part in enumerate(parts) for name, why in part.left_out.items()}
        sources = [
            part.clips[i].source for p, part in enumerate(parts) for _ in range(repeat[p]) for i in range(len(part))
        ]
        self.shards = shard_numbers(sources)

    def id(self, index: int) -> str:
        part, i, time = self._places[index]
        return f"{part}:{self.parts[part].id(i)}" + (f"#{time + 1}" if time else "")

    def __getitem__(self, index: int) -> AudioSample:
        part, i, _ = self._places[index]
        return self.parts[part][i]

    def describe(self) -> str:
        times = ["" if times == 1 else f", {times} times an epoch" for times in self.repeat]
        lines = zip(self.names, times, self.parts, strict=True)
        return "\n".join(f"{name}{how_often}: {part.describe()}" for name, how_often, part in lines)


class SyntheticFiles(Dataset[AudioSample]):
    """The built-in corpus, synthesised once and held in memory."""

    def __init__(self, corpus: SyntheticSpeech) -> None:
        self.corpus = corpus
        self.waveforms = [normalise(corpus[i].waveform) for i in range(len(corpus))]
        self.sizes = np.array([len(waveform) for waveform in self.waveforms], dtype=np.int64)

    def id(self, index: int) -> str:
        return str(index)

    def __getitem__(self, index: int) -> AudioSample:
        return AudioSample(self.waveforms[index])

    def describe(self) -> str:
        seconds = self.sizes.sum() / self.corpus.sample_rate
        return (
            f"No data.path: training on the built-in synthetic speech, {len(self)} utterances, {seconds / 60:.0f} min. "
            "Give data.path=/your/audio for your own."
        )


def open_dataset(config: AudioConfig, split: str, seed: int, min_samples: int) -> Dataset[AudioSample]:
    """Raises UserError where there is nothing to train on, or too much of it is broken."""
    if config.path is None:
        # The corpus is the same for every seed of a run, as a data set on disk would be.
        del seed
        return SyntheticFiles(SyntheticSpeech("train", config.synthetic_clips, 0, config.sample_rate))
    paths = [config.path, *config.also]
    if same := [path for path in paths if paths.count(path) > 1]:
        raise UserError(f"data.also={config.also} and data.path name {same[0]} twice. For more of it use data.repeat.")
    parts = [_files(config, path, min_samples) for path in paths]
    if len(parts) == 1 and not config.repeat:
        return parts[0]
    return Together(parts, paths, config.repeat or [1] * len(parts))


def _files(config: AudioConfig, path: str, min_samples: int) -> AudioFiles:
    try:
        report = scan_data(replace(config, path=path), config.split, min_samples)
    except UserError as error:
        key = "data.path" if path == config.path else "data.also"
        raise UserError(str(error).replace("data.path", key)) from None
    return AudioFiles(report, config.sample_rate)


def scan_data(config: AudioConfig, split: str | None, min_samples: int, columns: Sequence[str] = ()) -> ScanReport:
    """`files.scan` of data.path with the section's options. Raises UserError as it does."""
    assert config.path is not None
    return scan(
        config.path,
        sample_rate=config.sample_rate,
        min_s=min_samples / config.sample_rate,
        rate_policy=config.rate_policy,
        max_bad_ratio=config.max_bad_ratio,
        split=split,
        decode_hours={"headers": 0.0, "decode": float("inf"), "auto": VERIFY_HOURS}[config.verify],
        columns=columns,
    )


def inventory(config: AudioConfig) -> Inventory:
    """Every clip of data.path that can be read, of any length. Raises UserError where there is none, and for options
    that name more data."""
    if config.also or config.repeat:
        raise UserError(
            f"data.also={config.also} and data.repeat={config.repeat}: what is looked at or written here is data.path "
            "alone. Leave them out, and give the command for each of the data sets."
        )
    report = scan_data(replace(config, max_bad_ratio=1.0, rate_policy="resample"), config.split, 0)
    return Inventory(
        items=[Item(clip.id, clip.source, clip.facts) for clip in report.clips],
        bad=report.bad,
        amounts=[clip.num_samples / config.sample_rate for clip in report.clips],
        unit="s",
        total=duration(report.seconds()),
        notes=report.notes,
    )


Labelled = tuple[Mapping[str, Tensor], Tensor]


def phone_probe(modality: AudioModality) -> ProbeTask:
    """Frame-level phone accuracy on synthetic speakers that no run has heard; silence is not scored."""
    rate = modality.data.sample_rate
    geometry = modality.geometry

    def part(split: Literal["train", "dev", "test"], count: int) -> list[Labelled]:
        out: list[Labelled] = []
        corpus = SyntheticSpeech(split, count, 0, rate)
        for utterance in (corpus[i] for i in range(count)):
            inputs = modality.collate([AudioSample(normalise(utterance.waveform))])
            tokens = geometry.num_tokens(inputs["waveform"].shape[1])
            labels = frame_labels(utterance.phones, tokens, geometry.hop_s, geometry.offset_s)
            labels = np.where(labels == SILENCE, -100, labels - (labels > SILENCE))
            out.append((inputs, torch.from_numpy(labels)))
        return out

    return ProbeTask(
        name="phone accuracy",
        description=(
            f"Share of frames whose phone ({len(PHONES) - 1} classes) a linear classifier names, on unseen speakers of "
            "the built-in synthetic speech. Each row uses the layer that is best on other held-out speakers."
        ),
        num_classes=len(PHONES) - 1,
        budgets=(10, 100),
        train=part("train", 100),
        dev=part("dev", 40),
        test=part("test", 100),
        input_name="log-mel input",
        input_features=lambda inputs: input_bands(modality, inputs),
    )


def input_bands(modality: AudioModality, inputs: Mapping[str, Tensor]) -> Tensor:
    """The log-mel windows under each token side by side, (T, k * 80): what a probe sees without a network."""
    rate, waveform = modality.data.sample_rate, inputs["waveform"]
    num_tokens = modality.geometry.num_tokens(waveform.shape[1])
    return stacked_bands(_bands(rate), waveform, num_tokens, modality.geometry.hop_s, rate)


def summary_bands(modality: AudioModality, inputs: Mapping[str, Tensor]) -> Tensor:
    """Mean and deviation over time of each log-mel band of a whole clip, (B, 160): what a clip is without a network.

    Padding is left out. The bands are not standardised, for that would leave every clip the same mean and deviation.
    """
    waveform, bands = inputs["waveform"].cpu(), _bands(modality.data.sample_rate)
    x = bands.log_mel(waveform)
    num_samples = inputs.get("num_samples", torch.full((len(waveform),), waveform.shape[1])).cpu()
    count = bands.geometry.num_windows(num_samples).clamp(min=1)
    valid = (torch.arange(x.shape[1]) < count[:, None]).unsqueeze(-1)
    mean = (x * valid).sum(1) / count[:, None]
    var = ((x - mean[:, None]).square() * valid).sum(1) / count[:, None]
    return torch.cat([mean, var.sqrt()], 1)


def log_mel(waveform: Tensor, sample_rate: int) -> Tensor:
    """(B, S) -> (B, windows, 80), logarithms of the default bands, every 10 ms: to look at."""
    return _bands(sample_rate).log_mel(waveform)


@lru_cache(maxsize=2)
def _bands(sample_rate: int) -> LogMelEmbedding:
    return LogMelEmbedding(LogMelConfig(), 1, sample_rate)
