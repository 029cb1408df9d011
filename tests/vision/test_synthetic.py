"""The built-in shapes: repeatable, balanced, and not to be told apart by colour or texture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d2v_core.probe import fit_linear
from d2v_vision.synthetic import SHAPES, SyntheticShapes


def test_a_picture_depends_on_seed_split_size_and_index_alone() -> None:
    few, many = SyntheticShapes("train", 5, 32), SyntheticShapes("train", 500, 32)
    assert np.array_equal(few[4].pixels, many[4].pixels) and few[4].label == many[4].label == 4
    others = (SyntheticShapes("train", 5, 32, 1), SyntheticShapes("dev", 5, 32), SyntheticShapes("test", 5, 32))
    for other in others:
        assert not np.array_equal(few[4].pixels, other[4].pixels)


@pytest.mark.parametrize("size", [16, 32, 96])
def test_pictures_of_any_size(size: int) -> None:
    shapes = SyntheticShapes("test", len(SHAPES), size)
    for i in range(len(shapes)):
        pixels = shapes[i].pixels
        assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8 and pixels.std() > 5


def test_classes_take_turns() -> None:
    shapes = SyntheticShapes("train", 40, 16)
    assert np.bincount([shapes[i].label for i in range(40)]).tolist() == [4] * len(SHAPES) == [4] * 10


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="expected one of train, dev, test"):
        SyntheticShapes("valid", 1, 32)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="size=8 must be at least 16"):
        SyntheticShapes("train", 1, 8)
    with pytest.raises(IndexError, match="picture 3 of a set with 3"):
        SyntheticShapes("train", 3, 32)[3]


def test_colours_and_textures_do_not_give_the_class_away() -> None:
    """Histograms of each channel and of its differences between neighbours, by a linear classifier: near chance."""

    def features(split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        shapes = SyntheticShapes(split, count, 32)  # pyright: ignore[reportArgumentType]
        rows, labels = [], []
        for i in range(count):
            x = shapes[i].pixels.astype(float)
            values = [x, np.diff(x, axis=0) + 128, np.diff(x, axis=1) + 128]
            counts = [np.histogram(v[..., c], 8, (0, 256))[0] for v in values for c in range(3)]
            rows.append(np.concatenate(counts))
            labels.append(shapes[i].label)
        return torch.tensor(np.array(rows), dtype=torch.float32), torch.tensor(labels)

    torch.set_num_threads(1)
    x, y = features("train", 600)
    classify = fit_linear(x, y, len(SHAPES), 3e-3)
    x, y = features("test", 400)
    assert (classify(x).argmax(1) == y).float().mean().item() < 0.25
