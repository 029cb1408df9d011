"""Text files: what is read, what is left out and named, how blocks are cut, and what memory holds."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_core.errors import UserError
from d2v_text import files
from d2v_text.data import TextConfig, from_files
from d2v_text.files import Reader, blocks, find_files, tokenise
from d2v_text.tokenizer import BOS, EOS, load_tokenizer, train_tokenizer

TEXT = "One sentence here.\nAnd a second one.\n\nAnother document.\nIt goes on.\n"


@pytest.fixture
def tokenizer(tmp_path: Path):
    train_tokenizer([TEXT], 280).save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(tmp_path / "tokenizer.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "text"
    made.mkdir()
    return made


def read(path: Path, key: str = "text") -> tuple[list[str], Reader]:
    reader = Reader(key)
    return list(reader.lines(path)), reader


def tokenised(folder: Path, tokenizer, **options):
    given = {"key": "text", "cache": str(folder.parent / "cache"), "max_bad_ratio": 0.01, **options}
    return tokenise(str(folder), tokenizer=tokenizer, **given)


def test_lines_and_documents(folder: Path):
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n  two \n")
    assert read(folder / "a.txt")[0] == ["one", "", "two", ""]
    records = [{"text": "one\ntwo"}, {"text": "three", "more": 1}]
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    assert read(folder / "b.jsonl")[0] == ["one", "two", "", "three", "", ""]


def test_long_lines_come_in_pieces_that_join_again(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "LONGEST_PIECE", 16)
    words = "some wörds that gó ön and on until the end"
    (folder / "a.txt").write_text(words + "\nnext", encoding="utf-8")
    lines, reader = read(folder / "a.txt")
    assert " ".join(lines[:-2]) == words and lines[-2:] == ["next", ""]
    (folder / "b.txt").write_text("猫" * 40, encoding="utf-8")
    lines, reader = read(folder / "b.txt")
    assert "".join(lines) == "猫" * 40 and reader.num_bad == 0
    assert all(len(line.encode()) <= 16 for line in lines)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(8, 40))
def test_pieces_lose_nothing_and_cut_no_character(text: str, limit: int):
    content = text.encode()
    pieces = [piece for _, piece in files._pieces(io.BytesIO(content), limit, False)]
    assert b"".join(pieces) == content
    assert all(0 < len(piece) <= limit for piece in pieces)
    assert "".join(piece.decode() for piece in pieces) == text
    lines = text.count("\n") + (not text.endswith("\n"))
    assert len(pieces) >= lines if text else not pieces


def test_broken_lines_are_counted_and_named(folder: Path):
    (folder / "a.txt").write_bytes("gut\ncaf\u00e9\n".encode("latin-1"))
    lines, reader = read(folder / "a.txt")
    assert lines == ["gut", ""]
    assert reader.bad == ["a.txt line 2: no UTF-8 (unexpected end of data at byte 3)"] or "no UTF-8" in reader.bad[0]
    (folder / "b.jsonl").write_text('{"text": 3}\n{"txt": "a"}\nnonsense\n[1]\n{"text": "fine"}\n')
    lines, reader = read(folder / "b.jsonl")
    assert lines == ["fine", "", ""]
    assert reader.num_bad == 4 and reader.num_lines == 5
    named = "\n".join(reader.bad)
    for words in ("line 1: 'text' is int", "line 2: no key 'text' (keys: 'txt', did you mean data.key=txt?)",
                  "line 3: no JSON", "line 4: no object"):  # fmt: skip
        assert words in named


def test_a_record_beyond_all_bounds(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "LONGEST_RECORD", 40)
    (folder / "a.jsonl").write_text(json.dumps({"text": "x" * 200}) + "\n" + json.dumps({"text": "short"}) + "\n")
    lines, reader = read(folder / "a.jsonl")
    assert lines == ["short", "", ""] and reader.num_bad == 1


def test_too_much_broken_stops_before_training(folder: Path, tokenizer):
    (folder / "a.txt").write_bytes(b"good\n" * 50 + b"\xff\xfe\n")
    with pytest.raises(UserError, match=r"(?s)1 of 51 lines cannot be read.*a.txt line 51: no UTF-8.*iconv"):
        tokenised(folder, tokenizer)
    text = tokenised(folder, tokenizer, max_bad_ratio=0.05)
    assert "1 of 51 lines left out: a.txt line 51" in text.notes
    assert not list((folder.parent / "cache").glob(".*"))  # nothing half done is left


def test_a_missing_key(folder: Path, tokenizer):
    (folder / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(UserError, match=r"no key 'text' \(keys: 'body'\)"):
        tokenised(folder, tokenizer)
    assert tokenised(folder, tokenizer, key="body").num_tokens > 1


def test_empty_files(folder: Path, tokenizer):
    (folder / "a.txt").write_text("")
    (folder / "b.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"no text in 2 files\. no text in a.txt, b.txt"):
        tokenised(folder, tokenizer)
    (folder / "c.txt").write_text("words")
    assert tokenised(folder, tokenizer).notes == "no text in a.txt, b.txt"


def test_which_files(folder: Path, tmp_path: Path):
    for name in ("b.TXT", "a.jsonl", "c.md", ".hidden.txt", "sub/d.tokens", ".git/e.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    assert [path.name for path in find_files(folder)] == ["a.jsonl", "b.TXT", "d.tokens"]
    assert find_files(folder / "c.md") == [folder / "c.md"]  # asked for by name
    with pytest.raises(UserError, match=r"there is no 'tex' in .*Did you mean 'text'"):
        find_files(tmp_path / "tex")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no text in this folder or below. Looked for .raw"):
        find_files(tmp_path / "empty")


def test_what_is_kept(folder: Path, tokenizer):
    (folder / "a.txt").write_text(TEXT)
    text = tokenised(folder, tokenizer)
    ids, sizes = text.ids(), text.sizes()
    assert ids.dtype == np.uint16 and len(ids) == text.num_tokens == sizes.sum()
    lines = TEXT.splitlines()
    at = 0
    for line, size in zip([*lines, ""], sizes, strict=True):
        row = ids[at : at + size].tolist()
        assert (tokenizer.decode(row[:-1]), row[-1:]) == (line, [EOS] if line else [])
        at += size


def test_a_second_run_reads_the_result_and_a_change_does_not(folder: Path, tokenizer, monkeypatch):
    (folder / "a.txt").write_text(TEXT)
    first = tokenised(folder, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "encode", None)
        assert tokenised(folder, tokenizer) == first
    (folder / "a.txt").write_text(TEXT + "More.\n")
    assert tokenised(folder, tokenizer).num_tokens > first.num_tokens


def test_a_cache_that_cannot_be_written(folder: Path, tokenizer):
    (folder / "a.txt").write_text(TEXT)
    (folder.parent / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to .*data.cache=FOLDER"):
        tokenised(folder, tokenizer, cache=str(folder.parent / "file" / "cache"))


def test_blocks_of_whole_sentences_within_documents():
    sizes = np.array([3, 4, 5, 0, 2, 0, 0, 23, 1])
    starts, lengths = blocks(sizes, 10, True)
    # 3 + 4 fit in 9, 5 does not; a document ends; a sentence of 23 is cut into 9 + 9 + 5, and 1 more fits behind it
    assert list(zip(starts.tolist(), lengths.tolist(), strict=True)) == [
        (0, 7), (7, 5), (12, 2), (14, 9), (23, 9), (32, 6)
    ]  # fmt: skip
    starts, lengths = blocks(sizes, 10, False)
    assert lengths.tolist() == [9, 9, 9, 9, 2] and starts.tolist() == [0, 9, 18, 27, 36]


@pytest.mark.parametrize("documents", [True, False])
def test_blocks_hold_every_token_once(documents: bool):
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 40, 500)
    starts, lengths = blocks(sizes, 17, documents)
    assert lengths.max() <= 16 and lengths.min() >= 1
    assert np.array_equal(starts, np.concatenate([[0], np.cumsum(lengths)[:-1]]))
    assert lengths.sum() == sizes.sum()


def test_the_data_set_of_a_worker_reopens_the_file(folder: Path, tokenizer):
    (folder / "a.txt").write_text(TEXT * 2000)
    data = from_files(tokenised(folder, tokenizer), TextConfig(block_tokens=512))
    first = data[0]
    assert first[0] == BOS and first.dtype == np.int64 and len(first) == data.sizes[0]
    pickled = pickle.dumps(data)
    assert data.starts.nbytes + data.lengths.nbytes + data.sizes.nbytes + 2000 > len(pickled)  # none of the text
    assert np.array_equal(pickle.loads(pickled)[len(data) - 1], data[len(data) - 1])
    assert "1 files" in data.describe() and "blocks of up to 512" in data.describe()
