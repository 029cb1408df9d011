"""From transcripts to a recogniser, by both methods: a whole run, and what is loaded from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from d2v_audio.letters import Letters
from d2v_audio.recognize import load_recognizer
from d2v_audio.transcripts import Utterances
from d2v_core import cli
from d2v_core.errors import UserError
from d2v_core.labelled import ids

SMALL = {"model.embed_dim": "32", "model.num_layers": "2", "model.num_heads": "2", "target.top_k_layers": "2",
         "positions.groups": "4", "data.synthetic_clips": "8", "data.batch_s": "8", "train.max_steps": "2",
         "train.num_workers": "0", "train.tensorboard": "false", "train.probe": "false"}  # fmt: skip
TUNING = {"stage": "finetune", "preset": "ctc_tiny", "labels": "20s", "labelled.synthetic_clips": "40",
          "train.max_steps": "4", "finetune.eval_every": "2", "finetune.head_steps": "30", "train.tensorboard": "false",
          "finetune.freeze_steps": "1", "finetune.mask_prob": "0.3", "finetune.mask_length": "2",
          "finetune.channel_mask_prob": "0.1", "finetune.channel_mask_length": "4", "model.layer_drop": "0.1",
          "finetune.layer_decay": "0.8"}  # fmt: skip


def d2v(*words: str, **options: str) -> int:
    torch.set_num_threads(1)
    return cli.main([*words, *(f"{key}={value}" for key, value in options.items())])


@pytest.fixture(scope="module", params=["tiny", "tiny2"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was fine-tuned on built-in utterances for a few steps, in a place that it was moved to."""
    folder = tmp_path_factory.mktemp("runs")
    small = {**SMALL, **({"decoder.dim": "32"} if request.param == "tiny2" else {})}
    assert d2v("run", "modality=audio", f"preset={request.param}", **small, out=str(folder / "pre")) == 0
    assert d2v("run", **TUNING, **{"from": str(folder / "pre")}, out=str(folder / "tuned")) == 0
    shutil.move(folder / "tuned", folder / "moved")
    return folder / "moved"


def predictions(run: Path, part: str) -> dict[str, tuple[str, str]]:
    lines = [line.split("\t") for line in (run / f"predictions-{part}.tsv").read_text().splitlines()]
    assert lines[0] == ["id", "label", "predicted"]
    return {name: (label, predicted) for name, label, predicted in lines[1:]}


def test_what_a_run_leaves(run: Path) -> None:
    from d2v_audio.wer import total, word_edits

    task = json.loads((run / "task.json").read_text())
    assert task["symbols"] == list(Letters.official().symbols) and task["metrics"] == ["wer", "cer"]
    spoken = Utterances("train", 40, 16000)
    chosen = [int(name.split("-")[1]) for name in task["train"]]
    assert 18 < spoken.sizes[chosen].sum() / 16000 < 22 and len(set(chosen)) == len(chosen)
    result = json.loads((run / "summary.json").read_text())["finetune"]
    told = predictions(run, "test")
    assert len(told) == 80
    edits = total(word_edits([label for label, _ in told.values()], [heard for _, heard in told.values()]))
    assert result["test"]["wer"] == pytest.approx(edits.rate, abs=0.01)
    scores = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    assert [set(one) for one in scores] == [{"step", "wer", "cer"}] * 2
    assert result["dev"]["cer"] == min(scores, key=lambda one: (one["wer"], one["cer"]))["cer"]


def test_it_says_what_the_run_wrote(run: Path) -> None:
    recognizer = load_recognizer(run)
    spoken = Utterances("test", 80, 16000)
    told = predictions(run, "test")
    assert [label for label, _ in told.values()] == [spoken.transcripts[int(n.split("-")[1])] for n in told]
    heard = recognizer.transcribe([3.0 * spoken.waveforms[int(n.split("-")[1])] + 1 for n in told])  # of any loudness
    assert heard == [predicted for _, predicted in told.values()]
    assert recognizer.letters == Letters.official() and (recognizer.frame_s, recognizer.sample_rate) == (0.04, 16000)
    assert any(heard), "nothing was heard at all, which would say nothing"


def test_emissions(run: Path) -> None:
    recognizer = load_recognizer(run)
    spoken = Utterances("dev", 4, 16000)
    alone = recognizer.emissions(spoken.waveforms)
    for waveform, one in zip(spoken.waveforms, alone, strict=True):
        assert one.shape == (recognizer.modality.geometry.num_tokens(len(waveform)), 32)
        assert torch.allclose(one.exp().sum(1), torch.ones(len(one)), atol=1e-5)
    assert len({len(one) for one in alone}) > 1
    together = recognizer.emissions([torch.from_numpy(w).double() for w in spoken.waveforms], batch_s=60.0)
    for a, b in zip(alone, together, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-4)
    assert recognizer.emissions([]) == []


def test_files_and_bad_waveforms(run: Path, tmp_path: Path) -> None:
    recognizer = load_recognizer(run)
    waveform = Utterances("dev", 1, 16000).waveforms[0]
    sf.write(tmp_path / "a.wav", 0.1 * waveform, 16000, subtype="FLOAT")
    sf.write(tmp_path / "b.wav", 0.1 * np.stack([waveform, waveform], 1), 8000, subtype="FLOAT")
    read = recognizer.read(tmp_path / "a.wav")
    assert read.shape == waveform.shape and recognizer.read(tmp_path / "b.wav").shape == (2 * len(waveform),)
    assert recognizer.transcribe([read]) == recognizer.transcribe([waveform])
    for bad, message in ((waveform[:50], "has 50 samples, and a frame takes"), (waveform[None], r"shape \(1, "),
                         (np.full(16000, np.nan), "no finite numbers")):  # fmt: skip
        with pytest.raises(UserError, match=f"Waveform 1 .*{message}"):
            recognizer.emissions([waveform, bad])
    with pytest.raises(UserError, match=r"^/.*none.wav does not exist"):
        recognizer.read(tmp_path / "none.wav")
    with pytest.raises(UserError, match="holds 2 audio files: give one"):
        recognizer.read(tmp_path)


def test_other_runs_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="of stage=pretrain, not of stage=finetune"):
        load_recognizer(run.parent / "pre")
    out = tmp_path / "classes"
    words = {"stage": "finetune", "from": str(run.parent / "pre"), "out": str(out), "labelled.synthetic_clips": "40",
             "train.max_steps": "1", "train.tensorboard": "false", "train.num_workers": "0"}  # fmt: skip
    assert d2v("run", **words) == 0
    with pytest.raises(UserError, match="tells classes of audio, and transcribing needs a run of"):
        load_recognizer(out)


def test_the_subset_follows_the_seed_and_says_what_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from d2v_core.config import load_config
    from d2v_core.labelled import open_task

    chosen = []
    for seed in ("0", "1"):
        words = {**TUNING, "from": str(run.parent / "pre"), "seed": seed}
        config, kind = load_config([f"{key}={value}" for key, value in words.items()])
        split = open_task(kind(config))
        chosen.append(list(ids(split.train)))
        assert f"{len(chosen[-1])} of 40 labelled samples to train on, 10 to choose on, 80" in split.description
        assert "sequences of 32 symbols" in split.description
    assert chosen[0] != chosen[1] and json.loads((run / "task.json").read_text())["train"] == chosen[0]
