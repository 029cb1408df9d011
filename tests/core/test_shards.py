"""Tars: which there are, what lies where in them, and what is wrong with those that are damaged. Modalities come after
that: tests/test_data_verbs.py."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from d2v_core import sharding, shards
from d2v_core.contract import Inventory
from d2v_core.errors import UserError
from d2v_core.shards import Kind, find_shards, index_path, read_shards
from d2v_core.sources import Item, Source
from d2v_core.tars import BadTar, members

BIN = Kind("toy", (".bin",), lambda source: "it begins with x" if source.read()[:1] == b"x" else {"size": source.size})


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tar_of(path: Path, files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def files(count: int) -> dict[str, bytes]:
    return {f"{i // 3}/{i}.bin": bytes([i]) * (i * 211) for i in range(count)}


def inventory(folder: Path, contents: dict[str, bytes]) -> Inventory:
    items: list[Item] = []
    for name, data in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        items.append(Item(name, Source(path), {"size": len(data)}))
    return Inventory(items, [], [1.0] * len(items), "s", f"{len(items)} s")


# ----------------------------------------------------------------------------------------------------------- headers


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_are_read_as_python_reads_them(tmp_path: Path, form: int) -> None:
    contents = files(20)
    if form != tarfile.USTAR_FORMAT:
        contents |= {f"{'long' * 60}/{'name' * 50}.bin": b"1", "\N{GREEK SMALL LETTER MU}.bin": b"2"}
    path = tar_of(tmp_path / "a.tar", contents, form)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar.getmembers()]
    assert [(m.name, m.offset, m.length) for m in members(path)] == expected
    for member in members(path):
        assert Source(path, member.offset, member.length).read() == contents[member.name] and not member.problem


def test_names_that_lead_out_links_and_devices_are_told_apart(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("../up.bin", "/root.bin", "a/../../b.bin", "./good.bin"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            header = tarfile.TarInfo("odd.bin")
            header.type, header.linkname = kind, "/etc/passwd"
            tar.addfile(header)
    found = [(member.name, bool(member.problem)) for member in members(tmp_path / "a.tar")]
    bad = [("../up.bin", True), ("/root.bin", True), ("a/../../b.bin", True)]
    assert found == [*bad, ("good.bin", False), *[("odd.bin", True)] * 4]


def test_a_tar_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """Python's tarfile takes most of these for shorter tars."""
    whole = tar_of(tmp_path / "a.tar", files(6)).read_bytes()
    ends = 512 * sum(1 + -(-len(data) // 512) for data in files(6).values())  # of the last member
    path = tmp_path / "b.tar"
    for cut in [*range(0, ends, 512), *range(1, ends, 397), ends]:
        path.write_bytes(whole[:cut])
        with pytest.raises(BadTar):
            list(members(path))
    path.write_bytes(whole[: ends + 512])
    assert len(list(members(path))) == 6


@pytest.mark.parametrize("at", [0, 148, 124, 156, 512 * 3])
def test_a_damaged_header_is_no_end(tmp_path: Path, at: int) -> None:
    data = bytearray(tar_of(tmp_path / "a.tar", files(6)).read_bytes())
    data[at] ^= 0x41
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(BadTar, match=r"no tar|no header at byte \d+|for a number"):
        list(members(tmp_path / "a.tar"))


def test_nothing_behind_a_mark_of_the_end_is_lost_in_silence(tmp_path: Path) -> None:
    whole = tar_of(tmp_path / "a.tar", files(6)).read_bytes()
    (tmp_path / "two.tar").write_bytes(whole + whole)
    with pytest.raises(BadTar, match=f"a second tar begins at byte {len(whole)}"):
        list(members(tmp_path / "two.tar"))
    third = list(members(tmp_path / "a.tar"))[2].offset - 512
    (tmp_path / "wiped.tar").write_bytes(whole[:third] + bytes(512) + whole[third + 512 :])
    with pytest.raises(BadTar, match=f"no header at byte {third}, and yet something follows"):
        list(members(tmp_path / "wiped.tar"))
    (tmp_path / "rest.tar").write_bytes(whole + b"leftover " * 100)
    assert len(list(members(tmp_path / "rest.tar"))) == 6


@pytest.mark.parametrize("how", ["w:gz", "w:xz", "w:bz2"])
def test_packed_tars_are_refused_by_what_they_are(tmp_path: Path, how: str) -> None:
    with tarfile.open(tmp_path / "a.tar", how) as tar:  # pyright: ignore
        tar.addfile(tarfile.TarInfo("a.bin"))
    with pytest.raises(BadTar, match="packed by"):
        list(members(tmp_path / "a.tar"))
    with pytest.raises(UserError, match="unpack it to a plain"):
        find_shards(tmp_path / "a.tar.gz")


def test_a_header_that_claims_more_than_there_is(tmp_path: Path) -> None:
    header = tarfile.TarInfo("a.bin")
    header.size = 1 << 60
    path = tmp_path / "a.tar"
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(BadTar, match=r"truncated: a\.bin ends at byte"):
        list(members(path))
    header.type = b"L"
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(BadTar, match="go on for"):
        list(members(path))


# ----------------------------------------------------------------------------------------------------------- sources


def test_a_stretch_reads_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(200)))
    source = Source(tmp_path / "a", 50, 100, "b")
    assert source.read() == bytes(range(50, 150)) and source.size == 100 and str(source) == f"{tmp_path / 'a'}: b"
    for whole in (True, False):
        with source.open(whole) as file:
            assert file.read(3) == bytes([50, 51, 52]) and file.seek(-2, 2) == 98 and file.read() == bytes([148, 149])
            assert file.seek(500) == 500 and file.read() == b""
    with ThreadPoolExecutor(8) as pool:  # of one open file
        assert set(pool.map(lambda _: source.read(), range(200))) == {bytes(range(50, 150))}
    assert pickle.loads(pickle.dumps(source)).read() == source.read()
    with pytest.raises(OSError, match="has 200 bytes"):
        Source(tmp_path / "a", 150, 100).read()


