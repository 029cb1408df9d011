"""Parts of data2vec 2.0: gathering, ALiBi, prenet blocks, the convolutional decoder, the loss of the token in front."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2v_core.config import CORE_SECTIONS, LossConfig, ModelConfig, TargetConfig, load_config
from d2v_core.contract import FeatureEncoder, Masks, Tokens
from d2v_core.data2vec import Data2Vec
from d2v_core.decoder import ConvDecoder, DecoderConfig
from d2v_core.errors import UserError
from d2v_core.loss import RegressionLoss
from d2v_core.masking import BlockMaskingConfig
from d2v_core.targets import TopKTargets
from d2v_core.transformer import Transformer
from d2v_core.visible import (
    Alibi,
    AlibiConfig,
    Prenet,
    PrenetConfig,
    alibi_slopes,
    take_visible,
    take_visible_padding,
)

D = 16
MODEL = ModelConfig(embed_dim=D, num_heads=4, num_layers=2)


def masks_of(*hidden: str) -> Masks:
    """One string for each sample, its copies apart by a blank: x = hidden."""
    rows = np.array([[[c == "x" for c in copy] for copy in sample.split()] for sample in hidden])
    return Masks.of(rows, visible=np.array([[np.flatnonzero(~copy) for copy in sample] for sample in rows]))


# --------------------------------------------------------------------------------------------------- gathering


def test_gathering_keeps_the_copies_of_a_sample_together():
    masks = masks_of(".x.x x..x", "xx.. .xx.")
    x = torch.arange(8.0).view(2, 4, 1) + torch.tensor([0.0, 100.0])
    taken = take_visible(x, masks)
    assert taken[..., 0].tolist() == [[0, 2], [1, 2], [6, 7], [4, 7]]
    assert torch.equal(taken[..., 1], taken[..., 0] + 100)
    per_copy = x.repeat_interleave(2, 0) + torch.tensor([0.0, 0.5, 0.0, 0.5]).view(4, 1, 1)
    assert take_visible(per_copy, masks)[..., 0].tolist() == [[0, 2], [1.5, 2.5], [6, 7], [4.5, 7.5]]
    padding = torch.tensor([[False] * 4, [False, False, False, True]])
    expected = [[False, False], [False, False], [False, True], [False, True]]
    taken_padding = take_visible_padding(padding, masks)
    assert taken_padding is not None and taken_padding.tolist() == expected
    assert take_visible_padding(None, masks) is None


# ------------------------------------------------------------------------------------------------------- ALiBi


def test_slopes():
    assert alibi_slopes(4) == [2**-2, 2**-4, 2**-6, 2**-8]
    twelve = [2.0**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    assert alibi_slopes(12) == pytest.approx(twelve)
    assert len(alibi_slopes(1)) == 1 and len(alibi_slopes(7)) == 7 and len(alibi_slopes(16)) == 16


def test_alibi_is_between_original_places_and_zero_for_extra_tokens():
    alibi = Alibi(AlibiConfig(), 4, 2)
    whole = alibi(Tokens(torch.zeros(3, 6, D), None, (6,)))
    assert isinstance(whole, Tensor) and whole.shape == (1, 4, 6, 6)
    assert whole[0, 1, 2, 5] == whole[0, 1, 5, 2] == -(2**-4) * 3
    index = torch.tensor([[0, 2, 5], [1, 4, 3]])
    some = alibi(Tokens(torch.zeros(2, 4, D), None, (6,), num_extra=1, index=index))
    assert isinstance(some, Tensor) and some.shape == (2, 4, 4, 4)
    assert not some[:, :, 0].any() and not some[:, :, :, 0].any()
    for row in range(2):
        assert torch.equal(some[row, :, 1:, 1:], whole[0][:, index[row]][:, :, index[row]])


def test_alibi_scales():
    tokens = Tokens(torch.zeros(1, 5, D), None, (5,))
    unscaled = Alibi(AlibiConfig(), 4, 3).unscaled(tokens)
    per_layer = Alibi(AlibiConfig(per_layer=True), 4, 3)
    assert per_layer.scale.shape == (12,)
    with torch.no_grad():
        per_layer.scale.copy_(torch.arange(12.0) - 1)
    biases = per_layer(tokens)
    assert isinstance(biases, list) and len(biases) == 3
    assert not biases[0][0, 0].any()  # -1 counts as 0
    torch.testing.assert_close(biases[2][0, 1], unscaled[0, 1] * 8)
    assert Alibi(AlibiConfig(per_head=False), 4, 3).scale.shape == (1,)
    assert not Alibi(AlibiConfig(learned=False), 4, 3).scale.requires_grad
    with pytest.raises(ValueError, match=r"alibi\.scale=-1"):
        Alibi(AlibiConfig(scale=-1.0), 4, 3)


# ------------------------------------------------------------------------------------------------------ prenet


def test_prenet_blocks_follow_norm_and_take_their_own_biases():
    torch.manual_seed(0)
    prenet, x = Prenet(PrenetConfig(layers=2), MODEL), torch.randn(2, 5, D)
    biases = [torch.randn(1, 4, 5, 5) for _ in range(5)]
    assert prenet.norm is not None
    by_hand = prenet.norm(x)
    for block, bias in zip(prenet.transformer.blocks, biases, strict=False):
        by_hand, _ = block(by_hand, bias)
    torch.testing.assert_close(prenet(x, None, biases), by_hand)
    assert prenet.rest(biases) == biases[2:] and prenet.rest(None) is None and prenet.rest(biases[0]) is biases[0]
    alone = Prenet(PrenetConfig(), MODEL)
    assert alone.norm is not None
    torch.testing.assert_close(alone(x, None), alone.norm(x))


def test_dropout_before_the_prenet_is_for_training_only():
    prenet, x = Prenet(PrenetConfig(dropout=0.5), MODEL), torch.randn(2, 5, D)
    assert 0.3 < (prenet(x, None) == 0).float().mean() < 0.7
    prenet.eval()
    assert not (prenet(x, None) == 0).any()


def test_pre_norm_blocks_end_in_the_norm():
    prenet, x = Prenet(PrenetConfig(layers=1), dataclasses.replace(MODEL, norm="pre")), torch.randn(2, 5, D)
    out = prenet(x, None)
    assert prenet.norm is None
    torch.testing.assert_close(out.mean(-1), torch.zeros(2, 5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"layers": -1}, {"layer_drop": 1.0}, {"dropout": -0.1}])
def test_prenet_options_that_cannot_work(options):
    with pytest.raises(ValueError, match=rf"prenet\.{next(iter(options))}="):
        Prenet(PrenetConfig(**options), MODEL)


# ----------------------------------------------------------------------------------------------------- decoder


def decoder(num_axes: int = 1, leaky_padding: bool = False, **options) -> ConvDecoder:
    torch.manual_seed(1)
    config = DecoderConfig(**{"dim": D, "layers": 2, "kernel": 3, "groups": 4, **options})
    return ConvDecoder(config, D, num_axes, leaky_padding)


def encoded(masks: Masks, grid: tuple[int, ...], num_extra: int = 0) -> Tokens:
    assert masks.visible is not None
    index = masks.visible.flatten(0, 1)
    x = torch.randn(len(index), num_extra + index.shape[1], D)
    return Tokens(x, None, grid, num_extra, index)


def test_encoded_tokens_go_home_and_noise_fills_the_rest():
    masks = masks_of(".x.x.x x..xx.", "..xx.x x.x.x.")
    tokens, net = encoded(masks, (6,), num_extra=1), decoder(noise_std=0.5)
    full, keep = net.on_the_grid(tokens, masks)
    assert keep is None and full.shape == (4, 6, D) and tokens.index is not None
    for row in range(4):
        torch.testing.assert_close(full[row, tokens.index[row]], tokens.x[row, 1:])
    noise = full[masks.hidden.flatten(0, 1)]
    assert 0.4 < noise.std() < 0.6 and abs(noise.mean()) < 0.1
    again, _ = net.eval().on_the_grid(tokens, masks)
    assert not torch.equal(again, full)  # drawn anew, in eval mode too


@pytest.mark.parametrize("kernel", [3, 4])
def test_one_axis_by_hand(kernel: int):
    masks = masks_of(".x.xxx x..xxx")
    net = decoder(kernel=kernel)
    x = torch.randn(2, 6, D)
    by_hand = x
    for block in net.blocks:
        y = F.conv1d(by_hand.transpose(1, 2), block.conv.weight, block.conv.bias, padding=kernel // 2, groups=4)
        by_hand = by_hand + F.gelu(F.layer_norm(y[..., :6].transpose(1, 2), (D,)))
    torch.testing.assert_close(net.convolve(x, None, (6,)), by_hand)
    out = net(encoded(masks, (6,)), masks)
    assert out.shape == (8, D)


@pytest.mark.parametrize("kernel", [3, 4])
def test_two_axes_by_hand(kernel: int):
    net, x = decoder(2, kernel=kernel, layers=1, residual=False), torch.randn(2, 12, D)
    image = x.transpose(1, 2).reshape(2, D, 3, 4)
    y = F.conv2d(image, net.blocks[0].conv.weight, net.blocks[0].conv.bias, padding=kernel // 2, groups=4)
    y = y[:, :, :3, :4].flatten(2).transpose(1, 2)
    torch.testing.assert_close(net.convolve(x, None, (3, 4)), F.gelu(F.layer_norm(y, (D,))))


def test_residual_only_where_channels_agree():
    net, x = decoder(dim=8, layers=3), torch.randn(2, 6, D)
    first = net.blocks[0](x, (6,))
    second = first + net.blocks[1](first, (6,))
    torch.testing.assert_close(net.convolve(x, None, (6,)), second + net.blocks[2](second, (6,)))


def test_projections():
    net = decoder(projection_layers=2, projection_ratio=3.0)
    assert [tuple(layer.weight.shape) for layer in net.projections] == [(48, 16), (16, 48)]
    x = torch.randn(5, D)
    torch.testing.assert_close(net.project(x), net.projections[1](F.gelu(net.projections[0](x))))
    assert [tuple(layer.weight.shape) for layer in decoder().projections] == [(16, 16)]


@pytest.mark.parametrize("leaky", [False, True])
def test_padding_cannot_change_a_valid_token(leaky: bool, monkeypatch: pytest.MonkeyPatch):
    """The row of four tokens by itself, and padded to seven with padding among its encoded tokens."""
    net = decoder(leaky_padding=leaky, layers=3)
    monkeypatch.setattr(net, "noise", lambda like, num: torch.full((len(like), num, D), 0.3))
    x = torch.randn(1, 2, D)
    alone = net(Tokens(x, None, (4,), index=torch.tensor([[0, 2]])), masks_of(".x.x"))
    hidden = torch.tensor([[[False, True, False, True, False, False, False]]])
    masks = Masks.of(hidden, visible=torch.tensor([[[0, 2, 5]]]))
    padding = torch.tensor([[False, False, True]])
    padded = net(Tokens(torch.cat([x, torch.randn(1, 1, D)], 1), padding, (7,), index=torch.tensor([[0, 2, 5]])), masks)
    assert torch.allclose(alone, padded, atol=1e-6) != leaky


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, r"decoder\.layers=0"),
        ({"dim": 18}, r"decoder\.dim=18 must be a multiple of decoder\.groups=4"),
        ({"groups": 5, "dim": 20}, r"model\.embed_dim=16 must be a multiple of decoder\.groups=5"),
        ({"noise_std": -1.0}, r"decoder\.noise_std=-1"),
    ],
)
def test_decoder_options_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        decoder(**options)
    with pytest.raises(ValueError, match="a decoder of 3 axes"):
        decoder(3)


# ------------------------------------------------------------------------------------------ the token in front


class InFront(FeatureEncoder):
    """Visible tokens of learned content behind one token in front."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(3, D)
        self.cls = nn.Parameter(torch.randn(D))

    def embed(self, inputs):
        return Tokens(self.embedding(inputs["x"]), None, (inputs["x"].shape[1],))

    def view(self, tokens, masks):
        x = tokens.x if masks is None else take_visible(tokens.x, masks)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1)
        index = None if masks is None else masks.visible.flatten(0, 1)
        return Tokens(x, None, tokens.grid, 1, index)


