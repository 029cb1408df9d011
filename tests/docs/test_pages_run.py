"""The code of pages that teach is executed, block after block, as a reader would type it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2v_core import Layout, Masks
from d2v_core.contract import StatesShare
from d2v_core.keyed import generator

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def execute(page: str) -> dict[str, Any]:
    """The names that a page's Python leaves behind."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, "python"), 1):
        exec(compile(block, f"{page}, block {number}", "exec", dont_inherit=True), names)
    return names


def test_a_data2vec_for_ones_own_tensors(one_thread: None) -> None:
    model, loop, features = blocks("own-tensors.md", "python")
    assert sum(bool(line.strip()) for line in model.splitlines()) <= 30
    names: dict[str, Any] = {}
    exec(model, names)
    losses: list[float] = []
    names["losses"] = losses
    exec(loop + "    losses.append(out.loss_sum.item() / out.num_scored)\n", names)
    assert len(losses) == 200 and np.mean(losses[-20:]) < 0.7 * np.mean(losses[:5])
    assert names["out"].target_std > 0.3
    exec(features, names)
    assert names["features"].shape == (16, 64, 48) and names["features"].isfinite().all()


def test_a_masking_policy(capsys: pytest.CaptureFixture[str]) -> None:
    names = execute("masking.md")
    (shown,) = blocks("masking.md", "")
    assert capsys.readouterr().out == shown
    policy = names["StatedRhythm"](names["RhythmConfig"](period=4))
    assert isinstance(policy, StatesShare)
    for size in (1, 2, 5, 40):
        layout = Layout((size,))
        drawn = [policy([layout], 1, [generator(seed, "mask")]).hidden for seed in range(400)]
        assert all(isinstance(one, torch.Tensor) and one.any() and (size == 1 or not one.all()) for one in drawn)
        low, high = policy.hidden_share(layout)
        assert low == high == pytest.approx(torch.stack(drawn).float().mean().item(), abs=0.03)
    assert isinstance(names["masks"], Masks)
    with pytest.raises(ValueError, match=r"mask.period=1 must be at least 2"):
        names["RhythmMasking"](names["RhythmConfig"](period=1))
    assert names["MyModality"].sections("any") == {"mask": names["RhythmConfig"]}
