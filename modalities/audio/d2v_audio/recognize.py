"""From a run that was fine-tuned on transcripts to text: emissions, and what greedy decoding makes of them.

    recognizer = load_recognizer("runs/my-run")
    waveform = recognizer.read("speech.flac")
    print(recognizer.transcribe([waveform]))

A decoder with a language model (`d2v_audio.decode`) takes `emissions` and `letters`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2v_audio import files
from d2v_audio.data import AudioSample, normalise
from d2v_audio.letters import Letters
from d2v_audio.modality import AudioModality
from d2v_core.ctc import Symbols, greedy
from d2v_core.errors import UserError
from d2v_core.finetune import LoadedFinetuned, load_finetuned

Waveform = np.ndarray | Tensor


class Recognizer:
    """A network that spells speech, made of a `loaded` run. In eval mode; `to` moves it.

    letters: the vocabulary; its ids are the last axis of `emissions`, 0 is CTC's blank. frame_s: time from one frame to
    the next, seconds. offset_s: the middle of frame 0. sample_rate: Hz, of the waveforms it takes. modality, config,
    step: of the run.
    """

    def __init__(self, loaded: LoadedFinetuned) -> None:
        assert isinstance(loaded.modality, AudioModality) and isinstance(loaded.objective, Symbols)
        self.loaded, self.modality, self.config, self.step = loaded, loaded.modality, loaded.config, loaded.step
        self.letters = Letters(loaded.objective.symbols)
        self.frame_s, self.offset_s = self.modality.geometry.hop_s, self.modality.geometry.offset_s
        self.sample_rate = self.modality.data.sample_rate

    def to(self, device: str | torch.device) -> Recognizer:
        """Move the network to `device`; returns the recogniser."""
        self.loaded.to(device)
        return self

    def read(self, path: str | Path) -> np.ndarray:
        """(S,) float32 of the audio file `path`, at `sample_rate`. Raises UserError where it cannot be read."""
        try:
            report = files.scan(path, sample_rate=self.sample_rate, max_bad_ratio=0.0)
            clip, *more = report.clips
            if more:
                raise UserError(f"{path} holds {len(report.clips)} audio files: give one.")
            return files.read(clip, self.sample_rate)
        except files.BadClip as error:
            raise UserError(f"{error}. Mend the file or leave it out.") from error
        except UserError as error:
            raise UserError(str(error).replace("data.path=", "").replace(", or raise data.max_bad_ratio", "")) from None

    def emissions(self, waveforms: Sequence[Waveform], batch_s: float = 0.0) -> list[Tensor]:
        """(T, letters) float32 log-probabilities of each waveform, on the host; T is its own number of frames.

        waveforms: (S,) float, at `sample_rate`, of any loudness. batch_s: how much runs at once, seconds with padding;
        0 = one by one. Batches are quicker on a GPU and change the last bits.
        Raises UserError for one that is too short for a frame, or holds what is no number.
        """
        samples = [self._sample(waveform, i) for i, waveform in enumerate(waveforms)]
        done: dict[int, Tensor] = {}
        for batch in self._batches([len(sample.waveform) for sample in samples], batch_s):
            logits, lengths = self.loaded.outputs([samples[i] for i in batch])
            for i, row, length in zip(batch, logits.log_softmax(-1).cpu(), lengths.tolist(), strict=True):
                done[i] = row[:length]
        return [done[i] for i in range(len(samples))]

    def transcribe(self, waveforms: Sequence[Waveform], batch_s: float = 0.0) -> list[str]:
        """What is said in each, by greedy decoding; batch_s as for `emissions`."""
        return [self.letters.decode(greedy(one)) for one in self.emissions(waveforms, batch_s)]

    def _sample(self, waveform: Waveform, number: int) -> AudioSample:
        x = waveform.detach().cpu().numpy() if isinstance(waveform, Tensor) else np.asarray(waveform)
        if x.ndim != 1:
            raise UserError(f"Waveform {number} has shape {tuple(x.shape)}: expected (samples,), one channel.")
        if len(x) < self.modality.geometry.min_samples:
            least = self.modality.geometry.min_samples
            raise UserError(f"Waveform {number} has {len(x)} samples, and a frame takes {least}.")
        if not np.isfinite(x).all():
            raise UserError(f"Waveform {number} holds values that are no finite numbers.")
        return AudioSample(normalise(x.astype(np.float32)))

    def _batches(self, lengths: Sequence[int], batch_s: float) -> list[list[int]]:
        """Numbers of waveforms of like length, as many as fit."""
        limit = batch_s * self.sample_rate
        batches: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
            if batches and (len(batches[-1]) + 1) * lengths[i] <= limit:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches


def load_recognizer(path: str | Path) -> Recognizer:
    """The best weights of the run in the folder `path`, fine-tuned on transcripts.

    Raises UserError where there is no such thing.
    """
    loaded = load_finetuned(path)
    if not isinstance(loaded.modality, AudioModality) or not isinstance(loaded.objective, Symbols):
        raise UserError(
            f"{path} tells {loaded.objective.asks_for} of {loaded.modality.name}, and transcribing needs a run of "
            "modality=audio stage=finetune labelled.task=transcripts (preset=ctc_tiny and others)."
        )
    return Recognizer(loaded)
