"""Speech-like audio made in code: the corpus used when no data path is given.

Every utterance is a function of (seed, split, index), so nothing is stored or downloaded, and any process can make any
utterance in any order. Many random speakers say words of a small vocabulary; transcript, phone times and speaker are
known exactly, which is what probes and CTC fine-tuning need. Called by the audio dataset and the phone probe.

The voice is a source-filter synthesiser (Fant, "Acoustic Theory of Speech Production", 1960): pulses at the fundamental
frequency plus noise, shaped by four resonances that glide from phone to phone. Reproducible to the bit with one numpy
build on one kind of machine; elsewhere to rounding error, as long as numpy keeps its random streams.

Letters in shape remarks: S samples, T hops of 5 ms, K phones, W samples in a window.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

SILENCE = 0  # phone id
_HOPS_PER_S = 200  # one hop = 5 ms
_HOPS_PER_WINDOW = 4  # squared Hann windows then add up to 1.5 everywhere
MIN_SAMPLE_RATE = 4000  # Hz; below it nothing but the first formants would be left

# One row per phone: four resonances in Hz, their gains in dB, voice and noise amplitude, duration in ms, and the part
# of it that is closure (stops). Vowels stay near the averages of Peterson & Barney (JASA 1952); other rows are round
# numbers in the usual ranges, not measurements. The gains of voiced phones contain the fall of the glottal spectrum.
_PHONE_TABLE: dict[str, tuple[float, ...]] = {
    #      F1   F2    F3    F4     G1   G2   G3   G4   voice noise  ms closure
    "sil": (500, 1500, 2500, 3500, -20, -20, -25, -30, 0.0, 0.0, 90, 0.0),
    "iy": (290, 2250, 2950, 3600, 0, -9, -13, -18, 1.0, 0.0, 115, 0.0),
    "ih": (410, 1950, 2550, 3550, 0, -8, -13, -19, 1.0, 0.0, 85, 0.0),
    "eh": (550, 1800, 2450, 3550, 0, -7, -13, -19, 1.0, 0.0, 100, 0.0),
    "ae": (690, 1680, 2400, 3500, 0, -6, -13, -20, 1.0, 0.0, 120, 0.0),
    "aa": (730, 1110, 2450, 3450, 0, -3, -16, -21, 1.0, 0.0, 120, 0.0),
    "ao": (560, 850, 2400, 3400, 0, -4, -20, -25, 1.0, 0.0, 120, 0.0),
    "ah": (620, 1230, 2450, 3500, 0, -5, -16, -21, 1.0, 0.0, 90, 0.0),
    "uw": (320, 900, 2250, 3350, 0, -10, -24, -28, 1.0, 0.0, 115, 0.0),
    "m": (260, 1050, 2150, 3300, 0, -18, -24, -30, 0.6, 0.0, 75, 0.0),
    "n": (270, 1450, 2500, 3400, 0, -18, -21, -27, 0.6, 0.0, 70, 0.0),
    "l": (350, 1100, 2750, 3500, 0, -10, -17, -24, 0.7, 0.0, 70, 0.0),
    "r": (400, 1250, 1600, 3200, 0, -7, -10, -24, 0.7, 0.0, 70, 0.0),
    "w": (310, 680, 2200, 3250, 0, -8, -26, -32, 0.7, 0.0, 75, 0.0),
    "y": (280, 2150, 2900, 3600, 0, -13, -15, -20, 0.7, 0.0, 70, 0.0),
    "s": (400, 4300, 5600, 7000, -35, -8, -2, -3, 0.0, 0.5, 105, 0.0),
    "sh": (500, 2500, 3400, 4900, -35, -2, 0, -6, 0.0, 0.5, 110, 0.0),
    "f": (500, 1600, 3900, 7000, -18, -12, -9, -5, 0.0, 0.3, 95, 0.0),
    "z": (250, 4300, 5600, 7000, 0, -8, -3, -4, 0.3, 0.25, 85, 0.0),
    "v": (260, 1300, 3600, 6800, 0, -12, -13, -11, 0.35, 0.12, 65, 0.0),
    "h": (520, 1500, 2500, 3600, -9, -6, -9, -13, 0.0, 0.35, 65, 0.0),
    "p": (500, 1000, 2100, 3300, -8, -6, -14, -18, 0.0, 0.5, 90, 0.6),
    "t": (450, 1800, 3600, 5400, -22, -14, -4, -2, 0.0, 0.5, 90, 0.6),
    "k": (450, 1700, 2200, 3900, -20, -2, -2, -12, 0.0, 0.5, 95, 0.6),
    "b": (270, 950, 2150, 3300, 0, -12, -18, -22, 0.4, 0.2, 75, 0.65),
    "d": (270, 1750, 2900, 4600, 0, -16, -11, -10, 0.4, 0.25, 70, 0.65),
    "g": (270, 1800, 2250, 3700, 0, -10, -10, -18, 0.4, 0.25, 75, 0.65),
}
PHONES: tuple[str, ...] = tuple(_PHONE_TABLE)
_TABLE = np.array(list(_PHONE_TABLE.values()))  # (27, 12)
_DURATION_MS, _CLOSURE = _TABLE[:, 10], _TABLE[:, 11]

# Spelling decides pronunciation: a letter pair listed here is one phone, any other letter is the phone of its own name.
_LETTER_PAIRS = {"EE": "iy", "OO": "uw", "AW": "ao", "SH": "sh"}
_VOWEL_LETTERS = {"I": "ih", "E": "eh", "A": "ae", "O": "aa", "U": "ah"}


def _pronounce(word: str) -> tuple[str, ...]:
    phones, i = [], 0
    while i < len(word):
        pair = _LETTER_PAIRS.get(word[i : i + 2])
        phones.append(pair or _VOWEL_LETTERS.get(word[i], word[i].lower()))
        i += 2 if pair else 1
    return tuple(phones)


_VOCABULARY = """
    BUG DAWN FOG GUST HABIT HAWK HELP HUSK KIWI LEMON MOON PUBLISH RAPID ROBOT ROOF SEED SHAMPOO SHAWL SHEEP SUNSET SWIM
    VELVET VOODOO WAGON WALRUS WEEK YAK YAWN YES YUM ZIGZAG ZOOM
