"""Whole runs on images, tiny: what they write, what they leave out, and that an interruption changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import d2v_core
from d2v_core import plugins
from d2v_vision import data
from d2v_vision.modality import VisionModality

from ..runs import IMAGES, call_d2v, lines

TINY = {**IMAGES, "data.synthetic_images": "24", "train.max_steps": "6"}
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def d2v(own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`d2v run` on tiny sizes in a folder of its own: exit status and all that was printed."""
    monkeypatch.setattr(plugins, "load", lambda name: VisionModality)

    def call(**options: str) -> tuple[int, str]:
        words = {key.replace("__", "."): value for key, value in options.items()}
        status, out, error = call_d2v(capsys, TINY, words)
        return status, out + error

    return call


def test_a_run_without_data_ends_with_the_probe(d2v: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PROBE_COUNTS", {"train": 20, "dev": 10, "test": 20})
    monkeypatch.setattr(data, "PROBE_BUDGETS", (10, 20))
    status, printed = d2v(out="r", train__probe="true")
    assert status == 0 and "built-in textured shapes, 24 images" in printed
    summary = json.loads(Path("r/summary.json").read_text())
    assert summary["steps"] == 6 and summary["amount"] == 48 and summary["unit"] == "images"
    assert {"pretrained", "untrained", "raw pixels"} <= summary["probe"].keys()
    assert all(0.3 < line["target_std"] <= 1.01 and line["masked"] < 0.6 for line in lines("r"))
    features = d2v_core.load("r").encode({"image": torch.zeros(1, 3, 32, 32)})
    assert [tuple(layer.shape) for layer in features] == [(16, 16)] * 4


def test_stopping_and_going_on_changes_nothing(d2v: Run) -> None:
    assert d2v(out="whole")[0] == 0
    assert d2v(out="parts", train__checkpoint_every="3")[0] == 0
    folder = Path("parts/checkpoints")
    assert [path.name for path in sorted(folder.iterdir())] == ["step-00000003", "step-00000006"]
    for path in (folder / "step-00000006").iterdir():
        path.unlink()
    (folder / "step-00000006").rmdir()
    Path("parts/summary.json").unlink()
    assert d2v(out="parts", train__checkpoint_every="3", resume="auto")[0] == 0
    for part in ("model", "teacher"):
        whole, parts = (load_file(f"{run}/checkpoints/step-00000006/{part}.safetensors") for run in ("whole", "parts"))
        assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_files_that_break_while_training_are_named_and_left_out(d2v: Run) -> None:
    rng = np.random.default_rng(0)
    for i in range(8):
        path = Path("pictures", f"class{i % 2}", f"{i}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (40 + i, 50)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).convert("L" if i == 3 else "RGB").save(path)
    Path("pictures/empty").mkdir()
    cut = Path("pictures/class1/5.jpg")
    cut.write_bytes(cut.read_bytes()[:700])
    options = {"data__path": "pictures", "data__batch": "4", "train__max_steps": "4"}
    status, printed = d2v(out="checked", **options)
    assert status == 2 and "1 of 8 images (12.5%) are unreadable" in printed and "class1/5.jpg: damaged" in printed
    status, printed = d2v(out="headers", data__verify="headers", **options)
    assert status == 0 and "skipped class1/5.jpg" in printed and "1 folders without an image: empty" in printed
    summary = json.loads(Path("headers/summary.json").read_text())
    assert list(summary["skipped"]) == ["class1/5.jpg"]
    status, printed = d2v(out="allowed", data__max_bad_ratio="0.2", **options)
    assert status == 0 and "7 images in" in printed and "2 class folders" in printed


def test_a_wrong_path_leaves_no_folder_behind(d2v: Run) -> None:
    status, printed = d2v(out="r", data__path="nowhere")
    assert status == 2 and "data.path=nowhere does not exist" in printed
    assert not Path("r").exists()


def test_one_batch_is_learnt(d2v: Run) -> None:
    plain = {"data__color_jitter": "0", "data__crop_scale": "[1.0,1.0]", "data__flip_prob": "0"}
    norms = {"target__layer_norms": "[layer]", "target__mean_norms": "[layer]"}  # the official ones
    assert d2v(out="r", data__synthetic_images="8", train__max_steps="400", **norms, **plain)[0] == 0
    loss = [line["loss"] for line in lines("r")]
    assert np.mean(loss[-10:]) < 0.6 * np.mean(loss[:5])
    assert lines("r")[-1]["target_std"] > 0.3
