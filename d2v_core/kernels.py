"""Linear maps, attention and convolutions in (B, T, C) layout that use the fast kernels of the machine and keep little
for the backward pass.

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


def _autocast(x: Tensor) -> Tensor:
    """What autocast does to an operand of a matrix product; a custom function has to ask for it.

    Weights are rounded by the functions below, in the forward and again in the backward pass: to round is cheap, and a
    copy of each weight in half precision would live from the one to the other.
    """
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _like(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """A weight in the type to compute in, that of x."""
    return None if weight is None else weight.to(x.dtype)


class _Linear(torch.autograd.Function):
    """Of x, or of its GELU, which is computed again. x is of the type to compute in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias, ctx.gelu = None if bias is None else bias.dtype, gelu
        rows = (F.gelu(x) if gelu else x).reshape(-1, x.shape[-1])
        return mm_t(rows, weight.to(x.dtype), _like(bias, x)).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        dx = dw = dbias = None
        if ctx.needs_input_grad[1]:
            rows = (F.gelu(x) if ctx.gelu else x).reshape(-1, x.shape[-1])
            dw = mm_t(g.t(), rows.t()).to(weight.dtype)
            del rows
        if ctx.needs_input_grad[0]:
            dx = mm_t(g, weight.to(x.dtype).t()).view(x.shape)
            if ctx.gelu:
                dx = torch.ops.aten.gelu_backward(dx, x)
        if ctx.needs_input_grad[2]:
            dbias = g.sum(0, dtype=ctx.bias)
        return dx, dw, dbias, None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    x = _autocast(x)
    with torch.autocast("cpu", enabled=False):
        return cast(Tensor, _Linear.apply(x, weight, bias, gelu))  # pyright: ignore[reportUnknownMemberType]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear on a CPU: with oneDNN in fp32, and under autocast with less to keep for the backward pass."""
    if _is_plain() or x.device.type != "cpu" or not (_onednn(x) or torch.is_autocast_enabled("cpu")):
        return F.linear(x, weight, bias)
    return _linear(x, weight, bias, gelu=False)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear(F.gelu(x), weight, bias), on a CPU with less to keep for the backward pass: what the GELU is given, and
    not what it gives."""
    if _is_plain() or x.device.type != "cpu":
        return F.linear(F.gelu(x), weight, bias)
    return _linear(x, weight, bias, gelu=True)


class Linear(nn.Linear):
    """nn.Linear, computed by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(input, self.weight, self.bias)


@functools.cache
def _has_onednn_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _drop(weights: Tensor, rate: float) -> float:
    """Mark weights to drop, in place, by their sign; returns the share that is kept on average.

    Weights of attention are never negative, so relu(w) is what is left and |w| what there was: nothing else has to be
    kept. Of 15 random bits each, so that the rate is met to 1/65536: torch's own mask draws a double for each element,
    which costs as much as all matrix products of attention.
    """
    limit, count = round(rate * (1 << 15)), weights.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None).view(torch.int16)[:count]
    below = bits.bitwise_and_(0x7FFF).sub_(limit)  # negative, so with the sign's bit set, where the weight is dropped
    if weights.dtype == torch.float32:
        weights.view(torch.int32).view(-1).bitwise_or_(below.to(torch.int32).bitwise_and_(-(1 << 31)))
    else:
        weights.view(torch.int16).view(-1).bitwise_or_(below.bitwise_and_(-(1 << 15)))
    return 1.0 - limit / (1 << 15)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """(N, M, K), (N, L, K) -> (N, M, L), a b^T of each pair."""
    if _onednn(a):
        return torch.stack([mm_t(x, y) for x, y in zip(a, b, strict=True)])
    return torch.bmm(a, b.transpose(1, 2))


