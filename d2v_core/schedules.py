"""Learning rate and teacher decay as pure functions of the number of completed updates."""

from __future__ import annotations

import math

from d2v_core.config import OptimConfig, TeacherConfig


def lr_at(step: int, max_steps: int, config: OptimConfig) -> float:
    """Learning rate of the update that follows `step` completed ones.

    tri_stage: linear from initial_lr_ratio * lr, hold, then exponential to final_lr_ratio * lr
        (fairseq/optim/lr_scheduler/tri_stage_lr_scheduler.py).
    cosine: linear from 0, then half a cosine to final_lr_ratio * lr. linear: the same with a straight line.
    constant: warm-up, then lr.
    """
    warmup = round(config.warmup_ratio * max_steps)
    peak = config.lr
    if config.schedule == "tri_stage":
        if step < warmup:
            first = config.initial_lr_ratio * peak
            return first + (peak - first) * step / warmup
        hold_end = warmup + round(config.hold_ratio * max_steps)
        if step < hold_end or config.final_lr_ratio == 1.0:
            return peak
        done = min((step - hold_end) / max(max_steps - hold_end, 1), 1.0)
        return peak * math.exp(math.log(config.final_lr_ratio) * done)
    if step < warmup:
        return peak * step / warmup
    done = min((step - warmup) / max(max_steps - warmup, 1), 1.0)
    last = config.final_lr_ratio * peak
    if config.schedule == "cosine":
        return last + (peak - last) * 0.5 * (1.0 + math.cos(math.pi * done))
    if config.schedule == "linear":
        return last + (peak - last) * (1.0 - done)
    return peak


def decay_at(step: int, max_steps: int, config: TeacherConfig) -> float:
    """Teacher decay in force after `step` completed updates: linear from ema_decay to ema_end_decay, then constant.

    The EMA step that follows update number n uses decay_at(n) (fairseq: examples/data2vec/models, `set_num_updates`).
    """
    anneal = max_steps if config.ema_anneal_steps is None else config.ema_anneal_steps
    if step >= anneal:
        return config.ema_end_decay
    return config.ema_end_decay - (config.ema_end_decay - config.ema_decay) * (1.0 - step / anneal)
