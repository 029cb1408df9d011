"""`d2v encode`: what it writes, that it goes on where it was stopped, and that nothing of anybody else's is touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import d2v_core
from d2v_core import UserError, checkpoint, features
from d2v_core.features import EncodeConfig, chosen_layers, encode_files, file_name

WORDS = ("train.max_steps=2", "train.num_workers=0", "train.tensorboard=false", "train.probe=false", "data.bad=[3]")
LAYERS = ["input", "block-1", "block-2"]


@pytest.fixture
def run(d2v, tmp_path: Path) -> Path:
    """A finished run on 14 samples of 12 to 24 tokens, of which number 3 cannot be read."""
    assert d2v("run", "modality=toy", *WORDS, f"out={tmp_path / 'run'}")[0] == 0
    return tmp_path / "run"


def rows(out: Path, name: str = "index.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def arrays(out: Path) -> dict[str, np.ndarray]:
    return {row["id"]: np.load(out / row["file"]) for row in rows(out)}


def test_every_layer_of_every_sample(d2v, run: Path):
    status, text = d2v("encode", str(run), "data.bad=[3]")
    assert status == 0, text
    out = run / "features" / "trained-on"
    assert f"13 samples in {out}." in text and "1 cannot be encoded" in text and "sample-3: sample 3 is broken" in text
    loaded = d2v_core.load(run)
    data = loaded.modality.dataset("train")
    index = rows(out)
    assert [row["id"] for row in index] == [data.id(i) for i in range(14) if i != 3]
    assert list(loaded.layer_names) == LAYERS
    for i, row in zip((i for i in range(14) if i != 3), index, strict=True):
        expected = torch.stack(loaded.encode(data[i])).numpy()
        assert row["shape"] == list(expected.shape) == [3, data.sizes[i], 16] and row["grid"] == [data.sizes[i]]
        assert row["file"] == f"samples/sample-{i}.npy"
        np.testing.assert_allclose(np.load(out / row["file"]), expected, atol=2e-5)
    assert rows(out, "left_out.jsonl") == [{"id": "sample-3", "reason": "sample 3 is broken on purpose"}]
    about = json.loads((out / "features.json").read_text())
    newest = checkpoint.list_checkpoints(run / "checkpoints")[-1]
    assert about["run"] == str(run) and about["checkpoint"] == newest.name and about["layers"] == LAYERS
    assert about["sha256"] == checkpoint.digest_of(newest) and about["weights"] == "student"
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ("features.json", "index.jsonl", "left_out.jsonl", "samples")
    )


@pytest.mark.parametrize("extra", [0, 2])
def test_alone_or_padded_in_a_batch(d2v, tmp_path: Path, extra: int):
    """Samples of other lengths beside one change rounding at most; tokens in front are no tokens of the sample."""
    run = tmp_path / "run"
    d2v("run", "modality=toy", *WORDS, f"data.extra_tokens={extra}", f"out={run}")
    made = {}
    for batch in (1, 5, None):
        encode_files(run, config=EncodeConfig(out=str(tmp_path / f"batch-{batch}"), batch=batch))
        made[batch] = arrays(tmp_path / f"batch-{batch}")
    assert len({array.shape[1] for array in made[1].values()}) > 5
    for name, array in made[1].items():
        for other in (made[5][name], made[None][name]):
            assert other.shape == array.shape
            np.testing.assert_allclose(other, array, atol=2e-5)


def test_chosen_layers_pooled(run: Path, tmp_path: Path):
    encode_files(run, config=EncodeConfig(out=str(tmp_path / "all")))
    encode_files(run, config=EncodeConfig(out=str(tmp_path / "mean"), layers="[0,2]", pool="mean", dtype="float16"))
    encode_files(run, config=EncodeConfig(out=str(tmp_path / "first"), layers="last", pool="first"))
    whole, mean, first = (arrays(tmp_path / name) for name in ("all", "mean", "first"))
    for name, array in whole.items():
        assert mean[name].dtype == np.float16 and mean[name].shape == (2, 16)
        np.testing.assert_allclose(mean[name], array[[0, 2]].mean(1), atol=2e-3)
        np.testing.assert_allclose(first[name], array[2:, 0], atol=2e-5)
    assert json.loads((tmp_path / "mean/features.json").read_text())["layers"] == ["input", "block-2"]
    assert [row["shape"] for row in rows(tmp_path / "mean")] == [[2, 16]] * 13


def test_a_file_with_a_tensor_by_name_for_each_layer(run: Path, tmp_path: Path):
    config = EncodeConfig(out=str(tmp_path / "named"), layers="[1,2]", format="safetensors")
    assert encode_files(run, config=config).num_new == 13
    encode_files(run, config=EncodeConfig(out=str(tmp_path / "plain"), layers="[1,2]"))
    for name, array in arrays(tmp_path / "plain").items():
        tensors = load_file(tmp_path / "named" / "samples" / f"{name}.safetensors")
        assert sorted(tensors) == ["block-1", "block-2"]
        np.testing.assert_array_equal(np.stack([tensors["block-1"], tensors["block-2"]]), array)
    again = encode_files(run, config=config)
    assert (again.num_new, again.num_kept) == (0, 13)


def test_the_teacher_and_the_untrained_network(run: Path, tmp_path: Path):
    """Three networks, three folders: none is taken for another."""
    made = {}
    for name in ("student", "teacher", "untrained"):
        config = EncodeConfig(out=str(tmp_path / name), **({} if name == "student" else {name: True}))
        encode_files(run, config=config)
        made[name] = arrays(tmp_path / name)["sample-0"]
        loaded = d2v_core.load(run, **({} if name == "student" else {name: True}))
        expected = torch.stack(loaded.encode(loaded.modality.dataset("train")[0]))
        np.testing.assert_allclose(made[name], expected.numpy(), atol=2e-5)
        assert json.loads((tmp_path / name / "features.json").read_text())["weights"] == name
    assert len({array.tobytes() for array in made.values()}) == 3
    with pytest.raises(UserError, match=r"(?s)made otherwise.*weights: there 'student', now 'teacher'"):
        encode_files(run, config=EncodeConfig(out=str(tmp_path / "student"), teacher=True))
    with pytest.raises(UserError, match="are two networks"):
        encode_files(run, config=EncodeConfig(teacher=True, untrained=True))


def test_stopped_and_gone_on(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is whole is kept as it is; a sample or a line that was cut short is made again; the index ends in order."""
    config = EncodeConfig(out=str(tmp_path / "out"), batch=2)
    write, calls = features._write, []

    def stop(*given):
        calls.append(given)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return write(*given)

    monkeypatch.setattr(features, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        encode_files(run, config=config)
    monkeypatch.setattr(features, "_write", write)
    out = tmp_path / "out"
    done = rows(out)
    assert 0 < len(done) < 13
    kept, cut = out / done[0]["file"], out / done[1]["file"]
    cut.write_bytes(cut.read_bytes()[:-7])
    (out / "index.jsonl").write_text((out / "index.jsonl").read_text() + '{"id": "sample-')
    before = kept.stat().st_mtime_ns
    result = encode_files(run, config=config)
    assert (result.num_new, result.num_kept) == (13 - len(done) + 1, len(done) - 1)
    assert kept.stat().st_mtime_ns == before
    fresh = EncodeConfig(out=str(tmp_path / "fresh"), batch=2)
    encode_files(run, config=fresh)
    assert rows(out) == rows(tmp_path / "fresh")
    for name, array in arrays(tmp_path / "fresh").items():
        np.testing.assert_allclose(arrays(out)[name], array, atol=2e-5)
    assert not list(out.rglob("*.tmp"))


def test_nothing_is_overwritten(run: Path, d2v, tmp_path: Path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    status, text = d2v("encode", str(run), f"out={mine}")
    assert status == 2 and "holds no features. Nothing is overwritten" in text
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]
    out = tmp_path / "out"
    assert d2v("encode", str(run), f"out={out}", "layers=last")[0] == 0
    other = tmp_path / "other"
    d2v("run", "modality=toy", *WORDS, "seed=1", f"out={other}")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for words, expected in (
        ((str(other), "layers=last"), "sha256: there"),
        ((str(run),), "layers: there ['block-2'], now ['input', 'block-1', 'block-2']"),
        ((str(run), "layers=last", "pool=mean"), "pool: there None, now 'mean'"),
    ):
        status, text = d2v("encode", *words, f"out={out}")
        assert status == 2 and expected in text and "nothing is overwritten" in text, text
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    shutil.move(run, tmp_path / "moved")  # the same run at another place is the same run
    assert d2v("encode", str(tmp_path / "moved"), f"out={out}", "layers=last")[0] == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["gone"], "gone is not a run folder"),
        (["{run}", "nowhere"], "PATH=nowhere does not exist"),
        (["{run}", "{run}"], "data.path is not an option"),
        (["{run}", "{run}", "{run}"], "takes a run folder and the data to encode"),
        (["{run}", "layers=[0,3]"], "layers=[0,3] must be all, last, or numbers from 0 to 2"),
        (["{run}", "layer=last"], "Did you mean: 'layers'?"),
        (["{run}", "pool=max"], "pool=max must be one of: mean, first or null"),
        (["{run}", "batch=0"], "batch=0 must be at least 1"),
        (["{run}", "model.num_layers=1"], "model.num_layers is part of the run and cannot be changed"),
        (["{run}", "data.bad=[0,1,2,3,4,5,6,7,8,9,10,11,12,13]"], "None of the samples can be encoded"),
    ],
)
def test_what_cannot_be(run: Path, d2v, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words, expected: str):
    monkeypatch.chdir(tmp_path)
    status, text = d2v("encode", *(word.format(run=run) for word in words))
    assert status == 2 and expected in text, text


