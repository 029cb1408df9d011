"""The built-in data set: shapes cut out of one texture and laid on another, so that only the outline names the class.

Both textures, all colours, place, size and angle are drawn without regard to the class: the statistics of colours and
textures, and the pixel at any one place, say next to nothing about it. Nothing is downloaded.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
SHAPES = ("disc", "ring", "half disc", "crescent", "triangle", "square", "bar", "plus", "star", "arrow")
_FINE = 4  # outlines are drawn this much larger and then averaged, which smooths their edges


@dataclass(frozen=True)
class Shape:
    """One picture. pixels: (size, size, 3) uint8; label: index into SHAPES."""

    pixels: np.ndarray
    label: int


class SyntheticShapes:
    """A map-style set; item i depends on seed, split, size and i alone.

    Args:
        split: the splits have no picture in common.
        count: number of pictures. size: their side in pixels, 16 or more.
    """

    def __init__(self, split: Split, count: int, size: int, seed: int = 0) -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
        if size < 16 or count < 0:
            raise ValueError(f"size={size} must be at least 16 and count={count} not negative")
        self.split, self.count, self.size, self.seed = split, count, size, seed

    def __len__(self) -> int:
        return self.count

    def label(self, index: int) -> int:
        """Classes take turns, so that every stretch of the set is balanced."""
        return index % len(SHAPES)

    def __getitem__(self, index: int) -> Shape:
        index = operator.index(index)
        if not 0 <= index < self.count:
            raise IndexError(f"picture {index} of a set with {self.count}")
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        label = self.label(index)
        front, back = _colours(rng)
        cut = _outline(SHAPES[label], self.size, rng)[..., None]
        picture = cut * _texture(front, self.size, rng) + (1 - cut) * _texture(back, self.size, rng)
        picture += rng.normal(0, rng.uniform(1, 5), picture.shape)
        return Shape(np.clip(np.rint(picture), 0, 255).astype(np.uint8), label)


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two pairs of tinted greys, (2, 3) each in 0...255: a pair's own are near, the pairs apart, either one brighter.

    Full colours would be nicer to look at, and would be most of what a network of minutes learns to predict.
    """
    while True:
        levels = rng.uniform(30, 225, 2)
        if abs(levels[0] - levels[1]) > 70:
            break
    tinted = levels[:, None, None] + rng.uniform(-20, 20, (2, 1, 3))
    pairs = tinted + rng.uniform(-20, 20, (2, 2, 1))
    return pairs[0], pairs[1]


def _texture(colours: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """(size, size, 3): two colours mixed by waves, checks, a slope, spots or not at all."""
    y, x = (np.mgrid[:size, :size] + rng.uniform(0, size)) / size
    angle = rng.uniform(0, math.pi)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    frequency = 2 * math.pi * rng.uniform(3, 7)
    kind = rng.integers(5)
    if kind == 0:
        mix = np.zeros_like(x)
    elif kind == 1:
        mix = 0.5 + 0.5 * np.sin(frequency * along)
    elif kind == 2:
        mix = (np.sin(frequency * along) * np.sin(frequency * across) > 0).astype(float)
    elif kind == 3:
        mix = (along - along.min()) / np.ptp(along)
    else:
        coarse = Image.fromarray(rng.uniform(0, 1, (6, 6)).astype(np.float32))
        mix = np.clip(np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)), 0, 1)
    return colours[0] + mix[..., None] * (colours[1] - colours[0])


def _outline(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """(size, size) in 0...1: how much of each pixel the shape covers. Any place, size and angle that fits."""
    radius = rng.uniform(0.3, 0.44) * size
    centre = rng.uniform(radius, size - radius, 2)
    angle = rng.uniform(0, 2 * math.pi)
    image = Image.new("L", (size * _FINE, size * _FINE))
    draw = ImageDraw.Draw(image)
    for points, value in _polygons(name, rng):
        turned = points @ np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        places = (centre + radius * turned) * _FINE
        draw.polygon([(float(px), float(py)) for px, py in places], fill=value)
    return np.asarray(image.reduce(_FINE), dtype=np.float64) / 255


def _polygons(name: str, rng: np.random.Generator) -> list[tuple[np.ndarray, int]]:
    """Polygons (n, 2) in the unit circle with what to fill them with: 255 draws, 0 cuts out."""
    if name == "disc":
        return [(_arc(), 255)]
    if name == "ring":
        return [(_arc(), 255), (rng.uniform(0.45, 0.6) * _arc(), 0)]
    if name == "half disc":
        return [(_arc(0, math.pi) - [0, 0.4], 255)]
    if name == "crescent":
        return [(_arc(), 255), (0.8 * _arc() + [rng.uniform(0.45, 0.6), 0], 0)]
    if name == "triangle":
        return [(_arc(steps=3), 255)]
    if name == "square":
        return [(_arc(steps=4), 255)]
    if name == "bar":
        return [(_box(1.0, rng.uniform(0.25, 0.35)), 255)]
    if name == "plus":
        width = rng.uniform(0.2, 0.33)
        return [(_box(1.0, width), 255), (_box(width, 1.0), 255)]
    if name == "star":
        spikes = _arc(steps=10)
        spikes[1::2] *= rng.uniform(0.38, 0.48)
        return [(spikes, 255)]
    head = np.array([[1.0, 0.0], [0.1, 0.75], [0.1, -0.75]])
    return [(head, 255), (_box(0.55, 0.22) - [0.4, 0.0], 255)]


def _arc(start: float = 0.0, end: float = 2 * math.pi, steps: int = 40) -> np.ndarray:
    """(steps, 2) points on the unit circle; a whole turn does not repeat its first one."""
    turn = np.linspace(start, end, steps, endpoint=end - start < 6.28)
    return np.stack([np.cos(turn), np.sin(turn)], axis=1)


def _box(half_length: float, half_width: float) -> np.ndarray:
    return np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) * [half_length, half_width]
