"""Where clips come from, what is done to them before they are tubelets, and the action probe."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from d2v_core.config import opt
from d2v_core.contract import BadSample, Dataset, ProbeTask
from d2v_video import synthetic
from d2v_video.files import read, scan

MEAN, STD = 0.45, 0.25  # of pixels in 0...1, near those of films; subtracted, then divided by
BUILT_IN = "No data.path: training on built-in clips. Give data.path=/your/clips for your own."


@dataclass
class DataConfig:
    """Section `data`: which clips, and how much of them a step holds."""

    path: str | None = opt(None, "Folder searched for video files and folders of frames; null = the built-in clips.")
    num_frames: int = opt(16, "Frames of a clip that the network sees; a multiple of features.tubelet.")
    frame_step: int = opt(1, "Every so manieth frame is taken.")
    image_size: int = opt(112, "Side of what the network sees, pixels; a multiple of features.patch_size.")
    batch: int = opt(32, "Clips in an optimizer step, over all processes and accumulation.")
    min_crop: float = opt(0.5, "Least share of the largest square of a frame that a crop keeps.")
    max_frames: int = opt(300, "Of longer clips only the first frames are read.")
    max_bad_ratio: float = opt(0.01, "Larger share of unreadable clips stops the run before training.")
    synthetic_clips: int = opt(4000, "Built-in clips.")

    def check(self) -> None:
        """Raises ValueError."""
        for key in ("num_frames", "frame_step", "image_size", "batch", "synthetic_clips"):
            if getattr(self, key) < 1:
                raise ValueError(f"data.{key}={getattr(self, key)} must be at least 1")
        if not (0 < self.min_crop <= 1 and 0 <= self.max_bad_ratio <= 1):
            raise ValueError(f"data.min_crop={self.min_crop} and data.max_bad_ratio={self.max_bad_ratio} are shares")

    @property
    def span(self) -> int:
        """Frames of a file from the first to the last that the network sees."""
        return (self.num_frames - 1) * self.frame_step + 1


class Clips(Dataset[np.ndarray]):
    """(frames, height, width, 3) uint8 each: files, read when asked for, or built-in clips, drawn then. A clip is one
    unit of size. Raises UserError where there is nothing to train on, or too much of it is broken."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.files = None if config.path is None else scan(config.path, config.max_bad_ratio)
        self.sizes = np.ones(config.synthetic_clips if self.files is None else len(self.files), dtype=np.int64)

    def id(self, index: int) -> str:
        return str(index) if self.files is None else self.files[index].id

    def __getitem__(self, index: int) -> np.ndarray:
        config = self.config
        if self.files is None:
            return synthetic.clip("pretrain", index, config.span, config.image_size)[0]
        side = math.ceil(config.image_size / math.sqrt(config.min_crop))  # so that no crop need be enlarged
        frames = read(self.files[index], max(config.max_frames, config.span), side)
        if len(frames) < config.span:
            need = f"data.num_frames={config.num_frames} with data.frame_step={config.frame_step} need {config.span}"
            raise BadSample(f"{self.files[index].path}: {len(frames)} frames; {need}")
        return frames

    def describe(self) -> str:
        return f"{len(self)} clips in {self.config.path}" if self.files is not None else BUILT_IN


def cut(frames: np.ndarray, config: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """(frames, height, width, 3) uint8 -> (num_frames, S, S, 3): a random stretch of the clip and a random square, the
    same in all its frames."""
    height, width = frames.shape[1:3]
    side = max(round(min(height, width) * math.sqrt(rng.uniform(config.min_crop, 1.0))), 1)
    first, top, left = rng.integers(np.array([len(frames) - config.span, height - side, width - side]) + 1)
    taken = frames[first : first + config.span : config.frame_step, top : top + side, left : left + side]
    size = (config.image_size, config.image_size)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in taken])


def to_tensor(clips: Sequence[np.ndarray]) -> Tensor:
    """(F, S, S, 3) uint8 each -> (B, 3, F, S, S) float32, normalised."""
    batch = torch.from_numpy(np.stack(clips)).float()
    return rearrange((batch / 255.0 - MEAN) / STD, "b f h w c -> b c f h w").contiguous()


# ----------------------------------------------------------------------------------------------------------- probe

Labelled = tuple[Mapping[str, Tensor], Tensor]


def action_probe(config: DataConfig) -> ProbeTask:
    """What the shape does in built-in clips that no run has seen. Raw pixels: brightness, 16 x 16 in every frame."""

    def part(split: synthetic.Split, count: int) -> list[Labelled]:
        drawn = (synthetic.clip(split, i, config.num_frames, config.image_size) for i in range(count))
        return [({"clip": to_tensor([frames])}, torch.tensor(label)) for frames, label in drawn]

    return ProbeTask(
        name="action accuracy",
        description=(
            f"Share of clips whose action ({len(synthetic.ACTIONS)} kinds of motion) a linear classifier names from "
            "the mean of a layer's tokens. Each row uses the layer that is best on other held-out clips."
        ),
        num_classes=len(synthetic.ACTIONS),
        budgets=(60, 480),
        train=part("train", 480),
        dev=part("dev", 240),
        test=part("test", 480),
        input_name="raw pixels",
        input_features=lambda inputs: F.interpolate(inputs["clip"].mean(1), 16, mode="area").flatten(1),
    )
