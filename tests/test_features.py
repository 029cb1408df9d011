"""`d2v encode` on files of each modality: what a sample is, what is left out, and that company changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
import torch
from PIL import Image

import d2v_core
from d2v_core import UserError, cli
from d2v_core.features import EncodeConfig, encode_files

from .runs import IMAGES, SHORT, SMALL

SOUND = {**SHORT, **SMALL, "modality": "audio", "data.synthetic_clips": "6", "data.batch_s": "8"}
RUNS: dict[str, dict[str, str]] = {
    "sound": SOUND,
    "sound2": {**SOUND, "preset": "tiny2"},
    "images": {**IMAGES, "data.synthetic_images": "12", "data.batch": "6"},
    "words": {**SHORT, **SMALL, "modality": "text", "data.path": "texts", "data.tokenizer": "tokenizer.json",
              "data.batch_tokens": "256", "data.cache": "cache"},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Runs of one step, and files: some that cannot be read among them."""
    place = tmp_path_factory.mktemp("features")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        torch.set_num_threads(1)
        rng = np.random.default_rng(0)
        Path("clips/deep").mkdir(parents=True)
        for name, seconds in (("a.wav", 1.0), ("b.flac", 0.4), ("deep/a.wav", 2.3), ("deep/c.wav", 1.7)):
            sf.write(f"clips/{name}", 0.1 * rng.normal(size=round(16000 * seconds)), 16000)
        Path("clips/broken.wav").write_bytes(b"RIFF, but no sound")
        sf.write("clips/short.wav", np.zeros(100), 16000)
        Path("pictures").mkdir()
        for name, size in (("a.png", (40, 40)), ("b.jpeg", (90, 30))):
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(f"pictures/{name}")
        Path("pictures/broken.png").write_bytes(b"\x89PNG, but no picture")
        Path("texts").mkdir()
        lines = ["the sea is wide", "", "a ship", "the ship sees a bird over the sea"]
        Path("texts/a.txt").write_text("\n".join(lines * 10) + "\n")
        assert cli.main(["tokenizer", "train", "texts", "vocab_size=270", "out=tokenizer.json"]) == 0
        for name, options in RUNS.items():
            words = [f"{key}={value}" for key, value in {**options, "train.max_steps": "1", "out": name}.items()]
            assert cli.main(["run", *words, *(["stage=pretrain"] if "sound" in name else [])]) == 0
        Path("new.txt").write_text("a bird\n\nthe sea\n")
        Path("new.jsonl").write_text('{"text": "a bird"}\nno json\n{"text": "the\\nsea"}\n')
        yield place


def encoded(run: str, path: str, **options: Any) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, str]]:
    """Arrays by id, lines of the index by id, and what was left out."""
    out = f"of-{run}-{Path(path).name}-{options.get('batch')}"
    done = encode_files(run, path, EncodeConfig(out=out, **options))
    index = [json.loads(line) for line in (done.out / "index.jsonl").read_text().splitlines()]
    arrays = {row["id"]: np.load(done.out / row["file"]) for row in index}
    return arrays, {row["id"]: row for row in index}, dict(done.left_out)


@pytest.mark.parametrize("run", ["sound", "sound2"])
def test_sound(place: Path, monkeypatch: pytest.MonkeyPatch, run: str) -> None:
    """Every clip, whole, though training drops those below a second and crops the long ones."""
    monkeypatch.chdir(place)
    alone, index, left_out = encoded(run, "clips", batch=1)
    together, _, _ = encoded(run, "clips", batch=4)
    assert list(alone) == ["a.wav", "b.flac", "deep/a.wav", "deep/c.wav"]
    assert left_out.keys() == {"broken.wav", "short.wav"} and "shorter" in left_out["short.wav"]
    loaded = d2v_core.load(run)
    for name, array in alone.items():
        np.testing.assert_allclose(together[name], array, atol=1e-4)
        waveform, _ = sf.read(f"clips/{name}", dtype="float32")
        assert array.shape[1] == loaded.modality.geometry.num_tokens(len(waveform)) == index[name]["grid"][0]
        for one in (loaded.encode(f"clips/{name}"), loaded.encode(waveform), loaded.encode(torch.from_numpy(waveform))):
            np.testing.assert_allclose(torch.stack(one).numpy(), array, atol=1e-4)
    for wrong, said in ((np.zeros((2, 9)), r"shape \(2, 9\)"), (np.zeros(9), "at least"), ("clips", "has 4 samples")):
        with pytest.raises(UserError, match=said):
            loaded.encode(wrong)
    with pytest.raises(UserError, match="does not exist"):
        loaded.encode("clip/a.wav")


