"""Runs d2v on a fixture of data2vec vision 1.0 and holds everything recorded against it.

The fixtures come from fairseq's port, which shares the front end with the teacher and predicts by the final norm's
output: values of `features.teacher` and `features.head`. What only the official code has (a second layer norm of the
targets, a teacher averaged as a whole, a mean as the loss) is tested by hand in tests/vision.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from d2v_core import schedules
from d2v_core.config import load_config, parse_arguments
from d2v_core.contract import Layout, Masks
from d2v_core.data2vec import Data2Vec, channel_std
from d2v_core.keyed import generator
from d2v_core.run import build_model
from d2v_vision import official
from d2v_vision.feature_encoder import RelativeBias
from d2v_vision.masking import BlockMasking, BlockMaskingConfig

from .compare import ACTIVATION, EMA, GRADIENT, LOSS, Comparison, Limit
from .finder import Fixture
from .models import compare_teacher, load_recorded, watch


def build(c: Comparison, changes: Mapping[str, str] | None = None) -> tuple[Any, Data2Vec]:
    """Configuration and model of a fixture with its recorded weights."""
    words = official.config_from_official(c.fixture.config)
    options = {**parse_arguments(words), **(changes or {})}
    config, kind = load_config([f"{key}={value}" for key, value in options.items()])
    model = build_model(kind(config))
    layout = c.fixture.layout
    load_recorded(
        c, model, official.from_official(c.take_all(layout.student), config),
        official.teacher_from_official(c.take_all(layout.teacher), config),
    )  # fmt: skip
    return config, model


def check_single_step(fixture: Fixture, changes: Mapping[str, str] | None = None) -> Comparison:
    """Forward, targets, loss, gradients, one EMA step, features in eval mode."""
    c, meta = Comparison(fixture), fixture.meta
    config, model = build(c, changes)
    # Loaded with the weights, and compared with our own first: a table is read by its index.
    index = RelativeBias((_side(c), _side(c)), 1).index
    c.tensor("student.encoder.rel_pos_bias.relative_position_index", index, ACTIVATION)
    inputs = {"image": c.take("input.img")}
    masks = Masks.of(c.take("mask").flatten(1))
    with watch(model) as seen:
        out = model(inputs, masks)
    c.tensor("encoder_input_unmasked", seen["teacher"].args[0], ACTIVATION)
    at_block = config.target.tap == "block"
    for i in range(config.model.num_layers):
        c.tensor(f"student_layer.{i}", seen[f"student.{i}"].out[0], ACTIVATION)
        c.tensor(f"target_layer.{i}", seen[f"teacher.{i}"].out[0 if at_block else 1][:, 1:], ACTIVATION)
    c.tensor("target_full", model.teach(model.student.encoder.embed(inputs), inputs), ACTIVATION)
    c.tensor("target", out.target, ACTIVATION)
    c.tensor("pred", out.prediction, ACTIVATION)
    c.tensor("loss.regression", out.loss_sum, LOSS)
    for name, ours, limit in (
        ("loss_regression_sum", out.loss_sum, LOSS),
        ("sample_size", out.num_scored, LOSS),
        ("loss_per_sample", out.loss_sum / out.num_scored, LOSS),
        ("target_var", channel_std(out.target), ACTIVATION),
        ("pred_var", channel_std(out.prediction), ACTIVATION),
    ):
        c.number(f"json {name}", ours, meta["scalars"][name], limit)
    if config.loss.beta:
        beyond = ((out.prediction - out.target).abs() >= config.loss.beta).sum()
        c.number("json n_abs_diff_ge_beta", beyond, meta["scalars"]["n_abs_diff_ge_beta"], Limit())

    out.loss_sum.backward()
    gradients = official.gradients_to_official(model, config)
    c.tensors("grad.", gradients, GRADIENT)
    for name in gradients.keys() | fixture.grad_norms.keys():
        ours = gradients.get(name)
        c.number(f"norm of grad.{name}", None if ours is None else ours.norm(), fixture.grad_norms.get(name), GRADIENT)

    model.eval()
    with torch.no_grad():
        view, encoded = model.student(model.student.encoder.embed(inputs), None)
        c.tensor("eval.x", encoded.x[:, view.num_extra :], ACTIVATION)

    ema = meta["ema"]
    for step, decay in ({**ema["decay_at_step"], ema["num_updates"]: ema["decay"]}).items():
        ours = schedules.decay_at(int(step), config.train.max_steps, config.teacher)
        c.number(f"json decay_at_step {step}", ours, decay, Limit(absolute=1e-12))
    model.update_teacher(schedules.decay_at(ema["num_updates"], config.train.max_steps, config.teacher))
    to_official = partial(official.teacher_to_official, config=config)
    compare_teacher(c, fixture.layout.teacher_after, model, to_official, EMA)
    return c.finish()


def _side(c: Comparison) -> int:
    return c.fixture.config["image_size"] // c.fixture.config["patch_size"]


# -------------------------------------------------------------------------------------------------------- masks

NUM_SETTINGS = ("num_mask_patches", "min_mask_patches_per_block", "max_mask_patches_per_block", "window", "draws")
SIGMAS = 5.0


def check_mask_statistics(fixture: Fixture, draws: int = 400, seed: int = 0) -> Comparison:
    """Ours against the official draws, which are first held against their own recorded statistics."""
    c = Comparison(fixture)
    for name, setting in fixture.meta["settings"].items():
        theirs = statistics(c.take(name).bool().numpy())
        for key in setting.keys() - theirs.keys() - set(NUM_SETTINGS):
            c.fail(f"{key} of {name}", "recorded, but not compared")
        for key in theirs.keys() & setting.keys():
            if not np.allclose(theirs[key][0], setting[key], atol=1e-9):
                c.fail(f"{key} of {name}", f"the draws have {theirs[key][0]}, the file says {setting[key]}")
        ours = statistics(draw(setting, draws, seed))
        for key, (value, error) in ours.items():
            recorded, their_error = theirs[key]
            allowed = SIGMAS * np.sqrt(np.square(error) + np.square(their_error))
            if np.ndim(value):  # a rate per place: none may stand out, nor all of them lean to one side
                worst = np.abs(value - recorded) - allowed
                c.number(f"{key} of {name}", float(max(worst.max(), 0.0)), 0.0, Limit(absolute=1e-12))
                mirrored = (value + value[::-1] + value[:, ::-1] + value[::-1, ::-1]) / 4
                c.number(f"{key}[mirrored] of {name}", float(np.abs(mirrored - value).max()), 0.0,
                         Limit(absolute=float(allowed.max())))  # fmt: skip
            else:
                c.number(f"{key} of {name}", float(value), float(recorded), Limit(absolute=float(allowed)))
    return c.finish()


def draw(setting: Mapping[str, Any], draws: int, seed: int) -> np.ndarray:
    """(draws, rows, columns) bool."""
    policy = BlockMasking(
        BlockMaskingConfig(
            num_patches=setting["num_mask_patches"],
            min_block=setting["min_mask_patches_per_block"],
            max_block=setting["max_mask_patches_per_block"],
        )
    )
    shape = tuple(setting["window"])
    masks = policy([Layout(shape)] * draws, 1, [generator(seed, "mask", i) for i in range(draws)])
    return masks.hidden[:, 0].numpy().reshape(draws, *shape)


def statistics(masks: np.ndarray) -> dict[str, tuple[Any, Any]]:
    """Value and standard error of each recorded statistic; (draws, rows, columns) bool, True = hidden."""
    num = len(masks)
    fraction = masks.mean((1, 2))
    out: dict[str, tuple[Any, Any]] = {
        "masked_fraction_mean": (fraction.mean(), fraction.std() / np.sqrt(num)),
        "masked_fraction_std": (fraction.std(ddof=1), _error_of_std(fraction)),
        "masked_fraction_min": (fraction.min(), _error_of_extreme(fraction)),
        "masked_fraction_max": (fraction.max(), 0.0),
    }
    for kind, where in (("masked", masks), ("visible", ~masks)):
        sizes = [components(mask) for mask in where]
        count = np.array([len(one) for one in sizes], dtype=float)
        total = np.array([sum(one) for one in sizes], dtype=float)
        largest = np.array([max(one, default=0) for one in sizes], dtype=float)
        mean = total.sum() / count.sum()
        out[f"{kind}_block_size_mean"] = (mean, (total - mean * count).std() / count.mean() / np.sqrt(num))
        out[f"{kind}_blocks_per_image_mean"] = (count.mean(), count.std() / np.sqrt(num))
        out[f"{kind}_largest_block_mean"] = (largest.mean(), largest.std() / np.sqrt(num))
        out[f"{kind}_largest_block_std"] = (largest.std(ddof=1), _error_of_std(largest))
    # Two that were not recorded as numbers, but are in the draws: how ragged the hidden part is, and how oblong.
    padded = np.pad(masks, ((0, 0), (1, 1), (1, 1))).astype(np.int8)
    across, down = (np.abs(np.diff(padded, axis=axis)).sum((1, 2)).astype(float) for axis in (1, 2))
    for key, lengths in (("edge_length_mean", across + down), ("edge_imbalance_mean", np.abs(across - down))):
        out[key] = (lengths.mean(), lengths.std() / np.sqrt(num))
    rate = masks.mean(0)
    out["per_position_masked_rate_grid"] = (rate, np.sqrt((rate * (1 - rate) + 0.25 / num) / num))
    return out


def _error_of_std(values: np.ndarray) -> float:
    """Of a standard deviation, from the fourth moment."""
    centred, var = values - values.mean(), values.var()
    return float(np.sqrt(max((centred**4).mean() - var**2, 0.0) / len(values)) / (2 * np.sqrt(var) + 1e-12))


def _error_of_extreme(values: np.ndarray) -> float:
    """Rough: the spread of what lies outermost."""
    return float(np.sort(values)[: max(len(values) // 20, 2)].std() + 0.005)


def components(mask: np.ndarray) -> list[int]:
    """Sizes of the groups of True places that touch along edges."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    sizes: list[int] = []
    while left:
        stack, size = [left.pop()], 0
        while stack:
            y, x = stack.pop()
            size += 1
            for place in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if place in left:
                    left.remove(place)
                    stack.append(place)
        sizes.append(size)
    return sizes