def in_front(sum_rows: bool, weight: float = 0.5) -> Data2Vec:
    torch.manual_seed(0)
    return Data2Vec(
        InFront(), Transformer(MODEL), decoder(), TopKTargets(TargetConfig(top_k_layers=2, mean_norms=["layer"])),
        RegressionLoss(LossConfig(cls_weight=weight), sum_rows), {"": "average"},
    )  # fmt: skip


@pytest.mark.parametrize("sum_rows", [False, True])
def test_the_token_in_front_regresses_the_mean_of_its_sample(sum_rows: bool):
    net, x = in_front(sum_rows), torch.randn(2, 6, 3)
    masks = masks_of(".x.x.x x..xx.", "..xx.x x.x.x.")
    torch.manual_seed(5)
    out = net({"x": x}, masks)
    net.loss.cls_weight = 0.0
    torch.manual_seed(5)
    without = net({"x": x}, masks)
    tokens = net.student.encoder.embed({"x": x})
    mean = net.teach(tokens, {"x": x}).mean(1).repeat_interleave(2, 0)
    _, encoded = net.student(tokens, masks)
    rows = (encoded.x[:, 0] - mean).square().sum() / D**0.5
    expected = 0.5 * out.num_scored * rows / (1 if sum_rows else 4)
    torch.testing.assert_close(out.loss_sum - without.loss_sum, expected, rtol=1e-4, atol=1e-4)
    out.loss_sum.backward()
    assert net.student.encoder.cls.grad is not None


