"""The regression loss against torch and against arithmetic by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from d2v_core.config import LossConfig
from d2v_core.loss import RegressionLoss


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
def test_against_torch(beta: float):
    prediction, target = torch.randn(7, 16) * 3, torch.randn(7, 16)
    got = RegressionLoss(LossConfig(beta=beta, scale="mean"))(prediction, target)
    per_row = (F.mse_loss if beta == 0 else lambda a, b: F.smooth_l1_loss(a, b, beta=beta))(prediction, target)
    torch.testing.assert_close(got, 7 * per_row)


@pytest.mark.parametrize(("d", "squared", "smooth"), [(1.0, 1.0, 0.25), (2.0, 4.0, 1.0), (3.0, 9.0, 2.0)])
def test_values_by_hand(d: float, squared: float, smooth: float):
    prediction, target = torch.tensor([[5.0 + d]]), torch.tensor([[5.0]])
    assert RegressionLoss(LossConfig(beta=0.0, scale="sum"))(prediction, target).item() == squared  # not half of it
    assert RegressionLoss(LossConfig(beta=2.0, scale="sum"))(prediction, target).item() == smooth


@pytest.mark.parametrize(("scale", "factor"), [("inverse_sqrt", 0.25), ("mean", 0.0625), ("sum", 1.0), ("0.3", 0.3)])
def test_scales(scale: str, factor: float):
    loss = RegressionLoss(LossConfig(scale=scale))(torch.ones(5, 16), torch.zeros(5, 16))
    torch.testing.assert_close(loss, torch.tensor(5 * 16 * factor))


def test_float32_under_autocast_and_for_half_inputs():
    target = torch.full((1, 4096), 1000.0)
    prediction = target + 1.0  # bfloat16 cannot tell the two apart
    with torch.autocast("cpu", torch.bfloat16):
        loss = RegressionLoss(LossConfig(scale="sum"))(prediction, target)
    assert loss.dtype == torch.float32 and loss.item() == 4096.0
    half = RegressionLoss(LossConfig(scale="sum"))(torch.full((1, 2), 300.0).half(), torch.zeros(1, 2).half())
    assert half.dtype == torch.float32 and half.item() == 180_000.0  # overflows in float16


def test_gradient():
    prediction = torch.tensor([[3.0, -1.0]], requires_grad=True)
    RegressionLoss(LossConfig(scale="sum"))(prediction, torch.zeros(1, 2)).backward()
    assert prediction.grad.tolist() == [[6.0, -2.0]]


def test_nothing_scored_is_zero():
    assert RegressionLoss(LossConfig())(torch.zeros(0, 4), torch.zeros(0, 4)).item() == 0.0


def test_errors():
    with pytest.raises(ValueError, match=r"loss.beta=-1"):
        RegressionLoss(LossConfig(beta=-1))
    with pytest.raises(ValueError, match=r"prediction has shape \(2, 3\), target has \(1, 3\)"):
        RegressionLoss(LossConfig())(torch.zeros(2, 3), torch.zeros(1, 3))
