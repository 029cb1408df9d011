"""Blocks against the same computation written out in torch functions, and what masks and drops do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from d2v_core.config import ModelConfig
from d2v_core.transformer import Attention, Block, Transformer, drop_path, init_bert

R, T, D, H = 2, 7, 12, 3


def config(**values) -> ModelConfig:
    return ModelConfig(**{"embed_dim": D, "num_layers": 3, "num_heads": H, **values})


def shake(module: torch.nn.Module) -> None:
    """No weight at a special value such as 0 or 1, so that a forgotten one shows."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)


def attention_by_hand(x: Tensor, w, qkv_bias: Tensor, logits_bias: Tensor | float = 0.0) -> Tensor:
    q, k, v = F.linear(x, w["attention.qkv.weight"], qkv_bias).chunk(3, -1)
    heads = []
    for h in range(H):
        part = slice(h * D // H, (h + 1) * D // H)
        logits = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(D / H)
        logits = logits + (logits_bias[:, h] if isinstance(logits_bias, Tensor) else logits_bias)
        heads.append(logits.softmax(-1) @ v[..., part])
    return F.linear(torch.cat(heads, -1), w["attention.out.weight"], w["attention.out.bias"])


def block_by_hand(x: Tensor, block: Block, norm: str, logits_bias: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    w = dict(block.named_parameters())

    def norm_of(i: int, y: Tensor) -> Tensor:
        return F.layer_norm(y, (D,), w[f"norm{i}.weight"], w[f"norm{i}.bias"], 1e-5)

    def ffn(y: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(y, w["fc1.weight"], w["fc1.bias"])), w["fc2.weight"], w["fc2.bias"])

    if norm == "post":
        x = norm_of(1, x + attention_by_hand(x, w, w["attention.qkv.bias"], logits_bias))
        f = ffn(x)
        return norm_of(2, x + f), f
    x = x + attention_by_hand(norm_of(1, x), w, w["attention.qkv.bias"], logits_bias)
    f = ffn(norm_of(2, x))
    return x + f, f


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_block_and_its_tap_by_hand(norm):
    block = Block(config(norm=norm))
    shake(block)
    x = torch.randn(R, T, D)
    got, wanted = block(x, None), block_by_hand(x, block, norm)
    torch.testing.assert_close(got[0], wanted[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[1], wanted[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got[0], got[1], atol=0.1)  # the tap is not the block's output


def test_gelu_is_exact_and_hidden_width_follows_mlp_ratio():
    block = Block(config(mlp_ratio=2.5))
    assert block.fc1.weight.shape == (30, D)
    x = torch.linspace(-3, 3, 7)
    assert (F.gelu(x) - F.gelu(x, approximate="tanh")).abs().max() > 1e-4  # the two can be told apart


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_transformer_chains_blocks_and_keeps_every_tap(norm):
    model = Transformer(config(norm=norm))
    shake(model)
    x = y = torch.randn(R, T, D)
    taps, blocks = [], []
    for block in model.blocks:
        y, f = block_by_hand(y, block, norm)
        taps.append(f), blocks.append(y)
    if norm == "pre":
        y = F.layer_norm(y, (D,), model.norm.weight, model.norm.bias, 1e-5)
    else:
        assert model.norm is None
    out = model(x, taps=True)
    torch.testing.assert_close(out.x, y, atol=1e-3, rtol=1e-3)
    for got, wanted in ((out.ffn, taps), (out.blocks, blocks)):
        assert len(got) == 3
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    plain = model(x)
    assert plain.ffn == [] and plain.blocks == [] and torch.equal(plain.x, out.x)


def test_taps_are_taken_before_dropout():
    model = Transformer(config(num_layers=1, dropout=0.9, norm="pre")).train()
    f = model(torch.randn(R, T, D), taps=True).ffn[0]
    assert (f == 0).sum() == 0


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_padding_as_keys_has_no_influence_on_valid_tokens(norm):
    model = Transformer(config(norm=norm))
    shake(model)
    x = torch.randn(R, T, D)
    padding = torch.zeros(R, T, dtype=torch.bool)
    padding[0, 4:] = True
    out = model(x, padding, taps=True)
    moved = model(x.masked_fill(padding[..., None], 1e3), padding, taps=True)
    torch.testing.assert_close(out.x[~padding], moved.x[~padding])
    torch.testing.assert_close(out.ffn[-1][~padding], moved.ffn[-1][~padding])
    alone = model(x[:1, :4])
    torch.testing.assert_close(out.x[:1, :4], alone.x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.x[1:], model(x[1:]).x, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(x).x[0, :4], out.x[0, :4], atol=1e-3)  # and without the mask it has one


def test_attention_bias_for_all_blocks_one_each_and_together_with_padding():
    model = Transformer(config(num_layers=2))
    shake(model)
    x = torch.randn(R, T, D)
    biases = [torch.randn(1, H, T, T), torch.randn(R, H, T, T)]

    def by_hand(first: Tensor, second: Tensor) -> Tensor:
        y, _ = block_by_hand(x, model.blocks[0], "post", first)
        return block_by_hand(y, model.blocks[1], "post", second)[0]

    torch.testing.assert_close(model(x, bias=biases[0]).x, by_hand(biases[0], biases[0]), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(model(x, bias=biases).x, by_hand(*biases), atol=1e-3, rtol=1e-3)
    padding = torch.zeros(R, T, dtype=torch.bool)
    padding[1, 5:] = True
    closed = [b.expand(R, H, T, T).masked_fill(padding[:, None, None], float("-inf")) for b in biases]
    torch.testing.assert_close(model(x, padding, biases).x, by_hand(*closed), atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="1 attention biases for 2 blocks"):
        model(x, bias=biases[:1])


def test_attention_bias_and_padding_under_autocast():
    model = Transformer(config(num_layers=1))
    padding = torch.zeros(R, T, dtype=torch.bool)
    padding[1, 5:] = True
    x, bias = torch.randn(R, T, D), torch.randn(1, H, T, T)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x, padding, bias).x
    torch.testing.assert_close(got.float(), model(x, padding, bias).x, atol=0.05, rtol=0.05)


def test_layer_scale_multiplies_both_branches_and_the_tap():
    plain, scaled = Block(config(norm="pre")), Block(config(norm="pre", layer_scale=0.5))
    scaled.load_state_dict(plain.state_dict(), strict=False)
    assert scaled.gamma1.tolist() == [0.5] * D and scaled.gamma1.requires_grad
    x = torch.randn(R, T, D)
    scaled.gamma2.data.zero_()
    y = plain.attention(plain.norm1(x), None)
    torch.testing.assert_close(scaled(x, None)[0], x + 0.5 * y)
    scaled.gamma1.data.zero_()
    scaled.gamma2.data.fill_(2.0)
    f = plain.fc2(F.gelu(plain.fc1(plain.norm2(x))))
    got = scaled(x, None)
    torch.testing.assert_close(got[0], x + 2 * f)
    torch.testing.assert_close(got[1], 2 * f)


def test_drop_path_drops_whole_rows_and_keeps_the_expectation():
    x = torch.ones(20_000, 2, 3)
    y = drop_path(x, 0.3, True)
    rows = y.flatten(1)
    assert (rows == rows[:, :1]).all()
    assert set(rows[:, 0].unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)
    assert drop_path(x, 0.3, False) is x and drop_path(x, 0.0, True) is x


def test_drop_path_grows_linearly_and_leaves_the_residual():
    model = Transformer(config(drop_path=0.2, num_layers=3))
    assert [block.drop_path_rate for block in model.blocks] == pytest.approx([0.0, 0.1, 0.2])
    assert [b.drop_path_rate for b in Transformer(config(drop_path=0.2, num_layers=1)).blocks] == [0.0]
    block = Block(config(norm="pre"), drop_path_rate=0.99).train()
    x = torch.randn(200, T, D)
    same = (block(x, None)[0] == x).flatten(1).all(1)
    assert same.sum() > 150


def test_dropouts_act_in_training_only():
    x = torch.randn(R, T, D)
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        block = Block(config(**{name: 0.5}))
        assert not torch.equal(block(x, None)[0], block(x, None)[0]), name
        block.eval()
        assert torch.equal(block(x, None)[0], block(x, None)[0]), name


def test_qv_bias_has_no_key_bias():
    attention = Attention(D, H, 0.0, "qv")
    names = {name for name, _ in attention.named_parameters()}
    assert names == {"qkv.weight", "q_bias", "v_bias", "out.weight", "out.bias"}
    torch.nn.init.normal_(attention.q_bias), torch.nn.init.normal_(attention.v_bias)
    x = torch.randn(R, T, D)
    w = {f"attention.{n}": p for n, p in attention.named_parameters()}
    bias = torch.cat([attention.q_bias, torch.zeros(D), attention.v_bias])
    torch.testing.assert_close(attention(x, None), attention_by_hand(x, w, bias), atol=1e-5, rtol=1e-4)


def test_layer_drop_is_decided_by_the_seed_and_in_training_only():
    model = Transformer(config(num_layers=8, layer_drop=0.5)).train()
    x = torch.randn(R, T, D)

    def ran(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return model(x, taps=True).blocks

    a, b = ran(1), ran(1)
    assert len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    counts = [len(ran(seed)) for seed in range(100)]
    assert 3.4 < sum(counts) / 100 < 4.6 and len(set(counts)) > 3
    model.eval()
    assert len(ran(1)) == 8


def test_init_bert():
    module = torch.nn.ModuleList([torch.nn.Linear(200, 200), torch.nn.Embedding(200, 50, padding_idx=3)])
    init_bert(module)
    assert module[0].weight.std().item() == pytest.approx(0.02, rel=0.03) and (module[0].bias == 0).all()
    assert module[1].weight.std().item() == pytest.approx(0.02, rel=0.05) and (module[1].weight[3] == 0).all()


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="embed_dim=12 is not a multiple of num_heads=5"):
        Attention(12, 5, 0.0)