def test_it_needs_a_token_in_front():
    class Without(InFront):
        def view(self, tokens, masks):
            seen = super().view(tokens, masks)
            return dataclasses.replace(seen, x=seen.x[:, 1:], num_extra=0)

    net = in_front(False)
    net.student.encoder.__class__ = net.teacher.module.encoder.__class__ = Without
    with pytest.raises(UserError, match=r"loss\.cls_weight=0\.5, but this encoder puts no token in front"):
        net({"x": torch.randn(1, 4, 3)}, masks_of(".x.x"))


def test_its_weight_does_not_depend_on_how_a_batch_is_dealt_out():
    x, masks = torch.randn(4, 6, 3), masks_of(".x.x.x", "..xx.x", "x.x.x.", "xxx...")
    halves = [Masks.of(masks.hidden[i : i + 2], visible=masks.visible[i : i + 2]) for i in (0, 2)]

    def both(net: Data2Vec) -> tuple[Tensor, Tensor]:
        net.loss.scale = "1e-9"  # all but nothing: only the second loss is looked at
        net.loss.cls_weight = 1e9
        whole = net({"x": x}, masks)
        parts = [net({"x": part}, mask) for part, mask in zip(x.split(2), halves, strict=True)]
        return whole.loss_sum / whole.num_scored, sum(p.loss_sum for p in parts) / sum(p.num_scored for p in parts)

    torch.testing.assert_close(*both(in_front(False)))
    whole, parts = both(in_front(True))
    torch.testing.assert_close(whole, 2 * parts)  # officially


