"""The examples run, learn and stay short."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "pretrain.py"


def test_pretrain_learns_in_a_few_steps(capsys):
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("pretrain_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)  # importing it must not train
    assert capsys.readouterr().out == ""
    out = example.main(steps=41)
    losses = [float(line.split()[2]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert losses[-1] < 0.8 * losses[0]
    assert torch.isfinite(out.loss_sum) and out.target_std > 0.3


def test_pretrain_fits_on_a_page():
    text = EXAMPLE.read_text(encoding="utf-8")
    assert sum(bool(line.strip()) for line in text.splitlines()) <= 60
    assert "trainer" not in text.split('"""')[2]
