"""Tables, positions, what student and teacher see, and the head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from d2v_core.config import ModelConfig
from d2v_core.contract import Masks, Tokens
from d2v_core.errors import UserError
from d2v_text.feature_encoder import EmbeddingConfig, HeadConfig, RegressionHead, TextEncoder, position_ids
from d2v_text.tokenizer import PAD, Vocabulary

D, SIZE, T = 8, 30, 6


@pytest.fixture
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    made = TextEncoder(Vocabulary(SIZE, 7), ModelConfig(embed_dim=D, dropout=0.5), EmbeddingConfig(max_positions=10))
    return made.eval()


def by_hand(encoder: TextEncoder, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    x = encoder.embedding.table.weight[ids] + encoder.positions.weight[positions]
    return F.layer_norm(x, (D,), encoder.norm.weight, encoder.norm.bias)


def test_positions_skip_padding_wherever_it_stands():
    padding = torch.tensor([[0, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0]]).bool()
    assert position_ids(6, padding, padding.device).tolist() == [[2, 3, 1, 4, 1, 1], [1, 2, 3, 4, 5, 6]]
    assert position_ids(3, None, padding.device).tolist() == [[2, 3, 4]]


def test_what_the_teacher_sees(encoder: TextEncoder):
    ids = torch.randint(4, SIZE - 1, (2, T))
    view = encoder.view(encoder.embed({"ids": ids}), None)
    torch.testing.assert_close(view.x, by_hand(encoder, ids, torch.arange(2, 2 + T)))
    assert view.padding_mask is None and view.grid == (T,)


def test_hidden_places_hold_the_vector_of_the_filled_in_id(encoder: TextEncoder):
    ids = torch.randint(4, SIZE - 1, (1, T))
    fill = np.array([[[-1, SIZE - 1, 9, -2, -1, -1]], [[-1] * T]])[:1]
    masks = Masks.of(fill >= 0, fill != -1, fill)
    seen = ids.clone()
    seen[0, 1:3] = torch.tensor([SIZE - 1, 9])
    view = encoder.view(encoder.embed({"ids": ids}), masks)
    torch.testing.assert_close(view.x, by_hand(encoder, seen, torch.arange(2, 2 + T)))
    without = encoder.view(encoder.embed({"ids": ids}), Masks.of(fill == SIZE - 1))  # no fill: <mask>
    seen[0, 2] = ids[0, 2]
    torch.testing.assert_close(without.x, by_hand(encoder, seen, torch.arange(2, 2 + T)))


def test_gradients_reach_the_symbols_put_in_but_not_those_hidden(encoder: TextEncoder):
    ids = torch.tensor([[10, 11, 12, PAD]])
    fill = np.array([[[-1, 9, -2, -1]]])
    masks = Masks.of(fill >= 0, fill != -1, fill)
    inputs = {"ids": ids, "padding_mask": ids == PAD}
    (encoder.view(encoder.embed(inputs), masks).x * torch.randn(D)).sum().backward()
    touched = encoder.embedding.table.weight.grad.abs().sum(1)
    assert touched.nonzero().flatten().tolist() == [9, 10, 12]
    assert encoder.positions.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [2, 3, 4]


def test_padding_changes_no_valid_token_and_is_zero(encoder: TextEncoder):
    ids = torch.randint(4, SIZE - 1, (1, T))
    padded = F.pad(ids, (0, 3), value=PAD)
    short = encoder.view(encoder.embed({"ids": ids}), None)
    long = encoder.view(encoder.embed({"ids": padded, "padding_mask": padded == PAD}), None)
    assert torch.equal(long.x[:, :T], short.x)
    assert (long.x[:, T:] == 0).all()
    with torch.no_grad():  # whatever the row of <pad> holds
        encoder.embedding.table.weight[PAD] = 5.0
    again = encoder.view(encoder.embed({"ids": padded, "padding_mask": padded == PAD}), None)
    assert torch.equal(again.x, long.x)


def test_copies_stand_together(encoder: TextEncoder):
    ids = torch.randint(4, SIZE - 1, (2, T))
    hidden = np.zeros((2, 3, T), bool)
    for i in range(6):
        hidden[i // 3, i % 3, i % T] = True
    view = encoder.view(encoder.embed({"ids": ids}), Masks.of(hidden))
    plain = encoder.view(encoder.embed({"ids": ids}), None)
    assert view.x.shape == (6, T, D)
    for i in range(6):
        differs = (view.x[i] != plain.x[i // 3]).any(-1)
        assert differs.nonzero().flatten().tolist() == [i % T]


def test_initial_tables(encoder: TextEncoder):
    big = TextEncoder(Vocabulary(2000), ModelConfig(embed_dim=32), EmbeddingConfig())
    for table in (big.embedding.table, big.positions):
        assert table.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert (table.weight[PAD] == 0).all()
    assert big.positions.weight.shape == (514, 32)


def test_a_sequence_beyond_the_positions_is_refused(encoder: TextEncoder):
    with pytest.raises(UserError, match=r"11 tokens, but embedding.max_positions=10"):
        encoder.embed({"ids": torch.zeros(1, 11, dtype=torch.int64)})


def test_weights_of_another_vocabulary_are_refused(encoder: TextEncoder):
    encoder.embedding.fingerprint.fill_(8)  # what loading a checkpoint does
    with pytest.raises(UserError, match="tokenizer does not fit the weights"):
        encoder.embed({"ids": torch.zeros(1, 2, dtype=torch.int64)})
    encoder.embedding.fingerprint.fill_(0)  # official weights
    encoder.embed({"ids": torch.zeros(1, 2, dtype=torch.int64)})


@pytest.mark.parametrize(
    ("layers", "shapes"),
    [
        (1, [(D, D)]),
        (2, [(2 * D, D), (D, 2 * D)]),
        (4, [(2 * D, D), (2 * D, 2 * D), (2 * D, 2 * D), (D, 2 * D)]),
    ],
)
def test_head(layers, shapes):
    head = RegressionHead(D, HeadConfig(layers))
    assert [tuple(p.shape) for p in head.parameters() if p.dim() == 2] == shapes
    x = torch.randn(2, T, D)
    hidden = np.zeros((2, T), bool)
    hidden[0, 1] = hidden[1, 3] = True
    out = head(Tokens(x, None, (T,)), Masks.of(hidden))
    torch.testing.assert_close(out, head.layers(torch.stack([x[0, 1], x[1, 3]])))