# ------------------------------------------------------------------------------------------------- which tars there are


def test_what_stands_for_tars(tmp_path: Path) -> None:
    for name in ("x-008.tar", "x-009.tar", "x-010.tar", "y.tar"):
        tar_of(tmp_path / name, {"a.bin": b"1"})
    every = sorted(tmp_path.glob("*.tar"))
    assert find_shards(tmp_path) == every and find_shards(tmp_path / "y.tar") == [tmp_path / "y.tar"]
    assert find_shards(f"{tmp_path}/x-*.tar") == every[:3]
    assert find_shards(f"{tmp_path}/x-{{008..010}}.tar") == every[:3]
    assert find_shards(f"{tmp_path}/?.tar") == every[3:]
    with pytest.raises(UserError, match=r"there is no .*x-011\.tar"):
        find_shards(f"{tmp_path}/x-{{008..011}}.tar")
    with pytest.raises(UserError, match="no file matches"):
        find_shards(f"{tmp_path}/z*.tar")
    with pytest.raises(UserError, match=r"Did you mean 'y\.tar'"):
        find_shards(tmp_path / "yy.tar")
    (tmp_path / "train").mkdir()  # such as ImageNet's, which people keep beside the tar that it came in
    assert find_shards(tmp_path) is None and find_shards(tmp_path / "train") is None and find_shards("") is None


# ---------------------------------------------------------------------------------------------------------- reading


def test_tars_of_other_programs(tmp_path: Path, own_cache: Path) -> None:
    first = {"a.txt": b"no sample", "b.bin": b"1", "b.json": b"{}", "c.bin": b"x", "d.BIN": b"2"}
    tars = [tar_of(tmp_path / "1.tar", first), tar_of(tmp_path / "2.tar", {"b.bin": b"3", "../e.bin": b"4"})]
    found = read_shards(tars, tmp_path, BIN)
    assert [item.id for item in found.items] == ["1.tar/b.bin", "1.tar/d.BIN", "2.tar/b.bin"]
    assert [item.source.read() for item in found.items] == [b"1", b"2", b"3"]
    assert dict(found.bad) == {
        "1.tar/a": "no file of it ends in .bin: it has a.txt",
        "1.tar/c.bin": "it begins with x",
        "2.tar/../e.bin": "its name leads out of the folder or is none",
    }
    assert found.notes == ("index made from the headers of 2 tars: 1.tar, 2.tar",)
    assert not list(tmp_path.glob("*.jsonl")), "nothing is written beside the data"
    again = read_shards(tars, tmp_path, Kind("toy", (".bin",), lambda source: pytest.fail("looked at again")))
    assert (again.items, again.bad, again.notes) == (found.items, found.bad, ())
    for path in own_cache.rglob("*.jsonl"):
        path.write_text(path.read_text()[:-9])
    assert read_shards(tars, tmp_path, BIN).items == found.items, "a damaged cache is made anew"


def test_a_name_that_is_there_twice_is_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("a.bin"))
    found = read_shards([tmp_path / "1.tar"], tmp_path, BIN)
    assert len(found.items) == 1 and found.bad == (("1.tar/a.bin", "the tar has it a second time"),)


def test_tars_without_a_sample(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "1.tar", {"a.txt": b"1"})
    with pytest.raises(UserError, match=r"no sample in 1 tars\. Looked for \.bin\. 1\.tar/a \(no file of it ends in"):
        read_shards([tar], tmp_path, BIN)


# ---------------------------------------------------------------------------------------------------------- writing


def written(tmp_path: Path, count: int = 12, size: int = 4000) -> tuple[Inventory, Path]:
    made = inventory(tmp_path / "files", files(count))
    sharding.write_shards(made, tmp_path / "out", "toy", size, lambda line: None)
    return made, tmp_path / "out"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    made, out = written(tmp_path)
    tars = find_shards(out)
    assert tars is not None and len(tars) > 3 and not (out / shards.UNFINISHED).exists()
    assert max(sum(item.source.size for item in group) for group in sharding._groups(made.items, 4000)) <= 4000
    found = read_shards(tars, out, Kind("toy", (".bin",), lambda source: pytest.fail("an index needs no look")))
    assert [(item.id, item.facts) for item in found.items] == [(item.id, item.facts) for item in made.items]
    assert [item.source.read() for item in found.items] == [item.source.read() for item in made.items]
    assert (found.bad, found.notes) == ((), ())
    for tar in tars:
        with tarfile.open(tar) as one:
            assert all(member.isfile() and member.mtime == 0 for member in one.getmembers())


