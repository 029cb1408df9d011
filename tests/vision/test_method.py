"""What only the official recipe of vision has, against numbers worked out by hand: two layer norms, a mean as the
loss, a teacher averaged as a whole at a constant decay."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d2v_core.config import RunConfig, load_config
from d2v_core.contract import Masks
from d2v_core.data2vec import Data2Vec
from d2v_core.loss import RegressionLoss
from d2v_core.run import build_model
from d2v_core.schedules import decay_at, lr_at
from d2v_core.targets import TopKTargets
from d2v_core.transformer import TransformerOutput
from d2v_vision.modality import VisionModality

SMALL = ("data.image_size=32", "features.patch_size=8", "mask.num_patches=8", "mask.min_block=2", "model.embed_dim=16",
         "model.num_layers=3", "model.num_heads=2", "target.top_k_layers=2", "model.layer_scale=0.5")  # fmt: skip


def small(*words: str) -> tuple[RunConfig, Data2Vec]:
    torch.set_num_threads(1)
    config, _ = load_config(["modality=vision", "preset=base", *SMALL, *words], lambda name: VisionModality)
    return config, build_model(VisionModality(config))


def test_targets_are_normalised_per_layer_and_again_after_the_mean() -> None:
    """Two layers (1, 3), (0, 8): each becomes (-1, 1) whatever its size, and so does their mean."""
    config, _ = small()
    cls = torch.full((1, 1, 4), 99.0)

    def layer(*values: float) -> torch.Tensor:
        return torch.cat([cls, torch.tensor(values).view(1, 1, 4)], 1)

    blocks = [cls.expand(1, 2, 4), layer(1.0, 3.0, 1.0, 3.0), layer(0.0, 0.0, 8.0, 8.0)]
    target = TopKTargets(config.target)(TransformerOutput(blocks[-1], [], blocks), None, num_extra=1)
    # Normalised layers: (-1, 1, -1, 1) and (-1, -1, 1, 1); mean (-1, 0, 0, 1); variance 1/2, so times sqrt 2.
    torch.testing.assert_close(target, torch.tensor([[[-(2**0.5), 0.0, 0.0, 2**0.5]]]), atol=1e-4, rtol=0)


def test_the_loss_is_a_mean_over_masked_patches_and_channels() -> None:
    """Smooth L1 at beta 2: 1 -> 0.25, 2 -> 1, 3 -> 2."""
    config, _ = small()
    prediction, target = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.zeros(2, 2)
    loss = RegressionLoss(config.loss)(prediction, target) / 2  # the core divides by the number of scored patches
    assert loss.item() == pytest.approx((0.25 + 1 + 2 + 0) / 4)


def test_the_whole_model_is_averaged_and_integers_are_copied() -> None:
    config, model = small()
    assert {decay_at(step, config.train.max_steps, config.teacher) for step in (0, 1, 1000, 500_000)} == {0.9998}
    teacher = dict(model.teacher.module.named_parameters())
    student = dict(model.student.named_parameters())
    assert teacher.keys() == student.keys()
    assert all(teacher[name] is not student[name] for name in student)
    before = {name: p.clone() for name, p in teacher.items()}
    index = model.teacher.module.get_buffer("encoder.positions.index").clone()
    with torch.no_grad():
        for p in model.student.parameters():
            p.add_(1.0)
    for _ in range(3):
        model.update_teacher(0.9998)
    for name, p in teacher.items():
        torch.testing.assert_close(p - before[name], torch.full_like(p, 1 - 0.9998**3), atol=1e-6, rtol=0)
    after = model.teacher.module.get_buffer("encoder.positions.index")
    assert after.dtype == torch.int64 and torch.equal(after, index)


def test_one_step_by_hand() -> None:
    """The whole forward pass spelled out with torch alone: teacher on the full image, student on the masked one."""
    _, model = small("model.attention_dropout=0", "model.drop_path=0")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.student.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for p in model.teacher.module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    image, hidden = torch.randn(2, 3, 32, 32), np.zeros((2, 16), dtype=bool)
    hidden[0, :5] = hidden[1, 9:12] = True
    out = model({"image": image}, Masks.of(hidden))

    def network(w: dict[str, torch.Tensor], mask: torch.Tensor | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        norm = torch.nn.functional.layer_norm
        x = torch.nn.functional.conv2d(image, w["encoder.embedding.conv.weight"], w["encoder.embedding.conv.bias"], 8)
        x = x.flatten(2).transpose(1, 2)
        if mask is not None:
            x = torch.where(mask[..., None], w["encoder.mask_token"], x)
        x = torch.cat([w["encoder.cls_token"].expand(2, 1, 16), x], 1)
        bias = torch.empty(2, 17, 17)
        for q in range(17):
            for k in range(17):
                if q and k:
                    (qy, qx), (ky, kx) = divmod(q - 1, 4), divmod(k - 1, 4)
                    row = (qy - ky + 3) * 7 + qx - kx + 3
                else:
                    row = 51 if q == k else 49 if q == 0 else 50
                bias[:, q, k] = w["encoder.positions.table"][row]
        layers = []
        for i in range(3):
            p = {n.removeprefix(f"transformer.blocks.{i}."): t for n, t in w.items()}
            y = norm(x, (16,), p["norm1.weight"], p["norm1.bias"], 1e-6) @ p["attention.qkv.weight"].T
            q, k, v = y.split(16, -1)
            q, v = q + p["attention.q_bias"], v + p["attention.v_bias"]
            heads = []
            for h in range(2):
                part = slice(8 * h, 8 * h + 8)
                logits = q[..., part] @ k[..., part].transpose(1, 2) * 8**-0.5 + bias[h]
                heads.append(logits.softmax(-1) @ v[..., part])
            y = torch.cat(heads, -1) @ p["attention.out.weight"].T + p["attention.out.bias"]
            x = x + p["gamma1"] * y
            y = norm(x, (16,), p["norm2.weight"], p["norm2.bias"], 1e-6) @ p["fc1.weight"].T + p["fc1.bias"]
            y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
            x = x + p["gamma2"] * (y @ p["fc2.weight"].T + p["fc2.bias"])
            layers.append(x)
        return norm(x, (16,), w["transformer.norm.weight"], w["transformer.norm.bias"], 1e-6), layers

    mask = torch.from_numpy(hidden)
    _, layers = network(dict(model.teacher.module.named_parameters()), None)
    mean = sum(torch.nn.functional.layer_norm(layer[:, 1:], (16,)) for layer in layers[1:]) / 2
    target = torch.nn.functional.layer_norm(mean, (16,))[mask]
    x, _ = network(dict(model.student.named_parameters()), mask)
    head = dict(model.predictor.named_parameters())
    prediction = x[:, 1:][mask] @ head["linear.weight"].T + head["linear.bias"]
    difference = (prediction - target).abs()
    loss = torch.where(difference < 2, difference**2 / 4, difference - 1).mean()
    torch.testing.assert_close(out.target, target, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(out.prediction, prediction, atol=2e-5, rtol=1e-4)
    assert (out.loss_sum / out.num_scored).item() == pytest.approx(loss.item(), rel=1e-5)


def test_learning_rates_of_the_official_commands() -> None:
    for preset, peak, warmup, steps in (("base", 2e-3, 6250, 500_000), ("large", 1e-3, 24_960, 249_600)):
        config, _ = load_config(["modality=vision", f"preset={preset}"], lambda name: VisionModality)
        assert config.train.max_steps == steps
        assert lr_at(0, steps, config.optim) == 0
        assert lr_at(warmup, steps, config.optim) == pytest.approx(peak)
        assert lr_at(steps, steps, config.optim) == pytest.approx(1e-5)
        assert lr_at((warmup + steps) // 2, steps, config.optim) == pytest.approx((peak + 1e-5) / 2, rel=1e-4)
