"""Labelled images for fine-tuning and probing: where they come from, and how they are varied and blended.

The official recipe is BEiT's as data2vec_vision has it (beit/run_class_finetuning.py, beit/datasets.py). timm does the
augmentation; it is imported when a run first needs it, for that takes seconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from d2v_core.config import opt
from d2v_core.contract import Dataset, LabelledPart, Task
from d2v_core.errors import UserError
from d2v_core.files import existing, first
from d2v_core.keyed import seeded
from d2v_core.shards import refuse_shards
from d2v_vision.data import (
    ImageArrays,
    ImageFiles,
    ImageSample,
    SyntheticImages,
    VisionConfig,
    raw_pixels,
    scan_options,
)
from d2v_vision.files import EXPECTED, MORE, is_test, read_records, record_files, scan
from d2v_vision.synthetic import SHAPES, Split, SyntheticShapes

METRICS = ("accuracy",)
DEV_FOLDERS = ("val", "valid", "validation", "dev")
CLASS_NAMES = ("batches.meta.txt", "fine_label_names.txt")  # of CIFAR-10 and CIFAR-100, one name a line
BUILT_IN_SEED = 2  # pre-training has 0 and the shape probe 1: other pictures than either
BUILT_IN_COUNTS: Mapping[Split, int] = {"train": 2000, "dev": 500, "test": 1000}
SMALL_SIDE = 64  # pixels: up to here evaluation cuts nothing off
EVAL_CROP = 0.875  # 224 of 256
LONGEST = 32


@dataclass
class AugmentConfig:
    """How labelled images are varied while fine-tuning; scores are made on the middle of each image as it is."""

    rand_augment: str | None = opt(
        "rand-m9-mstd0.5-inc1", "RandAugment in timm's notation: m = magnitude, mstd = its spread; null = none."
    )
    crop_scale: list[float] = opt([0.08, 1.0], "Least and largest share of an image's area that a crop keeps.")
    crop_aspect: list[float] = opt([0.75, 1.3333333333333333], "Least and largest width over height of a crop.")
    pad_crop: int | None = opt(
        None, "In place of such crops: a black margin of this many pixels, and any place inside; null = crops."
    )
    flip_prob: float = opt(0.5, "Probability of mirroring left and right.")
    erase_prob: float = opt(0.25, "Probability that a rectangle of an image is replaced by noise.")
    mixup: float = opt(0.8, "Alpha of the Beta distribution of mixup's shares; 0 = no mixup.")
    cutmix: float = opt(1.0, "The same for cutmix, which pastes a rectangle; 0 = no cutmix.")
    mix_prob: float = opt(1.0, "Probability that a micro-batch is mixed at all.")
    switch_prob: float = opt(0.5, "Probability of cutmix in place of mixup, where there are both.")
    eval_crop: float | None = opt(
        None, "Share of the shorter side that scores are made on; null = 0.875 above 64 pixels, else all of it."
    )

    def check(self) -> None:
        """Raises ValueError."""
        if self.rand_augment is not None and not re.fullmatch(
            r"rand(-(m\d+|n[1-9]\d*|p(0?\.\d+|[01])|mstd\d+(\.\d+)?|mmax\d+|inc[01]))*", self.rand_augment
        ):
            raise ValueError(
                f"augment.rand_augment={self.rand_augment} must be null or like rand-m9-mstd0.5-inc1, made of rand and "
                "-m, -n, -p, -mstd, -mmax, -inc with a number each"
            )
        for key, most in (("crop_scale", 1.0), ("crop_aspect", math.inf)):
            values = getattr(self, key)
            if len(values) != 2 or not 0 < values[0] <= values[1] <= most:
                limit = f" and at most {most:g}" if math.isfinite(most) else ""
                raise ValueError(f"augment.{key}={values} must be two numbers above 0{limit}, the larger one last")
        for key in ("flip_prob", "erase_prob", "mix_prob", "switch_prob"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"augment.{key}={getattr(self, key)} must lie between 0 and 1")
        for key in ("mixup", "cutmix", "pad_crop"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"augment.{key}={value} must be at least 0")
        if self.eval_crop is not None and not 0 < self.eval_crop <= 1:
            raise ValueError(f"augment.eval_crop={self.eval_crop} must be above 0 and at most 1")


# ------------------------------------------------------------------------------------------------------------- tasks


class Part(Dataset[ImageSample]):
    """Images of one part of a task. prefix: keeps the ids of parts apart. about: what was found of all parts."""

    def __init__(self, images: Dataset[ImageSample], prefix: str = "", about: str = "") -> None:
        self.images, self.prefix, self.about = images, prefix, about
        self.sizes = images.sizes

    def id(self, index: int) -> str:
        return self.prefix + self.images.id(index)

    def __getitem__(self, index: int) -> ImageSample:
        return self.images[index]

    def describe(self) -> str:
        return self.about or self.images.describe()


def open_task(config: VisionConfig, patch_size: int) -> Task[ImageSample]:
    """The labelled images of `data.path`: class folders, CIFAR or IDX files; without it, the built-in shapes.

    Raises UserError where something is missing, contradictory or too much of it is broken.
    """
    if config.split is not None:
        raise UserError(
            f"data.split={config.split}: labelled data is divided by its own folders or files (train, val, test). "
            "Leave data.split out."
        )
    if config.path is None:
        return _shapes(config.image_size)
    refuse_shards(config.path)
    if record_files(config.path):
        return _records(config.path)
    return _folders(config, config.path, patch_size)


def _task(name: str, classes: Sequence[str], parts: Mapping[str, LabelledPart[ImageSample]]) -> Task[ImageSample]:
    return Task(
        name, tuple(classes), METRICS, parts["train"], parts.get("dev"), parts.get("test"), "raw pixels", raw_pixels
    )


def _shapes(side: int) -> Task[ImageSample]:
    def part(split: Split) -> LabelledPart[ImageSample]:
        shapes = SyntheticShapes(split, BUILT_IN_COUNTS[split], side, BUILT_IN_SEED)
        labels = np.array([shapes.label(i) for i in range(len(shapes))], dtype=np.int64)
        return LabelledPart(Part(SyntheticImages(shapes), f"{split}-"), labels)

    return _task("shapes", SHAPES, {split: part(split) for split in BUILT_IN_COUNTS})


def _records(path: str) -> Task[ImageSample]:
    """CIFAR or IDX files. Those with "test" or "t10k" in their names are the test part."""
    files = record_files(path)
    kinds = {"test" if is_test(file) else "train" for file in files}
    if "train" not in kinds:
        raise UserError(
            f"data.path={path} has test files only ({', '.join(file.name for file in files)}): nothing to train on. "
            "Put the training files beside them and give the folder."
        )
    arrays = {kind: read_records(path, kind) for kind in ("train", "test") if kind in kinds}
    labels: dict[str, np.ndarray] = {}
    for kind, array in arrays.items():
        if array.labels is None:
            raise UserError(
                f"data.path={path}: {array.source} has no labels. The file that names them "
                "(...-labels-idx1-ubyte, .gz too) must lie beside each file of images."
            )
        labels[kind] = array.labels
    classes = _class_names(files[0].parent, int(labels["train"].max()))
    for kind, values in labels.items():
        if values.max() >= len(classes):
            raise UserError(
                f"data.path={path}: the {kind} part has a label {values.max()}, but there are {len(classes)} classes, "
                f"{classes[0]} to {classes[-1]}."
            )
    about = "\n".join(f"{kind}: {ImageArrays(array).describe()}" for kind, array in arrays.items())
    if "test" not in kinds:
        about += "\nNo test files, so nothing is tested on in the end."
    parts = {
        kind: LabelledPart(Part(ImageArrays(array), f"{kind}-", about), labels[kind]) for kind, array in arrays.items()
    }
    return _task(Path(path).expanduser().resolve().name, classes, parts)


def _class_names(folder: Path, largest: int) -> tuple[str, ...]:
    """Of the file beside CIFAR's, else the numbers up to the largest label."""
    for name in CLASS_NAMES:
        path = folder / name
        if path.is_file():
            try:
                names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path} cannot be read: {error}. It should name a class a line.") from None
            if len(names) <= largest or len(set(names)) < len(names):
                raise UserError(
                    f"{path} names {len(set(names))} different classes, one a line, but the labels go up to {largest}. "
                    "Mend it, or take it away to call the classes by their numbers."
                )
            return names
    return tuple(map(str, range(largest + 1)))


