"""`d2v run` and what follows pre-training: when it does, with which options, and that it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from d2v_audio import ladder
from d2v_core import cli
from d2v_core.config import with_sequel
from d2v_core.errors import UserError

from ..runs import metrics, same, weights

NETWORK = ["model.embed_dim=32", "model.num_layers=2", "model.num_heads=2", "target.top_k_layers=2",
           "data.synthetic_clips=6", "data.batch_s=6", "train.max_steps=2", "train.num_workers=0", "train.log_every=1",
           "train.tensorboard=false", "train.probe=false"]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "follows"),
    [
        ([], True),
        (["seed=3", "out=runs/a"], True),
        (["stage=pretrain"], False),
        (["stage=all", "preset=small", "data.path=/speech"], True),
        (["data.path=/speech"], False),
        (["from=runs/a"], False),
        (["preset=tiny2"], False),
        (["encoder=waveform"], False),
        (["preset=base"], False),
        (["train.probe=false"], False),
        (["stage=all", "train.probe=false"], True),
    ],
)
def test_when_it_follows(words: list[str], follows: bool) -> None:
    first, sequel = with_sequel(["modality=audio", *words])
    assert (sequel is not None) == follows
    assert first == ["modality=audio", *(word for word in words if word != "stage=all")]


def test_options_of_either_half() -> None:
    words = ["train.max_steps=7", "seed=1"]
    later = ["labels=[10m]", "lm=[none]", "decode.beam=9", "finetune.pool=first", "augment.band_masks=1"]
    first, sequel = with_sequel(["modality=audio", "stage=all", *words, *later])
    assert sequel is not None and first == ["modality=audio", *words]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["modality=vision", "stage=all"], "nothing follows pre-training in modality=vision"),
        (["stage=all"], "needs modality=NAME"),
        (["modality=audio", "stage=all", "lm=[no.arpa]"], "neither none"),
        (["modality=audio", "stage=all", "seeds=0"], "seeds=0"),
        (
            ["modality=audio", "stage=all", "preset=base", "data.path=/speech", "labels=[3m]"],
            "No preset of fine-tuning",
        ),
        (["modality=audio", "seed=1", "seed=2"], "seed is given twice"),
    ],
)
def test_what_cannot_follow_is_refused_first(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        with_sequel(words)


def test_data_without_transcripts_are_refused_first(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    with pytest.raises(UserError, match="1 clips but no transcript among them"):
        with_sequel(["modality=audio", "stage=all", f"data.path={tmp_path}"])


def test_pretraining_then_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run is that of stage=pretrain; what follows lies in it; called again, the command goes on."""
    real, called = ladder.ladder, list[list[str]]()

    def shortened(config: ladder.LadderConfig, rest: list[str]) -> int:
        called.append(rest)
        return real(config, [*rest, "train.max_steps=2", "train.log_every=1"])

    monkeypatch.setattr(ladder, "ladder", shortened)
    out, alone = tmp_path / "run", tmp_path / "alone"
    base = ["run", "modality=audio", *NETWORK, "features.stride=2"]
    words = [*base, "stage=all", f"out={out}", "resume=auto", "labelled.synthetic_clips=32", "finetune.head_steps=5"]
    words += ["finetune.eval_every=2", "labels=[6]", "decode.beam=5", "decode.engine=builtin"]
    assert cli.main(words) == 0
    assert cli.main([*base, "stage=pretrain", f"out={alone}"]) == 0
    assert same(weights(out), weights(alone)) and metrics(out) == metrics(alone)
    assert "preset=ctc_built_in" in called[0] and "labelled.synthetic_clips=32" in called[0]
    table = json.loads((out / "words" / "ladder.json").read_text())
    assert [row["lm"] for row in table["rows"]] == ["none", "2gram"]
    assert set(table["rows"][0]["weights"]) == {"student", "untrained"}
    capsys.readouterr()
    assert cli.main(words) == 0
    assert capsys.readouterr().out.count("is already complete") == 3  # pre-training and two cells
