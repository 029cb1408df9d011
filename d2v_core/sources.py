"""Bytes that are read as one file: a file of its own, or a stretch of a larger one, such as a member of a tar."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

OPEN_FILES = 128  # kept open by each process, so that a stretch costs no more than one read
AT_ONCE = 1 << 30  # bytes; the system reads no more than 2 GiB in one call
BUFFER = 1 << 16  # bytes read ahead where not all are asked for


@dataclass(frozen=True, slots=True)  # there may be millions
class Source:
    """path: the file. offset, length: of a stretch of it, bytes; a length of None = the whole file. name: what to call
    the stretch."""

    path: Path
    offset: int = 0
    length: int | None = None
    name: str = ""

    def __str__(self) -> str:
        return f"{self.path}" if self.length is None else f"{self.path}: {self.name or f'byte {self.offset}'}"

    @property
    def size(self) -> int:
        """Bytes. Raises OSError."""
        return self.path.stat().st_size if self.length is None else self.length

    def open(self, whole: bool = False) -> BinaryIO:
        """A readable, seekable stream. whole: all of it will be read, which a stretch does at once. Raises OSError."""
        if self.length is None:
            return self.path.open("rb")
        if whole:
            return io.BytesIO(self.read())
        return io.BufferedReader(_Window(_handle(self.path), self.offset, self.length), BUFFER)

    def read(self) -> bytes:
        """All of it. Raises OSError where the file cannot be read or ends before the stretch does."""
        if self.length is None:
            return self.path.read_bytes()
        handle, parts, at = _handle(self.path), list[bytes](), 0
        while at < self.length:
            part = os.pread(handle.number, min(AT_ONCE, self.length - at), self.offset + at)
            if not part:
                raise OSError(f"{self.path} has {self.offset + at} bytes, {self} ends at {self.offset + self.length}")
            parts.append(part)
            at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


Fact = int | str


@dataclass(frozen=True, slots=True)
class Item:
    """A sample, or a file of samples, that was looked at. id: a stable name. source: where its bytes lie. facts: what
    its header says, by the modality's own names; with them the plan of an epoch needs none of the bytes."""

    id: str
    source: Source
    facts: Mapping[str, Fact]


class _Handle:
    """A file kept open, closed when nothing reads from it any more. Reads name their place, so that threads and forked
    workers may share it."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(maxsize=OPEN_FILES)
def _handle(path: Path) -> _Handle:
    return _Handle(path)


def forget_open_files() -> None:
    """Open files anew from here on: their paths may lead to others by now."""
    _handle.cache_clear()


class _Window(io.RawIOBase):
    """A stretch of an open file as a file."""

    def __init__(self, handle: _Handle, offset: int, length: int) -> None:
        self.handle, self.offset, self.length, self.place = handle, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.length}[whence]
        if start + offset < 0:
            raise OSError("a place before the beginning")
        self.place = start + offset
        return self.place

    def readinto(self, buffer: memoryview, /) -> int:  # pyright: ignore
        view = memoryview(buffer)
        wanted = max(0, min(len(view), self.length - self.place))
        data = os.pread(self.handle.number, wanted, self.offset + self.place) if wanted else b""
        view[: len(data)] = data
        self.place += len(data)
        return len(data)
