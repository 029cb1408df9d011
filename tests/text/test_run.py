"""Whole runs on text, tiny: what they write, what they repeat, what can be done with the result."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import d2v_core
from d2v_core import cli
from d2v_core.errors import UserError

from ..runs import SHORT, SMALL, call_d2v, metrics, options, weights

TINY = {"modality": "text", **SMALL, **SHORT, "data.grammar_documents": "30", "data.batch_tokens": "512"}
WORDS = ["the house stands on a hill", "a tree grows near the house", "she reads the book by the tree", "it rains"]
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def d2v(own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`d2v run` on tiny sizes in a folder of its own; exit status and what it printed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_folder / "cache"))

    def call(*words: str, verb: str = "run") -> tuple[int, str]:
        status, out, error = call_d2v(capsys, TINY, options(words), verb)
        return status, out + error

    return call


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """Two files, and a tokenizer trained on them by the verb."""
    folder = tmp_path / "books"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.txt", "b.txt"):
        lines = [WORDS[i] + "." if i < 4 else "" for i in rng.integers(0, 5, 400)]
        (folder / name).write_text("\n".join(lines))
    assert cli.main(["tokenizer", "train", str(folder), "vocab_size=300", f"out={tmp_path / 't.json'}"]) == 0
    return folder


def test_a_run_repeats_itself_with_any_number_of_workers(d2v: Run):
    assert d2v("out=one")[0] == d2v("out=two", "train.num_workers=2")[0] == 0
    assert metrics("one") == metrics("two")
    assert all(torch.equal(tensor, weights("two")[name]) for name, tensor in weights("one").items())


def test_a_resumed_run_is_the_same_run(d2v: Run):
    words = ("teacher.ema_anneal_steps=5", "optim.schedule=constant", "optim.warmup_ratio=0")
    d2v("out=whole", *words)
    d2v("out=parts", "train.max_steps=3", *words)
    status, said = d2v("out=parts", "resume=auto", *words)
    assert status == 0 and "Going on from" in said
    assert metrics("parts") == metrics("whole")
    assert all(torch.equal(tensor, weights("parts")[name]) for name, tensor in weights("whole").items())


def test_the_probe_and_the_summary(d2v: Run):
    status, said = d2v("out=run", "train.probe=true")
    assert status == 0 and "role accuracy" in said
    summary = json.loads(Path("run/summary.json").read_text())
    probe = summary["probe"]
    assert 20 < probe["pretrained"] < 100 and 20 < probe["untrained"] < 100 and 40 < probe["words around"] < 100
    assert summary["unit"] == "tokens" and summary["amount"] > 1000


def test_a_run_on_files(d2v: Run, books: Path):
    words = (f"data.path={books}", "data.tokenizer=t.json")
    status, said = d2v("out=run", *words)
    assert status == 0 and "2 files, " in said and "tokenised in" in said
    assert all(np.isfinite(line["loss"]) and line["target_std"] > 0.1 for line in metrics("run"))
    loaded = d2v_core.load("run")
    inputs = loaded.modality.inputs("the house")
    assert inputs["ids"][0, 0] == 0 and inputs["ids"][0, -1] == 2
    assert loaded.modality.tokenizer.decode(inputs["ids"][0, 1:-1].tolist()) == "the house"
    assert [layer.shape for layer in loaded.encode(inputs)] == [(inputs["ids"].shape[1], 32)] * 3
    assert loaded.modality.inputs("word " * 500)["ids"].shape == (1, 64)
    (books / "c.jsonl").write_text("\n".join(json.dumps({"text": word}) for word in WORDS))
    status, said = d2v("out=more", *words, "train.num_workers=1", "data.break_mode=none")
    assert status == 0 and "3 files, " in said


def test_another_tokenizer_does_not_pass(d2v: Run, books: Path, tmp_path: Path):
    words = (f"data.path={books}", "data.tokenizer=t.json")
    assert d2v("out=run", *words)[0] == 0
    assert d2v("from=run", "out=next", *words)[0] == 0
    (tmp_path / "other.txt").write_text("\n".join(word.upper() for word in WORDS * 3) + "\nXYZ ABCDE FGHIJK" * 3)
    assert cli.main(["tokenizer", "train", "other.txt", "vocab_size=300", "out=other.json"]) == 0
    status, said = d2v("from=run", "out=wrong", f"data.path={books}", "data.tokenizer=other.json")
    assert status == 2 and "The tokenizer does not fit the weights" in said
    assert cli.main(["tokenizer", "train", "other.txt", "vocab_size=290", "out=smaller.json"]) == 0
    status, said = d2v("from=run", "out=wrong2", f"data.path={books}", "data.tokenizer=smaller.json")
    assert status == 2 and "do not fit this configuration" in said and "embedding.table.weight" in said


def test_a_run_folder_can_go_elsewhere(d2v: Run, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The tokenizer goes with it: neither the file that was given nor the working directory is needed again."""
    d2v("out=run", f"data.path={books}", "data.tokenizer=t.json")
    before = d2v_core.load("run")
    inputs = before.modality.inputs("the house, the tree")
    status, said = d2v("out=next", "from=run", f"data.path={books}")
    assert status == 2 and "data.tokenizer=run/tokenizer.json" in said
    assert d2v("out=next", "from=run", f"data.path={books}", "data.tokenizer=run/tokenizer.json")[0] == 0
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").rename(tmp_path / "elsewhere" / "moved")
    (tmp_path / "t.json").unlink()
    monkeypatch.chdir(tmp_path / "elsewhere")
    after = d2v_core.load("moved")
    assert torch.equal(after.modality.inputs("the house, the tree")["ids"], inputs["ids"])
    assert all(map(torch.equal, after.encode(inputs), before.encode(inputs)))


