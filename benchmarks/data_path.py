"""What the data path costs: the share of an epoch that is padding or cropped away, and how long training waits."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from d2v_core.batching import plan_epoch
from d2v_core.config import load_config
from d2v_core.contract import Batching
from d2v_core.trainer import Trainer

RATE = 16000
# `preset=base` with a batch that a CPU can do; `preset=small` as it is, whose cheap network asks most of the loader.
LOADER_RUNS = {
    "base": ["preset=base", "data.batch_s=16", "data.micro_batch_s=16", "train.max_steps=9"],
    "small": ["preset=small", "train.max_steps=41"],
}


def librispeech_like(num_clips: int = 100_000) -> np.ndarray:
    """(num_clips,) lengths in samples, seeded. 70 % normal around 14.8 s with deviation 1.2 s, 30 % even from 1.5 to
    14 s: mean 12.7 s and percentiles 5, 25, 50, 75, 95 of 3.6, 11.8, 14.1, 15.2, 16.6 s; 1215 clips of LibriSpeech's
    training parts have 12.7 s and 4.4, 11.8, 14.0, 15.2, 16.0 s.
    """
    rng = np.random.default_rng(0)
    usual, short = rng.normal(14.8, 1.2, num_clips), rng.uniform(1.5, 14.0, num_clips)
    seconds = np.where(rng.random(num_clips) < 0.7, usual, short).clip(1.4, 24.5)
    return (seconds * RATE).astype(np.int64)


def waste(lengths: np.ndarray, batching: Batching) -> float:
    """Share of an epoch that is lost: cropped away, or, where micro-batches are padded, computed on padding."""
    sound = computed = 0
    for step in plan_epoch(lengths, batching, 0, 0):
        for micro in step:
            sound += int(np.minimum(lengths[list(micro.indices)], batching.max_size).sum())
            computed += len(micro.indices) * micro.size
    return 1.0 - computed / sound if batching.crop else 1.0 - sound / computed


def padding_waste() -> dict[str, float]:
    """With the batches of `preset=base`: 237.5 s a micro-batch, clips of at most 20 s."""
    config, kind = load_config(["modality=audio", "preset=base"])
    modality: Any = kind(config)
    size: Batching = modality.batching()
    lengths = librispeech_like()
    return {
        form: waste(lengths, Batching(size.batch, size.micro_batch, size.max_size, form == "cropping"))
        for form in ("cropping", "padding")
    }


def loader_wait(path: Path, device: str, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Runs the trainer on real files and reads from its own metrics which share of the time it waited for a batch.

    The first step, in which the workers start, is left out.
    """
    found: dict[str, dict[str, float]] = {}
    for name, words in LOADER_RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            common = ["modality=audio", f"data.path={path}", f"train.device={device}", "train.num_threads=1"]
            config, kind = load_config([*common, *words, "train.log_every=1", "train.probe=false"])
            modality: Any = kind(config)
            with open(os.devnull, "w", encoding="utf-8") as nowhere:
                Trainer(modality, Path(folder), Console(file=nowhere)).fit()
            rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        spans = [after["seconds"] - before["seconds"] for before, after in pairwise(rows)]
        waited = sum(row["data_wait"] * span for row, span in zip(rows[1:], spans, strict=True))
        found[name] = {"share": waited / sum(spans), "steps": len(spans), "seconds": sum(spans)}
        say(f"loader wait, preset={name}: {waited / sum(spans):.2%} of {len(spans)} steps in {sum(spans):.0f} s")
    return found
