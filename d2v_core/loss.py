"""The regression loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from d2v_core.config import LossConfig


class RegressionLoss:
    """Squared error, or smooth L1 with threshold `beta`, summed over channels and scored tokens, times a scale.

    `of_rows` is the loss of the token in front (data2vec 2.0's CLS loss). The official code sums it over the rows of a
    worker, so that its weight depends on how a batch is dealt out; here it is their mean unless `sum_rows` is set.

    The caller divides by the number of scored tokens of the whole optimizer step. fairseq scales by 1/sqrt(D)
    (examples/data2vec/models, `loss_scale`), so this is sqrt(D) times the mean over channels.
    """

    def __init__(self, config: LossConfig, sum_rows: bool = False) -> None:
        if config.beta < 0:
            raise ValueError(f"loss.beta={config.beta} must be 0 (squared error) or positive (smooth L1)")
        self.beta, self.scale, self.cls_weight = config.beta, config.scale, config.cls_weight
        self.sum_rows = sum_rows

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """prediction, target (N, D) -> () float32."""
        if prediction.shape != target.shape:
            raise ValueError(f"prediction has shape {tuple(prediction.shape)}, target has {tuple(target.shape)}")
        dim = prediction.shape[-1]
        scale = {"inverse_sqrt": 1 / math.sqrt(dim), "mean": 1 / dim, "sum": 1.0}.get(self.scale)
        scale = float(self.scale) if scale is None else scale
        with torch.autocast(prediction.device.type, enabled=False):
            prediction, target = prediction.float(), target.float()
            if self.beta == 0:
                loss = F.mse_loss(prediction, target, reduction="sum")
            else:
                loss = F.smooth_l1_loss(prediction, target, beta=self.beta, reduction="sum")
            return loss * scale

    def of_rows(self, prediction: Tensor, target: Tensor, num_scored: int) -> Tensor:
        """prediction, target (R, D), one token of each row -> () float32, to be added to the sum over the num_scored
        scored tokens, by whose number the caller will divide."""
        total = self(prediction, target) * (self.cls_weight * num_scored)
        return total if self.sum_rows else total / len(prediction)
