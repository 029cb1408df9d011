"""Data in tars: which tars `data.path` stands for, and what lies where in them.

    NAME.tar            samples, as WebDataset has them: files whose names are ids
    NAME.index.jsonl    of each the id, where its bytes lie, and what its header says; written by `d2v data shard`
    shards.json         the list of all tars of the folder; its presence says that the folder is whole

With the index, a sample is one read at a known place, in any order: a run on tars has the batches of a run on the files
that they were made of. For tars of other programs the index is made here, from their headers, and kept in the user's
cache folder.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from d2v_core.errors import UserError
from d2v_core.files import KEY, cache_folder, existing, first
from d2v_core.sources import Fact, Item, Source, forget_open_files
from d2v_core.tars import BadTar, members

FORMAT = 1  # of an index and of shards.json
LIST, UNFINISHED = "shards.json", ".plan.json"
INDEX = ".index.jsonl"  # in place of .tar
PACKED = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")
NUM_THREADS = 4
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")

Look = Callable[[Source], Mapping[str, Fact] | str]
"""From one file of a modality to its facts, or to the reason why it is of no use."""


@dataclass(frozen=True)
class Kind:
    """What a modality says of its files in tars. name: the modality's. extensions: in lower case, with their dots."""

    name: str
    extensions: tuple[str, ...]
    look: Look


@dataclass(frozen=True)
class Shards:
    """items: of all tars, in their order. bad: (id, reason) of what is of no use. notes: for the person who starts."""

    paths: tuple[Path, ...]
    items: tuple[Item, ...]
    bad: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def find_shards(given: str | Path) -> list[Path] | None:
    """The tars that data.path=`given` stands for, sorted; None where it stands for other things.

    They are given as one .tar file, a pattern (`shards/*.tar`, `shards/x-{000..017}.tar`), or a folder that holds
    `shards.json`, or tars and no folders. Raises UserError for packed ones, for patterns without a match, and for a
    folder that `d2v data shard` has not finished.
    """
    text = str(given)
    if text.endswith(PACKED):
        raise UserError(f"{KEY}={given} is packed, so that nothing in it can be gone to: unpack it to a plain .tar.")
    if text.endswith(".tar"):
        return _matching(text) if any(c in text for c in "*?[{") else [existing(text, "a .tar file")]
    path = Path(text).expanduser()
    if not text.strip() or not path.is_dir():
        return None
    if (path / LIST).is_file():
        names = cast("list[str]", _read_list(path / LIST)["shards"])
        return [path.resolve() / name for name in names]
    if (path / UNFINISHED).is_file():
        raise UserError(f"{KEY}={given}: `d2v data shard` has not finished there. Give the same command once more.")
    children = list(path.iterdir())
    tars = sorted(child.resolve() for child in children if child.name.endswith(".tar") and child.is_file())
    return tars if tars and not any(child.is_dir() for child in children) else None


def refuse_shards(given: str | Path) -> None:
    """Raises UserError where data.path=`given` is tars, for a stage that reads labelled files."""
    if find_shards(given) is not None:
        raise UserError(f"{KEY}={given}: tars are read by stage=pretrain alone. Unpack them, and give the folder.")


def read_shards(paths: Sequence[Path], given: str | Path, kind: Kind) -> Shards:
    """What lies where in tars. Raises UserError where one of them is damaged, truncated or of another modality."""
    forget_open_files()
    root = Path(os.path.commonpath([path.parent for path in paths]))
    items: list[Item] = []
    bad: list[tuple[str, str]] = []
    notes: list[str] = []
    seen: set[str] = set()
    for path in paths:
        index = _index_of(path, root, kind)
        bad += index.bad
        for item in index.items:
            if item.id in seen:
                bad.append((item.id, f"{path.name} has it a second time"))
            else:
                seen.add(item.id)
                items.append(item)
        if index.made:
            notes.append(path.name)
    if not items:
        raise UserError(
            f"{KEY}={given}: no sample in {len(paths)} tars. Looked for {' '.join(kind.extensions)}. "
            f"{first([f'{name} ({reason})' for name, reason in bad], '; ')}".rstrip()
        )
    made = (f"index made from the headers of {len(notes)} tars: {first(notes, ', ')}",) if notes else ()
    return Shards(tuple(paths), tuple(items), tuple(bad), made)


