"""Augmentation, normalisation and the data sets."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from d2v_core.contract import BadSample
from d2v_core.keyed import generator
from d2v_vision.data import SyntheticImages, VisionConfig, augment, crop_box, open_dataset, raw_pixels, to_tensor

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)


def test_nothing_to_change_changes_nothing() -> None:
    square = PIXELS[:, :40]
    config = VisionConfig(image_size=40, color_jitter=0, flip_prob=0, crop_scale=[1, 1], crop_aspect=[1, 1])
    assert np.array_equal(augment(square, config, generator(0, "a")), square)
    mirrored = augment(square, VisionConfig(**{**vars(config), "flip_prob": 1.0}), generator(0, "a"))
    assert np.array_equal(mirrored, square[:, ::-1])


def test_chance_comes_from_the_generator_alone() -> None:
    config = VisionConfig(image_size=32)
    first, again, other = (augment(PIXELS, config, generator(0, "prepare", i)) for i in (1, 1, 2))
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_crop_is_bicubic_of_the_box() -> None:
    config = VisionConfig(image_size=16, color_jitter=0, flip_prob=0)
    made = augment(PIXELS, config, generator(0, "c"))
    rng = generator(0, "c")
    rng.random()  # the mirror's
    box = crop_box(60, 40, config.crop_scale, config.crop_aspect, rng)
    by_hand = Image.fromarray(PIXELS).crop(box).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(made, np.asarray(by_hand))


def test_crops_are_distributed_as_torchvision_s() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    boxes = np.array([crop_box(640, 480, [0.08, 1.0], [3 / 4, 4 / 3], generator(0, "box", i)) for i in range(3000)])
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 640 and boxes[:, 3].max() <= 480
    torch.manual_seed(0)
    image = torch.empty(3, 480, 640)
    params = [transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    theirs = np.array([[left, top, left + width, top + height] for top, left, height, width in params])
    for measure in (
        lambda box: (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) / (640 * 480),
        lambda box: np.log((box[:, 2] - box[:, 0]) / (box[:, 3] - box[:, 1])),
        lambda box: (box[:, 0] + box[:, 2]) / 1280,
        lambda box: (box[:, 1] + box[:, 3]) / 960,
    ):
        ours, wanted = measure(boxes), measure(theirs)
        assert abs(ours.mean() - wanted.mean()) < 5 * wanted.std() * (2 / 3000) ** 0.5
        assert ours.std() == pytest.approx(wanted.std(), rel=0.07)


@pytest.mark.parametrize(("width", "height", "wanted"), [(1000, 10, (13, 10)), (10, 1000, (10, 13))])
def test_a_sliver_is_cropped_in_its_middle(width: int, height: int, wanted: tuple[int, int]) -> None:
    left, top, right, bottom = crop_box(width, height, [0.9, 1.0], [3 / 4, 4 / 3], generator(0, "box"))
    assert (right - left, bottom - top) == wanted
    assert abs(left - (width - right)) <= 1 and abs(top - (height - bottom)) <= 1


def test_colour_jitter_is_torchvision_s() -> None:
    """Its three operations on Pillow images, in a random order, factors uniform within 1 -+ strength."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = Image.fromarray(PIXELS)
    for ours, theirs in (
        (ImageEnhance.Brightness, functional.adjust_brightness),
        (ImageEnhance.Contrast, functional.adjust_contrast),
        (ImageEnhance.Color, functional.adjust_saturation),
    ):
        assert np.array_equal(np.asarray(ours(image).enhance(1.3)), np.asarray(theirs(image, 1.3)))
    config = VisionConfig(image_size=40, flip_prob=0, crop_scale=[1, 1], crop_aspect=[1, 1])
    rng = generator(0, "j")
    order = rng.permutation(3)
    by_hand = Image.fromarray(PIXELS[:, :40])
    for kind in order:
        adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)[kind]
        by_hand = adjust(by_hand, rng.uniform(0.6, 1.4))
    assert np.array_equal(augment(PIXELS[:, :40], config, generator(0, "j")), np.asarray(by_hand))


def test_pixels_are_normalised_by_channel() -> None:
    config = VisionConfig()
    x = to_tensor([np.full((2, 2, 3), 255, np.uint8), np.zeros((2, 2, 3), np.uint8)], config)
    assert x.shape == (2, 3, 2, 2) and x.dtype == torch.float32
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, 0.594 / 0.225]))
    torch.testing.assert_close(x[1, :, 0, 0], torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]))
    corner = to_tensor([np.arange(12, dtype=np.uint8).reshape(2, 2, 3)], VisionConfig(mean=[0] * 3, std=[1 / 255] * 3))
    assert corner[0, 1].round().tolist() == [[1, 4], [7, 10]]


def test_raw_pixels_of_large_images_are_averaged() -> None:
    assert raw_pixels({"image": torch.zeros(1, 3, 224, 224)}).shape == (1, 3 * 32 * 32)
    image = torch.randn(1, 3, 8, 8)
    assert torch.equal(raw_pixels({"image": image}), image.flatten(1))


# -------------------------------------------------------------------------------------------------------- data sets


def test_the_built_in_set() -> None:
    data = open_dataset(VisionConfig(image_size=32, synthetic_images=7), 4)
    assert len(data) == 7 and data.sizes.tolist() == [1] * 7 and data[3].pixels.shape == (32, 32, 3)
    assert "built-in textured shapes, 7 images of 32 x 32" in data.describe()


def test_large_built_in_pictures_are_drawn_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    held = open_dataset(VisionConfig(image_size=32, synthetic_images=3), 4)
    monkeypatch.setattr("d2v_vision.data.MAX_HELD_BYTES", 1000)
    drawn = open_dataset(VisionConfig(image_size=32, synthetic_images=3), 4)
    assert isinstance(drawn, SyntheticImages) and drawn.pixels is None
    assert np.array_equal(held[2].pixels, drawn[2].pixels)


def test_files_are_read_when_asked_for(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.fromarray(PIXELS).save(tmp_path / name)
    data = open_dataset(VisionConfig(path=str(tmp_path)), 4)
    assert [data.id(i) for i in range(2)] == ["a.png", "b.png"]
    assert np.array_equal(data[0].pixels, PIXELS)
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:500])
    with pytest.raises(BadSample, match=r"b\.png: damaged"):
        data[1]


def test_grey_arrays_are_given_three_channels(tmp_path: Path) -> None:
    grey = RNG.integers(0, 256, (3, 28, 28), dtype=np.uint8)
    data = bytes([0, 0, 8, 3]) + np.array(grey.shape, ">u4").tobytes() + grey.tobytes()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(data))
    data = open_dataset(VisionConfig(path=str(tmp_path)), 4)
    assert data[1].pixels.shape == (28, 28, 3) and np.array_equal(data[1].pixels[..., 2], grey[1])
    assert data.describe() == "3 images of 28 x 28 pixels from train-images-idx3-ubyte.gz"
