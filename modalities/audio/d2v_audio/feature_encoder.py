"""Sound to tokens: two front ends, and the masking and positions that both share.

waveform: the strided convolutions of wav2vec 2.0 as data2vec uses them, 25 ms wide every 20 ms.
logmel: a mel filter bank with one strided convolution on top. Much cheaper, and it learns within minutes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from d2v_core.config import ModelConfig, opt
from d2v_core.contract import AttentionBias, FeatureEncoder, Masks, RawValues, Tokens
from d2v_core.kernels import Linear, conv1d_time_major, norm_gelu_conv1d
from d2v_core.positions import ConvPositions, ConvPositionsConfig
from d2v_core.visible import Alibi, AlibiConfig, Prenet, PrenetConfig, take_visible, take_visible_padding


@dataclass
class WaveformConfig:
    """Section `features`: strided convolutions on the waveform (fairseq: ConvFeatureExtractionModel)."""

    channels: int = opt(512, "Channels of every convolution.")
    kernels: list[int] = opt([10, 3, 3, 3, 3, 2, 2], "Kernel of each convolution, in samples of its input.")
    strides: list[int] = opt([5, 2, 2, 2, 2, 2, 2], "Stride of each; their product is the hop, 320 samples = 20 ms.")
    norm: str = opt("layer", "layer = layer norm after every convolution; group = one group norm after the first.")
    bias: bool = opt(False, "Bias in the convolutions.")
    grad_mult: float = opt(1.0, "Factor of the gradient into the convolutions.")


@dataclass
class LogMelConfig:
    """Section `features`: a log-mel filter bank and one strided convolution."""

    num_mels: int = opt(80, "Mel bands from 0 Hz to half the sample rate.")
    window_s: float = opt(0.025, "Analysis window, seconds.")
    hop_s: float = opt(0.010, "Step of the window, seconds.")
    stride: int = opt(4, "Windows per token: 4 gives a token every 40 ms.")


@dataclass
class StretchConfig:
    """Section `stretches`: what stands behind a token for a plugin's encoder."""

    stretch_s: float = opt(0.04, "Sound behind each token, seconds; stretches do not overlap.")


class WaveformEmbedding(nn.Module):
    """(B, S) samples -> (B, T, D): convolutions, layer norm, linear projection."""

    def __init__(self, config: WaveformConfig, embed_dim: int, sample_rate: int) -> None:
        super().__init__()
        check_waveform(config)
        self.geometry = WaveformGeometry(config, sample_rate)
        self.grad_mult, self.layer_norms, self.bias = config.grad_mult, config.norm == "layer", config.bias
        channels = config.channels
        self.convs = nn.ModuleList(
            nn.Conv1d(1 if i == 0 else channels, channels, kernel, stride, bias=config.bias)
            for i, (kernel, stride) in enumerate(zip(config.kernels, config.strides, strict=True))
        )
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.get_parameter("weight"))
        count = len(self.convs) if self.layer_norms else 1
        self.norms = nn.ModuleList(
            nn.LayerNorm(channels) if self.layer_norms else nn.GroupNorm(channels, channels) for _ in range(count)
        )
        self.norm = nn.LayerNorm(channels)
        self.project = Linear(channels, embed_dim)

    def convolve(self, waveform: Tensor) -> Tensor:
        """(B, S) -> (B, T, C)."""
        x = waveform.unsqueeze(2)
        weights = [conv.get_parameter("weight") for conv in self.convs]
        biases = [conv.get_parameter("bias") if self.bias else None for conv in self.convs]
        convs = list(zip(weights, biases, self.geometry.strides, strict=True))
        if not self.layer_norms:
            for i, conv in enumerate(convs):
                x = conv1d_time_major(x, *conv)
                x = F.gelu(x if i else self.norms[0](x.transpose(1, 2)).transpose(1, 2))
            return x
        if len(convs) == 1:
            x = conv1d_time_major(x, *convs[0])
        for i, (conv, norm) in enumerate(zip(convs[1:], self.norms, strict=False)):
            x = norm_gelu_conv1d(x, cast("nn.LayerNorm", norm), conv, None if i else convs[0])
        return F.gelu(self.norms[-1](x))

    def forward(self, waveform: Tensor, num_samples: Tensor | None) -> Tokens:
        """waveform (B, S), num_samples (B,) or None where all are whole -> (B, T, D), nothing placed or hidden yet."""
        if self.grad_mult == 0:
            with torch.no_grad():
                x = self.convolve(waveform)
        else:
            x = self.convolve(waveform)
            if self.grad_mult != 1:
                x = x.detach() + self.grad_mult * (x - x.detach())
        return _tokens(self.project(self.norm(x)), num_samples, self.geometry)