def test_a_run_on_the_grammar_is_no_start_for_text(d2v: Run, books: Path):
    d2v("out=run")
    with pytest.raises(UserError, match="has no tokenizer"):
        d2v_core.load("run").modality.inputs("text")
    assert d2v("from=run", "out=more")[0] == 0
    status, said = d2v("from=run", "out=next", f"data.path={books}", "data.tokenizer=t.json")
    assert status == 2 and "from=run was trained on the built-in grammar" in said
    assert not Path("next").exists()


def test_mistakes_leave_no_folder(d2v: Run, tmp_path: Path):
    (tmp_path / "latin.txt").write_bytes("caf\u00e9 au lait\n".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "a.txt").write_text("words\n" * 9)
    assert cli.main(["tokenizer", "train", "a.txt", "vocab_size=270", "out=t.json"]) == 0
    for name, words in (("latin.txt", "no UTF-8"), ("empty.txt", "no text in 1 files"), ("gone.txt", "does not exist")):
        status, said = d2v("out=run", f"data.path={name}", "data.tokenizer=t.json")
        assert status == 2 and words in said, said
        assert not Path("run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("mask.mask_prob=0.35", "mask.mask_length=4", "mask.random_prob=0", "mask.unmasked_prob=0"),
        ("mask.teacher_input=labels", "mask.score=masked"),
        ("embedding.teacher=average", "head.layers=3"),
        ("train.precision=bf16",),
        ("data.micro_batch_tokens=256", "optim.clip_grad_norm=5", "loss.scale=sum"),
        ("target.layer_norms=[instance]", "model.dropout=0.1", "data.break_mode=none"),
    ],
    ids=["spans", "released", "averaged", "bf16", "accumulated", "instance"],
)
def test_other_ways_to_run(d2v: Run, words: tuple[str, ...]):
    assert d2v("out=run", *words)[0] == 0
    lines = metrics("run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(np.isfinite(line["loss"]) and line["target_std"] > 0.05 for line in lines)


def test_every_preset_takes_two_steps(d2v: Run):
    for preset in ("base", "base_shipped", "large"):
        status, said = d2v(f"preset={preset}", f"out={preset}", "train.max_steps=2", "data.micro_batch_tokens=null")
        assert status == 0, said
        assert len(metrics(preset)) == 2


def test_the_command_line_lists_the_options(d2v: Run):
    status, said = d2v(verb="config")
    assert status == 0 and "teacher_input: full" in said and "fairseq issue 4881" in said


@pytest.mark.slow
def test_the_default_run_learns(tmp_path: Path):
    """`d2v run modality=text`: what it prints must be worth its minutes."""
    done = subprocess.run(
        [sys.executable, "-m", "d2v_core", "run", "modality=text", "out=run"],
        cwd=tmp_path, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    probe = json.loads((tmp_path / "run" / "summary.json").read_text())["probe"]
    assert probe["pretrained"] > probe["untrained"] + 3  # 53.5 and 47.0 when this was written
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["target_std"] > 0.3
