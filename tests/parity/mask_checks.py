"""Holds the distribution of our span masks against statistics of the official ones.

A call of the policy is the independent unit: the samples of a call share their count. Every statistic is a ratio of
sums over calls, so its standard error follows from the spread over calls and from the number of calls, ours and the
recorder's together. Where a plain mean is concerned the recorded spread bounds the tolerance as well, lest masks that
vary too much excuse themselves; and the spread is itself a statistic that is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from d2v_core.contract import Layout
from d2v_core.keyed import generator
from d2v_core.masking import SpanMasking, SpanMaskingConfig

from .compare import Comparison, Limit
from .finder import Fixture

SIGMAS = 5.0
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def check_mask_statistics(fixture: Fixture, calls: int = 600, seed: int = 0) -> Comparison:
    c = Comparison(fixture)
    for number, setting in enumerate(fixture.meta["stats"]):
        masks, lengths = draw(setting, calls, seed)
        of = f"of setting {number}"
        known: set[str] = set(SETTINGS)
        for key, ours, recorded, allowed in statistics(masks, lengths, setting):
            known.add(key.partition("[")[0])
            c.number(f"{key} {of}", ours, recorded, Limit(absolute=allowed))
        for key in setting.keys() - known:
            c.fail(f"{key} {of}", "recorded, but not compared")
    return c.finish()


SETTINGS = (
    "B", "T", "mask_prob", "mask_length", "require_same_masks", "lengths", "min_masks", "mask_dropout", "calls",
)  # fmt: skip


def draw(setting: Mapping[str, Any], calls: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(calls, B, T) bool, and the (B,) lengths."""
    policy = SpanMasking(
        SpanMaskingConfig(
            mask_prob=setting["mask_prob"],
            mask_length=setting["mask_length"],
            min_spans=setting["min_masks"],
            same_count=setting["require_same_masks"],
            mask_dropout=setting["mask_dropout"],
        )
    )
    lengths = setting["lengths"] or [setting["T"]] * setting["B"]
    layouts = [Layout((length,)) for length in lengths]
    drawn = [
        policy(layouts, 1, [generator(seed, "mask", call, row) for row in range(len(lengths))]).hidden[:, 0].numpy()
        for call in range(calls)
    ]
    return np.stack(drawn), np.array(lengths)


def statistics(
    masks: np.ndarray, lengths: np.ndarray, setting: Mapping[str, Any]
) -> Iterator[tuple[str, float, float, float]]:
    """(name, ours, recorded, allowed deviation)."""
    calls, num_rows, num_tokens = masks.shape
    more = SIGMAS * np.sqrt(1 / setting["calls"] + 1 / calls)  # standard errors of a difference, per spread of a call
    count = masks.sum(-1).astype(float)
    fraction = count / lengths
    edges = np.diff(np.pad(masks, ((0, 0), (0, 0), (1, 1))).astype(np.int8), axis=-1)
    begin, end = np.nonzero(edges == 1), np.nonzero(edges == -1)
    run, call = (end[2] - begin[2]).astype(float), begin[0]
    num_runs = (edges == 1).sum(-1).astype(float)

    def of_call(values: np.ndarray) -> np.ndarray:
        """Sums over the runs of each call."""
        return np.bincount(call, values, calls)

    rows, runs = np.full(calls, float(num_rows)), of_call(np.ones_like(run))

    def ratio(top: np.ndarray, bottom: np.ndarray) -> tuple[float, float]:
        """Sum of top over sum of bottom, (calls,) each, and the spread that one call gives to it."""
        value = top.sum() / bottom.sum()
        return float(value), float((top - value * bottom).std() / bottom.mean())

    def mean_and_std(key: str, values: np.ndarray, sums: Any, bottom: np.ndarray) -> Iterator[Any]:
        mean, spread = ratio(sums(values), bottom)
        var, spread_of_var = ratio(sums((values - mean) ** 2), bottom)
        std, recorded_std = np.sqrt(var), setting[f"{key}_std"]
        yield f"{key}_mean", mean, setting[f"{key}_mean"], more * min(spread, recorded_std)
        yield f"{key}_std", std, recorded_std, more * spread_of_var / (2 * std) if std else 0.0

    def of_rows(values: np.ndarray) -> np.ndarray:
        return values.sum(1)

    yield from mean_and_std("fraction_masked", fraction, of_rows, rows)
    yield from mean_and_std("masked_count", count, of_rows, rows)
    yield from mean_and_std("runs_per_row", num_runs, of_rows, rows)
    yield from mean_and_std("run_length", run, of_call, runs)

    short, spread = ratio(of_call((run < setting["mask_length"]).astype(float)), runs)
    key = "runs_shorter_than_mask_length_fraction"
    yield key, short, setting[key], more * spread

    # Of the longest run: about how many of this length or more are to be expected in the recorder's calls?
    longest = setting["run_length_max"]
    expected = (run > longest).sum() * setting["calls"] / calls
    yield "run_length_max[longer]", 0.0, float(expected), -np.log(3e-4)  # none of so many: 3 in 10 000
    yield "run_length_max[shorter]", float(run.max() < 0.7 * longest), 0.0, 0.0

    # A recorded quantile has about its share of our samples below it. Values are discrete, so a band of shares.
    key = "fraction_masked_quantiles_0_5_25_50_75_95_100"
    for level, recorded in zip(QUANTILES, setting[key], strict=True):
        below, upto = float((fraction < recorded - 1e-9).mean()), float((fraction <= recorded + 1e-9).mean())
        nearest = min(max(level, below), upto)
        extreme = 1 - 3e-4 ** (1 / setting["calls"])  # share of which none may turn up in the recorder's calls
        allowed = max(more * np.sqrt(level * (1 - level)), extreme)
        yield f"{key}[{level}]", nearest, level, allowed

    for key, places in (("first10", range(10)), ("last10", range(num_tokens - 10, num_tokens))):
        for i, place in enumerate(places):
            rate, spread = ratio(of_rows(masks[..., place]).astype(float), rows)
            recorded = setting[f"position_mask_rate_{key}"][i]
            yield f"position_mask_rate_{key}[{i}]", rate, recorded, more * spread
    middle = slice(num_tokens // 2 - 5, num_tokens // 2 + 5)
    rate, spread = ratio(masks[..., middle].mean(-1).sum(1), rows)
    yield "position_mask_rate_middle10", rate, setting["position_mask_rate_middle10"], more * spread
