"""What fine-tuning withholds of the log-mel bands of a clip (SpecAugment: Park et al., 2019, arXiv:1904.08779)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from d2v_audio.feature_encoder import LogMelConfig, StretchConfig, WaveformConfig
from d2v_core.config import opt
from d2v_core.errors import UserError


@dataclass
class AugmentConfig:
    """What is withheld while fine-tuning a network that hears log-mel bands; nothing by default."""

    band_masks: int = opt(0, "Stretches of neighbouring bands that are blanked in a whole clip.")
    band_width: int = opt(15, "Most bands of such a stretch; its width is drawn from 0 up.")
    time_masks_per_s: float = opt(0.0, "Stretches of time that are blanked, for each second of a clip.")
    time_width_s: float = opt(0.2, "Longest such stretch, seconds; its length is drawn from 0 up.")

    def check(self, features: WaveformConfig | LogMelConfig | StretchConfig) -> None:
        """Raises UserError."""
        if self.band_masks < 0 or self.band_width < 0:
            raise UserError(
                f"augment.band_masks={self.band_masks} and band_width={self.band_width} must not be below 0."
            )
        if not (0 <= self.time_masks_per_s < math.inf and 0 <= self.time_width_s < math.inf):
            raise UserError(
                f"augment.time_masks_per_s={self.time_masks_per_s} and time_width_s={self.time_width_s} must be finite "
                "and not below 0."
            )
        if not isinstance(features, LogMelConfig) and (self.band_masks or self.time_masks_per_s):
            raise UserError(
                "augment.band_masks and augment.time_masks_per_s blank log-mel bands, which only encoder=logmel has. "
                "Use finetune.mask_prob and finetune.channel_mask_prob."
            )

    def rectangles(self, features: LogMelConfig, seconds: float, rng: np.random.Generator) -> np.ndarray | None:
        """(N, 4) int64: first band, band behind the last, first window, window behind the last; None = nothing."""
        windows = max(int(seconds / features.hop_s), 1)
        num_times = int(self.time_masks_per_s * seconds + rng.random()) if self.time_masks_per_s else 0
        found: list[tuple[int, int, int, int]] = []
        for _ in range(self.band_masks):
            first, end = _stretch(features.num_mels, self.band_width, rng)
            found.append((first, end, 0, windows))
        for _ in range(num_times):
            first, end = _stretch(windows, round(self.time_width_s / features.hop_s), rng)
            found.append((0, features.num_mels, first, end))
        if not self.band_masks and not self.time_masks_per_s:
            return None
        return np.array(found, dtype=np.int64).reshape(-1, 4)


def _stretch(size: int, widest: int, rng: np.random.Generator) -> tuple[int, int]:
    """Beginning and end of a stretch inside `size`, of 0 to `widest`."""
    width = int(rng.integers(min(widest, size) + 1))
    first = int(rng.integers(size - width + 1))
    return first, first + width
