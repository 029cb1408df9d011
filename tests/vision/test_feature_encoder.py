"""Patches, CLS, mask token, relative positions and initial weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from d2v_core.config import ModelConfig, OptimConfig
from d2v_core.contract import Masks
from d2v_core.optim import make_optimizer
from d2v_core.transformer import Transformer
from d2v_vision.feature_encoder import (
    PatchConfig,
    PatchEmbedding,
    PatchEncoder,
    RelativeBias,
    init_transformer,
    relative_index,
)

MODEL = ModelConfig(embed_dim=16, num_layers=3, num_heads=2, norm="pre", attention_bias="qv", layer_scale=0.1)
pytestmark = pytest.mark.usefixtures("one_thread")


def encoder() -> PatchEncoder:
    return PatchEncoder(PatchConfig(patch_size=4), MODEL, 12)


def test_patches_are_a_convolution_without_overlap() -> None:
    embedding, image = PatchEmbedding(4, 16), torch.randn(2, 3, 12, 8)
    by_torch = F.conv2d(image, embedding.conv.weight, embedding.conv.bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embedding(image), by_torch)


def test_an_image_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 3, 8, 8\); expected \(B, 3, 12, 12\)"):
        encoder().embed({"image": torch.zeros(1, 3, 8, 8)})


def test_hidden_patches_become_the_mask_token_and_cls_stays() -> None:
    net = encoder()
    tokens = net.embed({"image": torch.randn(2, 3, 12, 12)})
    hidden = np.zeros((2, 9), dtype=bool)
    hidden[0, 0] = hidden[1, 8] = True  # the places beside CLS and at the end, where an offset would show
    seen = net.view(tokens, Masks.of(hidden))
    assert seen.num_extra == 1 and seen.grid == (3, 3) and seen.x.shape == (2, 10, 16)
    assert torch.equal(seen.x[:, 0], net.cls_token.expand(2, 16))
    for row in range(2):
        for place in range(9):
            wanted = net.mask_token[0] if hidden[row, place] else tokens.x[row, place]
            assert torch.equal(seen.x[row, 1 + place], wanted)
    whole = net.view(tokens, None)
    assert torch.equal(whole.x[:, 1:], tokens.x)


def test_copies_of_a_sample_stand_together() -> None:
    net = encoder()
    tokens = net.embed({"image": torch.randn(2, 3, 12, 12)})
    hidden = np.zeros((2, 2, 9), dtype=bool)
    hidden[:, 1] = True
    x = net.view(tokens, Masks.of(hidden)).x[:, 1:]
    assert torch.equal(x[0::2], tokens.x) and torch.equal(x[1::2], net.mask_token.expand(2, 9, 16))


# ----------------------------------------------------------------------------------------------- relative positions


def test_relative_index_of_a_small_grid_by_hand() -> None:
    """1 x 2 patches: offsets -1, 0, 1 are rows 0, 1, 2; CLS -> patch is 3, patch -> CLS is 4, CLS -> CLS is 5."""
    assert relative_index(1, 2).tolist() == [[5, 3, 3], [4, 1, 0], [4, 2, 1]]


def test_relative_index_of_the_official_grid() -> None:
    index = relative_index(14, 14)
    assert index.shape == (197, 197) and RelativeBias((14, 14), 12).table.shape == (732, 12)
    assert index[0, 0] == 731 and set(index[0, 1:].tolist()) == {729} and set(index[1:, 0].tolist()) == {730}
    patches = index[1:, 1:]
    assert patches.min() == 0 and patches.max() == 728 and patches.unique().numel() == 729
    assert set(patches.diagonal().tolist()) == {13 * 27 + 13}
    assert patches[1, 0] == 13 * 27 + 14  # query one place to the right of the key
    assert patches[14, 0] == 14 * 27 + 13  # one row below
    assert patches[195, 0] == 728 and patches[0, 195] == 0


def test_the_bias_says_how_far_the_query_is_from_the_key() -> None:
    net = encoder()
    assert net.positions.table.abs().sum() == 0
    right = 2 * 5 + 3  # offset (0, 1) of a 3 x 3 grid
    with torch.no_grad():
        net.positions.table[right, 1] = 7.0
    bias = net.attention_bias(net.view(net.embed({"image": torch.zeros(1, 3, 12, 12)}), None))
    assert bias.shape == (1, 2, 10, 10) and bias[0, 0].abs().sum() == 0
    pairs = {(int(q), int(k)) for q, k in bias[0, 1].nonzero()}
    assert pairs == {(1 + 3 * row + col + 1, 1 + 3 * row + col) for row in range(3) for col in range(2)}


def test_gradients_reach_the_table_also_in_bf16() -> None:
    net, transformer = encoder(), Transformer(MODEL)
    for autocast in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            view = net.view(net.embed({"image": torch.randn(2, 3, 12, 12)}), None)
            transformer(view.x, None, net.attention_bias(view)).x[:, 1:].float().square().sum().backward()
        assert net.positions.table.grad is not None
        used = net.positions.index[1:].unique()  # CLS as a query changes no patch in the last layer, but in the first
        assert (net.positions.table.grad[used].abs().sum(1) > 0).all()


# ------------------------------------------------------------------------------------------------------ initial weights


def test_initial_weights() -> None:
    transformer = Transformer(ModelConfig(embed_dim=64, num_layers=3, num_heads=2, norm="pre", attention_bias="qv"))
    init_transformer(transformer, 0.02)
    for i, block in enumerate(transformer.blocks, 1):
        for name, parameter in block.named_parameters():
            scale = math.sqrt(2 * i) if name in ("attention.out.weight", "fc2.weight") else 1.0
            if name.endswith("weight") and parameter.dim() == 2:
                given = parameter * scale
                assert given.abs().max() <= 0.02 + 1e-8
                # A normal of standard deviation 0.02 cut at +-0.02 has 0.540 of that left.
                assert given.std().item() == pytest.approx(0.5396 * 0.02, rel=0.04)
            elif name.endswith("bias"):
                assert parameter.abs().sum() == 0
            else:
                assert torch.equal(parameter, torch.ones_like(parameter)), name
    net = encoder()
    for parameter in (net.cls_token, net.mask_token, net.embedding.conv.weight):
        assert 0.015 < parameter.abs().max() <= 0.02
    assert net.embedding.conv.bias is not None and net.embedding.conv.bias.abs().sum() == 0


def test_what_decays() -> None:
    """data2vec_vision: beit/optim_factory.py; the mask token and the table do, CLS and vectors do not."""
    net = encoder()
    decayed, plain = make_optimizer(net, OptimConfig(decay_all=False)).param_groups
    names = {id(p): name for name, p in net.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {"mask_token", "embedding.conv.weight", "positions.table"}
    assert {names[id(p)] for p in plain["params"]} == {"cls_token", "embedding.conv.bias"}