def test_a_missing_index_is_made_of_headers_with_the_same_ids(tmp_path: Path) -> None:
    made, out = written(tmp_path)
    tars = find_shards(out)
    assert tars is not None
    index_path(tars[1]).unlink()
    found = read_shards(tars, out, BIN)
    assert [item.id for item in found.items] == [item.id for item in made.items] and len(found.notes) == 1


@pytest.mark.parametrize("stop", range(1, 6))
def test_an_interrupted_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """Interrupted while the stop-th tar is written: what was there stays, and the end is what it would have been."""
    made = inventory(tmp_path / "files", files(12))
    sharding.write_shards(made, tmp_path / "whole", "toy", 4000, lambda line: None)
    write, calls = sharding._write_tar, 0

    def failing(path: Path, items: list[Item], modality: str) -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            path.with_name(f".{path.name}.tmp").write_bytes(b"begun")
            path.write_bytes(b"a tar without its index")
            raise OSError(28, "No space left on device")
        write(path, items, modality)

    monkeypatch.setattr(sharding, "_write_tar", failing)
    with pytest.raises(UserError, match=r"No space left on device\. Make room, then give the same command once more"):
        sharding.write_shards(made, tmp_path / "out", "toy", 4000, lambda line: None)
    with pytest.raises(UserError, match="has not finished there"):
        find_shards(tmp_path / "out")
    monkeypatch.setattr(sharding, "_write_tar", write)
    said: list[str] = []
    sharding.write_shards(made, tmp_path / "out", "toy", 4000, said.append)
    assert sum("was there" in line for line in said) == stop - 1
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    made, out = written(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    said: list[str] = []
    sharding.write_shards(made, out, "toy", 4000, said.append)
    assert said == [f"{out} is complete: {before.keys().__len__() // 2} tars. Nothing to do."]
    made.items[3].source.path.write_bytes(b"changed")
    for items, size in ((made.items, 4000), (made.items[1:], 4000), (made.items, 9000)):
        other = Inventory(items, [], [], "s", "")
        with pytest.raises(UserError, match="is not empty, and nothing there is overwritten"):
            sharding.write_shards(other, out, "toy", size, said.append)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    (out / shards.LIST).rename(out / shards.UNFINISHED)
    with pytest.raises(UserError, match="of files that have changed since"):
        sharding.write_shards(made, out, "toy", 4000, said.append)
    with pytest.raises(UserError, match="is a file"):
        sharding.write_shards(made, made.items[0].source.path, "toy", 4000, said.append)


# ---------------------------------------------------------------------------------------------------------- damage


def test_a_tar_that_is_not_its_index_s(tmp_path: Path) -> None:
    _, out = written(tmp_path)
    tars = find_shards(out)
    assert tars is not None
    whole = tars[0].read_bytes()
    tars[0].write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"has \d+ bytes, its index says \d+: it is truncated or another"):
        read_shards(tars, out, BIN)
    tars[0].unlink()
    with pytest.raises(UserError, match=r"toy-000000\.tar cannot be read \(No such file"):
        read_shards(tars, out, BIN)
    tars[0].write_bytes(whole)
    with pytest.raises(UserError, match="was made for modality=toy, not for other"):
        read_shards(tars, out, Kind("other", (".bin",), BIN.look))


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    _, out = written(tmp_path, 4)
    tars = find_shards(out)
    assert tars is not None
    index = index_path(tars[0])
    good = index.read_bytes()
    for at in range(0, len(good), 7):
        index.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(UserError):
            read_shards(tars, out, BIN)
    index.write_bytes(good)
    assert len(read_shards(tars, out, BIN).items) == 4


@pytest.mark.parametrize(
    "row",
    [["a.bin", -1, 5, 5], ["a.bin", 0, 1 << 40, 5], [3, 0, 5, 5], ["a.bin", 0, 5], {"a": 1}, None, ["a", 0, 5, []]],
)
def test_an_index_cannot_point_out_of_its_tar(tmp_path: Path, row: object) -> None:
    _, out = written(tmp_path, 4)
    (tar, *_) = find_shards(out) or []
    header = json.loads(index_path(tar).read_text().splitlines()[0])
    rows = json.dumps(row) + "\n"
    del header["sha256"]
    index_path(tar).write_text(shards._signed(header, rows) + "\n" + rows)  # by someone who means it
    with pytest.raises(UserError, match="is damaged"):
        read_shards([tar], out, BIN)


@pytest.mark.parametrize("names", [["../x.tar"], [".."], ["/etc/passwd"], [], [3], "x", None])
def test_the_list_names_files_of_its_folder(tmp_path: Path, names: object) -> None:
    (tmp_path / shards.LIST).write_text(json.dumps({"format": 1, "shards": names}))
    with pytest.raises(UserError, match="cannot be used"):
        find_shards(tmp_path)
