"""A long run takes no more memory, files, threads and processes at its end than at its beginning."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import astuple, dataclass
from pathlib import Path

import pytest

STEPS = 20_000
PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass
class Use:
    """Of a process and its children; memory in MiB that is resident, what they share counted for each."""

    memory: float
    files: int
    threads: int
    processes: int


def use_of(pid: int) -> Use:
    total = Use(0.0, 0, 0, 0)
    waiting = [pid]
    while waiting:
        folder = Path("/proc", str(waiting.pop()))
        try:
            tasks = list((folder / "task").iterdir())
            waiting += [int(child) for task in tasks for child in (task / "children").read_text().split()]
            total.memory += int((folder / "statm").read_text().split()[1]) * PAGE_MIB
            total.files += len(list((folder / "fd").iterdir()))
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        total.threads += len(tasks)
        total.processes += 1
    return total


def last_step(metrics: Path) -> int:
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads Linux's /proc")
def test_a_long_run_does_not_grow(environment: dict[str, str], tmp_path: Path) -> None:
    """With two processes that read, some 60 epochs, logs, TensorBoard and 80 checkpoints."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "d2v_core", "run", "modality=toy", f"out={out}", f"train.max_steps={STEPS}",
         f"train.checkpoint_every={STEPS // 80}", "train.log_every=50", "train.num_workers=2", "train.probe=false",
         "data.num_samples=1400"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    taken: list[tuple[int, Use]] = []
    while process.poll() is None:
        taken.append((last_step(out / "metrics.jsonl"), use_of(process.pid)))
        time.sleep(0.25)
    error = process.communicate()[1]
    assert process.returncode == 0, error

    def between(first: float, end: float) -> Use:
        """Memory as a rule; of the others the least, since files are opened and closed, processes end with epochs."""
        within = [use for step, use in taken if first * STEPS <= step < end * STEPS]
        assert len(within) >= 10, "measured too seldom"
        memory, *counts = zip(*map(astuple, within), strict=True)
        return Use(statistics.median(memory), *map(min, counts))

    early, late = between(0.1, 0.3), between(0.8, 1.0)
    assert late.files <= early.files and late.threads <= early.threads, (early, late)
    assert late.processes <= early.processes, (early, late)
    assert late.memory <= 1.02 * early.memory, (early, late)