def test_no_room(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "_write", full)
    with pytest.raises(UserError, match=r"No space left on device\. Make room, or choose another folder"):
        encode_files(run, config=EncodeConfig(out=str(tmp_path / "out")))


def test_numbers_of_layers():
    assert chosen_layers("all", 3) == [0, 1, 2] and chosen_layers("last", 3) == [2]
    assert chosen_layers("[2,0]", 3) == [0, 2] and chosen_layers("1", 3) == [1]
    for wrong in ("", "[]", "[1,1]", "[-1]", "[a]", "[0.5]", "first", "[0,3]"):
        with pytest.raises(UserError, match="from 0 to 2"):
            chosen_layers(wrong, 3)


def test_names_of_files():
    """Every id has a file of its own below the folder, readable where it can be."""
    ids = [
        "a/b.wav",
        "..",
        "../../etc/passwd",
        "/root",
        "a//b",
        ".",
        "%2e",
        "x" * 300,
        "x" * 301,
        "é:12",
        "a\tb",
        "\udcff",
    ]
    names = [file_name(one) for one in ids]
    assert names[0] == "a/b.wav" and len(set(names)) == len(ids)
    for name in names:
        parts = name.split("/")
        assert not {"", ".", ".."} & set(parts) and all(len(part) <= 200 and part.isascii() for part in parts)


def test_what_encode_takes(run: Path):
    """A sample, or what collate makes of one; a toy has no files."""
    loaded = d2v_core.load(run)
    sample = loaded.modality.dataset("train")[0]
    for one, other in zip(loaded.encode(sample), loaded.encode(loaded.modality.collate([sample])), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match=r"The modality toy has no option data\.path"):
        loaded.encode("a.wav")
