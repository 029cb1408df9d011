"""Targets: which axis each norm runs over, in which order, and that padding stays out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from d2v_core.config import TargetConfig
from d2v_core.targets import TopKTargets
from d2v_core.transformer import TransformerOutput

B, T, D = 3, 11, 5


def layers(count: int = 1) -> list[torch.Tensor]:
    """Different mean and scale in every sample, token and channel, so that no two norms agree."""
    scale = torch.rand(B, 1, 1) + 0.5, torch.rand(1, T, 1) + 0.5, torch.rand(1, 1, D) + 0.5
    return [torch.randn(B, T, D) * scale[0] * scale[1] * scale[2] + torch.randn(B, T, 1) + i for i in range(count)]


def targets(**config) -> TopKTargets:
    return TopKTargets(TargetConfig(top_k_layers=1, **config))


def test_instance_norm_runs_over_time():
    (x,) = layers()
    y = targets(layer_norms=["instance"]).build([x], None)
    torch.testing.assert_close(y, F.instance_norm(x.transpose(1, 2)).transpose(1, 2))
    torch.testing.assert_close(y.mean(1), torch.zeros(B, D), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(1, correction=0), torch.ones(B, D), atol=1e-3, rtol=0)
    assert y.mean(2).abs().max() > 0.1  # not standardised over channels


def test_layer_norm_runs_over_channels():
    (x,) = layers()
    y = targets(layer_norms=["layer"]).build([x], None)
    torch.testing.assert_close(y, F.layer_norm(x, (D,)))
    torch.testing.assert_close(y.mean(2), torch.zeros(B, T), atol=1e-5, rtol=0)
    assert y.mean(1).abs().max() > 0.1


def test_batch_and_group_norm():
    (x,) = layers()
    y = targets(layer_norms=["batch"]).build([x], None)
    torch.testing.assert_close(y, F.batch_norm(x.flatten(0, 1), None, None, training=True).view(B, T, D))
    y = targets(layer_norms=["group"]).build([x], None)
    torch.testing.assert_close(y, F.layer_norm(x, (T, D)))


def test_by_hand():
    x = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])  # over time: mean 2, variance 1; the second channel is constant
    y = targets(layer_norms=["instance"]).build([x], None)
    one = 1 / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(y, torch.tensor([[[-one, 0.0], [one, 0.0]]]))
    y = targets(layer_norms=["layer"]).build([x], None)  # over channels: variances 1/4 and 9/4
    first, second = 0.5 / (0.25 + 1e-5) ** 0.5, 1.5 / (2.25 + 1e-5) ** 0.5
    torch.testing.assert_close(y, torch.tensor([[[first, -first], [second, -second]]]))


def test_each_layer_is_normalised_before_the_mean_and_the_mean_again_where_asked():
    a, b = layers(2)
    b = 100 * b  # the order matters most where layers differ in scale

    def instance(x):
        return F.instance_norm(x.transpose(1, 2)).transpose(1, 2)

    wanted = (instance(a) + instance(b)) / 2
    build = TopKTargets(TargetConfig(top_k_layers=2, layer_norms=["instance"])).build
    torch.testing.assert_close(build([a, b], None), wanted)
    assert not torch.allclose(wanted, instance((a + b) / 2), atol=0.1)
    again = TopKTargets(TargetConfig(top_k_layers=2, layer_norms=["instance"], mean_norms=["layer"])).build
    torch.testing.assert_close(again([a, b], None), F.layer_norm(wanted, (D,)))


def test_norms_of_a_layer_are_applied_in_the_order_given():
    (x,) = layers()
    y = targets(layer_norms=["layer", "instance"]).build([x], None)
    torch.testing.assert_close(y, F.instance_norm(F.layer_norm(x, (D,)).transpose(1, 2)).transpose(1, 2))


def test_without_norms_the_target_is_the_plain_mean_of_the_last_k_taps():
    taps, blocks = layers(4), layers(4)
    output = TransformerOutput(taps[0], taps, blocks)
    ffn = TopKTargets(TargetConfig(top_k_layers=3))
    torch.testing.assert_close(ffn(output, None), (taps[1] + taps[2] + taps[3]) / 3)
    block = TopKTargets(TargetConfig(top_k_layers=2, tap="block"))
    torch.testing.assert_close(block(output, None), (blocks[2] + blocks[3]) / 2)


def test_extra_tokens_are_cut_off_before_the_statistics():
    (x,) = layers()
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0, 7:] = True
    build = targets(layer_norms=["instance"])
    with_extra = torch.cat([torch.full((B, 2, D), 1e6), x], 1)
    got = build(TransformerOutput(x, [with_extra], []), F.pad(padding, (2, 0)), num_extra=2)
    assert got.shape == (B, T, D)
    torch.testing.assert_close(got, build.build([x], padding))


@pytest.mark.parametrize("norm", ["instance", "layer", "batch", "group"])
def test_padding_has_no_influence_on_valid_tokens(norm: str):
    (x,) = layers()
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0, 4:], padding[1, 8:] = True, True
    build = targets(layer_norms=[norm], mean_norms=[norm]).build
    y = build([x], padding)
    moved = build([torch.where(padding[..., None], 1e3 * torch.randn(B, T, D), x)], padding)
    torch.testing.assert_close(y[~padding], moved[~padding])
    if norm != "batch":  # each sample alone, without its padding, by another code path
        for row in range(B):
            valid = x[row : row + 1, ~padding[row]]
            torch.testing.assert_close(y[row, ~padding[row]], build([valid], None)[0])
    else:
        flat = F.batch_norm(x[~padding], None, None, training=True)
        torch.testing.assert_close(y[~padding], F.batch_norm(flat, None, None, training=True))


@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
def test_padding_in_stats_lets_it_in(norm: str):
    (x,) = layers()
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0, 4:] = True
    kept = targets(layer_norms=[norm], padding_in_stats=True).build
    torch.testing.assert_close(kept([x], padding), kept([x], None))
    moved = torch.where(padding[..., None], x + 10, x)
    assert not torch.allclose(kept([x], padding)[0, :4], kept([moved], padding)[0, :4], atol=0.1)


def test_official_axes():
    """fairseq's own expressions, on its (T, B, D) tensors without and its (B, D, T) tensors with an instance norm."""
    a, b = layers(2)
    config = dict(top_k_layers=2, official_axes=True)
    tbd = [F.layer_norm(x.transpose(0, 1), (B, D)) for x in (a, b)]
    wanted = ((tbd[0] + tbd[1]) / 2).transpose(0, 1)
    torch.testing.assert_close(TopKTargets(TargetConfig(layer_norms=["group"], **config)).build([a, b], None), wanted)
    mean = ((a + b) / 2).transpose(0, 1)  # (T, B, D); instance_norm then takes (T, D, B) and runs over samples
    wanted = F.instance_norm(mean.transpose(1, 2)).transpose(1, 2).transpose(0, 1)
    torch.testing.assert_close(TopKTargets(TargetConfig(mean_norms=["instance"], **config)).build([a, b], None), wanted)
    # After an instance norm of the layers fairseq has transposed back, and the axes are the ones meant.
    both = dict(layer_norms=["instance", "group"], mean_norms=["instance"], top_k_layers=2)
    torch.testing.assert_close(
        TopKTargets(TargetConfig(official_axes=True, **both)).build([a, b], None),
        TopKTargets(TargetConfig(**both)).build([a, b], None),
    )


def test_result_is_float32_without_gradient_also_under_autocast():
    x = torch.randn(B, T, D, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = targets(layer_norms=["instance"]).build([x.bfloat16()], None)
    assert y.dtype == torch.float32 and not y.requires_grad
    torch.testing.assert_close(y, F.instance_norm(x.detach().bfloat16().float().transpose(1, 2)).transpose(1, 2))


def test_errors_name_both_numbers():
    with pytest.raises(ValueError, match=r"target.top_k_layers=0 must be at least 1"):
        TopKTargets(TargetConfig(top_k_layers=0))
    taps = layers(2)
    with pytest.raises(ValueError, match=r"target.top_k_layers=3, but the teacher gave 2 layers"):
        TopKTargets(TargetConfig(top_k_layers=3))(TransformerOutput(taps[0], taps, taps), None)
