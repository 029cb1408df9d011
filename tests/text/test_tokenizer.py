"""The tokenizer's file and the verb that writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from d2v_core.errors import UserError
from d2v_text.tokenizer import SMALLEST, Vocabulary, load_tokenizer, train_tokenizer

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "A lazy fox, a quick dog: the dog jumps over.",
    "café 猫 🐈",
] * 5


@pytest.fixture
def path(tmp_path: Path) -> Path:
    train_tokenizer(LINES, 300).save(str(tmp_path / "t.json"))
    return tmp_path / "t.json"


def test_order_of_the_special_symbols(path: Path):
    vocab = json.loads(path.read_text())
    ids = {**vocab["model"]["vocab"], **{token["content"]: token["id"] for token in vocab["added_tokens"]}}
    assert [ids[s] for s in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    loaded = load_tokenizer(path)
    assert loaded.vocabulary.size == 300 and ids["<mask>"] == loaded.vocabulary.mask == 299
    assert sorted(ids.values()) == list(range(300))


def test_text_comes_back_whatever_it_holds(path: Path):
    loaded = load_tokenizer(path)
    texts = [*LINES, "unseen: ß\tñ\0\u200b", "<mask> <s> </s><pad> <unk>", "  two  spaces "]
    for ids, given in zip(loaded.encode(texts), texts, strict=True):
        assert loaded.decode(ids) == given
        assert min(ids) > 3 and max(ids) < 299, given  # special symbols in a text are text


def test_training_repeats_itself_and_the_fingerprint_tells_vocabularies_apart(path: Path, tmp_path: Path):
    train_tokenizer(LINES, 300).save(str(tmp_path / "again.json"))
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    train_tokenizer([line.upper() for line in LINES], 300).save(str(tmp_path / "other.json"))
    one, other = (load_tokenizer(p).vocabulary for p in (path, tmp_path / "other.json"))
    assert one.size == other.size and one.fingerprint != other.fingerprint
    assert 0 < one.fingerprint < 2**63
    assert Vocabulary.of(["a", "b"]) == Vocabulary.of(("a", "b")) != Vocabulary.of(["b", "a"])


def test_too_small_a_vocabulary():
    with pytest.raises(UserError, match=f"at least {SMALLEST}"):
        train_tokenizer(LINES, 100)


@pytest.mark.parametrize("other", ["bert", "mask in the middle", "no mask"])
def test_other_special_symbols_are_refused(path: Path, other: str):
    content = json.loads(path.read_text())
    if other == "bert":
        text = path.read_text().replace('"<s>"', '"[CLS]"')
    elif other == "mask in the middle":
        content["added_tokens"].append({**content["added_tokens"][-1], "id": 300, "content": "<extra>"})
        text = json.dumps(content)
    else:
        content["added_tokens"].pop()
        text = json.dumps(content)
    path.write_text(text)
    with pytest.raises(UserError, match=r"other special symbols.*Expected <s>, <pad>, </s>, <unk> as ids 0 to 3"):
        load_tokenizer(path)


def test_what_is_no_tokenizer(tmp_path: Path):
    with pytest.raises(UserError, match=r"is no file\. Train one with `d2v tokenizer train"):
        load_tokenizer(tmp_path / "nothing.json")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer.json"):
        load_tokenizer(tmp_path / "x.json")


def test_the_verb(d2v, tmp_path: Path):
    (tmp_path / "a.txt").write_text("\n".join(LINES), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"body": line}) for line in LINES))
    status, said = d2v("tokenizer", "train", "a.txt", "b.jsonl", "vocab_size=280", "out=t.json", "key=body")
    assert status == 0
    assert "t.json: 280 symbols" in said and "data.tokenizer=t.json" in said
    assert load_tokenizer("t.json").vocabulary.size == 280
    status, said = d2v("tokenizer", "train", "a.txt", "out=t.json")
    assert status == 2 and "exists, and nothing is overwritten" in said
    status, said = d2v("tokenizer", "train", "a.txt", "out=big.json", "vocab_size=5000")
    assert status == 0 and "the text gives no 5000" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tokenizer", "train", "out=t.json"), "needs at least one text file"),
        (("tokenizer", "tain", "a.txt"), "has the verb train, not 'tain'"),
        (("tokenizer", "train", "nothing.txt"), "FILES=nothing.txt does not exist"),
        (("tokenizer", "train", "a.txt", "vocab_siz=300"), "vocab_size"),
        (("tokenizer", "train", "a.txt", "vocab_size=300", "out=no/t.json"), "is no folder"),
        (("tokenizer", "train", "latin.txt", "vocab_size=300"), "no UTF-8"),
        (("tokenizer", "train", "latin.txt", "vocab_size=300"), "or raise max_bad_ratio to"),
    ],
)
def test_mistakes_with_the_verb(d2v, tmp_path: Path, words, said):
    (tmp_path / "a.txt").write_text("some text\n")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9\n".encode("latin-1"))
    status, printed = d2v(*words)
    assert status == 2 and said in printed, printed
    assert not (tmp_path / "tokenizer.json").exists()


def test_help(d2v):
    status, said = d2v("tokenizer", "--help")
    assert status == 0 and "vocab_size=50265" in said