"""
WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType({word: _pronounce(word) for word in _VOCABULARY.split()})
_SPELLINGS = tuple(WORDS)
_WORD_PHONES = {word: [PHONES.index(phone) for phone in phones] for word, phones in WORDS.items()}

Split = Literal["train", "dev", "test"]
_SPEAKERS: Mapping[str, range] = {"train": range(0, 200), "dev": range(200, 230), "test": range(230, 290)}
_SPEAKER_STREAM, _UTTERANCE_STREAM = 0, 1  # keep the random streams of speakers and utterances apart


@dataclass(frozen=True)
class Utterance:
    """One spoken phrase with everything that is known about it."""

    waveform: np.ndarray  # (S,) float32, within [-1, 1]
    sample_rate: int  # Hz
    transcript: str  # words, upper case, single spaces
    speaker: int  # differs between any two splits
    phones: tuple[tuple[int, float, float], ...]  # (phone id, start s, end s), contiguous from 0 to the end


@dataclass(frozen=True)
class _Speaker:
    f0: float  # Hz
    rate: float  # 1 = the durations of the table
    formants: np.ndarray  # (27, 4) Hz: vocal tract length and personal habits applied
    bandwidth: float  # factor
    breath: float  # noise amplitude per voice amplitude
    equaliser_db: np.ndarray  # (4,) at _EQUALISER_HZ; with it, tilt:
    tilt_db: float  # per octave, around 1 kHz


_EQUALISER_HZ = (100.0, 800.0, 2500.0, 7000.0)


def _speaker(seed: int, speaker: int) -> _Speaker:
    rng = np.random.default_rng([seed, _SPEAKER_STREAM, speaker])
    habits = np.exp(rng.normal(0, 0.04, (len(PHONES), 4)))
    return _Speaker(
        f0=float(np.exp(rng.uniform(np.log(85), np.log(250)))),
        rate=rng.uniform(0.75, 1.3),
        formants=_TABLE[:, :4] * rng.uniform(0.85, 1.22) * habits,
        bandwidth=rng.uniform(0.8, 1.6),
        breath=rng.uniform(0.02, 0.3),
        equaliser_db=rng.uniform(-6, 6, 4),
        tilt_db=rng.uniform(-4, 3),
    )


@dataclass(frozen=True)
class _Plan:
    """What is said and when, before any sound is made."""

    speaker: int
    voice: _Speaker
    words: list[str]
    phones: np.ndarray  # (K,) phone ids, silence first and last
    hops: np.ndarray  # (K,) duration of each phone in hops
    rng: np.random.Generator  # goes on to draw the sound


class SyntheticSpeech:
    """A map-style corpus; `corpus[i]` does not depend on `size`, only on seed, split and i.

    At another sample rate, an index is the same phrase by the same speaker at the same times (up to rounding the 5 ms
    hop to whole samples), with fresh noise; resonances above half the sample rate vanish, as in a telephone call.

    Args:
        split: "train", "dev" or "test" have 200, 30 and 60 speakers, none in common.
        size: number of utterances.
        seed: another seed gives other speakers and phrases; vocabulary and phone table stay.
        sample_rate: Hz, 4000 or more.
    """

    def __init__(self, split: Split, size: int, seed: int = 0, sample_rate: int = 16000):
        if split not in _SPEAKERS:
            raise ValueError(f"split is {split!r}; expected one of {', '.join(_SPEAKERS)}")
        if size < 0 or seed < 0:
            raise ValueError(f"size and seed must not be negative; got size={size}, seed={seed}")
        if sample_rate < MIN_SAMPLE_RATE:
            raise ValueError(f"sample_rate is {sample_rate} Hz; expected at least {MIN_SAMPLE_RATE}")
        self.split, self.size, self.seed, self.sample_rate = split, size, seed, sample_rate
        self._hop = round(sample_rate / _HOPS_PER_S)  # samples

    def __len__(self) -> int:
        return self.size

    def num_samples(self, index: int) -> int:
        """Length of the waveform, found without synthesis."""
        return int(self._plan(index).hops.sum()) * self._hop

    def __getitem__(self, index: int) -> Utterance:
        plan = self._plan(index)
        edges = np.concatenate([[0], np.cumsum(plan.hops)]) * self._hop / self.sample_rate  # (K + 1,) s
        return Utterance(
            waveform=_synthesise(plan, self.sample_rate, self._hop),
            sample_rate=self.sample_rate,
            transcript=" ".join(plan.words),
            speaker=plan.speaker,
            phones=tuple(zip(plan.phones.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)),
        )

    def _plan(self, index: int) -> _Plan:
        index = operator.index(index)
        if not 0 <= index < self.size:
            raise IndexError(f"utterance {index} of a corpus with {self.size}")
        speakers = _SPEAKERS[self.split]
        rng = np.random.default_rng([self.seed, _UTTERANCE_STREAM, speakers.start, index])
        speaker = speakers[int(rng.integers(len(speakers)))]
        voice = _speaker(self.seed, speaker)
        words = [_SPELLINGS[i] for i in rng.integers(len(_SPELLINGS), size=rng.integers(3, 7))]
        phones = [SILENCE]
        for word in words:
            if len(phones) > 1 and rng.random() < 0.25:
                phones.append(SILENCE)
            phones += _WORD_PHONES[word]
        ids = np.array([*phones, SILENCE])
        spread = np.where(ids == SILENCE, 0.35, 0.18)
        ms = _DURATION_MS[ids] / voice.rate * np.exp(rng.normal(0, spread))
        hops = np.maximum(np.rint(ms * _HOPS_PER_S / 1000), 4).astype(int)
        return _Plan(speaker, voice, words, ids, hops, rng)


def _synthesise(plan: _Plan, sample_rate: int, hop: int) -> np.ndarray:
    """Turn a plan into (S,) float32 samples, S = hop * sum of plan.hops."""
    rng, voice, num_hops = plan.rng, plan.voice, int(plan.hops.sum())
    # Targets of each phone, in two parts: closure (empty except for stops) and the rest.
    target = _TABLE[plan.phones, :10]  # (K, 10): resonances, gains, voice, noise
    target[:, :4] = voice.formants[plan.phones] * np.exp(rng.normal(0, 0.03, (len(target), 4)))
    target[:, 4:8] += rng.normal(0, 2.0, (len(target), 4))
    target = np.repeat(target[:, None], 2, axis=1)  # (K, 2, 10)
    target[:, 0, 8:] *= (0.4, 0.0)  # closed: a weak voice, no burst
    closed = np.rint(plan.hops * _CLOSURE[plan.phones]).astype(int)
    parts = np.stack([closed, plan.hops - closed], axis=1).ravel()
    parts[-1] += 1  # values are wanted at hop edges, one more than there are hops
    track = np.repeat(target.reshape(-1, 10), parts, axis=0)  # (T + 1, 10)
    track[:, :8] = _smooth(_smooth(track[:, :8], 9), 7)  # coarticulation: about 40 ms from phone to phone
    voiced, noisy = _smooth(track[:, 8:], 3).T

    source = _source(voiced, noisy, voice, rng, sample_rate, hop)
    spectrum, window = _stft(source, hop)  # (T + 1, W // 2 + 1)
    spectrum *= _envelope(track, noisy, voice, np.fft.rfftfreq(len(window), 1 / sample_rate))
    frames = np.fft.irfft(spectrum, len(window)) * window
    blocks = np.zeros((num_hops + _HOPS_PER_WINDOW, hop), np.float32)
    for i in range(_HOPS_PER_WINDOW):
        blocks[i : i + num_hops + 1] += frames[:, i * hop : (i + 1) * hop]
    margin = _HOPS_PER_WINDOW // 2
    speech = blocks[margin:-margin].ravel()

    noise = rng.standard_normal(len(speech), np.float32)
    if rng.random() < 0.5:  # coloured: low-pass (positive pole) or high-pass, an AR(1) response cut after 32 samples
        noise = np.convolve(noise, rng.uniform(-0.6, 0.95) ** np.arange(32, dtype=np.float32))[: len(speech)]
    snr_db = rng.uniform(5, 25)
    noise *= np.sqrt(np.mean(speech**2) / np.mean(noise**2) / 10 ** (snr_db / 10))
    waveform = speech + noise
    return (waveform * (rng.uniform(0.3, 0.95) / np.abs(waveform).max())).astype(np.float32)


def _source(
    voiced: np.ndarray, noisy: np.ndarray, voice: _Speaker, rng: np.random.Generator, sample_rate: int, hop: int
) -> np.ndarray:
    """Pulses plus noise, both of unit power before their amplitudes (T + 1,) are applied: (S,) float32."""
    num_points = len(voiced)
    num_knots = 2 + num_points // 60
    knots = np.linspace(0.1, -0.1, num_knots) + rng.normal(0, 0.08, num_knots)  # falling melody, in log f0
    melody = np.interp(np.linspace(0, num_knots - 1, num_points), np.arange(num_knots), knots)
    f0 = voice.f0 * np.exp(melody + rng.normal(0, 0.01, num_points))  # with jitter
    cycles = np.floor(np.cumsum(_per_sample(f0, hop)) / sample_rate)
    at = np.flatnonzero(np.diff(cycles))  # one pulse where a cycle ends
    source = rng.standard_normal(len(cycles), np.float32) * _per_sample(noisy + voice.breath * voiced, hop)
    source[at] += _per_sample(voiced * np.sqrt(sample_rate / f0), hop)[at]
    return source.astype(np.float32)


def _envelope(track: np.ndarray, noisy: np.ndarray, voice: _Speaker, hz: np.ndarray) -> np.ndarray:
    """Amplitude response of the vocal tract and the channel: (T + 1, len(hz)) float32."""
    resonance = track[:, :4].astype(np.float32)
    # Wider for high resonances, and for noise, where the glottis is open or the cavity is short.
    half_width = voice.bandwidth * (30 + 0.03 * resonance) * (1 + 4 * noisy[:, None]).astype(np.float32)
    power = 10 ** (track[:, 4:8].astype(np.float32) / 10)
    total = np.zeros((len(track), len(hz)), np.float32)
    frequency = hz.astype(np.float32)
    for k in range(4):  # parallel resonators, added as powers
        detuning = (frequency - resonance[:, k, None]) / half_width[:, k, None]
        total += power[:, k, None] / (1 + detuning**2)
    octaves = np.log2(np.maximum(hz, 50) / 1000)
    channel_db = voice.tilt_db * octaves
    channel_db += np.interp(octaves, np.log2(np.array(_EQUALISER_HZ) / 1000), voice.equaliser_db)
    return np.sqrt(total) * (10 ** (channel_db / 20)).astype(np.float32)


def _stft(signal: np.ndarray, hop: int) -> tuple[np.ndarray, np.ndarray]:
    """Spectra of Hann windows centred at hop edges, (T + 1, W // 2 + 1), and the window, for the way back."""
    size = _HOPS_PER_WINDOW * hop
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)
    padded = np.pad(signal, size // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]
    return np.fft.rfft(frames * window), window


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Moving average over an odd number of rows, the ends held."""
    sums = np.cumsum(np.pad(values, ((width // 2 + 1, width // 2), (0, 0)), mode="edge"), axis=0)
    return (sums[width:] - sums[:-width]) / width


def _per_sample(values: np.ndarray, hop: int) -> np.ndarray:
    """Linear interpolation from T + 1 hop edges to T * hop samples."""
    ramp = np.arange(hop) / hop
    return (values[:-1, None] * (1 - ramp) + values[1:, None] * ramp).ravel()


def frame_labels(
    phones: Iterable[tuple[int, float, float]], num_frames: int, hop_s: float, offset_s: float
) -> np.ndarray:
    """Name the phone heard at each frame centre, offset_s + t * hop_s seconds.

    Args:
        phones: contiguous (phone id, start s, end s), as in `Utterance.phones`; a phone owns its start, not its end.
    Returns:
        (num_frames,) int64 phone ids; SILENCE before the first phone and after the last.
    """
    ids, starts, ends = (np.array(column) for column in zip(*phones, strict=True))
    centres = offset_s + hop_s * np.arange(num_frames) + 1e-9  # so that 3 * 0.1 s reaches a boundary at 0.3 s
    index = np.searchsorted(starts, centres, side="right") - 1
    inside = (index >= 0) & (centres < ends[-1])
    return np.where(inside, ids[index], SILENCE).astype(np.int64)
