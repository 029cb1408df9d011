"""The built-in clips: a shape that moves over a still background. What it does can be told from its motion alone.

Frames have no border: what leaves on one side comes in on the other. So place and angle of the shape are uniform in
every single frame, whatever it does, and one frame says nothing of the action. Nothing is downloaded.
"""

from typing import Literal

import numpy as np

from d2v_core.keyed import generator

ACTIONS = ("right", "left", "down", "up", "spin right", "spin left")
Split = Literal["pretrain", "train", "dev", "test"]


def clip(split: Split, index: int, frames: int, size: int) -> tuple[np.ndarray, int]:
    """((frames, size, size, 3) uint8, index into ACTIONS). Follows from the arguments alone; classes take turns."""
    rng = generator(0, "clip", split, index)
    label = index % len(ACTIONS)
    x, y, angle = _path(ACTIONS[label], frames, size, rng)
    covered = _shape(x, y, angle, size, rng)[..., None]
    levels = np.array([rng.uniform(150, 230), rng.uniform(20, 90)])  # a bright shape, a dark background
    front, back = levels[:, None] + rng.uniform(-20, 20, (2, 3))
    picture = covered * front + (1 - covered) * _background(back, size, rng)
    picture += rng.normal(0, rng.uniform(1, 6), picture.shape)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), label


def _path(action: str, frames: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Column, row (pixels) and angle (radians) of the shape's middle in each frame, (frames,) each."""
    time = np.arange(frames)
    x, y, angle = (np.full(frames, rng.uniform(0, end)) for end in (size, size, 2 * np.pi))
    kind, _, side = action.partition(" ")
    if kind == "spin":
        angle = angle + rng.uniform(0.25, 0.5) * time * (1 if side == "right" else -1)
    else:
        way = {"right": 0.0, "down": 0.5, "left": 1.0, "up": 1.5}[kind] * np.pi + rng.uniform(-0.3, 0.3)
        step = rng.uniform(0.05, 0.11) * size
        x, y = x + step * np.cos(way) * time, y + step * np.sin(way) * time
    return x, y, angle


def _shape(x: np.ndarray, y: np.ndarray, angle: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """(frames, size, size) in 0...1: how much of each pixel is covered by a bar, half disc or triangle."""
    radius = rng.uniform(0.2, 0.28) * size
    # The shortest way from the middle, over a border where that is nearer; in units of the radius, turned.
    dx, dy = ((np.arange(size) - place[:, None] + size / 2) % size - size / 2 for place in (x, y))
    dx, dy = dx[:, None, :] / radius, dy[:, :, None] / radius
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    slopes = np.maximum(0.87 * u - 0.5 * v - 0.5, -0.87 * u - 0.5 * v - 0.5)
    bar, half_disc = np.maximum(np.abs(u) - 1.0, np.abs(v) - 0.3), np.maximum(np.hypot(u, v) - 1.0, -v - 0.2)
    outside = (bar, half_disc, np.maximum(v - 0.5, slopes))[rng.integers(3)]  # near the distance from the outline
    return np.clip(0.5 - outside * radius, 0, 1)


def _background(colour: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """(size, size, 3): a wave in brightness that meets itself at the border, the same in every frame."""
    row, column = np.mgrid[:size, :size] / size
    wave = np.sin(2 * np.pi * (rng.integers(-3, 4) * row + rng.integers(-3, 4) * column + rng.random()))
    return colour + rng.uniform(0, 20) * wave[..., None]
