"""Sound to tokens: how many, when, and that neither padding nor hidden content leaks into what is seen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from d2v_audio.feature_encoder import (
    AudioEncoder,
    LogMelConfig,
    LogMelEmbedding,
    WaveformConfig,
    WaveformEmbedding,
    make_encoder,
    make_geometry,
    stacked_bands,
)
from d2v_core.config import ModelConfig
from d2v_core.contract import Masks
from d2v_core.positions import ConvPositions, ConvPositionsConfig

RATE, D = 16_000, 32
POSITIONS = ConvPositionsConfig(depth=3, width=15, groups=4)
KINDS = ("waveform", "logmel", "logmel-1", "logmel-2", "logmel-8")
pytestmark = pytest.mark.usefixtures("one_thread")


def features(kind: str) -> WaveformConfig | LogMelConfig:
    if kind == "waveform":
        return WaveformConfig(channels=16)
    return LogMelConfig(stride=int(kind.partition("-")[2] or 4))


def encoder(kind: str, positions: ConvPositionsConfig = POSITIONS, **model: Any) -> AudioEncoder:
    return make_encoder(features(kind), ModelConfig(embed_dim=D, num_heads=4, **model), positions, RATE)


def embedding(kind: str) -> WaveformEmbedding | LogMelEmbedding:
    return encoder(kind).embedding


@pytest.mark.parametrize(("samples", "frames"), [(16_000, 49), (400, 1), (719, 1), (720, 2), (320_000, 999)])
def test_frame_counts_of_the_official_convolutions(samples: int, frames: int):
    assert make_geometry(WaveformConfig(), RATE).num_tokens(samples) == frames


def test_the_shortest_sound_of_the_official_convolutions():
    geometry = make_geometry(WaveformConfig(), RATE)
    assert geometry.min_samples == 400 and geometry.num_tokens(399) == 0
    assert geometry.hop_s == 0.02 and geometry.offset_s == pytest.approx(0.0125)
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        embedding("waveform")(torch.randn(1, 399), None)


@pytest.mark.parametrize(("samples", "tokens"), [(16_000, 25), (560, 1), (400, 0), (4 * 160 + 560, 2), (320_000, 500)])
def test_token_counts_of_the_filter_bank(samples: int, tokens: int):
    """98 windows of 25 ms every 10 ms in a second, one more in front and behind, four to a token."""
    assert make_geometry(LogMelConfig(), RATE).num_tokens(samples) == tokens
    assert make_geometry(LogMelConfig(), RATE).hop_s == 0.04


@pytest.mark.parametrize("kind", KINDS)
def test_geometry_is_what_the_network_makes(kind: str):
    net = embedding(kind).eval()
    geometry = make_geometry(features(kind), RATE)
    least = geometry.min_samples
    assert geometry.num_tokens(least) == 1 and geometry.num_tokens(least - 1) <= 0
    lengths = [*range(least, least + 40), *range(least + 40, 4000, 97), 16_000, 16_001, 15_999]
    for length in lengths:
        tokens = net(torch.randn(1, length), None)
        assert tokens.x.shape == (1, geometry.num_tokens(length), D) and tokens.padding_mask is None
        assert tokens.grid == (tokens.x.shape[1],)


@pytest.mark.parametrize("kind", KINDS)
def test_geometry_of_padded_batches(kind: str):
    net = embedding(kind).eval()
    geometry = make_geometry(features(kind), RATE)
    lengths = torch.randint(geometry.min_samples, 9000, (12,))
    tokens = net(torch.randn(12, int(lengths.max())), lengths)
    assert tokens.padding_mask is not None
    assert (~tokens.padding_mask).sum(1).tolist() == [geometry.num_tokens(int(n)) for n in lengths]
    assert not (tokens.padding_mask[:, :-1] & ~tokens.padding_mask[:, 1:]).any()  # valid first, then padding


def both(net: AudioEncoder, masks: Masks | None, extra: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of two clips in one batch, without and with `extra` more samples of padding, and of the second alone."""
    lengths = [12_000, 7_000]
    waveform = torch.randn(2, lengths[0])
    waveform[1, lengths[1] :] = 0.0

    def view(x: Tensor, sizes: list[int], m: Masks | None) -> Tensor:
        return net.view(net.embed({"waveform": x, "num_samples": torch.tensor(sizes)}), m).x

    count = net.embedding.geometry.num_tokens
    plain = view(waveform, lengths, masks)
    wide = None
    if masks is not None:
        pad = count(lengths[0] + extra) - count(lengths[0])
        wide = Masks.of(F.pad(masks.hidden, (0, pad)))
    padded = view(F.pad(waveform, (0, extra)), lengths, wide)
    alone = net.view(
        net.embed({"waveform": waveform[1:, : lengths[1]]}),
        None if masks is None else Masks.of(masks.hidden[1:, :, : count(lengths[1])]),
    ).x
    valid = count(lengths[1])
    return plain[-1, :valid], padded[-1, :valid], alone[-1]


