"""The method on the toy modality: who gets gradients, which places are scored, and what is computed once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from d2v_core.contract import Batch, Masks, Tokens
from d2v_core.data2vec import Data2Vec, channel_std
from d2v_core.loss import RegressionLoss
from d2v_core.run import build_model
from d2v_core.schedules import decay_at
from d2v_core.targets import TopKTargets
from d2v_core.trainer import Updater

T = 12


def inputs_of(num: int, padded: bool = False) -> dict[str, torch.Tensor]:
    inputs = {"x": torch.randn(num, T, 4)}
    return inputs | {"sizes": torch.tensor([T - 3 * (i % 2) for i in range(num)])} if padded else inputs


def masks_of(num: int, copies: int = 1, prob: float = 0.4, last: int = T) -> Masks:
    hidden = torch.rand(num, copies, T) < prob
    hidden[:, :, 0], hidden[:, :, last - 3 :] = True, False
    return Masks.of(hidden)


def own(model: Data2Vec) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.teacher.own_state().items()}


@pytest.mark.parametrize("encoder", ["shared", "own"])
def test_gradient_reaches_the_student_and_never_the_teacher(make, encoder: str):
    model = build_model(make(f"encoder={encoder}")).train()
    out = model(inputs_of(3), masks_of(3))
    assert not out.target.requires_grad and out.prediction.requires_grad
    out.loss_sum.backward()
    student = {id(p) for p in model.student.parameters()}
    for name, parameter in model.teacher.named_parameters():
        assert id(parameter) in student or (parameter.grad is None and not parameter.requires_grad), name
    for name, parameter in [*model.student.named_parameters(), *model.predictor.named_parameters()]:
        if parameter.numel():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == student | {id(p) for p in model.predictor.parameters()}


def test_the_shared_embedding_gets_gradient_through_the_student_alone(make):
    """Against a model whose target is a constant."""
    model = build_model(make("model.dropout=0", "model.attention_dropout=0"))
    inputs, masks = inputs_of(3), masks_of(3)
    out = model(inputs, masks)
    out.loss_sum.backward()
    got = model.student.encoder.embedding.weight.grad.clone()
    model.zero_grad()
    _, encoded = model.student(model.student.encoder.embed(inputs), masks)
    prediction = model.predictor(Tokens(encoded.x, None, (T,)), masks)
    model.loss(prediction, out.target.clone()).backward()
    torch.testing.assert_close(model.student.encoder.embedding.weight.grad, got)


def test_teacher_is_deterministic_while_the_student_drops_out(make):
    model = build_model(make("model.dropout=0.5", "model.layer_drop=0.3")).train()
    inputs, masks = inputs_of(3), masks_of(3)
    a, b = model(inputs, masks), model(inputs, masks)
    assert torch.equal(a.target, b.target)
    assert not torch.equal(a.prediction, b.prediction)
    assert model.student.training and model.student.transformer.blocks[0].training


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_targets_and_predictions_at_scored_places_in_order(make, copies: int, extra: int, padded: bool):
    """Against a loop over samples, copies and places; the teacher sees each sample whole, alone and unmasked."""
    model = build_model(make(f"data.extra_tokens={extra}")).eval()
    inputs = inputs_of(3, padded)
    masks = masks_of(3, copies, last=T - 3 if padded else T)
    out = model(inputs, masks)
    targets, predictions = [], []
    for b in range(3):
        size = int(inputs["sizes"][b]) if padded else T
        sample = {"x": inputs["x"][b : b + 1, :size]}
        for m in range(copies):
            teacher = model.teacher.module
            _, encoded = teacher(teacher.encoder.embed(sample), None, taps=True)
            layers = [f[:, extra:] for f in encoded.ffn]
            target = model.targets.build(layers, None)[0]
            mask = Masks.of(masks.hidden[b : b + 1, m : m + 1, :size])
            _, seen = model.student(model.student.encoder.embed(sample), mask)
            for t in range(size):
                if masks.scored[b, m, t]:
                    targets.append(target[t])
                    predictions.append(model.predictor.linear(seen.x[0, extra + t]))
    assert len(targets) == out.num_scored == int(masks.scored.sum())
    torch.testing.assert_close(out.target, torch.stack(targets), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.prediction, torch.stack(predictions), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.loss_sum, RegressionLoss(make().config.loss)(out.prediction, out.target))


def test_scored_may_differ_from_hidden(make):
    model = build_model(make()).eval()
    inputs, hidden = inputs_of(2), torch.zeros(2, 1, T, dtype=torch.bool)
    hidden[:, :, 2:5] = True
    scored = torch.zeros_like(hidden)
    scored[:, :, 7] = True
    out = model(inputs, Masks.of(hidden, scored))
    assert out.num_scored == 2
    everywhere = model(inputs, Masks.of(hidden, torch.ones_like(hidden)))
    torch.testing.assert_close(out.target, everywhere.target.view(2, T, -1)[:, 7])
    torch.testing.assert_close(out.prediction, everywhere.prediction.view(2, T, -1)[:, 7])


def test_hidden_content_has_no_influence_on_predictions_and_all_on_targets(make):
    model = build_model(make()).eval()
    inputs, masks = inputs_of(2), masks_of(2)
    changed = {"x": torch.where(masks.hidden[:, 0, :, None], torch.randn(2, T, 4), inputs["x"])}
    a, b = model(inputs, masks), model(changed, masks)
    assert torch.equal(a.prediction, b.prediction)
    assert not torch.allclose(a.target, b.target, atol=0.1)


@pytest.mark.parametrize(("encoder", "calls"), [("shared", 1), ("own", 2)])
def test_a_shared_embedding_runs_once(make, monkeypatch: pytest.MonkeyPatch, encoder: str, calls: int):
    model = build_model(make(f"encoder={encoder}"))
    kind, count = type(model.student.encoder), []
    embed = kind.embed
    monkeypatch.setattr(kind, "embed", lambda self, inputs: (count.append(self), embed(self, inputs))[1])
    model(inputs_of(2), masks_of(2))
    assert len(count) == calls
    assert count[0] is model.student.encoder and (calls == 1 or count[1] is model.teacher.module.encoder)


@pytest.mark.parametrize("encoder", ["shared", "own"])
def test_the_teacher_can_have_an_input_of_its_own(make, encoder: str):
    model = build_model(make(f"encoder={encoder}")).eval()
    inputs, other, masks = inputs_of(2), inputs_of(2), masks_of(2)
    out = model(inputs, masks, other)
    torch.testing.assert_close(out.target, model(other, masks).target)
    torch.testing.assert_close(out.prediction, model(inputs, masks).prediction)


def test_statistics_against_numpy(make):
    x = torch.randn(50, 6) * torch.arange(1, 7)
    wanted = np.sqrt(x.double().numpy().var(0, ddof=1) + 1e-6).mean()
    assert channel_std(x).item() == pytest.approx(wanted, rel=1e-5)
    assert channel_std(x[:1]).item() == 0.0 and channel_std(x[:0]).item() == 0.0
    assert channel_std(torch.ones(9, 3)).item() == pytest.approx(1e-3)
    out = build_model(make())(inputs_of(3), masks_of(3))
    assert torch.equal(out.target_std, channel_std(out.target)) and not out.prediction_std.requires_grad


def test_step_by_hand_in_plain_torch(make):
    """The page against itself taken apart: embed, mask, encode, project; teacher; mean of taps; squared error."""
    modality = make()
    model = build_model(modality).eval()
    inputs, masks = inputs_of(2), masks_of(2)
    encoder, D = model.student.encoder, 16
    content = inputs["x"] @ encoder.embedding.weight.T + encoder.embedding.bias
    hidden = masks.hidden[:, 0, :, None]
    seen = torch.where(hidden, encoder.mask_embedding, content) + encoder.places[:T]
    prediction = model.student.transformer(seen).x[hidden[..., 0]] @ model.predictor.linear.weight.T
    taps = model.teacher.module.transformer(content + encoder.places[:T], taps=True).ffn
    target = sum(
        (tap - tap.mean(1, keepdim=True)) / (tap.var(1, correction=0, keepdim=True) + 1e-5).sqrt() for tap in taps
    )
    target = (target / 2)[hidden[..., 0]]
    error = (prediction + model.predictor.linear.bias - target).square().sum() / D**0.5
    torch.testing.assert_close(model(inputs, masks).loss_sum, error, atol=1e-3, rtol=1e-4)


def batch_of(inputs: dict, masks: Masks) -> Batch:
    return Batch(inputs, masks)


def part(inputs: dict, masks: Masks, rows: slice) -> Batch:
    return Batch({k: v[rows] for k, v in inputs.items()}, Masks.of(masks.hidden[rows]))


def updater_of(make: Callable[..., Any], *words: str) -> Updater:
    modality = make("model.dropout=0", "model.attention_dropout=0", "optim.warmup_ratio=0", *words)
    return Updater(build_model(modality), modality.config, torch.device("cpu"))


def test_accumulation_over_unequal_micro_batches_is_the_mean_over_all_scored_tokens(make):
    inputs = inputs_of(4)
    hidden = torch.zeros(4, 1, T, dtype=torch.bool)
    hidden[0, :, :1], hidden[1, :, :2], hidden[2, :, :9], hidden[3, :, 3:11] = True, True, True, True
    masks = Masks.of(hidden)  # 3 scored tokens in the first half, 17 in the second
    wanted = copy.deepcopy(updater_of(make).model)
    out = wanted(inputs, masks)
    (out.loss_sum / out.num_scored).backward()
    gradients = {name: p.grad for name, p in wanted.named_parameters() if p.grad is not None}
    results = []
    for batches in (
        [batch_of(inputs, masks)],
        [part(inputs, masks, slice(0, 2)), part(inputs, masks, slice(2, 4))],
        [part(inputs, masks, slice(2, 4)), part(inputs, masks, slice(0, 2))],
        [part(inputs, masks, slice(i, i + 1)) for i in range(4)],
    ):
        updater = updater_of(make, "optim.eps=0.01")  # AdamW's first step would else make rounding as large as lr
        result = updater.update(0, batches, lambda batch: None)
        assert result.loss.item() == pytest.approx(out.loss_sum.item() / 20, rel=1e-5)
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        assert result.grad_norm.item() == pytest.approx(norm.item(), rel=1e-4)
        for name, p in updater.model.named_parameters():
            if name in gradients:
                torch.testing.assert_close(p.grad, gradients[name], atol=1e-6, rtol=1e-4)
        results.append(updater.model)
    for other in results[1:]:
        for a, b in zip(results[0].parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("num_micro", [1, 2, 4])
def test_the_teacher_moves_once_per_update_after_the_optimizer(make, num_micro: int):
    updater = updater_of(make, "teacher.ema_decay=0.5", "teacher.ema_end_decay=0.9", "teacher.ema_anneal_steps=10")
    inputs, masks = inputs_of(4), masks_of(4)
    size = 4 // num_micro
    batches = [part(inputs, masks, slice(i, i + size)) for i in range(0, 4, size)]
    for step in range(3):
        before = own(updater.model)
        updater.update(step, batches, lambda batch: None)
        decay = 0.5 + 0.04 * (step + 1)
        assert decay == pytest.approx(decay_at(step + 1, 6, updater.config.teacher))
        student = dict(updater.model.student.named_parameters())
        moved = 0.0
        for name, tensor in own(updater.model).items():
            wanted = decay * before[name] + (1 - decay) * student[name].detach()
            torch.testing.assert_close(tensor, wanted, atol=1e-6, rtol=1e-5)
            moved += (tensor - before[name]).abs().sum().item()
        assert moved > 0


def test_clipping_acts_on_the_mean_gradient(make):
    inputs, masks = inputs_of(4), masks_of(4)
    limit = 1e-3
    updater = updater_of(make, f"optim.clip_grad_norm={limit}")
    result = updater.update(0, [part(inputs, masks, slice(0, 1)), part(inputs, masks, slice(1, 4))], lambda b: None)
    norm = torch.cat([p.grad.flatten() for p in updater.parameters if p.grad is not None]).norm().item()
    assert result.grad_norm.item() > 10 * limit and norm == pytest.approx(limit, rel=1e-3)


def test_first_weights_depend_on_the_seed_alone(make):
    torch.manual_seed(1)
    a = build_model(make("seed=3"))
    state = torch.get_rng_state()
    b, c = build_model(make("seed=3", "train.max_steps=99")), build_model(make("seed=4"))
    assert torch.equal(torch.get_rng_state(), state)  # and building draws nothing from the global stream
    for (name, p), q, r in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.dim() < 2 or not p.numel() or not torch.equal(p, r), name


def test_teacher_starts_as_the_student(make):
    model = build_model(make("encoder=own")).eval()
    for (name, a), b in zip(model.student.named_parameters(), model.teacher.module.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_targets_can_be_assembled_by_hand(make):
    config = make("target.tap=block", "target.top_k_layers=1", "target.layer_norms=[]").config
    model = build_model(make("target.tap=block", "target.top_k_layers=1", "target.layer_norms=[]")).eval()
    assert isinstance(model.targets, TopKTargets) and config.target.tap == "block"
    inputs = inputs_of(2)
    everywhere = Masks.of(torch.ones(2, 1, T, dtype=torch.bool))
    teacher = model.teacher.module
    _, out = teacher(teacher.encoder.embed(inputs), None, taps=True)
    torch.testing.assert_close(model(inputs, everywhere).target.view(2, T, -1), out.blocks[-1])
