"""Where images come from, what is done to them before they are patches, and the shape probe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.nn import functional as F

from d2v_core.config import opt
from d2v_core.contract import BadSample, Dataset, Inventory, ProbeTask
from d2v_core.errors import UserError
from d2v_core.shards import shard_numbers
from d2v_core.sources import Item
from d2v_vision.files import Arrays, BadImage, ScanReport, facts, read, read_records, record_files, scan
from d2v_vision.synthetic import SHAPES, Split, SyntheticShapes

if TYPE_CHECKING:
    from d2v_vision.modality import VisionModality

CROP_ATTEMPTS = 10
MAX_HELD_BYTES = 1 << 27  # of built-in pictures


@dataclass
class VisionConfig:
    """What to train on, how much at a time, and how it is varied."""

    path: str | None = opt(
        None, "Folder searched for images, CIFAR or IDX files, or one file; null = the built-in shapes."
    )
    split: str | None = opt(
        None, "Sub-folder to use, or train / test of CIFAR and IDX files; null = train where there is one, else all."
    )
    image_size: int = opt(224, "Side of what the network sees, pixels; a multiple of features.patch_size.")
    batch: int = opt(64, "Images per optimizer step, over all processes and accumulation.")
    micro_batch: int | None = opt(None, "Images that run at once; null = the whole batch.")
    crop_scale: list[float] = opt([0.08, 1.0], "Least and largest share of an image's area that a crop keeps.")
    crop_aspect: list[float] = opt([0.75, 1.3333333333333333], "Least and largest width over height of a crop.")
    flip_prob: float = opt(0.5, "Probability of mirroring left and right.")
    color_jitter: float = opt(0.4, "Brightness, contrast and saturation change by a factor within 1 -+ this.")
    mean: list[float] = opt([0.485, 0.456, 0.406], "Subtracted from red, green and blue in 0...1; ImageNet's.")
    std: list[float] = opt([0.229, 0.224, 0.225], "Then divided by; ImageNet's.")
    verify: Literal["auto", "headers", "decode"] = opt(
        "auto", "Before training read headers only, or decode every file; auto decodes up to 5000 files."
    )
    order: Literal["samples", "shards"] = opt(
        "samples",
        "samples = any order; shards = tars one after the other, for storage that is slow to go to and fro in.",
    )
    open_shards: int = opt(4, "Tars that are mixed at a time by order=shards, for each micro-batch of a step.")
    max_bad_ratio: float = opt(0.01, "Larger share of unreadable files stops the run before training.")
    max_pixels: int = opt(1 << 26, "Files with more pixels are refused unread, as decompression bombs are.")
    synthetic_images: int = opt(4000, "Pictures of the built-in set.")

    @property
    def shards_at_once(self) -> int | None:
        """As `Batching` takes it."""
        return self.open_shards if self.order == "shards" else None

    def check(self) -> None:
        """Raises ValueError."""
        if self.open_shards < 1:
            raise ValueError(f"data.open_shards={self.open_shards} must be at least 1")
        for key in ("image_size", "batch", "synthetic_images", "max_pixels"):
            if getattr(self, key) < 1:
                raise ValueError(f"data.{key}={getattr(self, key)} must be at least 1")
        if self.micro_batch is not None and not 1 <= self.micro_batch <= self.batch:
            raise ValueError(f"data.micro_batch={self.micro_batch} must lie between 1 and data.batch={self.batch}")
        for key, most in (("crop_scale", 1.0), ("crop_aspect", math.inf)):
            values = getattr(self, key)
            if len(values) != 2 or not 0 < values[0] <= values[1] <= most:
                raise ValueError(f"data.{key}={values} must be two numbers above 0, the larger one last")
        for key in ("flip_prob", "color_jitter", "max_bad_ratio"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"data.{key}={getattr(self, key)} must lie between 0 and 1")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"data.mean={self.mean} and data.std={self.std} must be three numbers, data.std above 0")


@dataclass(frozen=True)
class ImageSample:
    """pixels: (height, width, 3) uint8; square and of the network's size once prepared."""

    pixels: np.ndarray