@pytest.mark.parametrize("kind", ["waveform", "logmel"])
@pytest.mark.parametrize("hide", [False, True])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_padding_changes_no_valid_token(kind: str, hide: bool, norm: str):
    net = encoder(kind, norm=norm).eval()
    masks = None
    if hide:
        hidden = torch.zeros(2, 1, net.embedding.geometry.num_tokens(12_000), dtype=torch.bool)
        hidden[:, :, 2:5] = True
        masks = Masks.of(hidden)
    plain, padded, alone = both(net, masks, 5_000)
    torch.testing.assert_close(plain, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["waveform", "logmel"])
def test_without_rezero_padding_shows_near_the_end_as_in_the_official_code(kind: str):
    net = encoder(kind, ConvPositionsConfig(depth=3, width=15, groups=4, rezero_padding=False)).eval()
    plain, _, alone = both(net, None, 5_000)
    assert not torch.allclose(plain, alone, atol=1e-4)
    torch.testing.assert_close(plain[:-4], alone[:-4], atol=1e-5, rtol=1e-4)  # two more convolutions of 5: 4 tokens
    single = encoder(kind, ConvPositionsConfig(depth=1, width=15, groups=4, rezero_padding=False)).eval()
    plain, _, alone = both(single, None, 5_000)
    torch.testing.assert_close(plain, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_looks_at_the_sound_around_its_own_time(kind: str):
    """Token i is said to be centred at offset_s + i * hop_s, which is where labels are read: gradients say the same."""
    net = embedding(kind).eval()
    geometry = make_geometry(features(kind), RATE)
    num = geometry.num_tokens(2 * RATE)
    wave = torch.randn(1, 2 * RATE, requires_grad=True)
    for i in (num // 4, num // 2, 3 * num // 4):
        if isinstance(net, WaveformEmbedding):
            (reach,) = torch.autograd.grad(net(wave, None).x[0, i].square().sum(), wave)
            samples = reach[0].nonzero().squeeze(1)
            first, last = int(samples.min()), int(samples.max()) + 1
            assert last - first == 400
        else:
            bands = net.bands(wave, None).requires_grad_()
            (reach,) = torch.autograd.grad(net.conv(bands.transpose(1, 2))[0, :, i].square().sum(), bands)
            windows = reach[0].abs().sum(1).nonzero().squeeze(1)
            first, last = int(windows.min()) * 160, int(windows.max()) * 160 + 400
            assert len(windows) == max(3, int(kind.partition("-")[2] or 4))
        assert (first + last) / 2 / RATE == pytest.approx(geometry.offset_s + i * geometry.hop_s, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_burst_is_heard_by_the_token_of_its_time(kind: str):
    """In tokens of silence and noise those that change are the ones whose time lies within reach of the burst."""
    net = embedding(kind).eval()
    geometry = make_geometry(features(kind), RATE)
    quiet = 1e-2 * torch.randn(1, 2 * RATE)
    num = geometry.num_tokens(2 * RATE)
    times = geometry.offset_s + torch.arange(num) * geometry.hop_s
    for time in (0.4, 0.777, 1.5):
        loud = quiet.clone()
        loud[0, round(time * RATE) - 16 : round(time * RATE) + 16] += torch.randn(32)  # 2 ms
        change = (net(loud, None).x - net(quiet, None).x)[0].norm(dim=1)
        if isinstance(net, LogMelEmbedding):  # the standardisation moves every token a little
            assert abs(times[change.argmax()] - time) < geometry.hop_s + 0.0125
        else:
            assert (times[change > 1e-5] - time).abs().max() < 0.0125 + 0.002
        assert change[(times - time).abs() < geometry.hop_s / 2 + 1e-6].min() > 0.2 * change.max()


def test_a_click_is_loud_in_the_windows_that_contain_it():
    net = embedding("logmel")
    assert isinstance(net, LogMelEmbedding)
    for sample in (8_000, 12_345, 20_079):
        wave = 1e-3 * torch.randn(1, 2 * RATE)
        wave[0, sample] = 10.0
        loud = (net.bands(wave, None)[0].mean(1) > 2).nonzero().squeeze(1).tolist()
        covering = [w for w in range(198) if w * 160 + 20 <= sample < w * 160 + 380]  # the window fades at its ends
        assert covering and set(covering) <= set(loud)
        assert all(w * 160 <= sample < w * 160 + 400 for w in loud)


def test_bands_are_log_mel_energies_standardised_over_time():
    net = embedding("logmel")
    assert isinstance(net, LogMelEmbedding)
    t = torch.arange(RATE) / RATE
    wave = torch.where(t < 0.5, torch.sin(2 * math.pi * 500 * t), torch.sin(2 * math.pi * 3000 * t))[None]
    bands = net.bands(wave, None)
    assert bands.shape == (1, 98, 80) and bands.dtype == torch.float32
    torch.testing.assert_close(bands.mean(1), torch.zeros(1, 80), atol=1e-4, rtol=0)
    torch.testing.assert_close(bands.var(1, correction=0), torch.ones(1, 80), atol=1e-2, rtol=0)
    rise = bands[0, :40].mean(0) - bands[0, 60:].mean(0)
    centre = (net.mel * torch.arange(net.mel.shape[0])[:, None]).sum(0) / net.mel.sum(0) * RATE / net.num_fft  # Hz
    low, high = (int((centre - hz).abs().argmin()) for hz in (500, 3000))
    assert rise[low] > 1.5 and rise[high] < -1.5
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.bands(wave, None), bands)


def test_bands_of_a_padded_clip_use_its_own_windows():
    net = embedding("logmel")
    wave = torch.randn(1, 8000)
    alone = net.bands(wave, None)
    padded = net.bands(F.pad(wave, (0, 4000), value=9.0), torch.tensor([8000]))
    torch.testing.assert_close(padded[:, : alone.shape[1]], alone, atol=1e-4, rtol=1e-4)
    assert not padded[:, alone.shape[1] :].any()


def test_loudness_does_not_matter_to_the_filter_bank():
    net, wave = embedding("logmel"), torch.randn(1, 8000)
    torch.testing.assert_close(net.bands(3 * wave, None), net.bands(wave, None), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["waveform", "logmel"])
def test_hidden_content_does_not_reach_the_students_view(kind: str):
    """Tokens whose sound lies strictly inside a hidden stretch: any other sound there gives the same view."""
    net = encoder(kind).eval()
    geometry = net.embedding.geometry
    wave = torch.randn(1, 16_000)
    first, last = 8, 20  # hidden tokens, last one excluded
    hidden = torch.zeros(1, 1, geometry.num_tokens(16_000), dtype=torch.bool)
    hidden[..., first:last] = True
    masks = Masks.of(hidden)
    tokens = net.embed({"waveform": wave})
    noise = tokens.x + torch.randn_like(tokens.x) * hidden[:, 0, :, None]
    other = type(tokens)(noise, None, tokens.grid)
    assert torch.equal(net.view(tokens, masks).x, net.view(other, masks).x)
    assert not torch.allclose(net.view(tokens, None).x, net.view(other, None).x, atol=0.1)
    if kind == "waveform":  # from the sound itself; log-mel bands are standardised over the whole clip
        margin = round(geometry.offset_s * RATE)
        start = round((geometry.offset_s + first * geometry.hop_s) * RATE) + margin
        end = round((geometry.offset_s + (last - 1) * geometry.hop_s) * RATE) - margin
        changed = wave.clone()
        changed[:, start:end] = torch.randn(1, end - start)
        again = net.embed({"waveform": changed})
        torch.testing.assert_close(net.view(again, masks).x, net.view(tokens, masks).x)


def test_hidden_tokens_become_the_mask_vector_before_the_positions():
    net = encoder("logmel").eval()
    tokens = net.embed({"waveform": torch.randn(2, 16_000)})
    hidden = torch.rand(2, 3, tokens.x.shape[1]) < 0.4
    view = net.view(tokens, Masks.of(hidden))
    rows = []
    for b in range(2):
        for m in range(3):
            x = tokens.x[b].clone()
            x[hidden[b, m]] = net.mask_embedding.detach()
            x = x[None]
            y = x
            for conv in net.positions.convs:
                y = F.gelu(F.layer_norm(conv(y.transpose(1, 2)).transpose(1, 2), (D,)))
            rows.append(F.layer_norm(x + y, (D,), net.norm.weight, net.norm.bias)[0])
    torch.testing.assert_close(view.x, torch.stack(rows), atol=1e-5, rtol=1e-4)
    assert view.x.shape[0] == 6 and view.num_extra == 0 and view.index is None


def test_pre_norm_has_no_norm_before_the_first_block_and_dropout_acts_in_training_only():
    assert encoder("logmel", norm="pre").norm is None
    net = encoder("logmel", dropout=0.5)
    tokens = net.embed({"waveform": torch.randn(1, 8000)})
    assert (net.train().view(tokens, None).x == 0).float().mean() > 0.3
    assert (net.eval().view(tokens, None).x == 0).float().mean() == 0


def test_embedding_is_content_only():
    """No dropout, no positions: a stretch gives the same tokens wherever it stands."""
    net = encoder("waveform", dropout=0.5).train()
    wave = torch.randn(1, 6400)
    shifted = torch.cat([torch.randn(1, 3200), wave], 1)
    a, b = net.embed({"waveform": wave}), net.embed({"waveform": shifted})
    torch.testing.assert_close(b.x[:, 10:], a.x, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("factor", [0.0, 0.1, 1.0])
def test_grad_mult_scales_the_gradient_into_the_convolutions_and_nothing_else(factor: float):
    gradients = {}
    for mult in (1.0, factor):
        torch.manual_seed(0)
        net = WaveformEmbedding(WaveformConfig(channels=8, grad_mult=mult), D, RATE)
        x = net(torch.randn(1, 2000), None).x
        x.square().sum().backward()
        gradients[mult] = net.convs[0].weight.grad, net.project.weight.grad, x.detach()
    conv, project, out = gradients[factor]
    torch.testing.assert_close(out, gradients[1.0][2])
    torch.testing.assert_close(project, gradients[1.0][1])
    if factor == 0.0:
        assert conv is None
    else:
        torch.testing.assert_close(conv, factor * gradients[1.0][0], atol=1e-6, rtol=1e-3)


def test_convolutions_by_hand():
    net = WaveformEmbedding(WaveformConfig(channels=6), D, RATE)
    torch.nn.init.normal_(net.norms[2].weight), torch.nn.init.normal_(net.norms[2].bias)
    x = wave = torch.randn(2, 1, 3000)
    kernels, strides = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
    for i, (kernel, stride) in enumerate(zip(kernels, strides, strict=True)):
        weight = net.convs[i].weight
        assert weight.shape == (6, 1 if i == 0 else 6, kernel) and net.convs[i].bias is None
        x = F.conv1d(x, weight, stride=stride).transpose(1, 2)
        x = F.gelu(F.layer_norm(x, (6,), net.norms[i].weight, net.norms[i].bias)).transpose(1, 2)
    x = F.layer_norm(x.transpose(1, 2), (6,), net.norm.weight, net.norm.bias)
    torch.testing.assert_close(net(wave[:, 0], None).x, F.linear(x, net.project.weight, net.project.bias))


def test_group_norm_form_has_one_norm_after_the_first_convolution():
    net = WaveformEmbedding(WaveformConfig(channels=6, norm="group", bias=True), D, RATE)
    assert len(net.norms) == 1 and net.convs[3].bias is not None
    wave = torch.randn(1, 3000)
    x = F.group_norm(net.convs[0](wave[:, None]), 6, net.norms[0].weight, net.norms[0].bias)
    x = F.gelu(x)
    for conv in net.convs[1:]:
        x = F.gelu(conv(x))
    torch.testing.assert_close(net.convolve(wave), x.transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_initialisation_of_the_convolutions_is_kaiming_normal():
    net = WaveformEmbedding(WaveformConfig(channels=256), D, RATE)
    for conv in net.convs[1:4]:
        fan_in = conv.weight[0].numel()
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.02)
    mask = encoder("logmel").mask_embedding
    assert mask.min() >= 0 and mask.max() <= 1 and mask.std() > 0.2


@pytest.mark.parametrize(("depth", "width", "kernel"), [(5, 95, 19), (1, 19, 19), (2, 8, 4), (4, 4, 3)])
def test_positions_have_the_kernels_of_the_official_code_and_keep_the_length(depth: int, width: int, kernel: int):
    positions = ConvPositions(D, ConvPositionsConfig(depth=depth, width=width, groups=4))
    assert len(positions.convs) == depth
    assert {tuple(conv.weight.shape) for conv in positions.convs} == {(D, D // 4, kernel)}
    assert all(conv.bias is not None for conv in positions.convs)
    assert positions(torch.randn(2, 9, D), None).shape == (2, 9, D)
    with pytest.raises(ValueError, match=r"embed_dim=32 .*multiple of positions\.groups=5"):
        ConvPositions(D, ConvPositionsConfig(groups=5))


def test_receptive_field_of_the_official_positions_is_91_tokens():
    positions = ConvPositions(D, ConvPositionsConfig(depth=5, width=95, groups=4))
    x = torch.randn(1, 201, D, requires_grad=True)
    positions(x, None)[0, 100].sum().backward()
    touched = x.grad[0].abs().sum(-1).nonzero().squeeze(1)
    assert (touched.min().item(), touched.max().item()) == (55, 145)


def test_bands_under_a_token():
    net = embedding("logmel")
    wave = torch.randn(1, 16_000)
    bands = net.bands(wave, None)[0]
    stacked = stacked_bands(net, wave, 24, 0.04, RATE)
    assert stacked.shape == (24, 320)
    torch.testing.assert_close(stacked[5], bands[20:24].flatten())
    per_frame = stacked_bands(net, wave, 49, 0.02, RATE)
    assert per_frame.shape == (49, 160)
    torch.testing.assert_close(per_frame[-1], bands[96:98].flatten())


def test_errors():
    with pytest.raises(ValueError, match=r"features\.kernels=\[10, 3\] and features\.strides=\[5\] must be equally"):
        make_geometry(WaveformConfig(kernels=[10, 3], strides=[5]), RATE)
    with pytest.raises(ValueError, match=r"features\.norm='batch' must be layer or group"):
        WaveformEmbedding(WaveformConfig(norm="batch"), D, RATE)
    for wrong in (LogMelConfig(stride=0), LogMelConfig(hop_s=0.1, window_s=0.025), LogMelConfig(num_mels=0)):
        with pytest.raises(ValueError):
            make_geometry(wrong, RATE)
