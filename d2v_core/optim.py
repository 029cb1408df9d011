"""AdamW as the recipes want it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import nn

from d2v_core.config import OptimConfig


class Named(Protocol):
    """A module, or what stands for one."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters, as a module gives them."""
        ...


def make_optimizer(
    model: Named, config: OptimConfig, scale_of: Callable[[str], float] | None = None
) -> torch.optim.AdamW:
    """AdamW over the parameters that require gradients.

    One group, or matrices and the rest where only those decay; with scale_of, one of each for every factor of the
    learning rate that it gives a parameter's name. fused: one kernel over all parameters, five times as fast on a CPU
    as a loop over 223 tensors.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = config.decay_all or parameter.dim() > 1
            groups.setdefault((decayed, 1.0 if scale_of is None else scale_of(name)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": config.weight_decay if decayed else 0.0, "scale": scale}
            for (decayed, scale), parameters in groups.items()
            if parameters or len(groups) == 1
        ],
        lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True,
    )  # fmt: skip


def set_step(optimizer: torch.optim.Optimizer, lr: float, step: int, config: OptimConfig) -> None:
    """Learning rate (and eps) of the update that follows `step` completed ones.

    fairseq's Adam divides by sqrt(v) + eps before correcting the bias of v; torch's divides by sqrt(v_hat) + eps. They
    agree when torch's eps is eps / sqrt(1 - beta2^t) (fairseq: fairseq/optim/adam.py).
    """
    eps = config.eps / math.sqrt(1.0 - config.betas[1] ** (step + 1)) if config.official_eps else config.eps
    for group in optimizer.param_groups:
        group["lr"], group["eps"] = lr * group.get("scale", 1.0), eps
