"""data2vec 2.0 on sound: sizes of the official models, updates, padding, what the teacher averages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d2v_audio.data import AudioSample
from d2v_audio.modality import AudioModality
from d2v_core.contract import Masks
from d2v_core.decoder import ConvDecoder
from d2v_core.keyed import generator
from d2v_core.run import build_model

from ..runs import count, followed, modality_of, updated

WAVEFORM = ("preset=base2", "data.synthetic_clips=8", "data.batch_s=8", "data.micro_batch_s=4", "data.min_s=0.5",
            "data.max_s=3", "model.embed_dim=32", "model.num_heads=4", "model.num_layers=2", "target.top_k_layers=2",
            "positions.groups=4", "decoder.dim=16", "decoder.groups=4", "decoder.layers=2", "train.num_masks=3",
            "features.channels=16")  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def modality(*words: str) -> AudioModality:
    return modality_of(AudioModality, words)


@pytest.mark.parametrize(
    ("preset", "pretraining", "without_decoder", "averaged"),
    [("base2", 93_783_308, 93_163_532, 88_561_932), ("large2", 315_184_144, 313_275_408, 308_542_480)],
)
def test_parameter_counts_of_the_official_models(preset, pretraining, without_decoder, averaged):
    with torch.device("meta"):
        model = build_model(modality(f"preset={preset}"))
    assert count(p for p in model.parameters() if p.requires_grad) == pretraining
    assert count(model.student.parameters()) == without_decoder
    own = {id(p) for p in model.student.parameters()}
    assert count(p for p in model.teacher.parameters() if id(p) not in own) == averaged


def test_masks_of_the_official_recipes():
    for preset, hidden, copies in (("base2", 499, 8), ("large2", 549, 12)):
        made = modality(f"preset={preset}")
        layout = made.layout(AudioSample(np.zeros(320_000, np.float32)))
        masks = made.masking()([layout], made.config.train.num_masks, [generator(0, "m")])
        assert masks.hidden.shape == (1, copies, 999) and (masks.hidden.sum(-1) == hidden).all()


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("data.crop=false",),
        ("official_quirks=true",),
        ("official_quirks=true", "data.crop=false"),
        ("prenet.layers=2", "alibi.per_layer=true"),
        ("alibi.use=false", "train.num_masks=1"),
        ("train.precision=bf16", "data.crop=false"),
    ],
    ids=["cropped", "padded", "quirks", "quirks padded", "prenet", "one mask", "bf16"],
)
def test_updates(words: tuple[str, ...]):
    made = modality(*WAVEFORM, "prenet.layer_drop=0", "model.layer_drop=0", *words)
    model, done = updated(made, 2)
    for batches, numbers in done:
        assert len(batches) == 2
        assert all(batch.masks.num_copies == made.config.train.num_masks for batch in batches)
        assert 0.2 < numbers["target_std"] <= 1.01
    assert not {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}


def test_the_teacher_shares_the_front_end_and_averages_the_rest():
    model = build_model(modality(*WAVEFORM, "prenet.layers=1"))
    assert model.teacher.shares("encoder.embedding")
    moved = followed(model)
    for name, p in model.teacher.module.named_parameters():
        if name.startswith("encoder.embedding"):
            assert p is model.student.get_parameter(name)
        else:
            assert moved[name] == pytest.approx(0.1, abs=1e-5), name


@pytest.mark.parametrize("quirks", [False, True])
def test_padding_cannot_change_a_prediction(quirks: bool, monkeypatch: pytest.MonkeyPatch):
    """A short clip by itself and beside a longer one, under the same mask: the same predictions and targets, unless
    the official code is reproduced."""
    monkeypatch.setattr(
        ConvDecoder, "noise", lambda self, like, n: torch.full((len(like), n, like.shape[2]), 0.01)
    )  # fmt: skip
    made = modality(*WAVEFORM, *(("official_quirks=true", "target.padding_in_stats=true") if quirks else ()))
    model = build_model(made).eval()
    rng = np.random.default_rng(0)
    long, short = (AudioSample(rng.normal(size=n).astype(np.float32)) for n in (16_000, 9_000))
    layouts = [made.layout(sample) for sample in (long, short)]
    (whole,), (part,) = layouts[0].shape, layouts[1].shape
    short_mask = made.masking()([layouts[1]], 2, [generator(0, "s")])
    both_mask = made.masking()(layouts, 2, [generator(0, "l"), generator(0, "s")])
    if quirks:  # there padding is masked as well; here the mask is to be the same
        long_mask = made.masking()([layouts[0]], 2, [generator(0, "l")])
        hidden = np.zeros((2, 2, whole), dtype=bool)
        hidden[0], hidden[1, :, :part] = long_mask.hidden[0], short_mask.hidden[0]
        shown = [[[*np.flatnonzero(~copy)][: long_mask.visible.shape[2]] for copy in row] for row in hidden]
        both_mask = Masks.of(hidden, visible=np.array(shown))
        if both_mask.visible.shape[2] < (~short_mask.hidden).sum(-1).max():
            pytest.skip("the rows do not fit")
    assert torch.equal(both_mask.hidden[1, :, :part], short_mask.hidden[0])
    with torch.no_grad():
        alone = model(made.collate([short]), short_mask)
        both = model(made.collate([long, short]), both_mask)
    at = int(both_mask.scored[0].sum())
    same = torch.allclose(both.prediction[at:], alone.prediction, atol=1e-4)
    assert same != quirks
    if not quirks:
        torch.testing.assert_close(both.target[at:], alone.target, atol=1e-4, rtol=1e-4)


def test_a_loaded_run_gives_features_of_every_token():
    made = modality(*WAVEFORM, "prenet.layers=1")
    from d2v_core.probe import layers_of

    student = build_model(made).student
    inputs = made.collate([AudioSample(np.random.default_rng(0).normal(size=8000).astype(np.float32))])
    layers = layers_of(student, inputs)
    assert [tuple(layer.shape) for layer in layers] == [(24, 32)] * 3


def test_crops_remember_the_clip_they_come_from():
    made = modality(*WAVEFORM, "official_quirks=true")
    crop = made.prepare(AudioSample(np.zeros(48_000, np.float32)), 16_000, generator(0, "x"))
    layout = made.layout(crop)
    assert layout.shape == (49,) and layout.num_uncropped == 149
    assert made.layout(AudioSample(np.zeros(16_000, np.float32))).num_uncropped is None
