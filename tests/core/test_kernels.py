"""The fast forms equal torch's own functions, forwards and backwards, with and without oneDNN."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from d2v_core import kernels


@pytest.fixture(params=[True, False], ids=["onednn", "blas"])
def onednn(request, monkeypatch):
    """Both kernels of matrix products; only the second where the machine lacks the first."""
    if not request.param:
        monkeypatch.setattr(kernels, "_has_onednn_fp32", lambda: False)


def agree(fast, reference, shapes, tolerance=2e-5):
    """Values and all gradients within this share of the largest element."""
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    y, r = fast(*inputs), reference(*inputs)
    assert y.shape == r.shape
    grad = torch.randn_like(r)
    ours, theirs = torch.autograd.grad(y, inputs, grad), torch.autograd.grad(r, inputs, grad)
    for a, b in zip((y, *ours), (r, *theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "length, channels, out, kernel, stride",
    [(131, 1, 16, 10, 5), (64, 32, 24, 3, 2), (65, 32, 24, 3, 2), (66, 32, 24, 2, 2), (67, 32, 24, 2, 2),
     (50, 32, 8, 5, 2), (51, 40, 8, 2, 3), (50, 40, 8, 7, 3), (20, 70, 8, 3, 1), (10, 33, 8, 10, 5)],
)  # fmt: skip
def test_strided_convolution(onednn, rows, length, channels, out, kernel, stride):
    agree(
        lambda x, w, b: kernels.conv1d_time_major(x, w, b, stride),
        lambda x, w, b: F.conv1d(x.transpose(1, 2), w, b, stride).transpose(1, 2),
        [(rows, length, channels), (out, channels, kernel), (out,)],
    )


@pytest.mark.parametrize(
    "length, dim, kernel, groups", [(37, 32, 19, 4), (37, 32, 4, 4), (5, 32, 19, 16), (37, 32, 3, 1)]
)
def test_grouped_convolution_of_the_same_length(onednn, length, dim, kernel, groups):
    agree(
        lambda x, w, b: kernels.grouped_conv1d_same(x, w, b, groups),
        lambda x, w, b: F.conv1d(x.transpose(1, 2), w, b, 1, kernel // 2, 1, groups)[..., :length].transpose(1, 2),
        [(2, length, dim), (dim, dim // groups, kernel), (dim,)],
    )


def test_linear(onednn):
    agree(kernels.linear, F.linear, [(3, 37, 48), (24, 48), (24,)])


def test_autocast_casts_as_torch_does():
    x, weight = torch.randn(2, 65, 32, requires_grad=True), torch.randn(24, 32, 3)
    with torch.autocast("cpu", torch.bfloat16):
        fast = kernels.conv1d_time_major(x, weight, None, 2)
        positions = kernels.grouped_conv1d_same(fast, torch.randn(24, 6, 19), None, 4)
        reference = F.conv1d(x.transpose(1, 2), weight, None, 2).transpose(1, 2)
    assert fast.dtype == positions.dtype == reference.dtype == torch.bfloat16
    torch.testing.assert_close(fast.float(), reference.float(), rtol=0, atol=2**-7 * reference.abs().max().item())
    positions.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


WEIGHTED = {
    "linear": (kernels.linear, [(3, 37, 48), (24, 48), (24,)]),
    "gelu": (kernels.gelu_linear, [(3, 37, 48), (24, 48), (24,)]),
    "strided": (lambda x, w, b: kernels.conv1d_time_major(x, w, b, 2), [(2, 65, 48), (24, 48, 3), (24,)]),
    "grouped": (lambda x, w, b: kernels.grouped_conv1d_same(x, w, b, 4), [(2, 37, 48), (48, 12, 19), (48,)]),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_under_autocast_weights_are_kept_as_they_are(name):
    """Values and gradients are those of torch's own function under autocast; for the backward pass the weight itself is
    kept, and nothing of its size in half precision."""
    fast, shapes = WEIGHTED[name]
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    kept = []

    def note(tensor):
        kept.append(tensor)
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = fast(*inputs)
    with torch.autocast("cpu", torch.bfloat16), kernels.plain():
        expected = fast(*inputs)
    grad = torch.randn_like(expected)
    ours, theirs = torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert [g.dtype for g in ours] == [torch.float32] * 3
    near([y.float(), *ours], [expected.float(), *theirs], 0.01)
    assert any(tensor.data_ptr() == inputs[1].data_ptr() for tensor in kept)
    assert not any(tensor.dtype == torch.bfloat16 and tensor.numel() == inputs[1].numel() for tensor in kept)


def test_plain_is_torchs_own(monkeypatch):
    def refuse(*args):
        raise AssertionError("the fast form ran")

    monkeypatch.setattr(kernels._Conv1dTimeMajor, "apply", refuse)
    x, weight = torch.randn(1, 65, 32), torch.randn(24, 32, 3)
    with kernels.plain():
        torch.testing.assert_close(
            kernels.conv1d_time_major(x, weight, None, 2), F.conv1d(x.transpose(1, 2), weight, None, 2).transpose(1, 2)
        )
    with pytest.raises(AssertionError, match="the fast form ran"):
        kernels.conv1d_time_major(x, weight, None, 2)


def test_compiles_in_one_graph():
    x, weight = torch.randn(1, 65, 32), torch.randn(24, 32, 3)
    compiled = torch.compile(lambda x, w: kernels.conv1d_time_major(x, w, None, 2), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), kernels.conv1d_time_major(x, weight, None, 2), rtol=1e-5, atol=1e-4)


def attention_case(kind, dtype):
    """q, k, v; the learned part of the mask or None; the mask as a function of both; the gradient of the output.

    2 rows, of which the second is padded, 3 heads, 37 tokens.
    """
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 37, 16).to(dtype).requires_grad_() for _ in range(3)]
    bias = torch.randn(1, 3, 37, 37, requires_grad=True) if "bias" in kind else None
    keep = torch.arange(37).expand(2, 1, 1, 37) < torch.tensor([37, 20]).view(2, 1, 1, 1)

    def mask():
        if "padding" not in kind:
            return bias
        return keep if bias is None else bias.masked_fill(~keep, float("-inf"))

    return inputs, bias, mask, torch.randn(2, 3, 37, 16)


KINDS = ["", "bias", "padding", "bias and padding"]
needs_bf16 = pytest.mark.skipif(not kernels._has_onednn_bf16(), reason="this processor has no fast bf16")


def gradients(y, inputs, bias, grad):
    """The output and the gradients of everything, float32."""
    wanted = [*inputs, *([] if bias is None else [bias])]
    return [x.float() for x in (y, *torch.autograd.grad(y, wanted, grad.to(y.dtype)))]


def near(ours, theirs, tolerance):
    """Within this share of the norm: rounding, which in bf16 comes to 1 %."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() < tolerance * b.norm()


DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)]


@pytest.mark.parametrize(
    ("dtype", "dropout"),
    [(torch.float32, 1e-9), *(pytest.param(torch.bfloat16, rate, marks=needs_bf16) for rate in (0.0, 1e-9))],
)
@pytest.mark.parametrize("kind", KINDS)
def test_attention(kind, dtype, dropout, onednn, monkeypatch):
    """A dropout rate so low that it rounds to none, and in bf16 a short sequence, take the fast form: the result is
    torch's."""
    if dropout:
        monkeypatch.setattr(kernels, "SHORT", 0)
    inputs, bias, mask, grad = attention_case(kind, dtype)
    used = []
    apply = kernels._Attention.apply
    monkeypatch.setattr(kernels._Attention, "apply", lambda *args: used.append(1) or apply(*args))
    ours = gradients(kernels.attention(*inputs, mask(), dropout), inputs, bias, grad)
    assert used
    exact = [x.detach().float().requires_grad_() for x in inputs]
    theirs = gradients(F.scaled_dot_product_attention(*exact, attn_mask=mask()), exact, bias, grad)
    near(ours, theirs, 1e-5 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_with_dropout(kind, dtype, onednn, monkeypatch):
    """The result is what the drawn signs make of torch's softmax."""
    inputs, bias, mask, grad = attention_case(kind, dtype)
    drawn = []
    draw = kernels._drop
    monkeypatch.setattr(kernels, "_drop", lambda w, rate: drawn.append((draw(w, rate), ~w.signbit())) or drawn[0][0])
    ours = gradients(kernels.attention(*inputs, mask(), 0.3), inputs, bias, grad)
    ((share, kept),) = drawn
    assert abs(share - 0.7) < 2**-15
    q, k, v = exact = [x.detach().float().requires_grad_() for x in inputs]
    logits, added = q @ k.transpose(2, 3) / 4.0, mask()
    if added is not None:
        logits = logits.masked_fill(~added, float("-inf")) if added.dtype == torch.bool else logits + added
    y = (logits.softmax(-1) * kept.view(logits.shape) / share) @ v
    near(ours, gradients(y, exact, bias, grad), 1e-5 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_by_sign(dtype):
    torch.manual_seed(0)
    before = torch.rand(1_000_001).to(dtype)
    before[:100] = 0.0
    weights = before.clone()
    share = kernels._drop(weights, 0.1)
    assert abs(share - 0.9) < 2**-15
    assert torch.equal(weights.abs(), before)
    dropped = weights.signbit().double()  # -0.0 has the sign too
    assert abs(dropped.mean() - 0.1) < 4 * 0.3e-3  # four standard deviations
    for distance in range(1, 9):  # four numbers come from one draw: they must know nothing of each other
        assert abs((dropped[distance:] * dropped[:-distance]).mean() - 0.01) < 4 * 0.1e-3
    again = before.clone()
    kernels._drop(again, 0.1)
    assert not torch.equal(weights, again)
    assert kernels._drop(again[:1000].abs_(), 1.0) == 0.0 and again[:1000].signbit().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_elsewhere_is_torch_own(dtype, monkeypatch):
    """Without dropout or a learned bias in fp32; in bf16, if the sequence is long or no gradients are asked for."""
    monkeypatch.setattr(kernels, "SHORT_PER_CHANNEL", 2)  # 32 keys where there are 37
    inputs, _, mask, _ = attention_case("padding", dtype)
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=mask())
    assert torch.equal(kernels.attention(*inputs, mask(), 0.0), expected)
    monkeypatch.undo()
    with torch.no_grad():
        assert torch.equal(kernels.attention(*inputs, mask(), 0.0), expected)


def test_plain_attention_is_torch_own():
    inputs, _, mask, _ = attention_case("bias", torch.float32)
    with kernels.plain():
        torch.manual_seed(1)
        ours = kernels.attention(*inputs, mask(), 0.1)
    torch.manual_seed(1)
    assert torch.equal(ours, F.scaled_dot_product_attention(*inputs, attn_mask=mask(), dropout_p=0.1))


@needs_bf16
@pytest.mark.parametrize("way", ["training", "teacher", "plain"])
def test_a_bias_stays_fp32(way):
    """A bias whose steps bf16 cannot tell apart: 256, 256.5, 257, ... of which each row sees the difference."""
    q, k, v = (torch.zeros(1, 1, 4, 8, requires_grad=way == "training") for _ in range(3))
    v = torch.eye(4, 8).view(1, 1, 4, 8)
    bias = (256 + torch.arange(4) / 2).expand(1, 1, 4, 4).clone().requires_grad_(way == "training")
    with torch.autocast("cpu", torch.bfloat16), kernels.plain() if way == "plain" else nullcontext():
        y = kernels.attention(q, k, v, bias, 0.0)
    expected = torch.softmax(torch.arange(4) / 2, 0)
    torch.testing.assert_close(y[0, 0, :, :4].float(), expected.expand(4, 4), rtol=0, atol=2**-8)


@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=needs_bf16)])
def test_gelu_and_linear_map(onednn, autocast):
    def plain(x, w, b):
        with kernels.plain():
            return kernels.gelu_linear(x, w, b)

    shapes = [(3, 37, 48), (24, 48), (24,)]
    if not autocast:
        agree(kernels.gelu_linear, plain, shapes)
        return
    with torch.autocast("cpu", torch.bfloat16):
        agree(kernels.gelu_linear, plain, shapes, tolerance=2**-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("rows, length, kernel, stride", [(1, 65, 3, 2), (3, 66, 2, 2), (2, 51, 7, 3), (2, 1500, 3, 2)])
def test_norm_gelu_and_convolution(onednn, monkeypatch, dtype, raw, rows, length, kernel, stride):
    """Values and all gradients, those of the norm included, are those of torch in fp32; in pieces or in one."""
    monkeypatch.setattr(kernels, "PIECE", 100)
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(32)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    w, b = torch.randn(24, 32, kernel, requires_grad=True), torch.randn(24, requires_grad=True)
    front = (torch.randn(32, 1, 10, requires_grad=True), torch.randn(32, requires_grad=True), 5) if raw else None
    x = torch.randn(rows, 5 * length + 7, 1) if raw else torch.randn(rows, length, 32)
    x = x.to(dtype).requires_grad_(not raw)
    exact = x.detach().float().requires_grad_(not raw)
    with kernels.plain():
        theirs = kernels.norm_gelu_conv1d(exact, norm, (w, b, stride), front)
    grad = (torch.randn(theirs.shape) + 0.1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = kernels.norm_gelu_conv1d(x, norm, (w, b, stride), front)
    assert ours.dtype == dtype
    wanted = [norm.weight, norm.bias, w, b, *(front or ())[:2]]
    found = [ours, *torch.autograd.grad(ours, [*([] if raw else [x]), *wanted], grad)]
    expected = [theirs, *torch.autograd.grad(theirs, [*([] if raw else [exact]), *wanted], grad.float())]
    near([y.float() for y in found], expected, 1e-5 if dtype == torch.float32 else 0.02)


def test_gradients_of_a_norm_in_bf16_over_many_tokens():
    """Where torch's own are off by a tenth and more."""
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(64)
    x, g = torch.randn(1, 20000, 64).bfloat16(), (torch.randn(1, 20000, 64) + 0.05).bfloat16()
    of = torch.ops.aten.native_layer_norm
    _, mean, rstd = of(x, (64,), norm.weight, norm.bias, 1e-5)
    ours = kernels._norm_backward(g.clone(), x, mean, rstd, norm.weight, norm.bias)
    _, mean, rstd = of(x.float(), (64,), norm.weight, norm.bias, 1e-5)
    theirs = kernels._norm_backward(g.float(), x.float(), mean, rstd, norm.weight, norm.bias)
    near([y.float() for y in ours], theirs, 0.01)
