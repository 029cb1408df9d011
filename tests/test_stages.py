"""Every modality goes from pre-training through fine-tuning and probing on its built-in data, by either method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from d2v_core import load_classifier

from .runs import SHORT, call_d2v

LABELLED = {"labels": "40", "train.num_threads": "1", "train.num_workers": "0", "finetune.batch": "8"}
SMALLER = {"audio": {"data.synthetic_clips": "12"}, "vision": {"data.synthetic_images": "12", "data.batch": "6"},
           "text": {"data.grammar_documents": "30", "data.batch_tokens": "256"}}  # fmt: skip


@pytest.mark.parametrize(
    ("modality", "preset"),
    [
        ("audio", "tiny"),
        ("audio", "tiny2"),
        ("vision", "tiny1"),
        ("vision", "tiny"),
        ("text", "tiny"),
        ("text", "tiny2"),
    ],
)
def test_from_pre_training_to_a_classifier(
    modality: str, preset: str, own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"modality": modality, "preset": preset, **SHORT, **SMALLER[modality], "train.max_steps": "2", "out": "pre"}
    answer = call_d2v(capsys, run, {})
    assert answer.status == 0, answer.error
    tune = {"stage": "finetune", "from": "pre", "out": "tuned", "train.max_steps": "2", "finetune.eval_every": "1"}
    answer = call_d2v(capsys, {**tune, **LABELLED}, {})
    assert answer.status == 0, answer.error
    result = json.loads(Path("tuned", "summary.json").read_text())["finetune"]
    assert result["labels"] == 40 and 0 <= result["test"]["accuracy"] <= 100
    classifier = load_classifier("tuned")
    part = classifier.modality.task().test
    probabilities = classifier.predict([part.samples[i] for i in range(3)])
    assert probabilities.shape == (3, len(classifier.classes))
    assert probabilities.sum(1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    answer = call_d2v(capsys, {"stage": "probe", "from": "pre", "out": "probed", **LABELLED}, {})
    assert answer.status == 0, answer.error
    rows = json.loads(Path("probed", "summary.json").read_text())["table"]
    assert {row["system"] for row in rows} > {"pretrained", "untrained"} and len(rows) == 6
