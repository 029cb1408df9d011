"""A run that is killed again and again ends as the run that nobody touched: every number and every weight."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from d2v_core.checkpoint import list_checkpoints

SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT, "kill in a save": None}
STATUS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}


def words(out: Path, steps: int) -> list[str]:
    return ["run", "modality=toy", f"out={out}", f"train.max_steps={steps}", "train.checkpoint_every=3", "resume=auto",
            "train.log_every=1", "train.num_workers=0", "train.probe=false", "train.tensorboard=false",
            "train.num_threads=1", "model.layer_drop=0.2"]  # fmt: skip


def saving(checkpoints: Path) -> bool:
    return checkpoints.is_dir() and any(name.endswith(".tmp") for name in os.listdir(checkpoints))


def end_it(process: subprocess.Popen[str], out: Path, how: str, wait: float) -> str | None:
    """Stop a run some time after its first new step. What was done to it, None where it had ended by itself."""
    metrics = out / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.is_file() else 0
    while process.poll() is None and (not metrics.is_file() or metrics.stat().st_mtime_ns == before):
        time.sleep(0.002)
    until = time.monotonic() + wait
    if how == "kill in a save":
        while process.poll() is None and not saving(out / "checkpoints"):
            pass  # a save takes milliseconds
        process.kill()
    else:
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        process.send_signal(SIGNALS[how])
    text = process.communicate(timeout=120)[1]
    if process.returncode == 0:
        return None
    expected = STATUS[SIGNALS[how] or signal.SIGKILL]
    assert process.returncode == expected, f"{how}: exit status {process.returncode}\n{text}"
    return how


@pytest.mark.parametrize(
    ("kills", "steps"), [pytest.param(4, 40, id="short"), pytest.param(50, 400, id="long", marks=pytest.mark.slow)]
)
def test_a_run_that_is_killed_again_and_again(
    d2v, read_run, environment: dict[str, str], tmp_path: Path, kills: int, steps: int
):
    assert d2v(*words(tmp_path / "straight", steps))[0] == 0
    out, rng, done = tmp_path / "run", random.Random(0), Counter()
    interrupted_saves = 0
    for number in range(kills):
        how = list(SIGNALS)[number % len(SIGNALS)]
        process = subprocess.Popen(
            [sys.executable, "-m", "d2v_core", *words(out, steps)], env={**environment, "TOY_DELAY": "0.01"},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        done[end_it(process, out, how, rng.uniform(0.0, 0.3))] += 1
        interrupted_saves += saving(out / "checkpoints")
    process = subprocess.run(
        [sys.executable, "-m", "d2v_core", *words(out, steps)], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert sum(done.values()) - done[None] >= 0.7 * kills, done  # most of them hit a run that was under way
    assert interrupted_saves >= kills // 20, "no save was interrupted in the middle"
    (lines, tensors), (straight_lines, straight) = read_run(out), read_run(tmp_path / "straight")
    assert lines == straight_lines and tensors.keys() == straight.keys()
    assert all(torch.equal(tensors[name], straight[name]) for name in straight)
    assert not saving(out / "checkpoints") and len(list_checkpoints(out / "checkpoints")) == 2
