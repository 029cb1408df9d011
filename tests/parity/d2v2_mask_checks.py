"""Holds the distribution of data2vec 2.0's masks against draws of the official functions, on sequences and on grids.

The recorded draws are first held against the statistics that were recorded of them; then ours against them, within
five standard errors, which follow from the spread over draws on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from d2v_core.contract import Layout
from d2v_core.keyed import generator
from d2v_core.masking import BlockMasking, BlockMaskingConfig, SpanMasking, SpanMaskingConfig, draw_blocks

from .compare import Comparison, Limit
from .finder import Fixture
from .vision_checks import components

SIGMAS = 5.0
SETTINGS = (
    "function", "L", "mask_prob", "mask_prob_adjust", "mask_length", "inverse_mask", "require_same_masks", "draws",
)  # fmt: skip
RAW = "_before_equalising"  # the blocks alone


def check_mask_statistics(fixture: Fixture, draws: int = 400, seed: int = 0) -> Comparison:
    c = Comparison(fixture)
    for name, recorded in fixture.meta["settings"].items():
        official = c.take(name).bool().numpy()
        theirs = statistics(official)
        for key in recorded.keys() - theirs.keys() - set(SETTINGS) - {"per_position_masked_rate"}:
            c.fail(f"{key} of {name}", "recorded, but not compared")
        for key in theirs.keys() & recorded.keys():
            if not np.allclose(theirs[key][0], recorded[key], rtol=1e-5, atol=1e-6):
                c.fail(f"{key} of {name}", f"the draws have {theirs[key][0]}, the file says {recorded[key]}")
        if not np.allclose(official.mean(0), recorded["per_position_masked_rate"], atol=1e-6):
            c.fail(f"per_position_masked_rate of {name}", "the draws have other rates than the file")
        whole = name.removesuffix(RAW)
        setting = fixture.meta["settings"][whole]
        masks = draw(setting, official.shape[1:], draws, seed, blocks_alone=whole != name)
        for key, (value, error) in statistics(masks).items():
            wanted, their_error = theirs[key]
            allowed = SIGMAS * np.sqrt(np.square(error) + np.square(their_error)) + 1e-9
            if np.ndim(value):
                worst = (np.abs(value - wanted) - allowed).max()
                c.number(f"{key} of {name}", float(max(worst, 0.0)), 0.0, Limit(absolute=1e-12))
            else:
                c.number(f"{key} of {name}", float(value), float(wanted), Limit(absolute=float(allowed)))
    return c.finish()


def draw(
    setting: Mapping[str, Any], shape: tuple[int, ...], draws: int, seed: int, blocks_alone: bool = False
) -> np.ndarray:
    """(draws, *shape) bool, True = hidden."""
    rngs = [generator(seed, "mask", i) for i in range(draws)]
    if "span mask" in setting.get("function", ""):  # what the audio model draws by itself where none is given
        spans = SpanMaskingConfig(
            mask_prob=setting["mask_prob"], mask_length=setting["mask_length"], same_count=False
        )  # fmt: skip
        return SpanMasking(spans)([Layout(shape)] * draws, 1, rngs).hidden[:, 0].numpy()
    config = BlockMaskingConfig(
        mask_prob=setting["mask_prob"],
        mask_length=setting["mask_length"],
        adjust=setting["mask_prob_adjust"],
        inverse=setting.get("inverse_mask", False),
    )
    if blocks_alone:
        blocks = np.stack([draw_blocks(shape, config, rng) for rng in rngs])
        return ~blocks if config.inverse else blocks
    masks = BlockMasking(config)([Layout(shape)] * draws, 1, rngs)
    assert masks.visible is not None and masks.visible.shape[2] == (~masks.hidden[0, 0]).sum()
    return masks.hidden[:, 0].numpy().reshape(draws, *shape)


def statistics(masks: np.ndarray) -> dict[str, tuple[Any, Any]]:
    """Value and standard error of each statistic; (draws, T) or (draws, rows, columns) bool, True = hidden."""
    num, grid = len(masks), masks.reshape(len(masks), -1, masks.shape[-1])
    fraction = masks.reshape(num, -1).mean(1)
    spread = fraction.std(ddof=1) if len(set(fraction)) > 1 else 0.0
    out: dict[str, tuple[Any, Any]] = {
        "masked_fraction_mean": (fraction.mean(), spread / np.sqrt(num)),
        "masked_fraction_std": (spread, _error_of_std(fraction)),
        "masked_fraction_min": (fraction.min(), spread),
        "masked_fraction_max": (fraction.max(), spread),
    }
    for kind, where in (("masked", grid), ("visible", ~grid)):
        sizes = [np.array(components(mask), dtype=float) for mask in where]
        count = np.array([len(one) for one in sizes], dtype=float)
        total = np.array([one.sum() for one in sizes])
        largest = np.array([one.max(initial=0.0) for one in sizes])
        mean = total.sum() / count.sum()
        deviation = np.array([((one - mean) ** 2).sum() for one in sizes])
        std = np.sqrt(deviation.sum() / (count.sum() - 1))
        out[f"{kind}_block_size_mean"] = (mean, _error_of_ratio(total, count))
        out[f"{kind}_block_size_std"] = (std, _error_of_ratio(deviation, count) / (2 * std) if std > 1e-9 else 0.0)
        out[f"{kind}_blocks_per_row_mean"] = (count.mean(), count.std() / np.sqrt(num))
        out[f"{kind}_largest_block_mean"] = (largest.mean(), largest.std() / np.sqrt(num))
        out[f"{kind}_largest_block_std"] = (largest.std(ddof=1), _error_of_std(largest))
    # Rates by place: of every place, and of whole rows and columns, which show a lean to one side sooner.
    for key, rates in (("rate", grid), ("rate_of_row", grid.mean(2)), ("rate_of_column", grid.mean(1))):
        mean = rates.mean(0)
        error = rates.std(0)
        if key == "rate":  # of places that were always or never hidden too
            error = np.sqrt(mean * (1 - mean) + 1.0 / num)
        out[key] = (mean, error / np.sqrt(num))
    return out


def _error_of_ratio(top: np.ndarray, bottom: np.ndarray) -> float:
    """Of sum(top) / sum(bottom) over draws."""
    ratio = top.sum() / bottom.sum()
    return float((top - ratio * bottom).std() / bottom.mean() / np.sqrt(len(top)))


def _error_of_std(values: np.ndarray) -> float:
    """Of a standard deviation, from the fourth moment."""
    centred, var = values - values.mean(), values.var()
    if var < 1e-18:
        return 0.0
    return float(np.sqrt(max((centred**4).mean() - var**2, 0.0) / len(values)) / (2 * np.sqrt(var)))