class _Images(Dataset[ImageSample]):
    """An image is one unit of size, whatever its pixels."""

    def __init__(self, count: int) -> None:
        self.sizes = np.ones(count, dtype=np.int64)


class ImageFiles(_Images):
    """Files on disk, read when asked for."""

    def __init__(self, report: ScanReport, max_pixels: int) -> None:
        super().__init__(len(report.images))
        self.report, self.max_pixels = report, max_pixels
        self.left_out = report.left_out
        self.shards = shard_numbers([image.source for image in report.images])

    def id(self, index: int) -> str:
        return self.report.images[index].id

    def __getitem__(self, index: int) -> ImageSample:
        try:
            return ImageSample(read(self.report.images[index], self.max_pixels))
        except BadImage as error:
            raise BadSample(str(error)) from error

    def describe(self) -> str:
        return self.report.summary()


class ImageArrays(_Images):
    """Images of CIFAR or IDX files, in memory; grey ones are given three equal channels."""

    def __init__(self, arrays: Arrays) -> None:
        super().__init__(len(arrays.pixels))
        self.arrays = arrays

    def id(self, index: int) -> str:
        return str(index)

    def __getitem__(self, index: int) -> ImageSample:
        pixels = self.arrays.pixels[index]
        return ImageSample(np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels)

    def describe(self) -> str:
        height, width = self.arrays.pixels.shape[1:3]
        return f"{len(self)} images of {width} x {height} pixels from {self.arrays.source}"


class SyntheticImages(_Images):
    """The built-in set: drawn once and held in memory where it is small, else whenever a picture is asked for."""

    def __init__(self, shapes: SyntheticShapes) -> None:
        super().__init__(len(shapes))
        self.shapes = shapes
        small = len(shapes) * 3 * shapes.size**2 <= MAX_HELD_BYTES
        self.pixels = [shapes[i].pixels for i in range(len(shapes))] if small else None

    def id(self, index: int) -> str:
        return str(index)

    def __getitem__(self, index: int) -> ImageSample:
        return ImageSample(self.shapes[index].pixels if self.pixels is None else self.pixels[index])

    def describe(self) -> str:
        side = self.shapes.size
        return (
            f"No data.path: training on the built-in textured shapes, {len(self)} images of {side} x {side} pixels. "
            "Give data.path=/your/images for your own."
        )


def open_dataset(config: VisionConfig, patch_size: int) -> Dataset[ImageSample]:
    """Raises UserError where there is nothing to train on, or too much of it is broken."""
    if config.path is None:
        return SyntheticImages(SyntheticShapes("train", config.synthetic_images, config.image_size))
    if record_files(config.path):
        return ImageArrays(read_records(config.path, config.split))
    report = scan(config.path, split=config.split, **scan_options(config, patch_size))
    return ImageFiles(report, config.max_pixels)


def inventory(config: VisionConfig) -> Inventory:
    """Every image file that can be read, of any size. Raises UserError where there is none."""
    assert config.path is not None
    if record_files(config.path):
        raise UserError(
            f"data.path={config.path}: CIFAR and IDX files hold all their images as one array, which is read whole. "
            "`d2v data` is for folders of image files, and for tars."
        )
    report = scan(config.path, split=config.split, **{**scan_options(config, 1), "max_bad_ratio": 1.0})
    items: list[Item] = []
    bad = list(report.bad)
    for image in report.images:
        found = facts(image.source) if image.facts is None else image.facts
        if isinstance(found, str):  # it has changed within the last seconds
            bad.append((image.id, found))
        else:
            items.append(Item(image.id, image.source, found))
    return Inventory(
        items=items,
        bad=bad,
        amounts=[math.sqrt(int(item.facts["width"]) * int(item.facts["height"])) for item in items],
        unit="pixels, the root of an image's area",
        total=f"{len(items)} images",
        notes=report.notes,
    )


