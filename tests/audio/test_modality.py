"""The audio modality against its contract: sizes, cropping, masks, presets, and a run that is interrupted."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from d2v_audio.data import AudioSample, normalise
from d2v_audio.modality import AudioModality
from d2v_core import cli
from d2v_core.batching import StepLoader
from d2v_core.errors import UserError
from d2v_core.keyed import generator
from d2v_core.run import build_model
from d2v_core.trainer import Updater

from ..runs import count, followed, modality_of

SMALL = ("data.synthetic_clips=8", "model.embed_dim=32", "model.num_layers=2", "target.top_k_layers=2",
         "positions.groups=4")  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


def modality(*words: str) -> AudioModality:
    return modality_of(AudioModality, words)


@pytest.mark.parametrize(
    ("preset", "pretraining", "without_head", "averaged_and_copied"),
    [("base", 93_754_880, 93_164_288, 88_561_920), ("large", 314_326_016, 313_276_416, 308_542_464)],
)
def test_parameter_counts_of_the_official_models(preset, pretraining, without_head, averaged_and_copied):
    with torch.device("meta"):
        model = build_model(modality(f"preset={preset}"))
    assert count(p for p in model.parameters() if p.requires_grad) == pretraining
    assert count(model.student.parameters()) == without_head
    own = {id(p) for p in model.student.parameters()}
    teacher = [p for p in model.teacher.parameters() if id(p) not in own]
    assert count(teacher) == averaged_and_copied
    if preset == "base":
        encoder = model.student.encoder
        assert count(encoder.embedding.convs.parameters()) + count(encoder.embedding.norms.parameters()) == 4_206_592
        assert count(encoder.positions.parameters()) == 3_505_920
        assert count(model.student.transformer.blocks[0].parameters()) == 7_087_872
        assert count(model.predictor.parameters()) == 590_592


def test_several_data_sets_as_one(tmp_path: Path):
    rng = np.random.default_rng(0)
    for folder, lengths in {"a": (20000, 30000), "b": (25000,)}.items():
        (tmp_path / folder).mkdir()
        for i, length in enumerate(lengths):
            soundfile.write(tmp_path / folder / f"{i}.wav", 0.1 * rng.standard_normal(length), 16000)
    a, b = tmp_path / "a", tmp_path / "b"
    made = modality(f"data.path={a}", f"data.also=[{b}]", "data.repeat=[1,3]", *SMALL)
    together = made.dataset("train")
    assert list(together.sizes) == [20000, 30000, 25000, 25000, 25000]
    names = [together.id(i) for i in range(len(together))]
    assert names == ["0:0.wav", "0:1.wav", "1:0.wav", "1:0.wav#2", "1:0.wav#3"]
    alone = [modality(f"data.path={a}", *SMALL).dataset("train"), modality(f"data.path={b}", *SMALL).dataset("train")]
    for i, (part, inside) in enumerate([(0, 0), (0, 1), (1, 0), (1, 0), (1, 0)]):
        assert np.array_equal(together[i].waveform, alone[part][inside].waveform)
    steps = iter(StepLoader(made, together, seed=0))
    heard: list[str] = []
    while len(heard) < len(together):  # the first epoch
        heard += [name for batch in next(steps)[2] for name in batch.ids]
    assert sorted(heard) == names


@pytest.mark.parametrize("preset", sorted(p.stem for p in AudioModality.recipes().glob("*.yaml")))
def test_every_preset_loads(preset: str):
    made = modality(f"preset={preset}")
    batching = made.batching()
    assert batching.batch >= batching.micro_batch >= batching.max_size > made.min_samples
    with torch.device("meta"):
        if made.config.encoder == "waveform":
            build_model(made)


def test_the_teacher_shares_the_front_end_and_follows_as_the_official_code_does():
    for teacher in ("copy", "average"):
        model = build_model(modality(f"positions.teacher={teacher}", *SMALL))
        assert model.teacher.shares("encoder.embedding")
        moved = followed(model)
        for name, p in model.teacher.module.named_parameters():
            if name.startswith(("encoder.embedding", "encoder.mask_embedding")):
                assert p is model.student.get_parameter(name)
            elif name.startswith("encoder.positions") and teacher == "copy":
                assert moved[name] == pytest.approx(1.0, abs=1e-5)
            else:
                assert moved[name] == pytest.approx(0.1, abs=1e-5), name


def test_official_base_values_reach_the_parts():
    made = modality("preset=base")
    config = made.config
    assert config.encoder == "waveform" and config.target.layer_norms == ["instance"]
    assert config.target.top_k_layers == 8 and config.loss.beta == 0 and config.model.layer_drop == 0.05
    assert config.teacher.ema_anneal_steps == 30_000 and config.train.max_steps == 400_000
    assert made.batching().batch == 60_800_000 and made.batching().micro_batch == 3_800_000
    assert made.min_samples == 32_000 and made.batching().max_size == 320_000
    with torch.device("meta"):
        model = build_model(made)
    conv = model.student.encoder.positions.convs[0]
    assert len(model.student.encoder.positions.convs) == 5 and conv.kernel_size == (19,) and conv.groups == 16


def test_a_clip_is_normalised_as_a_whole_before_cropping():
    wave = (np.random.default_rng(0).normal(3.0, 0.01, 5000)).astype(np.float32)
    out = normalise(wave)
    x = wave.astype(np.float64)
    np.testing.assert_allclose(out, (x - x.mean()) / np.sqrt(x.var() + 1e-5), atol=1e-4)
    assert out.dtype == np.float32 and np.isfinite(normalise(np.zeros(10, np.float32))).all()
    crop = modality().prepare(AudioSample(out), 1000, generator(0, "x")).waveform
    assert len(crop) == 1000 and any(np.array_equal(crop, out[i : i + 1000]) for i in range(4001))


def test_crops_reach_both_ends_and_leave_short_clips_whole():
    made, wave = modality(), np.arange(8, dtype=np.float32)
    starts = {int(made.prepare(AudioSample(wave), 5, generator(0, "c", i)).waveform[0]) for i in range(200)}
    assert starts == {0, 1, 2, 3}
    assert made.prepare(AudioSample(wave), 8, generator(0, "c")).waveform is wave
    assert len(made.prepare(AudioSample(wave), 99, generator(0, "c")).waveform) == 8


def test_collate_pads_with_zeros_and_says_how_long_clips_are():
    made = modality()
    clips = [AudioSample(np.full(n, 1.0 + n, np.float32)) for n in (5, 3)]
    inputs = made.collate(clips)
    assert inputs["waveform"].tolist() == [[6.0] * 5, [4.0, 4.0, 4.0, 0.0, 0.0]]
    assert inputs["num_samples"].tolist() == [5, 3] and made.amount(inputs) == 8 / 16_000
    equal = made.collate([clips[0], clips[0]])
    assert "num_samples" not in equal and made.amount(equal) == 10 / 16_000


@pytest.mark.parametrize("encoder", ["logmel", "waveform"])
@pytest.mark.parametrize("crop", ["true", "false"])
def test_masks_have_the_networks_number_of_tokens(encoder: str, crop: str):
    made = modality(*SMALL, f"encoder={encoder}", f"data.crop={crop}", "data.batch_s=12",
                    *(["features.channels=16"] if encoder == "waveform" else []))  # fmt: skip
    net, padded = made.feature_encoder().eval(), 0
    for (_, _, batches), _ in zip(StepLoader(made, made.dataset("train"), seed=0), range(4), strict=False):
        for batch in batches:
            tokens = net.embed(batch.inputs)
            assert batch.masks is not None and batch.masks.hidden.shape == (len(batch.ids), 1, tokens.x.shape[1])
            if tokens.padding_mask is not None:
                padded += 1
                assert not (batch.masks.hidden[:, 0] & tokens.padding_mask).any()
            out = build_model(made)(batch.inputs, batch.masks)
            assert torch.isfinite(out.loss_sum) and out.num_scored == int(batch.masks.hidden.sum())
    assert (padded > 0) == (crop == "false")


def test_the_shortest_clip_has_two_tokens_whatever_is_asked():
    for words in (("data.min_s=0",), ("data.min_s=0", "encoder=waveform", "preset=base")):
        made = modality(*words)
        assert made.geometry.num_tokens(made.min_samples) == 2
        assert made.geometry.num_tokens(made.min_samples - 1) == 1
    assert modality("data.min_s=1.5").min_samples == 24_000


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("features.stride=0", "stride"),
        ("data.sample_rate=0", "data.sample_rate=0"),
        ("data.min_s=30", "data.min_s=30.0 must lie between 0 and data.max_s"),
        ("data.micro_batch_s=99", "data.micro_batch_s=99.0"),
        ("mask.mask_prob=0", "mask.mask_prob=0.0"),
        ("data.max_bad_ratio=2", "data.max_bad_ratio=2.0"),
    ],
)
def test_a_configuration_that_cannot_work(word: str, message: str):
    with pytest.raises(UserError) as caught:
        modality(word)
    assert message in str(caught.value)


def test_probe_labels_and_tokens_agree():
    made = modality(*SMALL)
    made.__dict__["config"].train.probe = True
    task = made.probe()
    assert task is not None and task.budgets[-1] <= len(task.train) and task.num_classes == 26
    net = made.feature_encoder().eval()
    for inputs, labels in task.dev[:3]:
        tokens = net.embed(inputs)
        assert labels.shape == (tokens.x.shape[1],)
        assert task.input_features(inputs).shape[0] == len(labels)
        assert set(labels.tolist()) <= {-100, *range(26)} and (labels >= 0).float().mean() > 0.3


def run(out: Path, capsys, *words: str) -> tuple[int, str]:
    status = cli.main(["run", "modality=audio", f"out={out}", *SMALL, "data.batch_s=4", "train.max_steps=6",
                       "train.log_every=1", "train.probe=false", "train.tensorboard=false", "model.dropout=0.1",
                       "train.device=cpu", *words])  # fmt: skip
    return status, capsys.readouterr().out


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, capsys):
    from safetensors.torch import load_file

    assert run(tmp_path / "straight", capsys, "train.num_workers=0")[0] == 0
    update, seen = Updater.update, []

    def counted(self, *args):
        seen.append(None)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)
        return update(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Updater, "update", counted)
        status, text = run(tmp_path / "stopped", capsys, "train.num_workers=2")
    assert status == 130 and "Stopped by SIGINT after step 3 of 6" in text
    assert run(tmp_path / "stopped", capsys, "train.num_workers=0", "resume=auto")[0] == 0
    lines = []
    for name in ("straight", "stopped"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        lines.append(
            [{k: v for k, v in row.items() if k not in ("seconds", "throughput", "data_wait")} for row in rows]
        )
        assert rows[-1]["epoch"] >= 1
    assert lines[0] == lines[1] and len(lines[0]) == 6
    for file in ("model", "teacher"):
        a, b = (
            load_file(tmp_path / n / "checkpoints/step-00000006" / f"{file}.safetensors")
            for n in ("straight", "stopped")
        )
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