def shard_numbers(sources: Sequence[Source]) -> np.ndarray | None:
    """(N,) int64: which tar each sample lies in, for `Dataset.shards`; None where they are files of their own."""
    if not sources or any(source.length is None for source in sources):
        return None
    paths = {path: number for number, path in enumerate(sorted({source.path for source in sources}))}
    return np.array([paths[source.path] for source in sources], dtype=np.int64)


# ------------------------------------------------------------------------------------------------ which tars


def _matching(pattern: str) -> list[Path]:
    patterns = [str(Path(pattern).expanduser())]
    while match := _BRACES.search(patterns[0]):
        low, high = match.groups()
        if int(high) - int(low) > 10**6 or int(high) < int(low):
            raise UserError(f"{KEY}={pattern}: {match.group()} must go from a number up to another.")
        numbers = [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
        patterns = [one.replace(match.group(), number, 1) for one in patterns for number in numbers]
    found = [sorted(glob.glob(one)) if any(c in one for c in "*?[") else [one] for one in patterns]
    paths = [Path(name).resolve() for names in found for name in names]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise UserError(f"{KEY}={pattern}: {'there is no ' + first(missing, ', ') if missing else 'no file matches'}.")
    return sorted(set(paths))


def _read_list(path: Path) -> dict[str, Any]:
    """shards.json, checked. Raises UserError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        names = found["shards"]
        _check_format(path, found["format"])
        if not names or not isinstance(names, list) or not all(map(_in_this_folder, cast("list[Any]", names))):
            raise ValueError("it must name files of its own folder")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be used ({error}): fetch it again, or give a pattern such as *.tar.") from None
    return cast("dict[str, Any]", found)


def _in_this_folder(name: object) -> bool:
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name


def _check_format(path: Path, found: object) -> None:
    if found != FORMAT:
        raise UserError(f"{path} has format {found!r:.40}, this d2v reads {FORMAT}: install the one that wrote it.")


# ------------------------------------------------------------------------------------------------ indices


@dataclass(frozen=True)
class _Index:
    items: tuple[Item, ...]
    bad: tuple[tuple[str, str], ...]
    made: bool  # just now


def _index_of(path: Path, root: Path, kind: Kind) -> _Index:
    """From beside the tar, from the cache, or made. Raises UserError."""
    try:
        stat = path.stat()
        beside = index_path(path)
        if beside.is_file():
            return _read_index(beside, path, kind)
        listed = path.parent / LIST
        ours = listed.is_file() and path.name in _read_list(listed)["shards"]
        # Names need to be unique in a tar only, so those of tars that nobody says more about have the tar's in front.
        prefix = "" if ours else f"{path.relative_to(root).as_posix()}/"
        facts = json.dumps([FORMAT, kind.name, str(path), prefix, stat.st_size, stat.st_mtime_ns])
        cached = cache_folder("shards") / (
            hashlib.blake2b(facts.encode(errors="surrogateescape")).hexdigest()[:20] + INDEX
        )
        if cached.is_file():
            try:
                return _read_index(cached, path, kind)
            except UserError:
                pass  # of an interrupted write, or of another version: made anew
        items, bad = _look_through(path, prefix, kind)
    except BadTar as error:
        raise UserError(
            f"{KEY}: {path} cannot be used: {error}. Fetch it again, or leave it out by a pattern."
        ) from None
    except OSError as error:
        raise UserError(f"{KEY}: {path} cannot be read ({error.strerror or error}).") from None
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_index(cached, path.name, stat.st_size, None, kind.name, items, bad)
    except OSError:
        pass  # then it is made again next time
    return _Index(tuple(items), tuple(bad), True)


def index_path(tar: Path) -> Path:
    """Where the index of a tar lies."""
    return tar.with_name(tar.name.removesuffix(".tar") + INDEX)


def _look_through(path: Path, prefix: str, kind: Kind) -> tuple[list[Item], list[tuple[str, str]]]:
    """(items, (id, reason) of what is of no use) of a tar without an index.

    Files that belong to one sample stand together and share their name up to its first dot (WebDataset); a sample
    without a file of the modality is bad, other files beside one that has it are not looked at.
    """
    bad: list[tuple[str, str]] = []
    wanted: list[tuple[str, Source]] = []
    seen: set[str] = set()
    others: dict[str, list[str]] = {}  # names of no use, by sample
    used: set[str] = set()
    for member in members(path):
        name, key = prefix + member.name, sample_key(member.name)
        if member.problem:
            bad.append((name, member.problem))
        elif not member.name.lower().endswith(kind.extensions):
            others.setdefault(key, []).append(member.name)
        elif member.name in seen:
            bad.append((name, "the tar has it a second time"))
        else:
            seen.add(member.name)
            used.add(key)
            wanted.append((name, Source(path, member.offset, member.length, name)))
    bad += [
        (prefix + key, f"no file of it ends in {' '.join(kind.extensions)}: it has {first(names, ', ')}")
        for key, names in others.items()
        if key not in used
    ]
    items: list[Item] = []
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        looked = list(pool.map(kind.look, [source for _, source in wanted]))
    for (name, source), found in zip(wanted, looked, strict=True):
        if isinstance(found, str):  # ask again, alone: a library may keep the error of another thread
            found = kind.look(source)
        if isinstance(found, str):
            bad.append((name, found))
        else:
            items.append(Item(name, source, found))
    return items, bad


def sample_key(name: str) -> str:
    """What the files of one sample have in common, by WebDataset's rule."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.split(".", 1)[0]


def write_index(
    path: Path, tar: str, size: int, sha256: str | None, kind: str, items: Iterable[Item],
    bad: Iterable[tuple[str, str]] = (),
) -> None:  # fmt: skip
    """Whole or not at all. tar: its name. size: its bytes. sha256: of all of it, where known. Raises OSError."""
    items = list(items)
    names = list(items[0].facts) if items else []
    lines = [
        json.dumps([item.id, item.source.offset, item.source.length, *(item.facts[name] for name in names)])
        for item in items
    ]
    rows = "".join(line + "\n" for line in lines)
    header = {
        "format": FORMAT, "modality": kind, "tar": tar, "bytes": size, "tar_sha256": sha256, "samples": len(items),
        "facts": names, "bad": [list(pair) for pair in bad],
    }  # fmt: skip
    write_whole(path, _signed(header, rows) + "\n" + rows)


def _signed(header: Mapping[str, Any], rows: str) -> str:
    """The first line of an index, with a digest of itself and of the rest."""
    digest = hashlib.sha256((json.dumps(header) + rows).encode()).hexdigest()
    return json.dumps({**header, "sha256": digest})


def write_whole(path: Path, text: str) -> None:
    """A text file that is there with all of it or not at all, also when the power fails. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_header(path: Path) -> dict[str, Any]:
    """The first line of an index. Raises ValueError, OSError."""
    with path.open(encoding="utf-8") as file:
        header = json.loads(file.readline())
    if not isinstance(header, dict):
        raise ValueError("its first line is no mapping")
    return cast("dict[str, Any]", header)


def _read_index(path: Path, tar: Path, kind: Kind) -> _Index:
    """Raises UserError where it is damaged, or of another tar or modality."""
    try:
        header = read_header(path)
        _check_format(path, header["format"])
        if header["modality"] != kind.name:
            raise UserError(f"{KEY}: {tar} was made for modality={header['modality']}, not for {kind.name}.")
        size = tar.stat().st_size
        if header["bytes"] != size:
            raise UserError(
                f"{KEY}: {tar} has {size} bytes, its index says {header['bytes']}: it is truncated or another. Fetch "
                "both again."
            )
        line, _, rows = path.read_text(encoding="utf-8").partition("\n")
        if _signed({key: value for key, value in header.items() if key != "sha256"}, rows) != line:
            raise ValueError("its digest is wrong")
        names = cast("list[str]", header["facts"])
        items = tuple(_item(json.loads(row), names, tar, size) for row in rows.splitlines())
        bad = tuple((str(name), str(reason)) for name, reason in header["bad"])
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UserError(
            f"{KEY}: {path} is damaged ({error}): fetch it again, or remove it, and it is made from the tar's headers."
        ) from None
    return _Index(items, bad, False)


def _item(row: Any, names: Sequence[str], tar: Path, size: int) -> Item:
    """One line of an index. Raises ValueError, TypeError."""
    name, offset, length, *values = row
    right = isinstance(name, str) and all(isinstance(value, (int, str)) for value in values)
    if len(values) != len(names) or not right:
        raise ValueError(f"a line has {row!r:.100}")
    if not (isinstance(offset, int) and isinstance(length, int) and 0 <= offset <= offset + length <= size):
        raise ValueError(f"{name!r:.100} lies outside of the tar")
    shared = [sys.intern(value) if isinstance(value, str) else value for value in values]
    return Item(name, Source(tar, offset, length, name), dict(zip(names, shared, strict=True)))
