"""`d2v data shard`: the files of `data.path` as tars, with an index beside each.

The list of what goes where is made first and kept in the folder, so that an interrupted call goes on with the first tar
that has no index. A tar takes its name when it is whole; shards.json, which says that all of them are there, is written
last.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from d2v_core.contract import Inventory
from d2v_core.errors import UserError
from d2v_core.shards import FORMAT, LIST, UNFINISHED, index_path, read_header, sample_key, write_index, write_whole
from d2v_core.sources import Item, Source
from d2v_core.tars import BLOCK


def write_shards(
    inventory: Inventory, out: Path, modality: str, shard_bytes: int, say: Callable[[str], None] = print
) -> None:
    """Write the items in order, as many in a tar as stay below `shard_bytes`, or one that alone is larger.

    Raises UserError where `out` holds something else, an item cannot be read or has changed, or a write fails.
    """
    groups = _groups(inventory.items, shard_bytes)
    plan = _plan(inventory.items, modality, shard_bytes)
    names = [f"{modality}-{number:06d}.tar" for number in range(len(groups))]
    if (out / LIST).is_file() and _digest_in(out / LIST) == plan["digest"]:
        say(f"{out} is complete: {len(names)} tars. Nothing to do.")
        return
    try:
        _take_up(out, plan)
        for left in out.glob(".*.tmp"):  # of a call that was interrupted
            left.unlink()
        for number, (name, group) in enumerate(zip(names, groups, strict=True), 1):
            done = _done(out / name)
            if not done:
                _write_tar(out / name, group, modality)
            say(f"{number}/{len(names)} {name}: {len(group)} samples" + (", was there" if done else ""))
        whole = {
            "format": FORMAT, "modality": modality, "samples": len(inventory.items), "total": inventory.total,
            "shards": names, "left_out": [list(pair) for pair in inventory.bad], "digest": plan["digest"],
        }  # fmt: skip
        write_whole(out / LIST, json.dumps(whole, indent=1) + "\n")
        (out / UNFINISHED).unlink()
    except OSError as error:
        raise UserError(
            f"out={out} cannot be written: {error.strerror or error}. Make room, then give the same command once more."
        ) from error


def shared_keys(items: Sequence[Item]) -> int:
    """How many items have a name that WebDataset's tools would take for a part of another's sample."""
    keys = [sample_key(item.id) for item in items]
    return len(keys) - len(set(keys))


def _groups(items: Sequence[Item], shard_bytes: int) -> list[list[Item]]:
    groups: list[list[Item]] = []
    filled = 0
    for item in items:
        size = BLOCK + -(-item.source.size // BLOCK) * BLOCK
        if not groups or filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size
    return groups


def _plan(items: Sequence[Item], modality: str, shard_bytes: int) -> dict[str, Any]:
    """What makes two calls the same: what goes in, as it is now, and how large a tar may be."""
    digest = hashlib.sha256(json.dumps([FORMAT, modality, shard_bytes]).encode())
    for item in items:
        source = item.source
        digest.update(json.dumps([item.id, source.offset, source.size, source.path.stat().st_mtime_ns]).encode())
    return {"format": FORMAT, "modality": modality, "shard_bytes": shard_bytes, "digest": digest.hexdigest()}


def _digest_in(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("digest")
    except (ValueError, AttributeError):
        return None


def _take_up(out: Path, plan: dict[str, Any]) -> None:
    """Make the folder, or go on in it. Raises UserError where it holds anything else."""
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is a file; give a folder for the tars.")
    unfinished = out / UNFINISHED
    if unfinished.is_file():
        if _digest_in(unfinished) != plan["digest"]:
            raise UserError(
                f"out={out} holds tars of a call that was interrupted, of other files, of files that have changed "
                "since, or of another shard_mb. Remove that folder, or give another."
            )
        return
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"out={out} is not empty, and nothing there is overwritten. Give a new or an empty folder.")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(unfinished, json.dumps(plan, indent=1) + "\n")


def _done(tar: Path) -> bool:
    """Whether a tar is there as its index says; the index is written when the tar is on the disk."""
    try:
        return tar.stat().st_size == read_header(index_path(tar))["bytes"]
    except (OSError, ValueError, KeyError):
        return False


class _Hashed(io.RawIOBase):
    """Hashes what is written to a file."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.file.tell()

    def write(self, data: Any, /) -> int:
        self.sha256.update(data)
        return self.file.write(data)


def _write_tar(path: Path, items: Sequence[Item], modality: str) -> None:
    """The tar, then its index. Raises UserError where an item is not what it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    placed: list[Item] = []
    try:
        with temporary.open("wb") as file:
            hashed = _Hashed(file)
            # Nothing of the machine or the hour goes in: the same files make the same bytes.
            with tarfile.open(fileobj=hashed, mode="w", format=tarfile.GNU_FORMAT) as tar:  # pyright: ignore
                for item, data in _contents(items):
                    header = tarfile.TarInfo(item.id)
                    header.size, header.mode = len(data), 0o644
                    tar.addfile(header, io.BytesIO(data))
                    start = int(tar.offset) - -(-len(data) // BLOCK) * BLOCK  # pyright: ignore
                    placed.append(Item(item.id, Source(path, start, len(data), item.id), item.facts))
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    write_index(index_path(path), path.name, size, hashed.sha256.hexdigest(), modality, placed)


def _contents(items: Sequence[Item]) -> Iterator[tuple[Item, bytes]]:
    for item in items:
        try:
            data = item.source.read()
        except OSError as error:
            raise UserError(f"{item.source} cannot be read any more: {error.strerror or error}.") from error
        yield item, data
