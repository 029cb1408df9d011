"""AdamW by hand, fairseq's eps, which parameters decay, and that a run's learning rate reaches its weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from d2v_core.config import OptimConfig
from d2v_core.contract import Batch, Masks
from d2v_core.optim import make_optimizer, set_step
from d2v_core.run import build_model
from d2v_core.schedules import lr_at
from d2v_core.trainer import Updater

LR, B1, B2, EPS, WD = 0.01, 0.9, 0.98, 1e-3, 0.1
GRADIENTS = (3.0, -1.0, 0.5)


def by_hand(official_eps: bool, decay: float) -> float:
    """Decoupled weight decay; fairseq adds eps before the bias correction of the second moment, torch after it."""
    p, m, v = 1.0, 0.0, 0.0
    for t, g in enumerate(GRADIENTS, 1):
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
        p -= LR * decay * p
        if official_eps:
            step = LR * math.sqrt(1 - B2**t) / (1 - B1**t)
            p -= step * m / (math.sqrt(v) + EPS)
        else:
            p -= LR * (m / (1 - B1**t)) / (math.sqrt(v / (1 - B2**t)) + EPS)
    return p


@pytest.mark.parametrize("official_eps", [False, True])
@pytest.mark.parametrize("decay", [0.0, WD])
def test_three_steps_by_hand(official_eps: bool, decay: float):
    layer = nn.Linear(1, 1, bias=False).double()
    layer.weight.data.fill_(1.0)
    config = OptimConfig(lr=LR, betas=[B1, B2], eps=EPS, weight_decay=decay, official_eps=official_eps)
    optimizer = make_optimizer(layer, config)
    for step, gradient in enumerate(GRADIENTS):
        set_step(optimizer, LR, step, config)
        layer.weight.grad = torch.full((1, 1), gradient, dtype=torch.float64)
        optimizer.step()
    assert layer.weight.item() == pytest.approx(by_hand(official_eps, decay), rel=1e-9)
    assert by_hand(True, decay) != pytest.approx(by_hand(False, decay), rel=1e-5)  # the two can be told apart


@pytest.mark.parametrize("decay_all", [True, False])
def test_which_parameters_decay(decay_all: bool):
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    frozen = net[0].bias.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    config = OptimConfig(lr=LR, weight_decay=WD, decay_all=decay_all)
    optimizer = make_optimizer(net, config)
    set_step(optimizer, LR, 0, config)
    for p in net.parameters():
        p.grad = None if p is frozen else torch.zeros_like(p)
    optimizer.step()
    shrunk = {"0.weight", "1.weight"} if decay_all else {"0.weight"}  # the norm's bias is 0 and stays so
    for name, p in net.named_parameters():
        factor = 1 - LR * WD if name in shrunk else 1.0
        torch.testing.assert_close(p.detach(), factor * before[name])
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in net.parameters() if p.requires_grad
    }


def test_the_schedule_reaches_the_weights(make):
    """Adam's first step is lr times the gradient's sign, whatever the gradient: its size shows the learning rate."""
    words = ("model.dropout=0", "model.attention_dropout=0", "optim.eps=1e-12", "optim.weight_decay=0", "optim.lr=0.01")
    for step in (0, 3, 30, 60, 99):
        modality = make(*words, "train.max_steps=100")
        updater = Updater(build_model(modality), modality.config, torch.device("cpu"))
        weight = updater.model.predictor.get_parameter("linear.bias")
        before = weight.detach().clone()
        hidden = torch.zeros(2, 1, 12, dtype=torch.bool)
        hidden[:, :, 3:6] = True
        updater.update(step, [Batch({"x": torch.randn(2, 12, 4)}, Masks.of(hidden))], lambda batch: None)
        moved = (weight.detach() - before).abs()
        lr = lr_at(step, 100, modality.config.optim)
        torch.testing.assert_close(moved, torch.full_like(moved, lr), rtol=1e-3, atol=1e-7)
        assert (lr == 0) == (step == 0)