def scan_options(config: VisionConfig, patch_size: int) -> dict[str, Any]:
    """What the configuration says about which files `scan` takes."""
    return {
        "min_side": patch_size,
        "max_pixels": config.max_pixels,
        "max_bad_ratio": config.max_bad_ratio,
        "decode": {"headers": False, "decode": True, "auto": None}[config.verify],
    }


# ---------------------------------------------------------------------------------------------------- augmentation


def augment(pixels: np.ndarray, config: VisionConfig, rng: np.random.Generator) -> np.ndarray:
    """The official recipe (data2vec_vision: beit/datasets.py): colour jitter, mirror, random resized crop, bicubic.

    pixels (height, width, 3) uint8 -> (S, S, 3) uint8.
    """
    image = Image.fromarray(pixels)
    if config.color_jitter > 0:
        for kind in rng.permutation(3):
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[kind]
            image = enhance(image).enhance(rng.uniform(1 - config.color_jitter, 1 + config.color_jitter))
    if rng.random() < config.flip_prob:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    box = crop_box(image.width, image.height, config.crop_scale, config.crop_aspect, rng)
    return np.asarray(image.crop(box).resize((config.image_size, config.image_size), Image.Resampling.BICUBIC))


def crop_box(
    width: int, height: int, scale: Sequence[float], aspect: Sequence[float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom): area uniform in `scale`, width over height log-uniform in `aspect`, place uniform.

    Where ten attempts do not fit into the image, the largest crop of an allowed aspect from its middle.
    """
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(scale[0], scale[1])
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * aspect[1])))
    h = min(height, max(1, round(width / aspect[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def to_tensor(pixels: Sequence[np.ndarray], config: VisionConfig) -> Tensor:
    """(S, S, 3) uint8 each -> (B, 3, S, S) float32, normalised."""
    batch = torch.from_numpy(np.stack(pixels))
    mean, std = torch.tensor(config.mean), torch.tensor(config.std)
    return rearrange((batch.float() / 255.0 - mean) / std, "b h w c -> b c h w").contiguous()


# ----------------------------------------------------------------------------------------------------------- probe

Labelled = tuple[Mapping[str, Tensor], Tensor]
PROBE_SEED = 1  # the training set's seed is 0: labelled pictures are others than those of pre-training
PROBE_COUNTS: Mapping[Split, int] = {"train": 1000, "dev": 500, "test": 1000}
PROBE_BUDGETS = (100, 1000)
RAW_SIDE = 32  # pixels: larger images are averaged down to this for the row of raw pixels


def shape_probe(modality: VisionModality) -> ProbeTask:
    """Which of ten shapes a picture shows, on pictures that no run has seen."""
    size = modality.data.image_size

    def part(split: Split) -> list[Labelled]:
        shapes = SyntheticShapes(split, PROBE_COUNTS[split], size, PROBE_SEED)
        pictures = (shapes[i] for i in range(len(shapes)))
        return [(modality.collate([ImageSample(p.pixels)]), torch.tensor(p.label)) for p in pictures]

    return ProbeTask(
        name="shape accuracy",
        description=(
            f"Share of pictures whose shape ({len(SHAPES)} classes) a linear classifier names from the mean of a "
            "layer's tokens. Each row uses the layer that is best on other held-out pictures."
        ),
        num_classes=len(SHAPES),
        budgets=PROBE_BUDGETS,
        train=part("train"),
        dev=part("dev"),
        test=part("test"),
        input_name="raw pixels",
        input_features=raw_pixels,
    )


def raw_pixels(inputs: Mapping[str, Tensor]) -> Tensor:
    """(1, F): all pixels of an image side by side."""
    image = inputs["image"]
    return F.interpolate(image, RAW_SIDE, mode="area").flatten(1) if image.shape[-1] > RAW_SIDE else image.flatten(1)