class LogMelEmbedding(nn.Module):
    """(B, S) samples -> (B, T, D): log-mel bands, each standardised over the valid windows of a sample; convolution
    with kernel and stride `stride` and one window of padding on each side, GELU, layer norm, linear projection."""

    mel: Tensor
    window: Tensor

    def __init__(self, config: LogMelConfig, embed_dim: int, sample_rate: int) -> None:
        super().__init__()
        from torchaudio.functional import melscale_fbanks

        self.geometry = LogMelGeometry(config, sample_rate)
        size, self.hop = self.geometry.window, self.geometry.hop
        self.num_fft = 2 ** math.ceil(math.log2(size))
        mel = melscale_fbanks(self.num_fft // 2 + 1, 0.0, sample_rate / 2, config.num_mels, sample_rate, norm="slaney")
        self.register_buffer("mel", mel, persistent=False)
        self.register_buffer("window", torch.hann_window(size), persistent=False)
        self.conv = nn.Conv1d(config.num_mels, embed_dim, self.geometry.kernel, config.stride, padding=1)
        self.norm = nn.LayerNorm(embed_dim)
        self.project = Linear(embed_dim, embed_dim)

    @torch.no_grad()
    def log_mel(self, waveform: Tensor) -> Tensor:
        """(B, S) -> (B, F, num_mels) float32, the log of each band's power in each window."""
        with torch.autocast(waveform.device.type, enabled=False):
            frames = waveform.float().unfold(-1, len(self.window), self.hop) * self.window
            power = torch.fft.rfft(frames, self.num_fft).abs().square()
            return (power @ self.mel + 1e-6).log()

    @torch.no_grad()
    def bands(self, waveform: Tensor, num_samples: Tensor | None) -> Tensor:
        """(B, S) -> (B, F, num_mels) float32, mean 0 and variance 1 in each band over a sample's valid windows, 0
        behind them."""
        with torch.autocast(waveform.device.type, enabled=False):
            x = self.log_mel(waveform)
            if num_samples is None:
                var, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
                return (x - mean) * torch.rsqrt(var + 1e-5)
            count = self.geometry.num_windows(num_samples).clamp(min=1)
            valid = (torch.arange(x.shape[1], device=x.device) < count[:, None]).unsqueeze(-1)
            mean = (x * valid).sum(1, keepdim=True) / count[:, None, None]
            centred = (x - mean) * valid
            return centred * torch.rsqrt(centred.square().sum(1, keepdim=True) / count[:, None, None] + 1e-5)

    def forward(self, waveform: Tensor, num_samples: Tensor | None, withheld: Tensor | None = None) -> Tokens:
        """withheld: (B, N, 4) int64 rectangles (first band, band behind the last, the same of windows) set to 0, the
        mean of each band."""
        bands = self.bands(waveform, num_samples)
        if withheld is not None:
            bands = bands.masked_fill(_inside(withheld, bands.shape[2], bands.shape[1]), 0.0)
        x = self.conv(bands.transpose(1, 2)).transpose(1, 2)
        return _tokens(self.project(self.norm(F.gelu(x))), num_samples, self.geometry)


def _inside(rectangles: Tensor, num_bands: int, num_windows: int) -> Tensor:
    """(B, N, 4) -> (B, num_windows, num_bands) bool, True in one of them."""

    def between(first: Tensor, end: Tensor, size: int) -> Tensor:
        places = torch.arange(size, device=rectangles.device)
        return (places >= first.unsqueeze(-1)) & (places < end.unsqueeze(-1))

    bands = between(rectangles[..., 0], rectangles[..., 1], num_bands)
    windows = between(rectangles[..., 2], rectangles[..., 3], num_windows)
    return (windows.unsqueeze(-1) & bands.unsqueeze(2)).any(1)


class WaveformGeometry:
    """Where the tokens of the convolutions stand in time, without a network."""

    def __init__(self, config: WaveformConfig, sample_rate: int) -> None:
        self.kernels, self.strides = config.kernels, config.strides
        self.hop_s = math.prod(self.strides) / sample_rate
        field, jump = 1, 1
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            field, jump = field + (kernel - 1) * jump, jump * stride
        self.min_samples = field
        self.offset_s = field / 2 / sample_rate

    def num_tokens(self, num_samples):
        """Of a waveform of so many samples, a number or a tensor of them."""
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            num_samples = (num_samples - kernel) // stride + 1
        return num_samples


class LogMelGeometry:
    """Where the tokens of the filter bank stand in time, without a network."""

    def __init__(self, config: LogMelConfig, sample_rate: int) -> None:
        self.window, self.hop = round(config.window_s * sample_rate), round(config.hop_s * sample_rate)
        self.stride = config.stride
        self.kernel = max(3, config.stride)
        self.hop_s = self.stride * self.hop / sample_rate
        self.min_samples = self.window + (self.kernel - 3) * self.hop
        # Token 0 is centred between windows -1 and kernel - 2; window 0 is centred at half its width.
        self.offset_s = ((self.kernel - 3) / 2 * self.hop + self.window / 2) / sample_rate

    def num_windows(self, num_samples):
        """Of a waveform of so many samples, a number or a tensor of them."""
        return (num_samples - self.window) // self.hop + 1

    def num_tokens(self, num_samples):
        """Of a waveform of so many samples, a number or a tensor of them."""
        return (self.num_windows(num_samples) + 2 - self.kernel) // self.stride + 1


class StretchGeometry:
    """Where stretches of samples stand in time."""

    def __init__(self, config: StretchConfig, sample_rate: int) -> None:
        self.hop = self.min_samples = round(config.stretch_s * sample_rate)
        self.hop_s, self.offset_s = self.hop / sample_rate, self.hop / 2 / sample_rate

    def num_tokens(self, num_samples):
        """Of a waveform of so many samples, a number or a tensor of them."""
        return num_samples // self.hop


Geometry = WaveformGeometry | LogMelGeometry | StretchGeometry


@dataclass(frozen=True)
class ReadStretches:
    """For `Raw.read`: samples of a waveform, `hop` behind each token."""

    geometry: StretchGeometry

    def __call__(self, inputs: Mapping[str, Tensor]) -> RawValues:
        waveform, hop = inputs["waveform"], self.geometry.hop
        values = waveform[:, : waveform.shape[1] // hop * hop].reshape(len(waveform), -1, hop, 1)
        tokens = _tokens(values, inputs.get("num_samples"), self.geometry)
        return RawValues(values, tokens.padding_mask, tokens.grid)


def _tokens(x: Tensor, num_samples: Tensor | None, geometry: Geometry) -> Tokens:
    padding_mask = None
    if num_samples is not None:
        padding_mask = torch.arange(x.shape[1], device=x.device) >= geometry.num_tokens(num_samples)[:, None]
    return Tokens(x, padding_mask, (x.shape[1],))


class AudioEncoder(FeatureEncoder):
    """Front end, mask vector, convolutional positions and, for post-norm, the norm before the first block.

    Hidden tokens are replaced by one learned vector after the projection and before the positions, which therefore see
    masked content. The teacher's view has nothing hidden.
    """

    def __init__(
        self, embedding: WaveformEmbedding | LogMelEmbedding, model: ModelConfig, positions: ConvPositionsConfig
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.mask_embedding = nn.Parameter(torch.rand(model.embed_dim))
        self.positions = ConvPositions(model.embed_dim, positions)
        self.norm = nn.LayerNorm(model.embed_dim, eps=model.norm_eps) if model.norm == "post" else None
        self.dropout = model.dropout

    def embed(self, inputs: Mapping[str, Tensor]) -> Tokens:
        """inputs: as `embedded` takes them."""
        assert isinstance(self.embedding, WaveformEmbedding | LogMelEmbedding)
        return embedded(self.embedding, inputs)

    def hide(self, x: Tensor, hidden: Tensor) -> Tensor:
        """By the mask vector, here as in pre-training."""
        return torch.where(hidden.unsqueeze(-1), self.mask_embedding.to(x.dtype), x)

    def view(self, tokens: Tokens, masks: Masks | None) -> Tokens:
        x, padding_mask = tokens.x, tokens.padding_mask
        if masks is not None:
            x = repeat(x, "b t d -> b m t d", m=masks.num_copies)
            x = rearrange(
                torch.where(masks.hidden.unsqueeze(-1), self.mask_embedding.to(x.dtype), x), "b m t d -> (b m) t d"
            )
            if padding_mask is not None:
                padding_mask = repeat(padding_mask, "b t -> (b m) t", m=masks.num_copies)
        if padding_mask is not None:
            x = x.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        x = x + self.positions(x, padding_mask)
        if self.norm is not None:
            x = self.norm(x)
        return Tokens(F.dropout(x, self.dropout, self.training), padding_mask, tokens.grid)


class VisibleAudioEncoder(FeatureEncoder):
    """data2vec 2.0: the student is given visible tokens only, each as it is, with a position from its surroundings.

    The positions are computed on the whole sequence with hidden tokens at zero, one for each masked copy, and gathered
    with the tokens. Places enter a second time as a bias on attention (ALiBi), from which hidden places are gathered
    out too. The norm before the first block, and blocks of the encoder's own, follow.

    leaky_padding: as fairseq, let padded tokens into the convolutions of the positions.
    """

    def __init__(
        self,
        embedding: WaveformEmbedding | LogMelEmbedding,
        model: ModelConfig,
        positions: ConvPositionsConfig,
        prenet: PrenetConfig,
        alibi: AlibiConfig,
        leaky_padding: bool,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.positions = ConvPositions(model.embed_dim, positions)
        self.prenet = Prenet(prenet, model)
        self.alibi = Alibi(alibi, model.num_heads, prenet.layers + model.num_layers) if alibi.use else None
        self.leaky_padding = leaky_padding

    def embed(self, inputs: Mapping[str, Tensor]) -> Tokens:
        """inputs: as `embedded` takes them."""
        assert isinstance(self.embedding, WaveformEmbedding | LogMelEmbedding)
        return embedded(self.embedding, inputs)

    def view(self, tokens: Tokens, masks: Masks | None) -> Tokens:
        x, padding_mask = tokens.x, tokens.padding_mask
        if masks is None:
            seen = replace(tokens, x=x + self._positions(x, padding_mask))
        else:
            assert masks.visible is not None, "data2vec 2.0 needs masks that say what is visible"
            rows = repeat(x, "b t d -> (b m) t d", m=masks.num_copies)
            rows = rows.masked_fill(masks.hidden.flatten(0, 1).unsqueeze(-1), 0.0)
            if padding_mask is not None:
                padding_mask = repeat(padding_mask, "b t -> (b m) t", m=masks.num_copies)
            positions = self._positions(rows, padding_mask)
            seen = Tokens(
                take_visible(x, masks) + take_visible(positions, masks),
                take_visible_padding(tokens.padding_mask, masks),
                tokens.grid,
                index=masks.visible.flatten(0, 1),
            )
        return replace(seen, x=self.prenet(seen.x, seen.padding_mask, self._biases(seen)))

    def attention_bias(self, tokens: Tokens) -> AttentionBias:
        return self.prenet.rest(self._biases(tokens))

    def _positions(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        return self.positions(x, None if self.leaky_padding else padding_mask)

    def _biases(self, tokens: Tokens) -> AttentionBias:
        return None if self.alibi is None else self.alibi(tokens)


def embedded(embedding: WaveformEmbedding | LogMelEmbedding, inputs: Mapping[str, Tensor]) -> Tokens:
    """inputs: waveform (B, S) float32, num_samples (B,) int64 where samples are padded, and, of a filter bank, withheld
    (B, N, 4) where fine-tuning withholds some of it."""
    waveform, num_samples = inputs["waveform"], inputs.get("num_samples")
    if isinstance(embedding, LogMelEmbedding):
        return embedding(waveform, num_samples, inputs.get("withheld"))
    return embedding(waveform, num_samples)


def make_embedding(
    features: WaveformConfig | LogMelConfig, embed_dim: int, sample_rate: int
) -> WaveformEmbedding | LogMelEmbedding:
    """The front end that the options name."""
    if isinstance(features, WaveformConfig):
        return WaveformEmbedding(features, embed_dim, sample_rate)
    return LogMelEmbedding(features, embed_dim, sample_rate)


def make_encoder(
    features: WaveformConfig | LogMelConfig, model: ModelConfig, positions: ConvPositionsConfig, sample_rate: int
) -> AudioEncoder:
    """The parts outside the transformer keep PyTorch's initialisation, as the official code's do; the waveform's
    convolutions have their own."""
    return AudioEncoder(make_embedding(features, model.embed_dim, sample_rate), model, positions)


def make_geometry(features: WaveformConfig | LogMelConfig | StretchConfig, sample_rate: int) -> Geometry:
    """Where the front end's tokens will stand. Raises ValueError for options that cannot work."""
    if isinstance(features, StretchConfig):
        if not 1 <= features.stretch_s * sample_rate < math.inf:
            raise ValueError(f"stretches.stretch_s={features.stretch_s} must be at least one sample, 1/{sample_rate} s")
        return StretchGeometry(features, sample_rate)
    if isinstance(features, WaveformConfig):
        check_waveform(features)
        return WaveformGeometry(features, sample_rate)
    for key in ("stride", "num_mels"):
        if getattr(features, key) < 1:
            raise ValueError(f"features.{key}={getattr(features, key)} must be at least 1")
    if not 1 / sample_rate <= features.hop_s <= features.window_s < float("inf"):
        raise ValueError(
            f"features.hop_s={features.hop_s} must lie between one sample and features.window_s={features.window_s}"
        )
    return LogMelGeometry(features, sample_rate)


def check_waveform(config: WaveformConfig) -> None:
    """Raises ValueError for options that cannot work."""
    if len(config.kernels) != len(config.strides) or not config.kernels:
        raise ValueError(
            f"features.kernels={config.kernels} and features.strides={config.strides} must be equally long"
        )
    for key, values in (("channels", [config.channels]), ("kernels", config.kernels), ("strides", config.strides)):
        if min(values) < 1:
            raise ValueError(f"features.{key}={getattr(config, key)} must be at least 1")
    if config.norm not in ("layer", "group"):
        raise ValueError(f"features.norm={config.norm!r} must be layer or group")


def stacked_bands(
    embedding: LogMelEmbedding, waveform: Tensor, num_tokens: int, hop_s: float, sample_rate: int
) -> Tensor:
    """Log-mel windows under each token side by side: (num_tokens, k * num_mels)."""
    bands = embedding.bands(waveform, None)[0]
    per_token = max(1, round(hop_s * sample_rate / embedding.hop))
    index = torch.arange(num_tokens)[:, None] * per_token + torch.arange(per_token)
    return bands[index.clamp(max=len(bands) - 1)].flatten(1)
