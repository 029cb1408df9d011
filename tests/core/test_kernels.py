"""The fast forms equal torch's own functions, forwards and backwards, with and without oneDNN."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from d2v_core import kernels


@pytest.fixture(params=[True, False], ids=["onednn", "blas"])
def onednn(request, monkeypatch):
    """Both kernels of matrix products; only the second where the machine lacks the first."""
    if not request.param:
        monkeypatch.setattr(kernels, "_has_onednn_fp32", lambda: False)


def agree(fast, reference, shapes):
    """Values and all gradients within 2e-5 of the largest element."""
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    y, r = fast(*inputs), reference(*inputs)
    assert y.shape == r.shape
    grad = torch.randn_like(r)
    ours, theirs = torch.autograd.grad(y, inputs, grad), torch.autograd.grad(r, inputs, grad)
    for a, b in zip((y, *ours), (r, *theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * b.abs().max().item())


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