# ---------------------------------------------------------------------------------------------- configuration


def test_several_masks_reach_the_loader(make):
    from d2v_core.batching import StepLoader

    toy = make("train.num_masks=3")
    _, _, batches = next(iter(StepLoader(toy, toy.dataset("train"), seed=0, num_copies=toy.config.train.num_masks)))
    assert all(batch.masks.num_copies == 3 for batch in batches)


def test_a_run_with_several_masks(d2v, tmp_path):
    status, said = d2v("run", "modality=toy", "train.num_masks=3", "train.max_steps=2", "train.num_workers=0",
                       "train.probe=false", f"out={tmp_path / 'run'}")  # fmt: skip
    assert status == 0, said


def test_method_is_one_that_the_modality_has():
    with pytest.raises(UserError, match=r"method='data2vec2' is not one of toy's: data2vec\."):
        load_config(["modality=toy", "method=data2vec2"])
    config, _ = load_config(["modality=toy"])
    assert config.method == "data2vec" and config.official_quirks is False
    assert load_config(["modality=toy", "official_quirks=true"])[0].official_quirks is True
    with pytest.raises(UserError, match=r"train\.num_masks=0 must be at least 1"):
        load_config(["modality=toy", "train.num_masks=0"])


def test_a_method_has_sections_of_its_own(monkeypatch: pytest.MonkeyPatch):
    _, toy = load_config(["modality=toy"])
    monkeypatch.setattr(toy, "methods", ("data2vec", "data2vec2"))
    monkeypatch.setattr(
        toy, "method_sections",
        classmethod(lambda cls, encoder, method: {**cls.sections(encoder), "mask": BlockMaskingConfig,
                                                  "decoder": DecoderConfig}),
    )  # fmt: skip
    words = ["modality=toy", "method=data2vec2", "decoder.layers=7", "mask.mask_length=2"]
    config, _ = load_config(words, lambda name: toy)
    assert config.section("decoder", DecoderConfig).layers == 7
    assert config.section("mask", BlockMaskingConfig).inverse is False
    with pytest.raises(UserError, match="decoder"):
        load_config(["modality=toy", "decoder.layers=7"], lambda name: toy)


def test_every_option_has_a_sentence():
    kinds = (BlockMaskingConfig, DecoderConfig, PrenetConfig, AlibiConfig, *CORE_SECTIONS.values())
    for kind in kinds:
        assert kind.__doc__
        for field in dataclasses.fields(kind):
            assert field.metadata.get("doc", "").endswith("."), field.name
