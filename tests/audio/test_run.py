"""Whole runs on sound, tiny: what they write, what they repeat, what can be done with the result."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

import d2v_core
from d2v_audio.synthetic import SyntheticSpeech
from d2v_core import checkpoint, cli

from ..runs import SHORT, SMALL, call_d2v, metrics, options, same, weights

TINY = {"modality": "audio", **SMALL, **SHORT, "data.synthetic_clips": "12", "data.batch_s": "8", "data.min_s": "0.5"}
Run = Callable[..., str]


@pytest.fixture
def d2v(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`d2v run` on tiny sizes in a folder of its own, with exit status 0; returns what it printed."""

    def call(*words: str, base: dict[str, str] = TINY) -> str:
        status, out, error = call_d2v(capsys, base, options(words))
        assert (status, error) == (0, "")
        return out

    return call


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve utterances in the layout of LibriSpeech, in three formats."""
    root = tmp_path_factory.mktemp("LibriSpeech") / "train-tiny"
    corpus = SyntheticSpeech("train", 12)
    for i in range(12):
        chapter = root / str(100 + i // 6) / str(7 + i // 3)
        chapter.mkdir(parents=True, exist_ok=True)
        stem = f"{100 + i // 6}-{7 + i // 3}-{i:04d}"
        if i % 3 == 2:
            sf.write(chapter / f"{stem}.opus", corpus[i].waveform, 16000, format="OGG", subtype="OPUS")
        else:
            sf.write(chapter / f"{stem}{('.wav', '.flac')[i % 3]}", corpus[i].waveform, 16000)
        with (chapter / f"{chapter.parent.name}-{chapter.name}.trans.txt").open("a") as transcripts:
            transcripts.write(f"{stem} {corpus[i].transcript}\n")
    return root


def test_what_a_run_leaves(d2v: Run) -> None:
    words = {"modality": "audio", "stage": "pretrain", "train.max_steps": "5", "data.synthetic_clips": "40"}
    out = d2v(base={**words, "out": "run"})
    run = Path("run")
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "tensorboard"
    }  # fmt: skip
    (step,) = (run / "checkpoints").iterdir()
    assert step.name == "step-00000005"
    assert {p.name for p in step.iterdir()} == {
        "model.safetensors", "teacher.safetensors", "state.safetensors", "state.json", "manifest.json"
    }  # fmt: skip
    (events,) = (run / "tensorboard").iterdir()
    assert events.name.startswith("events.out.tfevents")
    assert events.stat().st_size > 100

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 5]
    for key in ("loss", "target_std", "pred_std", "ema_decay", "lr", "grad_norm", "masked", "throughput", "skipped"):
        assert all(np.isfinite(line[key]) for line in lines), key
    assert lines[0]["ema_decay"] == 0.98
    assert 0.3 < lines[0]["masked"] < 0.6  # 0.65 with spans of 5 that overlap
    assert lines[0]["lr"] == 0.002

    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 5
    assert summary["wall_seconds"] > 0
    assert summary["modality"] == "audio"
    assert summary["skipped"] == {}
    assert 0 < summary["amount"] <= 5 * 32  # seconds of sound; a batch is at most 32 s
    scores = summary["probe"]
    for system in ("pretrained", "untrained", "log-mel input"):
        assert isinstance(scores[system], float)
        assert 100 / 26 < scores[system] < 100  # better than guessing among 26 phones
    assert {(row["system"], row["labels"]) for row in scores["table"]} == {
        (system, labels) for system in ("pretrained", "untrained", "log-mel input") for labels in (10, 100)
    }
    for text in ("No data.path: training on the built-in synthetic speech", "The run lies in run", "from=run"):
        assert text in out


def test_the_default_name_is_new_each_time(d2v: Run) -> None:
    d2v()
    d2v()
    names = [path.name for path in Path("runs").iterdir()]
    assert len(set(names)) == 2
    assert all(name.startswith("audio-tiny-2") for name in names)


def test_config_yaml_alone_says_it_all(d2v: Run) -> None:
    from omegaconf import OmegaConf

    d2v("out=first", "optim.lr=0.003", "seed=3")
    text = Path("first/config.yaml").read_text()
    assert "lr: 0.003" in text
    stored = OmegaConf.to_container(OmegaConf.load("first/config.yaml"))
    assert isinstance(stored, dict)
    words: dict[str, str] = {}
    for key, value in stored.items():
        for leaf, content in value.items() if isinstance(value, dict) else [("", value)]:
            words[f"{key}.{leaf}" if leaf else str(key)] = "null" if content is None else str(content)
    d2v("out=second", base=words)
    assert metrics("second") == metrics("first")
    assert same(weights("second"), weights("first"))
    assert Path("second/config.yaml").read_text() == text.replace("out: first", "out: second")


def test_the_same_command_gives_the_same_numbers(d2v: Run, speech: Path) -> None:
    words = (f"data.path={speech}", "data.micro_batch_s=4", "model.dropout=0.1", "model.layer_drop=0.2")
    d2v("out=a", *words)
    d2v("out=b", *words)
    d2v("out=c", *words, "train.num_workers=2")
    d2v("out=d", *words, "seed=1")
    assert metrics("a") == metrics("b") == metrics("c")
    assert same(weights("a"), weights("b"))
    assert same(weights("a"), weights("c"))
    assert metrics("a") != metrics("d")


def test_stopped_and_resumed_is_the_same_run(d2v: Run, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import os
    import signal

    from d2v_core.trainer import Updater

    d2v("out=straight", "train.num_workers=1")
    update = Updater.update

    def stop(updater, step, *rest):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(updater, step, *rest)

    words = [f"{key}={value}" for key, value in {**TINY, "out": "run", "train.num_workers": "1"}.items()]
    with monkeypatch.context() as patch:
        patch.setattr(Updater, "update", stop)
        assert cli.main(["run", *words]) == 143
    said = capsys.readouterr().out
    assert "Stopped by SIGTERM after step 3 of 5; a checkpoint is saved." in said
    assert "out=run resume=auto" in said
    assert "Going on from run/checkpoints/step-00000003" in d2v("out=run", "resume=auto", "train.num_workers=1")
    assert metrics("run") == metrics("straight")
    assert same(weights("run"), weights("straight"))


def test_load_gives_features(d2v: Run) -> None:
    d2v("out=run")
    inputs = {"waveform": torch.from_numpy(SyntheticSpeech("test", 1)[0].waveform)[None]}
    trained, untrained, teacher = (
        d2v_core.load("run", **kind) for kind in ({}, {"untrained": True}, {"teacher": True})
    )
    assert (trained.step, untrained.step, teacher.step) == (5, 0, 5)
    assert not trained.training
    layers = trained.encode(inputs)
    tokens = ((inputs["waveform"].shape[1] - 400) // 160 + 1 + 2 - 4) // 4 + 1  # windows, one of padding on each side
    assert [tuple(layer.shape) for layer in layers] == [(tokens, 32)] * 3
    assert all(layer.dtype == torch.float32 and not layer.requires_grad for layer in layers)
    assert torch.equal(trained.encode(inputs)[-1], layers[-1])
    for other in (untrained, teacher):
        assert not torch.equal(other.encode(inputs)[-1], layers[-1])
    # After five steps the teacher has kept most of where it began: it lies between the untrained and the trained.
    start, end, mean = (run.encode(inputs)[-1] for run in (untrained, trained, teacher))
    assert (mean - start).norm() < (end - start).norm()


def test_load_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(d2v_core.UserError, match="is not a run folder"):
        d2v_core.load(tmp_path)


def test_continued_on_files(d2v: Run, speech: Path) -> None:
    d2v("out=first")
    out = d2v("out=second", "from=first", f"data.path={speech}", "optim.lr=1e-9", "optim.weight_decay=0")
    assert "Weights from first/checkpoints/step-00000005; teacher made anew from them." in out
    assert "12 clips, 23.0 s at 16000 Hz" in out
    before, after = weights("first"), weights("second")
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)
    start = checkpoint.load(checkpoint.list_checkpoints(Path("second/checkpoints"))[-1]).teacher
    assert all(
        torch.allclose(tensor, before[name if name in before else f"student.{name}"], atol=1e-6)
        for name, tensor in start.items()
        if name in before or f"student.{name}" in before
    )
    assert len(metrics("second")) == 5  # a run of its own, from step 1


@pytest.mark.parametrize(
    "words",
    [
        ("encoder=waveform", "features.channels=16", "data.batch_s=4"),
        ("encoder=waveform", "features.channels=16", "data.batch_s=4", "features.norm=group", "features.grad_mult=0.1"),
        ("train.precision=bf16",),
        ("data.crop=false", "mask.same_count=false"),
        ("model.norm=pre", "loss.beta=0.5", "optim.schedule=tri_stage", "optim.final_lr_ratio=0.05"),
        ("data.micro_batch_s=4", "optim.clip_grad_norm=1", "optim.decay_all=false", "mask.mask_dropout=0.1"),
    ],
    ids=["waveform", "waveform-group", "bf16", "padded", "pre-norm", "accumulated"],
)
def test_other_ways_to_run(d2v: Run, words: tuple[str, ...]) -> None:
    d2v("out=run", *words)
    lines = metrics("run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(np.isfinite(line["loss"]) and line["target_std"] > 0.1 and line["pred_std"] > 0.01 for line in lines)
    assert all(tensor.dtype == torch.float32 for tensor in weights("run").values())
    waveform = torch.randn(1, 16000)
    assert all(torch.isfinite(layer).all() for layer in d2v_core.load("run").encode({"waveform": waveform}))


def test_bf16_stays_near_fp32(d2v: Run) -> None:
    d2v("out=full")
    d2v("out=half", "train.precision=bf16")
    full, half = metrics("full"), metrics("half")
    assert full != half
    assert half[0]["loss"] == pytest.approx(full[0]["loss"], rel=0.02)


def test_padding_and_cropping_see_another_amount(d2v: Run, speech: Path) -> None:
    d2v("out=cropped", f"data.path={speech}")
    d2v("out=padded", f"data.path={speech}", "data.crop=false")
    amounts = [json.loads(Path(run, "summary.json").read_text())["amount"] for run in ("cropped", "padded")]
    assert amounts[0] < amounts[1] <= 5 * 8


def test_a_fairseq_manifest(d2v: Run, speech: Path) -> None:
    files = sorted(path for path in speech.rglob("*") if path.suffix in (".wav", ".flac"))
    rows = [f"{path.relative_to(speech)}\t{sf.info(path).frames}" for path in files]
    Path("train.tsv").write_text("\n".join([str(speech), *rows]) + "\n")
    assert "8 clips" in d2v("out=run", "data.path=train.tsv")
    shutil.copytree(speech, "copy")
    d2v("out=folder", "data.path=copy")
    assert metrics("folder") != metrics("run")


def test_one_batch_is_overfitted(d2v: Run) -> None:
    words = ("data.synthetic_clips=4", "data.batch_s=30", "train.max_steps=150", "train.log_every=10")
    d2v("out=run", *words, "optim.lr=0.003")
    lines = metrics("run")
    assert lines[-1]["epoch"] == 149  # every step is the whole of the data
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert all(line["target_std"] > 0.4 for line in lines)
    assert lines[-1]["pred_std"] > 0.3


def test_collapse_stops_a_run(d2v: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = {**TINY, "guard.after_steps": "2", "guard.min_target_std": "50", "out": "run"}
    assert cli.main(["run", *(f"{key}={value}" for key, value in words.items())]) == 2
    error = capsys.readouterr().err
    assert "The representation has collapsed: at step 3 target_std is 0." in error
    assert "below guard.min_target_std=50.0" in error
    assert "target.layer_norms=[instance]" in error


def test_every_preset_takes_two_steps(d2v: Run) -> None:
    for preset in ("small", "base", "large"):
        words = (f"preset={preset}", f"out={preset}", "train.max_steps=2", "data.min_s=1", "data.max_s=4")
        features = ("features.channels=16",) if preset in ("base", "large") else ()
        micro = ("data.micro_batch_s=null",) if features else ()
        d2v(*words, *features, *micro)
        assert len(metrics(preset)) == 2


@pytest.mark.slow
def test_the_default_run_learns(tmp_path: Path) -> None:
    """`d2v run modality=audio`: what it prints must be worth the minutes."""
    done = subprocess.run(
        [sys.executable, "-m", "d2v_core", "run", "modality=audio", "out=run"],
        cwd=tmp_path, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    probe = summary["probe"]
    assert probe["pretrained"] >= probe["untrained"] + 10
    assert probe["pretrained"] > probe["log-mel input"]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["target_std"] > 0.3
    assert "pretrained" in done.stdout
    for row in json.loads((tmp_path / "run" / "words" / "ladder.json").read_text())["rows"]:
        wer = {name: one["wer"] for name, one in row["weights"].items()}
        assert wer["student"] < wer["untrained"], row