def _folders(config: VisionConfig, path: str, patch_size: int) -> Task[ImageSample]:
    """train/CLASS/IMAGE with val/ and test/ where there are such; or CLASS/IMAGE, a training part alone.

    With val/ and test/, val is for choosing; with one of them, that one is the test part.
    """
    root = existing(path, EXPECTED)
    if not root.is_dir():
        raise UserError(f"data.path={path} is one image. Labelled images lie in folders named after their classes.")
    there = {child.name for child in root.iterdir() if child.is_dir()}
    val = [name for name in DEV_FOLDERS if name in there]
    if len(val) > 1:
        raise UserError(f"data.path={path} has {' and '.join(f'{name}/' for name in val)}: leave one of them.")
    held = [*val, *(["test"] if "test" in there else [])]
    if held and "train" not in there:
        raise UserError(
            f"data.path={path} has {' and '.join(f'{name}/' for name in held)} but no train/: nothing to train on. "
            "Put the class folders of the training images into train/."
        )
    notes: list[str] = []
    found: dict[str, ImageFiles] = {}
    for folder in ["train", *held]:
        report = scan(path, split=folder if folder in there else None, **scan_options(config, patch_size))
        labelled = tuple(image for image in report.images if image.label is not None)
        loose = [image.id for image in report.images if image.label is None]
        if not labelled and folder == "train":
            raise UserError(
                f"data.path={path}: none of {len(loose)} images in {report.top} lies in a class folder. Expected "
                f"{report.top}/CLASS/IMAGE, one folder for each class."
            )
        notes.append(replace(report, images=labelled).summary() if labelled else f"{report.top}: no class folders")
        if loose:
            notes.append(f"{len(loose)} without a class folder are left out: {first(loose, ', ', more=MORE)}")
        if labelled:
            found[folder] = ImageFiles(replace(report, images=labelled), config.max_pixels)
    held = [name for name in held if name in found]
    if not held:
        notes.append("No val/ or test/ with class folders beside train/, so nothing is tested on in the end.")
    classes = found["train"].report.labels
    parts: dict[str, LabelledPart[ImageSample]] = {}
    for folder, images in found.items():
        unknown = sorted(set(images.report.labels) - set(classes))
        if unknown:
            raise UserError(
                f"data.path={path}: {folder}/ has classes of which there is no image to train on: "
                f"{first(unknown, ', ', more=MORE)}. Those to train on: {first(classes, ', ', 20, MORE)}. Names must "
                "agree."
            )
        labels = np.array([classes.index(str(image.label)) for image in images.report.images], dtype=np.int64)
        role = folder if folder in ("train", "test") or len(held) > 1 else "test"
        parts["dev" if role in DEV_FOLDERS else role] = LabelledPart(Part(images, about="\n".join(notes)), labels)
    return _task(root.name, classes, parts)


