"""Flips single bits of a checkpoint and counts how many are noticed; measures what the digests cost.

    python benchmarks/flips.py --flips 10000 --out benchmarks/results/flips.json

The checkpoint for the flips is small, its bits are drawn over all files in proportion to their sizes. For the cost, one
of `--mib` MiB of float32 (a Base network with its optimizer has 1450) is saved and loaded with and without digests:
with them first in one round, without first in the next, since a disk may be slower at every other file, and after a
sync, so that nothing that was written or deleted before is paid for. Saving includes the flush to the disk. Medians of
seconds of the wall clock, and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from d2v_core import checkpoint
from d2v_core.checkpoint import Checkpoint, DamagedCheckpoint
from d2v_core.metrics import write_json


def flip(count: int, seed: int) -> dict[str, int]:
    torch.manual_seed(seed)
    weights = {f"w{i}": torch.randn(32, 32) for i in range(8)}
    state = {"optimizer": {"state": {i: {"exp_avg": torch.randn(32, 32)} for i in range(8)}}, "step": 3}
    noticed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = checkpoint.save(Path(name), 1, Checkpoint(weights, {"w0": torch.randn(32, 32)}, state), keep=1)
        whole = {path: path.read_bytes() for path in sorted(folder.iterdir())}
        sizes = np.array([len(data) for data in whole.values()])
        places = np.random.default_rng(seed).choice(8 * sizes.sum(), count, replace=False)
        for place in places:
            index = int(np.searchsorted(8 * sizes.cumsum(), place, side="right"))
            path, bit = list(whole)[index], int(place - 8 * sizes[:index].sum())
            data = bytearray(whole[path])
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            try:
                checkpoint.load(folder)
            except DamagedCheckpoint:
                noticed += 1
            path.write_bytes(whole[path])
    return {"flips": count, "noticed": noticed, "bits": int(8 * sizes.sum())}


def cost(mib: int, rounds: int) -> dict[str, float]:
    part = {f"w{i}": torch.randn(1024, 1024) for i in range(max(mib // 4 // 4, 1))}  # 4 MiB each
    copies = [{n: t.clone() for n, t in part.items()} for _ in range(3)]
    stored = Checkpoint(part, copies[0], {"a": copies[1], "b": copies[2]})
    seconds: dict[str, list[float]] = {}
    for turn in range(rounds):
        for digests in (True, False) if turn % 2 == 0 else (False, True):
            os.sync()
            with (
                tempfile.TemporaryDirectory() as name,
                mock.patch.object(checkpoint, "_digest", checkpoint._digest if digests else lambda data, kind: ""),
            ):
                start = time.perf_counter()
                folder = checkpoint.save(Path(name), 1, stored, keep=1)
                saved = time.perf_counter()
                checkpoint.load(folder)
                loaded = time.perf_counter()
            which = "digests" if digests else "no digests"
            seconds.setdefault(f"save, {which}", []).append(saved - start)
            seconds.setdefault(f"load, {which}", []).append(loaded - saved)
    ratios = [a / b for a, b in zip(seconds["save, digests"], seconds["save, no digests"], strict=True)]
    medians = {name: round(statistics.median(values), 3) for name, values in seconds.items()}
    return {**medians, "save, ratio": round(statistics.median(ratios), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mib", type=int, default=1450)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result = {"machine": platform.processor() or platform.machine(), "torch": str(torch.__version__),
              "date": time.strftime("%Y-%m-%d"), **flip(given.flips, given.seed), "mib": given.mib,
              "seconds": cost(given.mib, given.rounds)}  # fmt: skip
    print(json.dumps(result, indent=1))
    if given.out:
        write_json(given.out, result)


if __name__ == "__main__":
    main()
