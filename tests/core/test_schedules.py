"""Learning rate and decay at their seams, with the numbers of the official recipes."""

from __future__ import annotations

import math
import random

import pytest

from d2v_core.config import OptimConfig, TeacherConfig
from d2v_core.schedules import decay_at, lr_at

BASE = OptimConfig(
    lr=5e-4, schedule="tri_stage", warmup_ratio=0.03, hold_ratio=0.9, initial_lr_ratio=0.01, final_lr_ratio=0.01
)


@pytest.mark.parametrize(
    ("step", "lr"),
    [(0, 5e-6), (6000, 2.525e-4), (12_000, 5e-4), (200_000, 5e-4), (372_000, 5e-4), (386_000, 5e-5), (400_000, 5e-6)],
)
def test_tri_stage_of_the_official_base_recipe(step: int, lr: float):
    assert lr_at(step, 400_000, BASE) == pytest.approx(lr, rel=1e-9)


@pytest.mark.parametrize(("step", "decay"), [(0, 0.999), (15_000, 0.99945), (30_000, 0.9999), (400_000, 0.9999)])
def test_decay_of_the_official_base_recipe(step: int, decay: float):
    config = TeacherConfig(ema_decay=0.999, ema_end_decay=0.9999, ema_anneal_steps=30_000)
    assert decay_at(step, 400_000, config) == pytest.approx(decay, rel=1e-12)


def test_decay_anneals_over_the_run_where_no_length_is_given_and_can_be_constant():
    config = TeacherConfig(ema_decay=0.5, ema_end_decay=1.0, ema_anneal_steps=None)
    assert [decay_at(step, 10, config) for step in (0, 5, 10, 11)] == [0.5, 0.75, 1.0, 1.0]
    constant = TeacherConfig(ema_decay=0.999, ema_end_decay=0.9, ema_anneal_steps=0)
    assert decay_at(0, 10, constant) == 0.9


@pytest.mark.parametrize(("schedule", "half"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_seams_of_the_other_schedules(schedule: str, half: float):
    config = OptimConfig(lr=1.0, schedule=schedule, warmup_ratio=0.1, final_lr_ratio=0.1)
    assert lr_at(0, 1000, config) == 0.0
    assert lr_at(50, 1000, config) == pytest.approx(0.5)
    assert lr_at(100, 1000, config) == 1.0
    assert lr_at(550, 1000, config) == pytest.approx(half)
    end = 1.0 if schedule == "constant" else 0.1
    assert lr_at(1000, 1000, config) == pytest.approx(end)
    assert lr_at(1500, 1000, config) == pytest.approx(end)  # a cosine does not begin again


def test_cosine_at_a_quarter():
    config = OptimConfig(lr=1.0, schedule="cosine", warmup_ratio=0.0, final_lr_ratio=0.0)
    assert lr_at(250, 1000, config) == pytest.approx(0.5 + math.sqrt(2) / 4)


def test_no_warmup_and_no_decay_phase():
    none = OptimConfig(lr=1.0, schedule="cosine", warmup_ratio=0.0)
    assert lr_at(0, 10, none) == 1.0
    held = OptimConfig(lr=1.0, schedule="tri_stage", warmup_ratio=0.5, hold_ratio=0.5, final_lr_ratio=0.01)
    assert lr_at(5, 10, held) == 1.0 and lr_at(9, 10, held) == 1.0
    all_warmup = OptimConfig(lr=1.0, schedule="linear", warmup_ratio=1.0)
    assert lr_at(9, 10, all_warmup) == pytest.approx(0.9)


@pytest.mark.parametrize("schedule", ["tri_stage", "cosine", "linear", "constant"])
def test_a_pure_function_of_the_step(schedule: str):
    config = OptimConfig(lr=1.0, schedule=schedule, warmup_ratio=0.1, hold_ratio=0.3, final_lr_ratio=0.01)
    teacher = TeacherConfig()
    in_order = [(lr_at(s, 100, config), decay_at(s, 100, teacher)) for s in range(101)]
    steps = list(range(101))
    random.Random(0).shuffle(steps)
    assert {s: (lr_at(s, 100, config), decay_at(s, 100, teacher)) for s in steps} == dict(enumerate(in_order))
    lrs = [lr for lr, _ in in_order]
    peak = lrs.index(1.0)
    assert lrs[: peak + 1] == sorted(lrs[: peak + 1]) and lrs[peak:] == sorted(lrs[peak:], reverse=True)