# ------------------------------------------------------------------------------------------ augmentation and mixing


def middle(pixels: np.ndarray, side: int, share: float | None) -> np.ndarray:
    """(height, width, 3) -> (side, side, 3) uint8: shorter side to side / share, bicubic, then the middle.

    share: None = 0.875 where side is above 64, else 1. As torchvision's Resize and CenterCrop do it.
    """
    share = (EVAL_CROP if side > SMALL_SIDE else 1.0) if share is None else share
    image = Image.fromarray(pixels)
    short = max(int(side / share), side)
    image = _without_far_ends(image)
    width, height = image.size
    if min(width, height) != short:
        size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return np.asarray(image.crop((left, top, left + side, top + side)))


def _without_far_ends(image: Image.Image) -> Image.Image:
    """A sliver, cut to LONGEST times its shorter side: resized as it is, 1 x 100000 pixels would fill the memory."""
    width, height = (min(length, LONGEST * min(image.size)) for length in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height)) if (width, height) != image.size else image


def vary(pixels: np.ndarray, data: VisionConfig, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """(height, width, 3) uint8 -> (S, S, 3) uint8: a random crop, mirror and RandAugment, all drawn from `rng`."""
    if config.pad_crop is not None:
        pixels = middle(pixels, data.image_size, 1.0)
    transform = training_transform(data, config)
    with seeded(rng):
        return np.asarray(transform(Image.fromarray(pixels)))


def training_transform(data: VisionConfig, config: AugmentConfig) -> Any:
    """timm's training transform from a picture to a picture; normalising and erasing come later, on whole batches."""
    return _timm_transform(
        data.image_size, config.rand_augment, tuple(config.crop_scale), tuple(config.crop_aspect), config.pad_crop,
        config.flip_prob, tuple(data.mean), tuple(data.std),
    )  # fmt: skip


@lru_cache(maxsize=8)
def _timm_transform(
    side: int,
    rand_augment: str | None,
    scale: tuple[float, ...],
    aspect: tuple[float, ...],
    pad_crop: int | None,
    flip_prob: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Any:
    from timm.data.transforms_factory import create_transform
    from torchvision import transforms

    create: Any = create_transform  # its types allow neither None for no colour jitter nor a tuple as the result
    first, second, _ = create(
        side, is_training=True, scale=scale, ratio=aspect, hflip=flip_prob, color_jitter=None,
        auto_augment=rand_augment, interpolation="bicubic", mean=mean, std=std, separate=True,
    )  # fmt: skip
    for augmentation in second.transforms if rand_augment else ():
        for operation in augmentation.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
    steps = list(first.transforms)
    if pad_crop is not None:  # as officially for small images, in place of the random resized crop
        steps[0] = transforms.RandomCrop(side, padding=pad_crop)
    return transforms.Compose([*steps, *second.transforms])


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """At its strongest RandAugment keeps no bit at all. Pillow 13 refuses that; before, the image became black."""
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def mix(images: Tensor, targets: Tensor, config: AugmentConfig, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random erasing of each image, then mixup or cutmix of image i with image B - 1 - i, all drawn from `rng`.

    images (B, 3, S, S), normalised; targets (B, C) shares, which are blended like the images. Erased places hold
    N(0, 1) noise. The middle one of an odd number of images would be mixed with itself and stays as it is.
    """
    mixing = config.mix_prob > 0 and (config.mixup > 0 or config.cutmix > 0)
    if not mixing and not config.erase_prob:
        return images, targets
    from timm.data.mixup import Mixup
    from timm.data.random_erasing import RandomErasing

    count = len(images)
    with seeded(rng):
        if config.erase_prob:
            images = RandomErasing(config.erase_prob, mode="pixel", max_count=1, device="cpu")(images.clone())
        paired = torch.tensor([i for i in range(count) if 2 * i + 1 != count], dtype=torch.int64)
        if mixing and len(paired):
            # timm blends classes; given the samples' own numbers for classes, it says what each is blended of. Label
            # smoothing is the loss's.
            blend = Mixup(
                config.mixup, config.cutmix, prob=config.mix_prob, switch_prob=config.switch_prob,
                label_smoothing=0.0, num_classes=len(paired),
            )  # fmt: skip
            mixed, shares = blend(images[paired], torch.arange(len(paired)))
            images, targets = images.clone(), targets.clone()
            images[paired], targets[paired] = mixed, shares @ targets[paired]
    return images, targets
