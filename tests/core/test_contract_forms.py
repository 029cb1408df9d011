"""The contract holds what the official methods need: each form, in miniature, through `Data2Vec` as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from d2v_core import Data2Vec, FeatureEncoder, LinearPredictor, Masks, Predictor, RegressionLoss, Tokens, TopKTargets
from d2v_core.config import LossConfig, ModelConfig, TargetConfig
from d2v_core.run import build_model
from d2v_core.transformer import Transformer

B, M, T, D, LAYERS = 2, 3, 8, 16, 2


class Embedding(FeatureEncoder):
    """Token ids to vectors; a mask vector; learned places."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, D)
        self.mask_vector = nn.Parameter(torch.randn(D))
        self.places = nn.Parameter(torch.randn(T, D))
        self.calls = 0

    def embed(self, inputs):
        self.calls += 1
        return Tokens(self.embedding(inputs["ids"]), None, (T,))

    def view(self, tokens, masks):
        x = tokens.x
        if masks is not None:
            x = torch.where(masks.hidden[:, 0, :, None], self.mask_vector, x)
        return Tokens(x + self.places, None, (T,))


def model(encoder, predictor=None, parts=None):
    torch.manual_seed(0)
    return Data2Vec(
        encoder,
        Transformer(ModelConfig(embed_dim=D, num_layers=LAYERS, num_heads=4)),
        predictor or LinearPredictor(D),
        TopKTargets(TargetConfig(top_k_layers=LAYERS, layer_norms=["layer"])),
        RegressionLoss(LossConfig()),
        parts or {"": "average"},
    )


def ids() -> torch.Tensor:
    return torch.arange(B * T).view(B, T)