def test_images(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    arrays, index, left_out = encoded("images", "pictures")
    assert list(arrays) == ["a.png", "b.jpeg"] and list(left_out) == ["broken.png"]
    loaded = d2v_core.load("images")
    for name, array in arrays.items():
        assert index[name]["grid"] == list(loaded.modality.grid) and array.shape[1] == np.prod(loaded.modality.grid)
        image = Image.open(f"pictures/{name}")
        for one in (loaded.encode(Path("pictures", name)), loaded.encode(image), loaded.encode(np.asarray(image))):
            np.testing.assert_allclose(torch.stack(one).numpy(), array, atol=1e-4)
    with pytest.raises(UserError, match=r"shape \(3, 8, 8\) and type float64"):
        loaded.encode(np.zeros((3, 8, 8)))


def test_words(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line, or a record, is a sample of its own, named by its place; what is too long is cut, and that is said."""
    monkeypatch.chdir(place)
    lines, index, left_out = encoded("words", "new.txt")
    records, _, broken = encoded("words", "new.jsonl")
    assert list(lines) == ["new.txt:1", "new.txt:3"] and not left_out
    assert list(records) == ["new.jsonl:1", "new.jsonl:3"] and list(broken) == ["new.jsonl:2"]
    loaded = d2v_core.load("words")
    for text, line, record in (("a bird", "new.txt:1", "new.jsonl:1"), ("the sea", "new.txt:3", "new.jsonl:3")):
        one = torch.stack(loaded.encode(text)).numpy()
        np.testing.assert_allclose(lines[line], one, atol=1e-4)
        np.testing.assert_allclose(records[record], one, atol=1e-4)
        assert index[line]["grid"] == [one.shape[1]]
        np.testing.assert_allclose(torch.stack(loaded.encode(loaded.modality.sample(text))).numpy(), one, atol=1e-4)
    Path("long.txt").write_text("sea " * 2000 + "\n")
    said: list[str] = []
    done = encode_files("words", "long.txt", EncodeConfig(layers="last", out="long"), say=said.append)
    most = loaded.modality.max_tokens
    assert done.num_new == 1 and f"1 are cut to {most} tokens" in said[0]
    assert np.load("long/samples/long.txt%3A1.npy").shape == (1, most, 32)
    with pytest.raises(UserError, match="has 2 samples, expected one"):
        loaded.encode(Path("new.txt"))


def test_a_run_on_the_grammar_reads_no_text(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    options = {**SHORT, **SMALL, "modality": "text", "data.grammar_documents": "20", "data.batch_tokens": "256",
               "train.max_steps": "1", "out": "grammar"}  # fmt: skip
    assert cli.main(["run", *(f"{key}={value}" for key, value in options.items())]) == 0
    assert encode_files("grammar", config=EncodeConfig(layers="last", pool="mean")).num_new > 20
    with pytest.raises(UserError, match="The run grammar was trained on the built-in grammar"):
        encode_files("grammar", "new.txt")


def test_a_fine_tuned_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its best weights; a table's split is chosen as for a run."""
    monkeypatch.chdir(place)
    rows = ["file\tsplit", "a.wav\tone", "deep/a.wav\ttwo"]
    Path("clips/table.tsv").write_text("\n".join(rows) + "\n")
    tune = {"stage": "finetune", "from": "sound", "out": "tuned", "labels": "12", "finetune.batch": "4", **SHORT,
            "train.max_steps": "1", "finetune.eval_every": "1"}  # fmt: skip
    tune.pop("train.probe")
    assert cli.main(["run", *(f"{key}={value}" for key, value in tune.items())]) == 0
    done = encode_files("tuned", "clips/table.tsv", EncodeConfig(out="tuned-out"), {"data.split": "two"})
    loaded = d2v_core.load("tuned")
    expected = torch.stack(loaded.encode("clips/deep/a.wav")).numpy()
    np.testing.assert_allclose(np.load("tuned-out/samples/deep/a.wav.npy"), expected, atol=1e-4)
    assert done.num_new == 1
    with pytest.raises(UserError, match="it has no teacher"):
        encode_files("tuned", "clips", EncodeConfig(teacher=True))
