"""Where samples come from: NumPy files of your own, or signals made on the spot. Start here with your own format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from d2v_core.config import opt
from d2v_core.contract import BadSample, Dataset
from d2v_core.errors import UserError
from d2v_core.files import existing
from d2v_core.keyed import generator


@dataclass
class DataConfig:
    """Section `data`: which signals, and how many in a step."""

    path: str | None = opt(
        None, "Folder of .npy files, or one, each a signal of (S,) numbers; null = built-in signals."
    )
    num_signals: int = opt(400, "Built-in signals.")
    batch: int = opt(16000, "Values of the signals in an optimizer step.")
    max_size: int = opt(2000, "Longer signals are cropped to this many values.")

    def check(self) -> None:
        """Raises ValueError."""
        for key in ("num_signals", "batch", "max_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"data.{key}={getattr(self, key)} must be at least 1")


class Files(Dataset[np.ndarray]):
    """The .npy files under a folder, or one of them, each a signal of at least `min_size` values."""

    def __init__(self, given: str | Path, min_size: int) -> None:
        path = existing(given, "a folder of .npy files, or one of them")  # an error says what is there instead
        self.folder, self.min_size = (path if path.is_dir() else path.parent), min_size
        self.paths = sorted(path.rglob("*.npy")) if path.is_dir() else [path]
        if not self.paths:
            raise UserError(f"data.path={given} holds no .npy file.")
        # Sizes without reading all: NumPy maps a file and reads its header. A file that is no array is found when read.
        self.sizes = np.array([max(_size(path), 1) for path in self.paths], dtype=np.int64)

    def id(self, index: int) -> str:
        return self.paths[index].relative_to(self.folder).as_posix()

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            signal = np.load(self.paths[index])
        except (OSError, ValueError) as error:
            raise BadSample(f"cannot be read: {error}") from error
        if signal.ndim != 1 or len(signal) < self.min_size:
            raise BadSample(f"has shape {signal.shape}; expected (S,) with S of at least {self.min_size}")
        if not np.isfinite(signal).all():
            raise BadSample("holds values that are not finite")
        return signal.astype(np.float32)


def _size(path: Path) -> int:
    try:
        return len(np.load(path, mmap_mode="r"))
    except (OSError, ValueError, TypeError):
        return 0


class Pulses(Dataset[np.ndarray]):
    """Built-in signals: a slow drift, pulses that ring and die away, noise. Made anew whenever they are read."""

    def __init__(self, num_signals: int) -> None:
        self.sizes = np.array([int(generator(0, "size", i).integers(600, 2001)) for i in range(num_signals)])

    def id(self, index: int) -> str:
        return f"pulses-{index}"

    def __getitem__(self, index: int) -> np.ndarray:
        rng, size = generator(0, "pulses", index), int(self.sizes[index])
        time = np.arange(size)
        signal = 0.3 * np.sin(2 * np.pi * (time / rng.uniform(400, 900) + rng.random()))
        ringing, rate = rng.uniform(0.02, 0.1), rng.uniform(0.01, 0.03)
        for start in rng.integers(0, size, size // 150):
            since = time[start:] - start
            signal[start:] += rng.uniform(0.5, 1.5) * np.exp(-rate * since) * np.sin(2 * np.pi * ringing * since)
        return (signal + 0.05 * rng.normal(size=size)).astype(np.float32)


def open_dataset(config: DataConfig, min_size: int) -> Dataset[np.ndarray]:
    """min_size: shortest signal of use, in values."""
    return Pulses(config.num_signals) if config.path is None else Files(config.path, min_size)