def _products_t(a: Tensor, b: Tensor) -> Tensor:
    """(N, M, L), (N, M, K) -> (N, L, K), a^T b of each pair; a is the larger one."""
    if _onednn(a):  # its transpose, since oneDNN would rather have the small operand copied
        return _products(b.transpose(1, 2).contiguous(), a.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(a.transpose(1, 2), b)


class _Attention(torch.autograd.Function):
    """What is kept: queries, keys, values and one set of weights, with those to drop marked by their sign."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        rows, heads, num_queries, width = q.shape
        scale = width**-0.5
        q, k, v = (x.reshape(rows * heads, -1, width) for x in (q * scale, k, v))
        logits = _products(q, k).view(rows, heads, num_queries, -1)
        if mask is not None:
            logits = _masked(logits, mask)
        weights = torch.softmax(logits, -1).to(q.dtype).flatten(0, 1)
        share = _drop(weights, dropout) if dropout > 0 else 1.0
        ctx.save_for_backward(q, k, v, weights)
        ctx.shape, ctx.scale, ctx.dropout, ctx.share = (rows, heads, num_queries, width), scale, dropout, share
        ctx.mask = None if mask is None else (mask.shape, mask.dtype)
        y = _products(torch.relu(weights) if dropout > 0 else weights, v.transpose(1, 2))
        return (y if dropout == 0 else y.div_(share)).view(rows, heads, num_queries, width)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        rows, heads, num_queries, width = ctx.shape
        g = grad.reshape(rows * heads, num_queries, width)
        if ctx.dropout > 0:
            g = g / ctx.share
        dweights = _products(g, v)
        if ctx.dropout > 0:
            torch.ops.aten.threshold_backward.grad_input(dweights, weights, 0, grad_input=dweights)
            dv = _products_t(torch.relu(weights), g)
            weights = weights.abs()
        else:
            dv = _products_t(weights, g)
        dlogits = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
        dmask = None
        if ctx.needs_input_grad[3]:
            shape, dtype = ctx.mask
            full = dlogits.view(rows, heads, num_queries, -1)
            shape = (1,) * (4 - len(shape)) + tuple(shape)
            axes = [i for i in range(4) if shape[i] == 1 and full.shape[i] > 1]
            dmask = full.sum(axes, keepdim=True, dtype=torch.float32) if axes else full
            dmask = dmask.view(ctx.mask[0]).to(dtype)
        dq = _products(dlogits, k.transpose(1, 2)).mul_(ctx.scale)
        dk = _products_t(dlogits, q)
        return *(x.reshape(rows, heads, -1, width) for x in (dq, dk, dv)), dmask, None


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits with places shut (bool) or a bias added, which is float32 and stays it: the sum is float32 too.

    What is shut gets the least finite number where SDPA has -inf: a row of them alone would be not a number.
    """
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    logits = logits.to(torch.promote_types(logits.dtype, mask.dtype)) + mask
    return logits.clamp(min=torch.finfo(logits.dtype).min)


def _biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float) -> Tensor:
    """Attention as it is defined, with a float32 bias on half-precision logits, where SDPA would round the bias."""
    logits = _masked((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1), bias)
    return F.dropout(torch.softmax(logits, -1).to(q.dtype), dropout, dropout > 0) @ v


# With 16 to 64 channels in each head and 8 to 512 keys, one thread of an AMD EPYC, forward and backward: torch's fused
# attention takes 1.1 (256 keys of 16 channels) to 9 times as long within these bounds, 0.8 times at 512 of 16.
SHORT, SHORT_PER_CHANNEL = 512, 16


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """F.scaled_dot_product_attention of (R, H, T, d), faster where torch has no fused form, in training on a CPU with
    dropout or a learned bias, and on short sequences in bf16, where the backward pass of its fused form takes several
    times as long. With a float32 bias in half precision it is more exact: SDPA rounds the bias.

    In bf16 logits are rounded: the output is 1.5 to 2 times as far from the exact one as torch's, which computes in
    fp32 there and is hardly better than the rounding of the inputs (docs/performance.md has the figures).
    """
    operands = (q, k, v)
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = _autocast(q), _autocast(k), _autocast(v)
    learned = mask is not None and mask.requires_grad
    short = q.dtype == torch.bfloat16 and k.shape[2] <= min(SHORT_PER_CHANNEL * k.shape[3], SHORT)
    slow = torch.is_grad_enabled() and (dropout > 0 or learned or short)
    fast = q.dtype == torch.float32 or (q.dtype == torch.bfloat16 and _has_onednn_bf16())
    with torch.autocast(q.device.type, enabled=False):
        if slow and fast and q.device.type == "cpu" and not _is_plain():
            return cast(Tensor, _Attention.apply(q, k, v, mask, dropout))  # pyright: ignore[reportUnknownMemberType]
        if mask is not None and mask.dtype == torch.float32 != q.dtype:
            return _biased(q, k, v, mask, dropout)
    return F.scaled_dot_product_attention(*operands, attn_mask=mask, dropout_p=dropout)


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


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """(B, T, C), (O, C, K) -> (B, num_out, O)."""
    (num_rows, length, _), (out, _, kernel) = x.shape, weight.shape
    num_out = (length - kernel) // stride + 1
    y: Tensor | None = None
    for first, taps in _parts(kernel, stride):
        rows = _rows(x, first, taps, stride, num_out)
        y = mm_t(rows, _tap_weight(weight, first, taps), bias if first == 0 else None, y)
    assert y is not None
    return y.view(num_rows, num_out, out)


