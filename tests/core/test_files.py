"""What reading files has in common: mistyped paths, folders that loop, files that are broken."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from d2v_core.errors import UserError
from d2v_core.files import check_bad_files, check_bad_ratio, existing, first, kind, none_found, subfolder, walk


def test_a_path_that_exists_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert existing("a", "a folder") == existing("~/a", "a folder") == existing("a/../a", "a folder") == tmp_path / "a"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "FILES is empty: give a folder."),
        ("  ", "FILES is empty: give a folder."),
        ("lettrs/deep", r"FILES=lettrs/deep does not exist: there is no 'lettrs' in .*\. Did you mean 'letters'\?"),
        ("letters/zzz", r"no 'zzz' in .*letters\. There is: -\."),
        ("zzz", r"no 'zzz' in .*\. There is: letters, numbers\."),
    ],
)
def test_a_path_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, words: str):
    (tmp_path / "letters").mkdir()
    (tmp_path / "numbers").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        existing(given, "a folder", "FILES")


def test_a_subfolder_is_one_of_those_there_are(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "file").touch()
    assert subfolder(tmp_path, "a", "x") == tmp_path / "a"
    with pytest.raises(UserError, match=r"data.path=x has no sub-folder 'file'\. Sub-folders: a, b\."):
        subfolder(tmp_path, "file", "x")
    with pytest.raises(UserError, match=r"Sub-folders: none\."):
        subfolder(tmp_path / "a", "b", "x")


def test_every_folder_is_visited_once_whatever_links_to_it(tmp_path: Path):
    top, elsewhere = tmp_path / "top", tmp_path / "elsewhere"
    for folder in (top / "b", top / "a", top / ".hidden", elsewhere):
        folder.mkdir(parents=True)
        (folder / "2").touch()
        (folder / "1").touch()
    (top / "b" / "up").symlink_to(top)
    (top / "b" / "out").symlink_to(elsewhere)
    (top / "out too").symlink_to(elsewhere)
    (top / ".dot").touch()
    found = {folder.relative_to(top).as_posix(): names for folder, names in walk(top, "x")}
    assert found == {".": [".dot"], "a": ["1", "2"], "b": ["1", "2"], "b/out": ["1", "2"]}
    assert list(found)[:3] == [".", "a", "b"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path: str):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"data.path=x: cannot list .*closed \(Permission denied\): mend its perm"):
        list(walk(tmp_path, "x"))


def test_nothing_of_use_says_what_there_is(tmp_path: Path):
    kinds = Counter(map(kind, [Path("a.TXT"), Path("b.txt"), Path("Makefile")]))
    error = none_found("tables", tmp_path, "x", (".a", ".b"), kinds, "Mend it.")
    assert str(error) == (
        f"data.path=x: no tables in {tmp_path} or below. Looked for .a .b; found 2 x .txt, 1 x no extension. Mend it."
    )
    assert "found no files at all." in str(none_found("tables", tmp_path, "x", (".a",), Counter(), "Mend it."))


def test_the_first_few():
    assert first(["a", "b"], ", ") == "a, b"
    assert first(list("abcdef"), "; ") == "a; b; c; d; e; and 1 more"
    assert first(list("abc"), ", ", 1, more="...") == "a, ..."
    assert first([os.fsdecode(b"\xff.x")], ", ") == "\\udcff.x"


def test_as_much_may_be_broken_as_was_allowed():
    check_bad_files(["a (empty)"], 10, 0.1, "tables", "x")
    check_bad_files([], 10, 0.0, "tables", "x")
    with pytest.raises(UserError) as caught:
        check_bad_files(["a (empty)", "b (cut)"], 10, 0.1, "tables", "x")
    assert str(caught.value) == (
        "data.path=x: 2 of 10 tables (20.0%) are unreadable, more than data.max_bad_ratio=0.1 allows:\n"
        "  a (empty)\n  b (cut)\nMend or remove them, or raise data.max_bad_ratio to do without them."
    )
    words = {"found": "Two", "named": "a", "advice": "Mend them", "option": "limit"}
    check_bad_ratio(0, 0, 0.0, **words)
    with pytest.raises(UserError, match=r"^Two, more than limit=0 allows:\n  a\nMend them, or raise limit to do"):
        check_bad_ratio(1, 2, 0.0, **words)
