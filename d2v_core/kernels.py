"""Linear maps, attention and convolutions in (B, T, C) layout that use the fast kernels of the machine.

Why: in fp32 torch's CPU `mm` is MKL, which gives AMD processors its AVX2 code (about 95 GFLOP/s per core where AVX-512
has 210); oneDNN, which torch ships and already uses for bf16, has no such rule. And a convolution along contiguous
channels is a matrix product on a view of its input, with no transpose before or after it.

Each function equals a function of torch.nn.functional up to rounding; inside `plain()` it is that function, and so it
is under torch.compile, which does its own fusing.
"""

from __future__ import annotations

import functools
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_use_plain = False


@contextmanager
def plain() -> Generator[None]:
    """Run the reference form: torch's own functions. For tests and comparisons."""
    global _use_plain
    before, _use_plain = _use_plain, True
    try:
        yield
    finally:
        _use_plain = before


def _is_plain() -> bool:
    return _use_plain or torch.compiler.is_compiling()


@functools.cache
def _has_onednn_fp32() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def _onednn(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.enabled and _has_onednn_fp32()


def _dense(x: Tensor) -> Tensor:
    """x or a copy of it that is contiguous or the transpose of something contiguous: oneDNN crawls on others."""
    if x.is_contiguous() or x.t().is_contiguous():
        return x
    return x.t().contiguous().t() if x.stride(0) == 1 else x.contiguous()


def mm_t(a: Tensor, b: Tensor, bias: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """(M, K), (N, K) -> a b^T + bias + plus, (M, N). `plus` (M, N) may be overwritten. Not differentiable."""
    if _onednn(a):
        a, b = _dense(a), _dense(b)
        if plus is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(a, plus, b, bias, "add")
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    if plus is not None:
        y = plus.addmm_(a, b.t())
        return y if bias is None else y.add_(bias)
    return a @ b.t() if bias is None else torch.addmm(bias, a, b.t())


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast does to the operands of a matrix product; a custom function has to ask for it."""
    kind = next(x for x in tensors if x is not None).device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if x is None else x.to(dtype) for x in tensors)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return mm_t(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        dx = mm_t(g, weight.t()).view(x.shape) if ctx.needs_input_grad[0] else None
        dw = mm_t(g.t(), x.reshape(-1, x.shape[-1]).t()) if ctx.needs_input_grad[1] else None
        return dx, dw, g.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear with oneDNN in fp32 on a CPU; F.linear itself everywhere else."""
    if _is_plain() or torch.is_autocast_enabled(x.device.type) or not _onednn(x):
        return F.linear(x, weight, bias)
    return cast(Tensor, _Linear.apply(x, weight, bias))  # pyright: ignore[reportUnknownMemberType]


class Linear(nn.Linear):
    """nn.Linear, computed by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


@functools.cache
def _has_onednn_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _kept(count: int, rate: float) -> tuple[Tensor, float]:
    """(count,) int16 for dropout, -1 (all bits set) = kept and 0 = dropped; and the share that is kept on average.

    Of 15 random bits each, so that the rate is met to 1/65536. torch's own mask draws a double for each element, which
    costs as much as all matrix products of attention.
    """
    limit = round(rate * (1 << 15))
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None).view(torch.int16)[:count]
    return bits.bitwise_and_(0x7FFF).neg_().add_(limit - 1).bitwise_right_shift_(15), 1.0 - limit / (1 << 15)


class _Attention(torch.autograd.Function):
    """Dropped weights are cleared bit by bit, which is cheaper than a product, and 1 / kept falls to the output."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        rows, heads, num_queries, width = q.shape
        scale = width**-0.5
        q, k, v = (x.reshape(rows * heads, -1, width) for x in (q * scale, k, v))
        logits = torch.bmm(q, k.transpose(1, 2)).view(rows, heads, num_queries, -1)
        if mask is not None:
            # The least finite number where SDPA has -inf: a row of them alone would be not a number.
            least = torch.finfo(logits.dtype).min
            if mask.dtype == torch.bool:
                logits.masked_fill_(~mask, least)
            else:
                logits.add_(mask.to(logits.dtype)).clamp_(min=least)
        weights = torch.softmax(logits, -1).flatten(0, 1)
        kept, share = _kept(weights.numel(), dropout) if dropout > 0 else (None, 1.0)
        ctx.save_for_backward(q, k, v, weights, kept)
        ctx.shape, ctx.scale, ctx.share = (rows, heads, num_queries, width), scale, share
        ctx.mask = None if mask is None else (mask.shape, mask.dtype)
        y = torch.bmm(_clear(weights, kept), v)
        return (y if kept is None else y.div_(share)).view(rows, heads, num_queries, width)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, weights, kept = ctx.saved_tensors
        rows, heads, num_queries, width = ctx.shape
        g = grad.reshape(rows * heads, num_queries, width)
        if kept is not None:
            g = g / ctx.share
        dv = torch.bmm(_clear(weights, kept).transpose(1, 2), g)
        dweights = torch.bmm(g, v.transpose(1, 2))
        if kept is not None:
            dweights.view(torch.int16).view(-1).bitwise_and_(kept)
        dlogits = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
        dmask = None
        if ctx.needs_input_grad[3]:
            shape, dtype = ctx.mask
            full = dlogits.view(rows, heads, num_queries, -1)
            shape = (1,) * (4 - len(shape)) + tuple(shape)
            axes = [i for i in range(4) if shape[i] == 1 and full.shape[i] > 1]
            dmask = full.sum(axes, keepdim=True, dtype=torch.float32) if axes else full
            dmask = dmask.view(ctx.mask[0]).to(dtype)
        dq = torch.bmm(dlogits, k).mul_(ctx.scale)
        dk = torch.bmm(dlogits.transpose(1, 2), q)
        return *(x.view(rows, heads, -1, width) for x in (dq, dk, dv)), dmask, None


def _clear(weights: Tensor, kept: Tensor | None) -> Tensor:
    """bf16 weights with +0 where `kept` is 0."""
    if kept is None:
        return weights
    return (weights.view(torch.int16) & kept.view(weights.shape)).view(weights.dtype)


# With 16 to 64 channels in each head and 8 to 512 keys, one thread of an AMD EPYC, forward and backward: torch's fused
# attention takes 1.1 (256 keys of 16 channels) to 9 times as long within these bounds, 0.8 times at 512 of 16.
SHORT, SHORT_PER_CHANNEL = 512, 16


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """F.scaled_dot_product_attention of (R, H, T, d), made for training in bf16 on a CPU with dropout or learned bias,
    where torch has no fused form and computes in fp32, and on short sequences, where the backward pass of its fused
    form takes several times as long; F.scaled_dot_product_attention itself everywhere else.

    Logits are rounded to bf16: the output is 1.5 to 2 times as far from the exact one as torch's, which is hardly worse
    than rounding the inputs makes it (docs/performance.md has the figures).
    """
    operands = (q, k, v)
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = cast("tuple[Tensor, Tensor, Tensor]", _autocast(q, k, v))
    learned = mask is not None and mask.requires_grad
    short = k.shape[2] <= min(SHORT_PER_CHANNEL * k.shape[3], SHORT)
    slow = torch.is_grad_enabled() and (dropout > 0 or learned or short)
    if _is_plain() or not slow or q.device.type != "cpu" or q.dtype != torch.bfloat16 or not _has_onednn_bf16():
        return F.scaled_dot_product_attention(*operands, attn_mask=mask, dropout_p=dropout)
    with torch.autocast("cpu", enabled=False):
        return cast(Tensor, _Attention.apply(q, k, v, mask, dropout))  # pyright: ignore[reportUnknownMemberType]


def _parts(kernel: int, stride: int) -> list[tuple[int, int]]:
    """(first tap, number of taps) of each matrix product: `stride` taps at once are a view of contiguous rows."""
    if kernel <= stride:
        return [(0, kernel)]
    return [(i, min(stride, kernel - i)) for i in range(0, kernel, stride)]


def _rows(x: Tensor, first: int, taps: int, stride: int, num_out: int) -> Tensor:
    """(B, T, C) -> (B * num_out, taps * C): the inputs of these taps for every output. A view where it can be one."""
    windows = x[:, first : first + (num_out - 1) * stride + taps].unfold(1, taps, stride)  # (B, num_out, C, taps)
    return windows.transpose(2, 3).reshape(-1, taps * x.shape[2])


def _tap_weight(weight: Tensor, first: int, taps: int) -> Tensor:
    """(O, C, K) -> (O, taps * C), contiguous."""
    return weight[:, :, first : first + taps].transpose(1, 2).reshape(weight.shape[0], -1)


class _Conv1dTimeMajor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        (num_rows, length, _), (out, _, kernel) = x.shape, weight.shape
        num_out = (length - kernel) // stride + 1
        y: Tensor | None = None
        for first, taps in _parts(kernel, stride):
            rows = _rows(x, first, taps, stride, num_out)
            y = mm_t(rows, _tap_weight(weight, first, taps), bias if first == 0 else None, y)
        assert y is not None
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.has_bias = stride, bias is not None
        return y.view(num_rows, num_out, out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride = ctx.stride
        (_, length, channels), (out, _, kernel) = x.shape, weight.shape
        num_out = grad.shape[1]
        grad = grad.contiguous()
        g = grad.view(-1, out)
        parts = _parts(kernel, stride)
        dx = dw = None
        if ctx.needs_input_grad[1]:
            dw = torch.empty_like(weight)
            for first, taps in parts:
                rows = _rows(x, first, taps, stride, num_out)
                part = mm_t(g.t(), rows.t())
                dw[:, :, first : first + taps] = part.view(out, taps, channels).transpose(1, 2)
        if ctx.needs_input_grad[0]:
            dx = _input_grad(grad, weight, length, stride)
        return dx, dw, g.sum(0) if ctx.has_bias else None, None


def _input_grad(grad: Tensor, weight: Tensor, length: int, stride: int) -> Tensor:
    """(B, num_out, O) -> (B, length, C). Output j owns the inputs from j * stride on; taps beyond them fall to the
    outputs behind it, and are added there."""
    (num_rows, num_out, out), (_, channels, kernel) = grad.shape, weight.shape
    slots = max(num_out + -(-kernel // stride) - 1, -(-length // stride))
    padded = F.pad(grad, (0, 0, 0, slots - num_out))  # slots without an output get zeros from the product
    first_taps = min(stride, kernel)
    own = mm_t(padded.view(-1, out), _tap_weight(weight, 0, first_taps).t())
    if first_taps < stride:
        own = F.pad(own, (0, (stride - first_taps) * channels))
    dx = own.view(num_rows, slots, stride, channels)
    for first in range(stride, kernel, stride):
        taps = min(stride, kernel - first)
        late = mm_t(grad.view(-1, out), _tap_weight(weight, first, taps).t())
        shift = first // stride
        dx[:, shift : shift + num_out, :taps] += late.view(num_rows, num_out, taps, channels)
    return dx.view(num_rows, slots * stride, channels)[:, :length]


def conv1d_time_major(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """F.conv1d of (B, T, C) with (O, C, K), to (B, T', O): no padding, no groups."""
    if _is_plain():
        return F.conv1d(x.transpose(1, 2), weight, bias, stride).transpose(1, 2)
    if x.shape[2] * weight.shape[2] <= 64:  # a raw signal: no product worth its name; the strides say channels-last
        y = F.conv2d(x.unsqueeze(1).permute(0, 3, 1, 2), weight.unsqueeze(2), bias, (1, stride))
        return y.permute(0, 2, 3, 1).squeeze(1)
    x_, weight_, bias_ = _autocast(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return cast(Tensor, _Conv1dTimeMajor.apply(x_, weight_, bias_, stride))  # pyright: ignore[reportUnknownMemberType]


def _windows(x: Tensor, kernel: int, left: int, groups: int) -> Tensor:
    """(B, T, D) -> (G, B * T, K * D/G), copied: what each output of a same-length convolution sees."""
    num_rows, length, dim = x.shape
    padded = F.pad(x, (0, 0, left, kernel - 1 - left))
    windows = padded.view(num_rows, -1, groups, dim // groups).unfold(1, kernel, 1)  # (B, T, G, c, K)
    return windows.permute(2, 0, 1, 4, 3).reshape(groups, num_rows * length, -1)


def _grouped(x: Tensor, weight: Tensor, bias: Tensor | None, left: int) -> Tensor:
    """weight (G, o, c, K) on (B, T, D) with `left` zeros in front, to the same length."""
    groups, out, _, kernel = weight.shape
    num_rows, length = x.shape[:2]
    matrix = weight.transpose(2, 3).reshape(groups, out, -1)  # (G, o, K * c)
    y = torch.bmm(_windows(x, kernel, left, groups), matrix.transpose(1, 2))
    y = y.view(groups, num_rows, length, out).permute(1, 2, 0, 3).reshape(num_rows, length, groups * out)
    return y if bias is None else y.add_(bias)


def _grouped_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, left: int) -> Tensor:
    """As `_grouped`, by oneDNN's direct convolution, which takes (B, T, D) as channels-last and needs no windows."""
    groups, out, per_group, kernel = weight.shape
    padded = F.pad(x, (0, 0, left, kernel - 1 - left)).unsqueeze(1).permute(0, 3, 1, 2)
    y = torch.mkldnn_convolution(
        padded, weight.reshape(groups * out, per_group, 1, kernel), bias, (0, 0), (1, 1), (1, 1), groups
    )
    return y.permute(0, 2, 3, 1).squeeze(1)


class _GroupedConv1dSame(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        per_group, kernel = weight.shape[1:]
        ctx.save_for_backward(x, weight)
        ctx.groups, ctx.has_bias = groups, bias is not None
        run = _grouped_onednn if _onednn(x) else _grouped
        return run(x, weight.view(groups, -1, per_group, kernel), bias, kernel // 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        groups, (per_group, kernel) = ctx.groups, weight.shape[1:]
        grad = grad.contiguous()
        dx = dw = None
        if ctx.needs_input_grad[1]:
            out = weight.shape[0] // groups
            g = grad.view(-1, groups, out).permute(1, 2, 0)  # (G, o, B * T)
            seen = _windows(x, kernel, kernel // 2, groups)
            if _onednn(x):
                part = torch.stack([mm_t(a, b.t()) for a, b in zip(g.contiguous(), seen, strict=True)])
            else:
                part = torch.bmm(g, seen)
            dw = part.view(-1, kernel, per_group).transpose(1, 2)
        if ctx.needs_input_grad[0]:  # the same convolution with each tap's matrix transposed and the taps reversed
            back = weight.view(groups, -1, per_group, kernel).transpose(1, 2).flip(3)
            dx = (_grouped_onednn if _onednn(x) else _grouped)(grad, back, None, kernel - 1 - kernel // 2)
        return dx, dw, grad.sum((0, 1)) if ctx.has_bias else None, None


def grouped_conv1d_same(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """F.conv1d(padding=K // 2, groups) of (B, T, D) with (O, D / groups, K), to (B, T, O): for an even K the one token
    too many at the end is left out."""
    if _is_plain():
        y = F.conv1d(x.transpose(1, 2), weight, bias, padding=weight.shape[2] // 2, groups=groups)
        return y[..., : x.shape[1]].transpose(1, 2)
    x_, weight_, bias_ = _autocast(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return cast(Tensor, _GroupedConv1dSame.apply(x_, weight_, bias_, groups))  # pyright: ignore[reportUnknownMemberType]