def hidden(copies: int = 1) -> np.ndarray:
    """(B, copies, T), four hidden tokens in each row, other ones in each."""
    mask = np.zeros((B, copies, T), dtype=bool)
    for row in range(B * copies):
        mask[row // copies, row % copies, np.random.default_rng(row).permutation(T)[:4]] = True
    return mask


def test_extra_token_in_front_and_a_bias_per_block():
    """Vision: CLS is in the sequence, neither target nor prediction counts it, and each block has its own bias."""
    seen = []

    class WithCLS(Embedding):
        def __init__(self) -> None:
            super().__init__()
            self.cls = nn.Parameter(torch.randn(D))
            self.biases = nn.Parameter(torch.randn(LAYERS, 1, 4, T + 1, T + 1))

        def view(self, tokens, masks):
            places = super().view(tokens, masks)
            x = torch.cat([self.cls.expand(len(places.x), 1, D), places.x], 1)
            return Tokens(x, None, (T,), num_extra=1)

        def attention_bias(self, tokens):
            seen.append(tokens.x.shape)
            return list(self.biases)

    net = model(WithCLS())
    out = net({"ids": ids()}, Masks.of(hidden()))
    assert out.prediction.shape == out.target.shape == (B * 4, D)
    assert seen == [(B, T + 1, D)] * 2
    # Row k of the target belongs to the k-th hidden place, not to its neighbour on the side of CLS.
    _, encoded = net.teacher.module(net.student.encoder.embed({"ids": ids()}), None, taps=True)
    by_hand = sum(nn.functional.layer_norm(f[:, 1:], (D,)) for f in encoded.ffn) / LAYERS
    torch.testing.assert_close(out.target, by_hand[torch.as_tensor(hidden()[:, 0])])
    out.loss_sum.backward()
    assert net.student.encoder.biases.grad[1].abs().sum() > 0


def test_replaced_tokens_and_tokens_left_alone():
    """Text, 80/10/10: some hidden places hold another id, and some scored places hide nothing."""
    MASK_ID = 49
    hide = np.zeros((B, 1, T), dtype=bool)
    hide[:, :, [1, 2]] = True
    scored = hide.copy()
    scored[:, :, 5] = True
    fill = np.full((B, 1, T), MASK_ID)
    fill[:, :, 2] = 7

    class Fill(Embedding):
        def view(self, tokens, masks):
            x = tokens.x
            if masks is not None:
                x = torch.where(masks.hidden[:, 0, :, None], self.embedding(masks.fill[:, 0]), x)
            return Tokens(x + self.places, None, (T,))

    net = model(Fill(), parts={"": "average", "encoder.embedding": "copy"})
    masks = Masks.of(hide, scored, fill)
    view = net.student.encoder.view(net.student.encoder.embed({"ids": ids()}), masks)
    places = net.student.encoder.places
    torch.testing.assert_close(view.x[:, 2] - places[2], net.student.encoder.embedding.weight[7].expand(B, D))
    torch.testing.assert_close(view.x[:, 5] - places[5], net.student.encoder.embedding(ids()[:, 5]))
    assert net({"ids": ids()}, masks).num_scored == B * 3


def test_teacher_with_an_input_of_its_own():
    """Text as released: the teacher reads another tensor than the student."""
    net = model(Embedding(), parts={"": "average", "encoder.embedding": "share"})
    masks = Masks.of(hidden())
    same = net({"ids": ids()}, masks).target
    other = net({"ids": ids()}, masks, {"ids": ids() + 20}).target
    assert not torch.allclose(same, other)
    torch.testing.assert_close(other, net({"ids": ids() + 20}, masks).target)


class VisibleOnly(Embedding):
    """data2vec 2.0: M copies per sample, only visible tokens enter; places come from the full, zero-masked sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(D, D, 3, padding=1)
        self.rows = []

    def view(self, tokens, masks):
        if masks is None:
            return Tokens(tokens.x + self.conv(tokens.x.transpose(1, 2)).transpose(1, 2), None, (T,))
        rows = tokens.x.repeat_interleave(masks.num_copies, 0)
        full = rows * ~masks.hidden.flatten(0, 1).unsqueeze(-1)
        places = self.conv(full.transpose(1, 2)).transpose(1, 2)
        index = masks.visible.flatten(0, 1)
        x = torch.take_along_dim(rows + places, index.unsqueeze(-1), 1)
        self.rows.append(x.shape)
        return Tokens(x, None, (T,), index=index)

    def attention_bias(self, tokens):
        place = torch.arange(T).expand(len(tokens.x), T) if tokens.index is None else tokens.index
        return -(place[:, :, None] - place[:, None, :]).abs().unsqueeze(1).float()


class Decoder(Predictor):
    """Puts visible tokens back in place, constants elsewhere, and convolves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(D, D, 3, padding=1)

    def forward(self, tokens, masks):
        full = torch.full((len(tokens.x), T, D), 0.01).scatter(
            1, tokens.index.unsqueeze(-1).expand_as(tokens.x), tokens.x
        )
        return self.conv(full.transpose(1, 2)).transpose(1, 2).flatten(0, 1)[masks.scored_rows]


def test_visible_tokens_only_with_several_copies_and_one_teacher_pass():
    net = model(VisibleOnly(), Decoder(), {"": "average", "encoder.embedding": "share"})
    hide = hidden(M)
    visible = np.stack([[np.flatnonzero(~row) for row in sample] for sample in hide])
    masks = Masks.of(hide, visible=visible)
    out = net({"ids": ids()}, masks)
    assert net.student.encoder.rows == [(B * M, T - 4, D)]
    assert net.student.encoder.calls == 1 and net.teacher.module.encoder.calls == 0
    assert out.target.shape == (B * M * 4, D)
    # The target at a place is the same in every copy that hides it: one teacher pass per sample.
    whole = net.teach(net.student.encoder.embed({"ids": ids()}), {})
    at = 0
    for b in range(B):
        for m in range(M):
            for t in np.flatnonzero(hide[b, m]):
                torch.testing.assert_close(out.target[at], whole[b, t])
                at += 1
    out.loss_sum.backward()
    assert all(
        p.grad is not None for n, p in net.student.named_parameters() if "mask_vector" not in n and "places" not in n
    )


def test_a_modality_keeps_what_its_run_needs(make, tmp_path):
    """With every checkpoint, and a loaded run knows its folder."""
    from rich.console import Console

    from d2v_core.run import load_config_of
    from d2v_core.runfolder import open_run
    from d2v_core.trainer import Trainer

    toy = make("train.max_steps=2", "train.checkpoint_every=1", "train.num_workers=0", "train.probe=false",
               "train.tensorboard=false", f"out={tmp_path / 'run'}")  # fmt: skip
    kept = []
    toy.keep = kept.append
    open_run(toy.config)
    Trainer(toy, tmp_path / "run", Console(quiet=True)).fit()
    assert kept == [tmp_path / "run"] * 2
    assert load_config_of(tmp_path / "run")[0].home == tmp_path / "run"
    assert toy.config.home is None


def test_masks_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"scored has shape \(2, 1, 7\), hidden has \(2, 1, 8\)"):
        Masks.of(np.zeros((2, 8), bool), np.zeros((2, 7), bool))


def test_a_modality_may_initialise_the_transformer(make, monkeypatch):
    """Vision rescales what each block adds; others leave it at BERT's normal, of which a third lies beyond 0.02."""
    modality = make()
    weight = build_model(modality).student.transformer.blocks[0].fc1.weight
    assert 0.015 < weight.std() < 0.025 and 0.25 < (weight.abs() > 0.02).float().mean() < 0.4

    def zero(transformer):
        for parameter in transformer.parameters():
            nn.init.zeros_(parameter)

    monkeypatch.setattr(modality, "init_transformer", zero)
    model = build_model(modality)
    for network in (model.student, model.teacher.module):
        assert not any(p.any() for p in network.transformer.parameters())
    assert model.student.encoder.embedding.weight.any()