def _weight_grad(grad: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """(B, num_out, O) contiguous, (B, T, C) -> (O, C, K)."""
    out, channels, kernel = weight.shape
    dw = torch.empty_like(weight)
    g = grad.view(-1, out)
    for first, taps in _parts(kernel, stride):
        part = mm_t(g.t(), _rows(x, first, taps, stride, grad.shape[1]).t())
        dw[:, :, first : first + taps] = part.view(out, taps, channels).transpose(1, 2)
    return dw


class _Conv1dTimeMajor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.has_bias = stride, bias is not None
        return _convolved(x, weight.to(x.dtype), _like(bias, x), stride)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, kept = ctx.saved_tensors
        weight, grad = kept.to(x.dtype), grad.contiguous()
        dw = _weight_grad(grad, x, weight, ctx.stride).to(kept.dtype) if ctx.needs_input_grad[1] else None
        dx = _input_grad(grad, weight, x.shape[1], ctx.stride) if ctx.needs_input_grad[0] else None
        return dx, dw, grad.sum((0, 1)) if ctx.has_bias else None, None


def _norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a layer norm's input (B, T, C), scale and shift; the latter two in float32. May overwrite `grad`.

    In half precision torch's kernel adds up in half precision: over 25,599 tokens in bf16 its gradients of scale and
    shift were off by 17 % and 36 %. Sums that a matrix product takes are in float32.
    """
    exact = x.dtype == torch.float32
    dx, dscale, dshift = torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[-1:], mean, rstd, scale, shift, [True, exact, exact]
    )
    if exact:
        return dx, dscale, dshift
    g = grad.flatten(0, 1)
    ones = torch.ones(1, len(g), dtype=g.dtype)
    dshift = ones @ g
    g = g.mul_(rstd.view(-1, 1).to(g.dtype))
    of_mean = mean.view(1, -1).to(g.dtype) @ g
    dscale = (ones @ g.mul_(x.flatten(0, 1))).float() - of_mean.float()
    return dx, dscale[0], dshift[0].float()


PIECE = 4096
"""Outputs that `_NormGeluConv1d` works on at once, so that what is in between stays small."""


def _from_signal(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """A convolution of few channels, by torch's own for two axes; the strides say channels-last."""
    y = F.conv2d(x.unsqueeze(1).permute(0, 3, 1, 2), weight.unsqueeze(2), bias, (1, stride))
    return y.permute(0, 2, 3, 1).squeeze(1)


class _NormGeluConv1d(torch.autograd.Function):
    """Keeps what the norm is given and computes norm and GELU again: a third of what there would be to keep. With the
    convolution of a signal in front (`raw`) it keeps the signal alone, from which the largest tensor of all is soon
    made again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float, weight: Tensor, bias: Tensor | None, stride: int,
        raw: Tensor | None, raw_bias: Tensor | None, raw_stride: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, scale, shift, weight, raw, raw_bias)
        ctx.eps, ctx.stride, ctx.has_bias, ctx.raw_stride = eps, stride, bias is not None, raw_stride
        length = x.shape[1] if raw is None else (x.shape[1] - raw.shape[2]) // raw_stride + 1
        num_out = (length - weight.shape[2]) // stride + 1
        if num_out < 1:
            raise RuntimeError(f"Kernel size {weight.shape[2]} can't be greater than the input's {length} tokens")
        weight, bias, raw, raw_bias = weight.to(x.dtype), _like(bias, x), _like(raw, x), _like(raw_bias, x)
        y = x.new_empty(x.shape[0], num_out, weight.shape[0])
        for first, last, seen in _pieces(num_out, weight.shape[2], stride):
            inputs = (
                x[:, seen] if raw is None else _from_signal(_part(x, seen, raw, raw_stride), raw, raw_bias, raw_stride)
            )
            normed = F.layer_norm(inputs, inputs.shape[-1:], scale, shift, eps)
            y[:, first:last] = _convolved(torch.ops.aten.gelu_(normed), weight, bias, stride)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, scale, shift, *kept = ctx.saved_tensors
        weight, raw, raw_bias = kept[0].to(x.dtype), _like(kept[1], x), _like(kept[2], x)
        stride, raw_stride = ctx.stride, ctx.raw_stride
        dw, dscale, dshift = (torch.zeros_like(z, dtype=torch.float32) for z in (weight, scale, shift))
        dx = torch.zeros_like(x) if raw is None else None
        draw = None if raw is None else torch.zeros_like(raw, dtype=torch.float32)
        draw_bias = None if raw_bias is None else torch.zeros_like(raw_bias, dtype=torch.float32)
        late: Tensor | None = None  # what a piece gives to inputs that the next one sees too
        for first, last, seen in _pieces(grad.shape[1], weight.shape[2], stride):
            signal = x[:, seen] if raw is None else _part(x, seen, raw, raw_stride)
            inputs = signal.contiguous() if raw is None else _from_signal(signal, raw, raw_bias, raw_stride)
            g = grad[:, first:last].contiguous()
            normed, mean, rstd = torch.ops.aten.native_layer_norm(inputs, inputs.shape[-1:], scale, shift, ctx.eps)
            dw += _weight_grad(g, F.gelu(normed), weight, stride)
            d = _input_grad(g, weight, inputs.shape[1], stride)
            if late is not None:
                d[:, : late.shape[1]] += late
            done = inputs.shape[1] if last == grad.shape[1] else (last - first) * stride
            late = d[:, done:].clone()
            d, inputs, normed, mean, rstd = (z[:, :done].contiguous() for z in (d, inputs, normed, mean, rstd))
            d = torch.ops.aten.gelu_backward.grad_input(d, normed, grad_input=d)
            d, of_scale, of_shift = _norm_backward(d, inputs, mean, rstd, scale, shift)
            dscale += of_scale
            dshift += of_shift
            places = slice(seen.start, seen.start + done)
            if dx is not None:
                dx[:, places] = d
            if raw is not None and draw is not None:
                draw += _signal_grad(d, _part(x, places, raw, raw_stride), raw, raw_stride)
                if draw_bias is not None:
                    draw_bias += d.sum((0, 1))
        dbias = grad.sum((0, 1)) if ctx.has_bias else None
        return dx, dscale, dshift, None, dw, dbias, None, draw, draw_bias, None


def _part(x: Tensor, seen: slice, weight: Tensor, stride: int) -> Tensor:
    """What the outputs `seen` of a convolution are made from."""
    return x[:, seen.start * stride : (seen.stop - 1) * stride + weight.shape[2]]


def _signal_grad(grad: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Gradient of `_from_signal`'s weight."""
    return torch.ops.aten.convolution_backward(
        grad.unsqueeze(1).permute(0, 3, 1, 2), x.unsqueeze(1).permute(0, 3, 1, 2), weight.unsqueeze(2), None,
        (1, stride), (0, 0), (1, 1), False, (0, 0), 1, (False, True, False),
    )[1].squeeze(2)  # fmt: skip


def _pieces(num_out: int, kernel: int, stride: int) -> list[tuple[int, int, slice]]:
    """(first output, last output + 1, the inputs that they see) of each piece of a convolution."""
    ends = [(first, min(first + PIECE, num_out)) for first in range(0, num_out, PIECE)]
    return [(first, last, slice(first * stride, (last - 1) * stride + kernel)) for first, last in ends]


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
    if x.shape[2] * weight.shape[2] <= 64:  # a raw signal: no product worth its name
        return _from_signal(x, weight, bias, stride)
    x = _autocast(x)
    with torch.autocast(x.device.type, enabled=False):
        return cast(Tensor, _Conv1dTimeMajor.apply(x, weight, bias, stride))  # pyright: ignore[reportUnknownMemberType]


Convolution = tuple[Tensor, Tensor | None, int]
"""Weight (O, C, K), bias and stride."""


def norm_gelu_conv1d(x: Tensor, norm: nn.LayerNorm, conv: Convolution, raw: Convolution | None = None) -> Tensor:
    """conv1d_time_major(F.gelu(norm(x)), *conv), on a CPU with a third to keep for the backward pass.

    raw: a convolution that comes first, of a signal x (B, S, C).
    """
    if raw is not None and x.requires_grad:
        x, raw = conv1d_time_major(x, *raw), None
    if _is_plain() or x.device.type != "cpu":
        return conv1d_time_major(F.gelu(norm(x if raw is None else conv1d_time_major(x, *raw))), *conv)
    x, (weight, bias, stride) = _autocast(x), conv
    raw_weight, raw_bias, raw_stride = (None, None, 1) if raw is None else raw
    with torch.autocast("cpu", enabled=False):
        return cast(
            Tensor,
            _NormGeluConv1d.apply(  # pyright: ignore[reportUnknownMemberType]
                x, norm.weight, norm.bias, norm.eps, weight, bias, stride, raw_weight, raw_bias, raw_stride
            ),
        )  # fmt: skip


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
        return run(x, weight.to(x.dtype).view(groups, -1, per_group, kernel), _like(bias, x), kernel // 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, kept = ctx.saved_tensors
        weight, groups = kept.to(x.dtype), ctx.groups
        per_group, kernel = weight.shape[1:]
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
            dw = part.view(-1, kernel, per_group).transpose(1, 2).to(kept.dtype)
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
    x = _autocast(x)
    with torch.autocast(x.device.type, enabled=False):
        return cast(Tensor, _GroupedConv1dSame.apply(x, weight, bias, groups))  # pyright: ignore[reportUnknownMemberType]
